"""An index of boxes, for the search of those that are similar to an object."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..anchors import Anchors
from ..caching import cached, cached_property
from ..geometry import centres
from .similarities import Similarity, max_distance

# Neighbouring anchors in a block.
BLOCK = 16
# Upper bound of a similarity's relative error in float32.
ROUNDING = 1e-3
# Upper bound of an object's rounding in float32, in pixels.
SLACK = 1e-2
# Coordinate of missing boxes, in pixels: far from all objects.
FAR = 1e9


@dataclass(frozen=True)
class BoxIndex:
    """Boxes in blocks of BLOCK neighbouring anchors, with bounds of each block. The arithmetic is
    float32, with margins, so the search returns a few pairs too many and never one too few.

    **Why a block outside the bounds contains no similar box.** By
    :meth:`Similarity.max_distance` the centres of two similar boxes of sides a and b are at most
    s (a + b) / 2 + d apart along an axis. So an object with centre m and half side h can only be
    similar to a box with centre c and half side r if m - s h - d <= c + s r and
    c - s r <= m + s h + d. For s <= 1, c + s r interpolates linearly between the centre and the
    corner c + r, so its maximum over a block is at most the same interpolation between the greatest
    centre and the greatest corner. For s > 1 it is at most the greatest corner plus (s - 1) times
    the greatest half side. The other end is symmetric.

    Args:
        anchors: R anchors.
        boxes: (N, R, 4) predicted.
        usable: (N, R) bool: finite boxes of eligible anchors.
    """

    anchors: Anchors
    boxes: Tensor
    usable: Tensor

    def near(
        self,
        similarity: Similarity,
        objects: Tensor,
        image: Tensor,
        least: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Find the anchors whose boxes are similar to objects.

        Args:
            similarity: of boxes and objects.
            objects: (g, 4) float32 boxes.
            image: (g,) int64 into N.
            least: (g,) least similarity, up to rounding. None: any above 0, all anchors whose
                centres lie inside the object, and a few more.

        Returns:
            (P,) int64 objects, into g, and (P,) int64 anchors, in rising order.
        """
        if least is None:
            minimum = torch.zeros_like(objects[:, 0])
        else:
            minimum = least.float() * (1 - ROUNDING)
        bound = max_distance(similarity, torch.where(minimum < ROUNDING, 0, minimum))
        row, block = self._touched(objects, image, bound, least is None).nonzero(as_tuple=True)
        index = block[:, None] * BLOCK + torch.arange(BLOCK, device=block.device)
        selected = index < len(self.anchors.boxes)
        if least is not None:
            blocks = self._blocks
            image_block = image[row] * blocks.shape[2] + block
            boxes = blocks.flatten(1, 2).index_select(1, image_block).movedim(0, -1)
            similarities = similarity(boxes, objects[row, None])  # (M, BLOCK)
            selected = selected & (similarities >= minimum[row, None]) & (similarities > 0)
        return row[:, None].expand_as(index)[selected], index[selected]

    def _touched(
        self, objects: Tensor, image: Tensor, bound: tuple[Tensor, Tensor], inside: bool
    ) -> Tensor:
        """Return (g, B) bool: blocks that can contain a box within the bound of
        :meth:`Similarity.max_distance`, or, on request, an anchor whose centre lies inside."""
        middle, half = centres(objects), (objects[:, 2:] - objects[:, :2]).clamp(min=0) / 2
        scale, distance = bound
        radius = scale * half + distance + 1e-6 * (middle.abs() + half) + SLACK
        low, low_centre, high, high_centre, half_side = self._bounds.index_select(2, image)
        part, excess = (x.T[..., None] for x in (scale.clamp(max=1), (scale - 1).clamp(min=0)))
        low = torch.lerp(low_centre, low, part) - excess * half_side
        high = torch.lerp(high_centre, high, part) + excess * half_side
        first, last = middle - radius, middle + radius
        touched = (low <= last.T[..., None]) & (high >= first.T[..., None])
        if inside:
            # This also accepts a block that is similar along one axis and inside along the other.
            first, last = self._point_bounds
            high, low = (objects[:, 2:] + SLACK).T[..., None], (objects[:, :2] - SLACK).T[..., None]
            touched |= (first < high) & (last > low)
        return touched.all(dim=0)

    @cached_property
    def _blocks(self) -> Tensor:
        """(4, N, B, BLOCK) boxes in the anchors' order; unusable ones at FAR."""
        boxes = torch.where(self.usable[..., None], self.boxes.float(), FAR)
        boxes = nn.functional.pad(boxes, (0, 0, 0, -boxes.shape[1] % BLOCK), value=FAR)
        return boxes.unflatten(1, (-1, BLOCK)).movedim(-1, 0).contiguous()

    @cached_property
    def _bounds(self) -> Tensor:
        """(5, 2, N, B) bounds of each block along x and y: least x1, least centre, greatest x2,
        greatest centre, greatest half side."""
        # Reductions over the first dimension are the fastest on a CPU.
        low, high = self._blocks.movedim(-1, 0).contiguous().split(2, dim=1)
        middle, half = (low + high) / 2, (high - low).clamp(min=0) / 2
        missing = low == FAR
        least = (torch.minimum(low, middle).amin(dim=0), middle.amin(dim=0))
        high = torch.maximum(high, middle)
        greatest = (x.masked_fill(missing, -FAR).amax(dim=0) for x in (high, middle))
        return torch.stack([*least, *greatest, half.amax(dim=0)])

    @cached_property
    def _point_bounds(self) -> tuple[Tensor, Tensor]:
        """(2, 1, B) least and greatest x and y of the anchors' centres in each block."""
        points = self.anchors.points.float()
        points = torch.cat([points, points[-1:].expand(-len(points) % BLOCK, 2)])
        points = points.unflatten(0, (-1, BLOCK)).movedim(0, -1).contiguous()[..., None, :]
        return points.amin(dim=0), points.amax(dim=0)


@cached
def index_anchors(anchors: Anchors) -> BoxIndex:
    """Index the anchors themselves, as boxes of one image."""
    usable = torch.ones_like(anchors.stride, dtype=torch.bool)
    return BoxIndex(anchors, anchors.boxes[None], usable[None])
