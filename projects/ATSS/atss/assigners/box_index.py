"""An index of predicted boxes: which of them can be similar to an object."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..anchors import Anchors
from ..geometry import centres
from ..structures import cached_property
from .similarities import Similarity

# Neighbouring anchors whose predicted boxes an object is compared with at once.
BLOCK = 16
# Relative error of a similarity in float32, several times over.
ROUNDING = 1e-3
# Error in pixels of a corner of an object, likewise.
SLACK = 1e-2
# Pixels from everything.
FAR = 1e9


@dataclass(frozen=True)
class BoxIndex:
    """Predicted boxes in blocks of BLOCK neighbouring anchors, with bounds of each block.

    All of it is float32, and finds a few pairs too many, never one too few.

    **Why a block outside the bounds holds no similar box.** A similarity promises
    (:meth:`Similarity.reach`) that the centres of two boxes of sides a and b that are as similar
    as ``least`` lie within s (a + b) / 2 + d of each other along an axis. So an object with centre
    m and half side h can only be similar to a predicted box with centre c and half side r if
    m - s h - d <= c + s r, and c - s r <= m + s h + d. For s <= 1, c + s r lies between the centre
    and the corner c + r, linearly in s; its maximum over a block is at most the same mean of the
    greatest centre and the greatest corner. For s > 1 it is at most the greatest corner and
    (s - 1) times the greatest half side more. The other end is alike.

    Args:
        anchors: R anchors.
        boxes: (N, R, 4) predicted.
        usable: (N, R) bool: finite boxes of anchors that may be chosen.
    """

    anchors: Anchors
    boxes: Tensor
    usable: Tensor

    @classmethod
    def of_anchors(cls, anchors: Anchors, usable: Tensor | None = None) -> "BoxIndex":
        """An index of the anchors themselves.

        Args:
            usable: (N, R) bool; None: all, of one image.
        """
        if usable is None:
            usable = torch.ones_like(anchors.stride, dtype=torch.bool)[None]
        return cls(anchors, anchors.boxes.expand(*usable.shape, 4), usable)

    def near(
        self,
        similarity: Similarity,
        objects: Tensor,
        image: Tensor,
        least: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Find the anchors whose predicted boxes are similar to objects.

        Args:
            similarity: of predicted boxes and objects.
            objects: (g, 4) float32 boxes.
            image: (g,) int64 into N.
            least: (g,) similarity, of which a few have less. None: any similarity, and also all
                anchors whose centres lie inside the object, and some more.
        Returns:
            (P,) int64 objects, into g, in rising order, and (P,) int64 anchors, in rising order of
            each object.
        """
        asked = torch.zeros_like(objects[:, 0]) if least is None else least.float() * (1 - ROUNDING)
        reach = similarity.reach(torch.where(asked < ROUNDING, 0, asked))
        which, block = self._touched(objects, image, reach, least is None).nonzero(as_tuple=True)
        index = block[:, None] * BLOCK + torch.arange(BLOCK, device=block.device)
        exists = index < len(self.anchors.boxes)
        if least is None:
            return which[:, None].expand_as(index)[exists], index[exists]
        blocks = self._blocks
        row = image[which] * blocks.shape[2] + block
        predicted = blocks.flatten(1, 2).index_select(1, row).movedim(0, -1)  # (M, BLOCK, 4)
        overlap = similarity(predicted, objects[which, None])
        chosen = exists & (overlap >= asked[which, None]) & (overlap > 0)
        return which[:, None].expand_as(index)[chosen], index[chosen]

    def _touched(
        self, objects: Tensor, image: Tensor, reach: tuple[Tensor, Tensor], inside: bool
    ) -> Tensor:
        """(g, B) bool: blocks that can hold a box within reach, as :meth:`Similarity.reach` returns
        it, or, if asked for, an anchor whose centre lies inside the object."""
        middle, half = centres(objects), (objects[:, 2:] - objects[:, :2]).clamp(min=0) / 2
        scale, distance = reach
        beyond_centre = scale * half + distance + 1e-6 * (middle.abs() + half) + SLACK
        low, low_centre, high, high_centre, longest = self._bounds.index_select(2, image)
        part, beyond = (x.T[..., None] for x in (scale.clamp(max=1), (scale - 1).clamp(min=0)))
        low = torch.lerp(low_centre, low, part) - beyond * longest
        high = torch.lerp(high_centre, high, part) + beyond * longest
        first, last = middle - beyond_centre, middle + beyond_centre
        touched = (low <= last.T[..., None]) & (high >= first.T[..., None])
        if inside:
            # Similar along one axis and inside along the other passes too: a few more.
            first, last = self._points
            high, low = (objects[:, 2:] + SLACK).T[..., None], (objects[:, :2] - SLACK).T[..., None]
            touched |= (first < high) & (last > low)
        return touched.all(dim=0)

    @cached_property
    def _blocks(self) -> Tensor:
        """(4, N, B, BLOCK) predicted boxes, in the anchors' order; boxes that are not usable are
        far away."""
        boxes = torch.where(self.usable[..., None], self.boxes.float(), FAR)
        boxes = nn.functional.pad(boxes, (0, 0, 0, -boxes.shape[1] % BLOCK), value=FAR)
        return boxes.unflatten(1, (-1, BLOCK)).movedim(-1, 0).contiguous()

    @cached_property
    def _bounds(self) -> Tensor:
        """(5, 2, N, B) of each block along x and y: least x1 and least centre, greatest x2 and
        greatest centre, greatest half side."""
        # The first axis is the cheapest to reduce on a CPU.
        low, high = self._blocks.movedim(-1, 0).contiguous().split(2, dim=1)
        middle, half = (low + high) / 2, (high - low).clamp(min=0) / 2
        missing = low == FAR
        least = (torch.minimum(low, middle).amin(dim=0), middle.amin(dim=0))
        high = torch.maximum(high, middle)
        most = (x.masked_fill(missing, -FAR).amax(dim=0) for x in (high, middle))
        return torch.stack([*least, *most, half.amax(dim=0)])

    @cached_property
    def _points(self) -> tuple[Tensor, Tensor]:
        """(2, 1, B) least and greatest x and y of the centres of each block."""
        points = self.anchors.points.float()
        points = torch.cat([points, points[-1:].expand(-len(points) % BLOCK, 2)])
        points = points.unflatten(0, (-1, BLOCK)).movedim(0, -1).contiguous()[..., None, :]
        return points.amin(dim=0), points.amax(dim=0)
