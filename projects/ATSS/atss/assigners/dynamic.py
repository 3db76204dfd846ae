"""The rules after ATSS that look at predictions: what a pair costs, and what is put together."""

import math

import torch
from torch import Tensor

from ..geometry import centres
from ..losses import Focal, QualityFocal, cross_entropy, giou_loss
from ..parts import one_of, within
from .cuts import Cheapest, DynamicK, OneEach, Transport, TwoGaussians
from .matching import Matching, class_cost, overlap
from .max_iou import MaxIoU
from .pairs import INSIDE_MARGIN, covered
from .scene import Pairs, Scene, alignment
from .similarities import IOU, Similarity

FOCAL, QUALITY_FOCAL = Focal(), QualityFocal()
# Keeps the logarithm of an overlap finite, as in the references.
EPS = 1e-7


class TAL(Matching):
    """Task alignment learning (TOOD, arXiv 2108.07755, section 3.2): an object has the anchors
    that say its class and its box best, both at once.

    Its ``top_k`` of the highest p^alpha * IoU^beta over all levels, as far as their centres lie
    inside it; several objects: the one with the highest IoU. Score: that metric, scaled so that the
    best anchor of an object has the highest IoU that any of its anchors has.

    Args:
        top_k: of each object.
        alpha, beta: powers of the class probability and of the IoU of the predicted box.
        inside: when anchors outside the object are left out: "after" its top k are taken (mmdet),
            or "before" (PP-YOLOE, YOLOv8).
        similarity: of predicted boxes and objects, in place of the IoU.
    """

    def __init__(
        self,
        top_k: int = 13,
        alpha: float = 1.0,
        beta: float = 6.0,
        inside: str = "after",
        similarity: Similarity = IOU,
    ):
        within("top_k", top_k, 1)
        within("alpha", alpha, 0)
        within("beta", beta, 0.1)  # pairs that do not overlap are nobody's
        one_of("inside", inside, ("after", "before"))
        self.alpha, self.beta, self.inside = alpha, beta, inside
        self.top = Cheapest(top_k)
        super().__init__(
            candidates=self._candidates,
            cost=self._misaligned,
            cut=self._cut,
            rank=overlap,
            score=self._aligned,
            similarity=similarity,
        )

    def _candidates(self, scene: Scene, objects: Tensor) -> Pairs:
        """Those that overlap enough to be among the top k: to be ahead of the k-th of some pairs,
        one must overlap as much as would do with a probability of 1."""
        some = scene.central(objects)
        if self.inside == "before":
            some = some.at(some.inside(INSIDE_MARGIN))
        last = some.kth_highest(alignment(some, self.alpha, self.beta), self.top.k)[objects]
        return scene.near(objects, last ** (1 / self.beta))

    def _misaligned(self, pairs: Pairs) -> Tensor:
        metric = alignment(pairs, self.alpha, self.beta)
        return torch.where(metric > 0, -metric, torch.inf)

    def _cut(self, pairs: Pairs, cost: Tensor) -> Tensor:
        within_object = pairs.inside(INSIDE_MARGIN)
        if self.inside == "before":
            cost = torch.where(within_object, cost, torch.inf)
        return self.top(pairs, cost) & within_object

    def _aligned(self, pairs: Pairs) -> Tensor:
        metric = alignment(pairs, self.alpha, self.beta)
        highest, best = (
            torch.zeros_like(pairs.scene.objects[:, 0]).scatter_reduce(0, pairs.owner, x, "amax")
            for x in (metric, pairs.overlap)
        )
        return metric / (highest[pairs.owner] + EPS) * best[pairs.owner]


class SimOTA(Matching):
    """OTA without its transport (YOLOX, arXiv 2107.08430): each object takes its cheapest anchors,
    as many as its best predicted boxes overlap it, added up.

    A pair costs the cross entropy of its classes, and ``iou_weight`` times -ln IoU. Anchors inside
    any object or near its centre take part; to one that is not both of an object it prefers any
    that is. An anchor goes to the object to which it is cheapest. Score: the IoU.

    Args:
        top_k: overlaps that are added.
        radius: how near to a centre, in strides along both axes.
        cls_weight, iou_weight: of the two costs.
        similarity: of predicted boxes and objects, in place of the IoU.
    """

    # For anchors not inside an object, or not near its centre.
    PENALTY = 1e5

    def __init__(
        self,
        top_k: int = 10,
        radius: float = 2.5,
        cls_weight: float = 1.0,
        iou_weight: float = 3.0,
        similarity: Similarity = IOU,
    ):
        within("top_k", top_k, 1)
        within("radius", radius, 0)
        within("cls_weight", cls_weight, 0)
        within("iou_weight", iou_weight, 0)
        self.radius, self.cls_weight, self.iou_weight = radius, cls_weight, iou_weight
        super().__init__(
            takes_part=self._near_any,
            candidates=self._own_ones,
            farther=[
                (self.PENALTY - iou_weight * math.log1p(EPS), Scene.near),
                (self.PENALTY - iou_weight * math.log(EPS), Scene.all_pairs),
            ],
            cost=self._cost,
            cut=DynamicK(top_k),
            score=overlap,
            similarity=similarity,
        )

    def _near_any(self, scene: Scene) -> Tensor:
        return _covered(scene, torch.cat(scene.around(scene.every(), self.radius), dim=-1))

    def _own_ones(self, scene: Scene, objects: Tensor) -> Pairs:
        return scene.between(objects, *_of_object(scene, objects, self.radius))

    def _cost(self, pairs: Pairs) -> Tensor:
        right = pairs.inside() & pairs.around(self.radius)
        classes = class_cost(pairs, cross_entropy, torch.ones_like(pairs.overlap))
        boxes = -(pairs.overlap + EPS).log()
        return self.cls_weight * classes + self.iou_weight * boxes + self.PENALTY * ~right


