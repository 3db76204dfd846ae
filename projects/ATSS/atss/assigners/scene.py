"""A batch as rules see it that look at predictions: flat candidate pairs of objects and anchors.

What decides is computed in float64, so that it does not hang on rounding; float32 only tells which
pairs need not be looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..anchors import Anchors
from ..geometry import area, centres, nearest_side
from ..structures import GroundTruth, HeadOutput, Predictions
from .pairs import anchors_between
from .similarities import IOU, Similarity

# (probability, cross entropy, targets) -> elementwise, as of atss.losses.
ClassLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
# Pairs looked at together, at most: bounds memory.
PIECE = 1 << 20
# Neighbouring anchors whose predicted boxes are compared with an object as one.
BLOCK = 16
# By how much float32 may be wrong about a similarity, relatively; several times over.
ROUNDING = 1e-3
# And pixels that it may be wrong by where an anchor's box ends.
SLACK = 1e-2
# Pixels from everything.
FAR = 1e9


@dataclass(frozen=True)
class Scene:
    """A batch.

    Attributes:
        anchors: R anchors.
        gt: G objects of N images.
        predictions: of the images.
        similarity: of predicted boxes and objects.
        takes_part: (N * R,) bool: which anchors may be chosen; None for all.
    """

    anchors: Anchors
    gt: GroundTruth
    predictions: Predictions
    similarity: Similarity = IOU
    takes_part: Tensor | None = None
    _known: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        rule: object,
        anchors: Anchors,
        gt: GroundTruth,
        predictions: Predictions | None,
        similarity: Similarity,
    ) -> Scene:
        """What a rule is called with.

        Raises:
            ValueError: without predictions.
        """
        if predictions is None:
            raise ValueError(
                f"{type(rule).__name__} looks at what a model predicts, and there is none"
            )
        return cls(anchors, gt, predictions, similarity)

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What is computed when it is asked for first."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    @property
    def num_slots(self) -> int:
        """N * R."""
        return self.gt.num_images * len(self.anchors.boxes)

    @cached_property
    def objects(self) -> Tensor:
        """(G, 4) float64 boxes."""
        return self.gt.boxes.double()

    @cached_property
    def real(self) -> Tensor:
        """(G,) bool: objects with an area. No box code can describe the others to a head."""
        return area(self.objects) > 0

    def every(self) -> Tensor:
        """Int64 indices of all objects with an area."""
        return self.real.nonzero().squeeze(1)

    def pieces(self, some: Tensor, pairs_of_each: int) -> tuple[Tensor, ...]:
        """Some objects or anchors, so many at a time that their pairs are no more than PIECE."""
        return some.split(max(1, PIECE // max(pairs_of_each, 1)))

    # --------------------------------------------------------------------------------------------
    # Candidates: pairs of (g,) objects
    # --------------------------------------------------------------------------------------------

    def pairs(self, owner: Tensor, index: Tensor) -> Pairs:
        """Pairs of (P,) objects and (P,) anchors, as far as these take part."""
        pairs = Pairs(self, owner, index)
        return pairs if self.takes_part is None else pairs.at(self.takes_part[pairs.slot])

    def all_pairs(self, objects: Tensor) -> Pairs:
        """With every anchor."""
        index = torch.arange(len(self.anchors.boxes), device=objects.device)
        return self.pairs(objects.repeat_interleave(len(index)), index.repeat(len(objects)))

    def between(self, objects: Tensor, low: Tensor, high: Tensor) -> Pairs:
        """With the anchors whose centres lie in a rectangle of its own on each level, from
        (g, L, 2) to (g, L, 2), and a few more."""
        nothing = objects[:0], objects[:0]
        found = [nothing, *anchors_between(self.anchors, low, high)]
        owner, index = (torch.cat(x) for x in zip(*found, strict=True))
        return self.pairs(objects[owner], index)

    def around(self, objects: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        """(g, L, 2) corners of squares around their centres, of a half side in strides."""
        middle = centres(self.objects[objects])[:, None]
        reach = radius * self.anchors.lattice[:, :1]
        return middle - reach, middle + reach

    def most_similar(self, objects: Tensor, k: int) -> Pairs:
        """With the k whose predicted boxes are most similar, as far as there are, and a few more.
        Those at the objects' centres tell what the others have to be like."""
        some = self.central(objects)
        return self.near(objects, some.kth_highest(some.overlap, k)[objects])

    def central(self, objects: Tensor) -> Pairs:
        """With the anchors of some 9 locations of each level around their centres."""
        return self.between(objects, *self.around(objects, 1.5))

    def near(self, objects: Tensor, least: Tensor | None = None) -> Pairs:
        """With the anchors whose predicted boxes are similar.

        Args:
            least: (g,) by how much; a few may be less so. None: at all, together with the anchors
                whose centres lie inside the object, and some more.
        """
        boxes = self.gt.boxes[objects]
        asked = torch.zeros_like(boxes[:, 0]) if least is None else least.float() * (1 - ROUNDING)
        which, block = self._touched(objects, asked, least is None).nonzero(as_tuple=True)
        blocks = self._blocks
        row = self.gt.image_index[objects[which]] * blocks.shape[2] + block
        predicted = blocks.flatten(1, 2).index_select(1, row).movedim(0, -1)  # (M, BLOCK, 4)
        overlap = self.similarity(predicted, boxes[which, None])
        chosen = torch.ones_like(overlap, dtype=torch.bool)
        if least is not None:
            chosen = (overlap >= asked[which, None]) & (overlap > 0)
        row, column = chosen.nonzero(as_tuple=True)
        owner, index = objects[which[row]], block[row] * BLOCK + column
        there = index < len(self.anchors.boxes)
        return self.pairs(owner[there], index[there])

    def _touched(self, objects: Tensor, least: Tensor, inside: bool) -> Tensor:
        """(g, B) bool: which blocks can hold an anchor whose predicted box is as similar as (g,),
        or whose centre lies inside the object, if that is asked for."""
        boxes, image = self.gt.boxes[objects], self.gt.image_index[objects]
        middle, half = centres(boxes), (boxes[:, 2:] - boxes[:, :2]).clamp(min=0) / 2
        scale, distance = self.similarity.reach(torch.where(least < ROUNDING, 0, least))
        # By how much an object reaches beyond its centre, and how far scaled boxes of a block do:
        # less than whole boxes and more than their centres, or more than these by the longest.
        reach = scale * half + distance + 1e-6 * (middle.abs() + half) + SLACK
        low, low_centre, high, high_centre, longest = self._bounds.index_select(2, image)
        part, beyond = (x.T[..., None] for x in (scale.clamp(max=1), (scale - 1).clamp(min=0)))
        low = torch.lerp(low_centre, low, part) - beyond * longest
        high = torch.lerp(high_centre, high, part) + beyond * longest
        touched = (low <= (middle + reach).T[..., None]) & (high >= (middle - reach).T[..., None])
        if inside:
            # Axis by axis either will do, which lets in a few more.
            first, last = self._points
            high, low = (boxes[:, 2:] + SLACK).T[..., None], (boxes[:, :2] - SLACK).T[..., None]
            touched |= (first < high) & (last > low)
        return touched.all(dim=0)

    @cached_property
    def _blocks(self) -> Tensor:
        """(4, N, B, BLOCK) predicted boxes, in the anchors' order; what takes no part, or is not
        finite, is far away."""
        boxes = self.predictions.boxes.float()
        there = boxes.isfinite().all(dim=-1)
        if self.takes_part is not None:
            there = there & self.takes_part.view_as(there)
        boxes = torch.where(there[..., None], boxes, FAR)
        boxes = nn.functional.pad(boxes, (0, 0, 0, -boxes.shape[1] % BLOCK), value=FAR)
        return boxes.unflatten(1, (-1, BLOCK)).movedim(-1, 0).contiguous()

    @cached_property
    def _bounds(self) -> Tensor:
        """(5, 2, N, B) of each block along x and y: least x1 and least centre, greatest x2 and
        greatest centre, greatest half side."""
        low, high = self._blocks[:2], self._blocks[2:]
        middle, half = (low + high) / 2, (high - low).clamp(min=0) / 2
        there = low < FAR
        least = (torch.minimum(low, middle).amin(dim=-1), middle.amin(dim=-1))
        high = torch.maximum(high, middle)
        most = (torch.where(there, x, -FAR).amax(dim=-1) for x in (high, middle))
        return torch.stack([*least, *most, half.amax(dim=-1)])

    @cached_property
    def _points(self) -> tuple[Tensor, Tensor]:
        """(2, 1, B) least and greatest x and y of the centres of each block."""
        points = self.anchors.points.float()
        points = torch.cat([points, points[-1:].expand(-len(points) % BLOCK, 2)])
        points = points.unflatten(0, (-1, BLOCK)).movedim(-1, 0)[:, None]
        return points.amin(dim=-1), points.amax(dim=-1)

    def all_objects(self, slots: Tensor) -> Pairs:
        """Pairs of (s,) anchors among the N * R with every object of their images."""
        per_image = len(self.anchors.boxes)
        image = slots.div(per_image, rounding_mode="floor")
        theirs = (image[:, None] == self.gt.image_index) & self.real
        which, owner = theirs.nonzero(as_tuple=True)
        return Pairs(self, owner, slots[which] % per_image)

    # --------------------------------------------------------------------------------------------
    # Classes
    # --------------------------------------------------------------------------------------------

    @cached_property
    def classes(self) -> Tensor:
        """(N * R, K) predicted: logits, or probabilities."""
        classes = self.predictions.output.classes
        if classes is None:
            raise ValueError("a rule looks at the classes of an output that has none")
        return classes.flatten(0, 1)

    def class_loss(self, loss: ClassLoss, classes: Tensor, targets: Tensor) -> Tensor:
        """A class loss of some predicted classes, elementwise, in float64."""
        seen = HeadOutput(classes.double(), targets, None, self.predictions.output.probabilities)
        return loss(seen.probability(), seen.cross_entropy(targets), targets)

    def without_object(self, loss: ClassLoss, slots: Tensor) -> Tensor:
        """(P,) what a class loss costs (P,) anchors among the N * R that have no object."""
        known = self.once(loss, lambda: self.objects.new_full((self.num_slots,), torch.nan))
        asked = torch.zeros_like(known, dtype=torch.bool)
        asked[slots] = True
        for new in self.pieces((asked & known.isnan()).nonzero().squeeze(1), self.classes.shape[1]):
            classes = self.classes[new]
            zero = self.objects.new_zeros(()).expand_as(classes)
            known[new] = self.class_loss(loss, classes, zero).sum(dim=1)
        return known[slots]


