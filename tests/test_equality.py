import equality
import pytest
import rule_scenes
import torch

from atss.geometry import iou


@pytest.fixture(scope="module")
def found():
    return equality.call_rules("MaxIoU", len(rule_scenes.TRAITS))


def copied(found):
    """Twice, of one engine."""
    return [
        {"scenes": found["scenes"], "lists": {name: list(x) for name, x in found["lists"].items()}}
        for _ in range(2)
    ]


def test_scenes_of_rules_have_every_trait(found):
    assert {x for traits, *_ in found["scenes"] for x in traits.split(" + ")} == {
        *rule_scenes.TRAITS
    }
    assert not any(isinstance(x, str) for calls in found["lists"].values() for x in calls)
    assert len({inputs for _, inputs, _ in found["scenes"]}) == len(found["scenes"])
    assert equality.call_rules("none", 3)["scenes"][2][1] == found["scenes"][2][1]


def test_equal_rules_are_equal(found, capsys):
    assert equality.compare_rules(*copied(found)) == 0
    assert f"{len(rule_scenes.TRAITS)} scenes: 0 calls differ" in capsys.readouterr().out


def test_one_anchor_that_differs_is_found(found, capsys):
    old, new = copied(found)
    gt_index, score = new["lists"]["MaxIoU"][1]
    other = gt_index.clone()
    other[0, 5] += 1
    new["lists"]["MaxIoU"][1] = other, score
    assert equality.compare_rules(old, new) == 1
    assert "scene 1 (crowded): MaxIoU: 1 anchors, 0 scores" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("new", "wanted"),
    [
        ((torch.tensor([[0, 1, -1]]), torch.tensor([[0.5, 1.0, 0.0]])), (3, 0, 0, 0, 0.0, "")),
        ((torch.tensor([[2, 1, -1]]), torch.tensor([[0.5, 1.0, 0.0]])), (3, 1, 1, 0, 0.0, "")),
        ((torch.tensor([[1, 1, 0]]), torch.tensor([[0.5, 1.0, 0.0]])), (3, 2, 0, 0, 0.0, "")),
        ((torch.tensor([[0, 1, -1]]), torch.tensor([[0.5, 0.75, 0.0]])), (3, 0, 0, 1, 0.25, "")),
        ((torch.tensor([[0, 1, -1]]), None), (3, 0, 0, 3, torch.inf, "")),
        ("ValueError: x", (3, 3, 0, 0, 0.0, "ValueError: x")),
    ],
)
def test_differences_of_a_call(new, wanted):
    """Objects 0 and 2 are identical."""
    old = torch.tensor([[0, 1, -1]]), torch.tensor([[0.5, 1.0, 0.0]])
    assert equality.differences(old, new, torch.tensor([0, 1, 0])) == wanted


def sides(boxes):
    return boxes[..., 2:] - boxes[..., :2]


def best_overlaps(scene):
    overlap = iou(scene.gt.boxes[:, None].double(), scene.anchors.boxes.double())
    return overlap.amax(dim=1).tolist()


@pytest.fixture(scope="module")
def scenes():
    return [rule_scenes.make_scene(i) for i in range(4 * len(rule_scenes.TRAITS))]


# What most scenes of a trait have, and most others have not.
HAVE = {
    "crowded": lambda s: len(s.gt) > 20,
    "several images": lambda s: (s.gt.image_index.diff() < 0).any(),
    "empty images": lambda s: s.gt.num_images == 3 and len(s.gt.image_index.unique()) < 3,
    "empty batch": lambda s: len(s.gt) == 0,
    "tiny": lambda s: len(s.gt) and sides(s.gt.boxes).median() < 7,
    "beyond the canvas": lambda s: (s.gt.boxes < 0).any(),
    "without area": lambda s: (sides(s.gt.boxes) == 0).any(),
    "duplicates": lambda s: len(equality._alike(s.gt).unique()) < len(s.gt),
    "ties": lambda s: {0.5, 1.0} & set(best_overlaps(s)),
    "not finite": lambda s: not s.predictions.boxes.isfinite().all(),
    "far predictions": lambda s: (s.predictions.boxes.nan_to_num(0, 0, 0) > 1e4).any(),
    "constant predictions": lambda s: (s.predictions.boxes.diff(dim=1) == 0).float().mean() > 0.5,
    "probabilities": lambda s: s.predictions.output.probabilities,
    "nine anchors": lambda s: s.anchors.num_anchors == 9,
    "one level": lambda s: len(s.anchors.strides) == 1,
    "odd strides": lambda s: s.anchors.offset == 0,
    "large canvas": lambda s: len(s.anchors.boxes) / s.anchors.num_anchors > 1200,
}


@pytest.mark.parametrize("trait", rule_scenes.TRAITS[1:])
def test_traits_of_scenes_are_what_they_are_called(trait, scenes):
    shares = []
    for wanted in (True, False):
        some = [bool(HAVE[trait](s)) for s in scenes if (trait in s.traits) == wanted]
        shares.append(sum(some) / len(some))
    assert shares[0] >= 0.5, shares
    assert shares[1] < 0.5, shares