class SoftLabel(Matching):
    """RTMDet's rule (arXiv 2212.07784, section 3.3): SimOTA with costs that are soft.

    A pair costs the quality focal loss of its classes with the IoU as target, ``iou_weight`` times
    -ln IoU, and 10^(d - radius), d strides from the object's centre. Anchors inside any object take
    part. Score: the IoU.

    Args:
        top_k: overlaps that are added.
        radius: of a centre, in strides, where distance begins to matter.
        iou_weight: of -ln IoU.
        similarity: of predicted boxes and objects, in place of the IoU.
    """

    # Strides beyond the radius in which candidates are sought first.
    WIDER = 0.75
    # Of a power of ten: one of more is of no use, and soon too large for a number.
    MOST_STRIDES = 100.0

    def __init__(
        self,
        top_k: int = 13,
        radius: float = 3.0,
        iou_weight: float = 3.0,
        similarity: Similarity = IOU,
    ):
        within("top_k", top_k, 1)
        within("radius", radius, 0)
        within("iou_weight", iou_weight, 0)
        self.radius, self.iou_weight = radius, iou_weight
        super().__init__(
            takes_part=self._inside_any,
            candidates=self._central_ones,
            # Of the two costs that grow, one or the other.
            farther=[
                (10**self.WIDER - iou_weight * math.log1p(EPS), Scene.near),
                (-iou_weight * math.log(EPS), Scene.all_pairs),
            ],
            cost=self._cost,
            cut=DynamicK(top_k),
            score=overlap,
            similarity=similarity,
        )

    def _inside_any(self, scene: Scene) -> Tensor:
        return _covered(scene)

    def _central_ones(self, scene: Scene, objects: Tensor) -> Pairs:
        return scene.between(objects, *scene.around(objects, self.radius + self.WIDER))

    def _cost(self, pairs: Pairs) -> Tensor:
        distance = (pairs.points - centres(pairs.objects)).norm(dim=-1) / pairs.strides
        far = 10 ** (distance - self.radius).clamp(max=self.MOST_STRIDES)
        classes = class_cost(pairs, QUALITY_FOCAL, pairs.overlap)
        return classes - self.iou_weight * (pairs.overlap + EPS).log() + far


class OTA(Matching):
    """Optimal transport assignment (arXiv 2103.14259): the plan that serves all objects of an image
    and the background at the least cost.

    A pair costs the focal loss of its classes and ``iou_weight`` times -ln IoU; its anchor lies
    inside the object and near its centre. An object without such an anchor gets nothing: in the
    authors' code all are open to it at a cost of 1e6 each, next to which float32 hardly tells one
    from another. Score: the IoU.

    Args:
        top_k: overlaps that are added for how many anchors an object has to give away.
        radius: how near to the centre, in strides along both axes.
        iou_weight: of -ln IoU.
        regularisation, iterations: of Sinkhorn's algorithm.
        similarity: of predicted boxes and objects, in place of the IoU.
    """

    # Least IoU of which the logarithm is taken, as in the authors' code.
    LEAST_IOU = torch.finfo(torch.float32).eps

    def __init__(
        self,
        top_k: int = 20,
        radius: float = 2.5,
        iou_weight: float = 1.5,
        regularisation: float = 0.1,
        iterations: int = 50,
        similarity: Similarity = IOU,
    ):
        within("top_k", top_k, 1)
        within("radius", radius, 1e-6)
        within("iou_weight", iou_weight, 0)
        within("regularisation", regularisation, 1e-3)
        within("iterations", iterations, 1)
        self.radius, self.iou_weight = radius, iou_weight
        self.transport = Transport(DynamicK(top_k), regularisation, iterations)
        super().__init__(
            candidates=self._candidates,
            cost=self._cost,
            cut=self._cut,
            score=overlap,
            together=True,
            similarity=similarity,
        )

    def _candidates(self, scene: Scene, objects: Tensor) -> Pairs:
        return _central(scene, objects, self.radius, INSIDE_MARGIN)

    def _cost(self, pairs: Pairs) -> Tensor:
        classes = class_cost(pairs, FOCAL, torch.ones_like(pairs.overlap))
        return classes - self.iou_weight * pairs.overlap.clamp(min=self.LEAST_IOU).log()

    def _cut(self, pairs: Pairs, cost: Tensor) -> Tensor:
        chosen = cost < torch.inf
        finite = pairs.at(chosen)
        background = finite.scene.without_object(FOCAL, finite.slot)
        chosen[chosen.clone()] = self.transport(finite, cost[chosen], background)
        return chosen