@dataclass(frozen=True)
class Pairs:
    """Candidate pairs of objects and anchors, in rising order of objects and, of each, of anchors.

    Attributes:
        scene: where they are.
        owner: (P,) int64 into G.
        index: (P,) int64 into R.
    """

    scene: Scene
    owner: Tensor
    index: Tensor

    def at(self, chosen: Tensor) -> Pairs:
        """Some of them."""
        return replace(self, owner=self.owner[chosen], index=self.index[chosen])

    @cached_property
    def slot(self) -> Tensor:
        """(P,) int64: the anchor of the image, among the N * R."""
        return self.scene.gt.image_index[self.owner] * len(self.scene.anchors.boxes) + self.index

    @cached_property
    def objects(self) -> Tensor:
        """(P, 4) float64 boxes of the objects."""
        return self.scene.objects[self.owner]

    @cached_property
    def boxes(self) -> Tensor:
        """(P, 4) float64 predicted boxes."""
        return self.scene.predictions.boxes.flatten(0, 1)[self.slot].double()

    @cached_property
    def points(self) -> Tensor:
        """(P, 2) float64 centres of the anchors."""
        return self.scene.anchors.points[self.index]

    @cached_property
    def strides(self) -> Tensor:
        """(P,) float64, of the anchors' levels."""
        return self.scene.anchors.stride[self.index].double()

    @cached_property
    def overlap(self) -> Tensor:
        """(P,) float64 similarity of predicted boxes and objects; 0 of what is not finite."""
        return self.scene.similarity(self.boxes, self.objects).nan_to_num(0)

    @cached_property
    def classes(self) -> Tensor:
        """(P,) what is predicted for the class of the object: logits, or probabilities."""
        return self.scene.classes[self.slot, self.scene.gt.classes[self.owner]]

    @cached_property
    def probability(self) -> Tensor:
        """(P,) float64 probability that is predicted for the class of the object; 0 for NaN."""
        known = self.classes.double()
        known = known if self.scene.predictions.output.probabilities else known.sigmoid()
        return known.nan_to_num(0)

    def kth_highest(self, values: Tensor, k: int) -> Tensor:
        """(G,) of the (P,) values of each object; 0 where it has fewer."""
        segments = Segments(self.owner)
        found = values.new_zeros(len(self.scene.gt))
        table = segments.table(values, 0)
        if table.shape[1] >= k:
            found[segments.ids] = table.topk(k).values[:, -1]
        return found

    def inside(self, margin: float = 0.0) -> Tensor:
        """(P,) bool: the anchor's centre lies in the object, by more than so many pixels."""
        return nearest_side(self.points, self.objects) > margin

    def around(self, radius: float) -> Tensor:
        """(P,) bool: the anchor's centre lies less than so many strides from the object's, along
        both axes."""
        apart = (self.points - centres(self.objects)).abs().amax(dim=-1)
        return apart < radius * self.strides


def alignment(pairs: Pairs, alpha: float, beta: float) -> Tensor:
    """(P,) p^alpha * IoU^beta of what is predicted for the object (TOOD, arXiv 2108.07755, section
    3.2), with the rule's similarity for the IoU."""
    return pairs.probability**alpha * pairs.overlap**beta


class Segments:
    """Values of flat pairs, to be put side by side by segment.

    Args:
        segment: (P,) int64, equal ones beside each other.

    Attributes:
        ids: (S,) the segments, in their order.
        count: (S,) of how many values each is.
        row, column: (P,) where each value stands in the table.
    """

    def __init__(self, segment: Tensor):
        self.ids, self.row, self.count = torch.unique_consecutive(
            segment, return_inverse=True, return_counts=True
        )
        start = self.count.cumsum(0) - self.count
        self.column = torch.arange(len(segment), device=segment.device) - start[self.row]

    def table(self, values: Tensor, fill: float) -> Tensor:
        """(S, M) the (P,) values of each segment, then ``fill``."""
        width = int(self.count.max()) if len(self.count) else 0
        table = values.new_full((len(self.count), width), fill)
        table[self.row, self.column] = values
        return table
