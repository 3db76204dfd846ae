"""Multi-scale testing as published: 26 views of an image, filtered by size, merged by voting."""

from collections.abc import Callable, Sequence

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from .config_checks import lookup
from .geometry import area, iou
from .postprocess import nms_per_class

# (boxes (M, 4), scores (M,), classes (M,)) -> the same of what is left, best first.
Detections = tuple[Tensor, Tensor, Tensor]


def merge_nms(boxes: Tensor, scores: Tensor, classes: Tensor, nms_thresh: float) -> Detections:
    """Plain suppression of each class."""
    keep = nms_per_class(boxes, scores, classes, nms_thresh)
    return boxes[keep], scores[keep], classes[keep]


def merge_vote(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    vote_thresh: float,
    soft_min_score: float | None = None,
) -> Detections:
    """Groups of overlapping boxes of a class become their mean, weighted by score, with the group's
    highest score (box voting, arXiv 1505.01749, section 5).

    Args:
        boxes, scores, classes: (M, 4), (M,), (M,).
        vote_thresh: a group is the best box that is left and all that overlap it so much.
        soft_min_score: the members of a group stay too, their scores lowered by their overlap with
            its best (soft suppression, arXiv 1704.04503), where this much is left; None for not.
    """
    kept: list[Detections] = []
    for k in classes.unique():
        of_class = (classes == k).nonzero().squeeze(1)
        order = of_class[scores[of_class].argsort(descending=True, stable=True)]
        left, left_scores = boxes[order], scores[order]
        if len(left) == 1:
            kept.append((left, left_scores, classes[order]))
            continue
        while len(left):
            overlap = iou(left[0], left)
            # The best is of its group, even where it has no area.
            group = (overlap >= vote_thresh).index_fill(
                0, left.new_zeros(1, dtype=torch.long), True
            )
            members, weights = left[group], left_scores[group]
            shares = weights if weights.any() else torch.ones_like(weights)
            merged = (members * shares[:, None]).sum(dim=0) / shares.sum()
            found, found_scores = merged[None], weights[:1]
            if len(members) == 1:
                found = members
            elif soft_min_score is not None:
                lowered = weights * (1 - overlap[group])
                stay = lowered >= soft_min_score
                found = torch.cat([found, members[stay]])
                found_scores = torch.cat([found_scores, lowered[stay]])
            kept.append((found, found_scores, k.expand(len(found))))
            left, left_scores = left[~group], left_scores[~group]
    if not kept:
        return boxes, scores, classes
    merged, merged_scores, merged_classes = (torch.cat(x) for x in zip(*kept, strict=True))
    order = merged_scores.argsort(descending=True, stable=True)
    return merged[order], merged_scores[order], merged_classes[order]


class ATSSWithTTA(nn.Module):
    """A detector that looks at several resized and mirrored views of each image.

    Each view goes through the whole detector by itself, its own suppression included, so that
    memory is that of the largest view. Of a view only boxes within its range of sizes count, small
    ones on large views and the reverse.

    Args:
        model: in evaluation mode.
        plain: (short side, longest side) of the view that everything counts of.
        sizes: (short side, longest side, least and greatest size) of the others: only boxes whose
            area lies between the squares of the latter two, in pixels of the view, count.
        flip: whether each view is mirrored too.
        merge: boxes, scores, classes -> the same, merged.
        max_detections: kept per image.
        input_format: of the model, "BGR" or "RGB".
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        plain: tuple[int, int],
        sizes: Sequence[tuple[int, int, float, float]],
        flip: bool,
        merge: Callable[[Tensor, Tensor, Tensor], Detections],
        max_detections: int,
        input_format: str,
    ):
        super().__init__()
        self.model = model
        self.views = [(*plain, 0.0, float("inf")), *sizes]
        self.flips = (False, True) if flip else (False,)
        self.merge = merge
        self.max_detections = max_detections
        self.input_format = input_format

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Detectron2's model format. An image is read from its "file_name", or else taken as it is;
        detections are in the frame of "height" and "width", or of the image."""
        return [{"instances": self._one(example)} for example in batched_inputs]

    def _one(self, example: dict) -> Instances:
        if "file_name" in example:
            image = read_image(example["file_name"], self.input_format)
        else:
            image = example["image"].permute(1, 2, 0).cpu().numpy()
        views = [self._view(image, *view, flip) for view in self.views for flip in self.flips]
        boxes, scores, classes = self.merge(*(torch.cat(x) for x in zip(*views, strict=True)))
        height, width = image.shape[:2]
        merged = Instances(
            (height, width),
            pred_boxes=Boxes(boxes[: self.max_detections]),
            scores=scores[: self.max_detections],
            pred_classes=classes[: self.max_detections],
        )
        return detector_postprocess(
            merged, example.get("height", height), example.get("width", width)
        )

    def _view(
        self, image: np.ndarray, short: int, longest: int, least: float, greatest: float, flip: bool
    ) -> Detections:
        """What the model finds on one view, in pixels of the image."""
        resize = T.ResizeShortestEdge([short, short], longest).get_transform(image)
        view = resize.apply_image(image)
        if flip:
            view = view[:, ::-1]
        (height, width), (view_height, view_width) = image.shape[:2], view.shape[:2]
        tensor = torch.as_tensor(np.ascontiguousarray(view.transpose(2, 0, 1)))
        found = self.model([{"image": tensor, "height": height, "width": width}])[0]["instances"]
        boxes = found.pred_boxes.tensor
        size = area(boxes) * (view_height / height) * (view_width / width)
        counts = (size > least**2) & (size < greatest**2)
        boxes = boxes[counts]
        if flip:
            x1, y1, x2, y2 = boxes.unbind(1)
            boxes = torch.stack([width - x2, y1, width - x1, y2], dim=1)
        return boxes, found.scores[counts], found.pred_classes[counts]


def build_tta(cfg: CfgNode, model: nn.Module) -> ATSSWithTTA:
    """What TEST.AUG and MODEL.ATSS.TTA say.

    Raises:
        ValueError: where the ranges are not as many as the sizes, or the merge is unknown.
    """
    node, aug = cfg.MODEL.ATSS.TTA, cfg.TEST.AUG
    if len(node.SIZE_RANGES) != len(aug.MIN_SIZES):
        raise ValueError(
            f"MODEL.ATSS.TTA.SIZE_RANGES has {len(node.SIZE_RANGES)} ranges for the "
            f"{len(aug.MIN_SIZES)} sizes of TEST.AUG.MIN_SIZES"
        )
    merges = {
        "soft_vote": lambda *x: merge_vote(*x, node.VOTE_THRESH, node.SOFT_MIN_SCORE),
        "vote": lambda *x: merge_vote(*x, node.VOTE_THRESH),
        "nms": lambda *x: merge_nms(*x, cfg.MODEL.ATSS.NMS_THRESH_TEST),
    }
    merge = lookup(merges, node.MERGE, "MODEL.ATSS.TTA.MERGE")
    plain = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    sizes = [
        # Views smaller than the plain one have its cap.
        (short, plain[1] if short < plain[0] else aug.MAX_SIZE, *size_range)
        for short, size_range in zip(aug.MIN_SIZES, node.SIZE_RANGES, strict=True)
    ]
    return ATSSWithTTA(
        model,
        plain=plain,
        sizes=sizes,
        flip=aug.FLIP,
        merge=merge,
        max_detections=node.MAX_DETECTIONS,
        input_format=cfg.INPUT.FORMAT,
    )