class POTO(Matching):
    """One anchor for each object, so that detection needs no suppression (arXiv 2012.03544): of all
    ways to give each an anchor of its own, the one in which what is predicted there says most of
    them, p^(1 - alpha) * IoU^alpha added up.

    An object's anchor lies inside it and near its centre. An object that finds none free gets
    nothing; in the authors' code it gets one elsewhere, whose box then has sides of negative
    length. The host waits for the matching. Score: the IoU.

    Args:
        alpha: what the IoU counts against the class probability.
        radius: how near to the centre, in strides along both axes; a large one is the whole object.
        similarity: of predicted boxes and objects, in place of the IoU.
    """

    # What it says of an object to have no anchor, in the authors' code.
    NONE = -1.0

    def __init__(self, alpha: float = 0.8, radius: float = 1.5, similarity: Similarity = IOU):
        within("alpha", alpha, 0, 1)
        within("radius", radius, 1e-6)
        self.alpha, self.radius = alpha, radius
        super().__init__(
            candidates=self._candidates,
            cost=self._cost,
            cut=OneEach(-self.NONE),
            score=overlap,
            together=True,
            similarity=similarity,
        )

    def _candidates(self, scene: Scene, objects: Tensor) -> Pairs:
        return _central(scene, objects, self.radius)

    def _cost(self, pairs: Pairs) -> Tensor:
        return -alignment(pairs, 1 - self.alpha, self.alpha)


class PAA(Matching):
    """Probabilistic anchor assignment (arXiv 2007.08103): of the anchors that overlap an object,
    those that a mixture of two Gaussians over their losses finds good.

    Each anchor is a candidate of the object that it overlaps most, if by ``iou_threshold``, or else
    of an object that has none better. A pair costs its focal and GIoU loss now.

    Args:
        top_k: cheapest of each level, over which the mixture is fitted.
        iou_threshold: from which on an anchor is a candidate.
        box_weight: of the GIoU loss, 1.3 in mmdet and 1 in the authors' code.
        take: see :class:`~atss.assigners.cuts.TwoGaussians`.
        claims_go_to: see :class:`~atss.assigners.MaxIoU`; "best" in the authors' code.
        similarity: of anchors and objects, in place of the IoU.
    """

    def __init__(
        self,
        top_k: int = 9,
        iou_threshold: float = 0.1,
        box_weight: float = 1.3,
        take: str = "component",
        claims_go_to: str = "claimant",
        similarity: Similarity = IOU,
    ):
        within("top_k", top_k, 1)
        within("iou_threshold", iou_threshold, 1e-6, 1)
        within("box_weight", box_weight, 0)
        one_of("take", take, ("component", "all"))
        self.box_weight = box_weight
        self.first = MaxIoU(
            iou_threshold, iou_threshold, claims_go_to=claims_go_to, similarity=similarity
        )
        super().__init__(
            candidates=self._candidates,
            cost=self._cost,
            cut=TwoGaussians(top_k, take),
            together=True,
        )

    def _candidates(self, scene: Scene, objects: Tensor) -> Pairs:
        gt_index = self.first(scene.anchors, scene.gt).gt_index
        image, index = (gt_index >= 0).nonzero(as_tuple=True)
        owner = gt_index[image, index]
        order = owner.sort(stable=True).indices
        return scene.pairs(owner[order], index[order])

    def _cost(self, pairs: Pairs) -> Tensor:
        classes = class_cost(pairs, FOCAL, torch.ones_like(pairs.boxes[:, 0]))
        return classes + self.box_weight * giou_loss(pairs.boxes, pairs.objects)


def _covered(scene: Scene, *more: Tensor) -> Tensor:
    """(N * R,) bool: anchors inside any object, or any of more rectangles, (G, L, 4) each."""
    every = scene.every()
    boxes = scene.objects[every, None].expand(-1, len(scene.anchors.strides), -1)
    image = scene.gt.image_index[every].repeat(1 + len(more))
    return covered(scene.anchors, scene.gt.num_images, image, torch.cat([boxes, *more]))


def _of_object(scene: Scene, objects: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """(g, L, 2) corners of what an object and a square around its centre have in common."""
    low, high = scene.around(objects, radius)
    boxes = scene.objects[objects, None]
    return torch.maximum(boxes[..., :2], low), torch.minimum(boxes[..., 2:], high)


def _central(scene: Scene, objects: Tensor, radius: float, margin: float = 0.0) -> Pairs:
    """Pairs of (g,) objects with the anchors inside them, by more than a margin in pixels, and near
    their centres."""
    pairs = scene.between(objects, *_of_object(scene, objects, radius))
    return pairs.at(pairs.inside(margin) & pairs.around(radius))
