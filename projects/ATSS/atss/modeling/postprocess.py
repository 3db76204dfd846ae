"""From the head's output to detections: filter, rank, decode, clip, suppress."""

from collections.abc import Callable, Sequence

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..anchors import Anchors
from ..structures import HeadOutput
from .suppression import nms_per_class


# How class probability and centerness make the score. Both rank alike; the root keeps the score
# on the scale of a probability (authors' code), without it scores are mmdet's.
def product(probability: Tensor, quality: Tensor) -> Tensor:
    return probability * quality


def root(probability: Tensor, quality: Tensor) -> Tensor:
    return product(probability, quality).sqrt()


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sqrt": root, "product": product}


class PostProcessor:
    """Detections of each image.

    A (anchor, class) pair is a candidate when its class probability alone exceeds the threshold;
    candidates are ranked by probability times centerness, and only those kept are decoded.

    Args:
        score_thresh: on the class probability.
        topk_candidates: kept per level, before suppression.
        nms_thresh: IoU above which a lower-scored box of the same class goes.
        max_detections: kept per image.
        score: name of the final score, of SCORES.
    """

    def __init__(
        self,
        *,
        score_thresh: float = 0.05,
        topk_candidates: int = 1000,
        nms_thresh: float = 0.6,
        max_detections: int = 100,
        score: str = "sqrt",
    ):
        if score not in SCORES:
            raise ValueError(f"unknown score {score!r}; known are {sorted(SCORES)}")
        self.score_thresh = score_thresh
        self.topk_candidates = topk_candidates
        self.nms_thresh = nms_thresh
        self.max_detections = max_detections
        self.score = SCORES[score]

    @torch.no_grad()
    def __call__(
        self,
        output: HeadOutput,
        anchors: Anchors,
        decode: Callable[[Tensor, Tensor], Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """
        Args:
            output: the head's, in float32.
            decode: the box coder's: (M, 4) deltas and anchors -> boxes in pixels.
            image_sizes: (height, width) of each image on its canvas; boxes are clipped to it.
        Returns:
            per image: pred_boxes, scores, pred_classes, best first.
        """
        results = []
        for i, image_size in enumerate(image_sizes):
            quality = None if output.quality is None else output.quality[i].sigmoid()
            anchor, classes, scores = self._candidates(output.logits[i], quality, anchors)
            boxes = Boxes(decode(output.deltas[i, anchor], anchors.boxes[anchor]))
            boxes.clip(image_size)
            # Nothing overlaps a box without area: it would take the place of a detection.
            real = boxes.nonempty()
            boxes, scores, classes = boxes[real], scores[real], classes[real]
            keep = nms_per_class(boxes.tensor, scores, classes, self.nms_thresh)
            keep = keep[: self.max_detections]
            results.append(
                Instances(
                    image_size,
                    pred_boxes=boxes[keep],
                    scores=scores[keep],
                    pred_classes=classes[keep],
                )
            )
        return results

    def _candidates(
        self, logits: Tensor, quality: Tensor | None, anchors: Anchors
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(R, K) logits, (R,) quality -> (M,) anchor index, class and score, over all levels."""
        kept, first = [], 0
        for level in logits.split(anchors.per_level):
            probability = level.sigmoid()
            anchor, classes = (probability > self.score_thresh).nonzero().unbind(1)
            score = probability[anchor, classes]
            anchor = anchor + first
            if quality is not None:
                score = self.score(score, quality[anchor])
            score, best = score.topk(min(self.topk_candidates, len(score)))
            kept.append((anchor[best], classes[best], score))
            first += len(level)
        anchor, classes, score = (torch.cat(x) for x in zip(*kept, strict=True))
        return anchor, classes, score
