import pytest
import torch

from atss import Anchors
from atss.assigners.locations import anchors_between


@pytest.mark.parametrize("piece", [1 << 18, 7])
def test_rectangles_include_edges_and_one_location_beyond(piece):
    """Edges on multiples of 4 px, on which half of the centres lie; some rectangles are empty,
    beyond the canvas or around it. Every location is listed once, objects in rising order."""
    anchors = Anchors.grid((56, 88), strides=(8, 16), scales=(1.0,))
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.randint(-5, 28, (2, 60, 2, 2), generator=generator) * 4).double()
    low[:5], high[:5] = -100.0, 200.0
    pairs = [torch.stack(x) for x in anchors_between(anchors, low, high, piece)]
    assert all(x.shape[1] <= piece for x in pairs)
    owner, location = torch.cat(pairs, dim=1)
    assert (owner.diff() >= 0).all()
    count = torch.zeros(60, len(anchors.boxes), dtype=torch.long)
    count.index_put_((owner, location), torch.ones_like(owner), accumulate=True)
    assert count.max() == 1
    level = torch.tensor([0, 1]).repeat_interleave(torch.tensor(anchors.per_level))
    step = anchors.stride[:, None]
    points, low, high = anchors.points, low[:, level], high[:, level]
    inside = ((points >= low) & (points <= high)).all(dim=-1)
    near = ((points > low - step) & (points < high + step)).all(dim=-1)
    assert (count[inside] == 1).all()
    assert (count[~near] == 0).all()
    assert inside[5:].sum() > 300
