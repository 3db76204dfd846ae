"""From the head's output to detections: filter, rank, decode, clip, suppress."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..anchors import Anchors
from ..errors import Checked, arg
from ..structures import HeadOutput
from .box_coding import BoxCode
from .suppression import NMS, ScoredBoxes

PLAIN_NMS = NMS()


# Scores from class probability and quality, of the same shape. Both functions rank alike: root
# (authors' code) keeps the scale of a probability, product is mmdet's.
def product(probability: Tensor, quality: Tensor) -> Tensor:
    return probability * quality


def root(probability: Tensor, quality: Tensor) -> Tensor:
    return product(probability, quality).sqrt()


@dataclass(kw_only=True, eq=False)
class PostProcessor(Checked):
    """Postprocessing of the head's output to detections of each image.

    Candidates are pairs of anchor and class; boxes are decoded after their selection.

    Args:
        score_thresh: lower bound of a candidate's class probability.
        topk_candidates: kept per level, before suppression.
        max_detections: kept per image.
        score: (class probability, quality) -> score; class probability without quality.
        suppression: of overlapping boxes, as in :mod:`.suppression`.
        threshold_on_score: whether ``score_thresh`` applies to the score (PAA, OTA).
        rank_by_class: whether candidates are ranked by class probability (mmdet).
        rank_anchors: whether anchors are ranked, by their best class, and keep all their classes
            (PAA).
        clip: whether boxes are clipped to the image before suppression.
    """

    score_thresh: float = arg(0.05, low=0, high=1)
    topk_candidates: int = arg(1000, low=1)
    max_detections: int = arg(100, low=1)
    score: Callable[[Tensor, Tensor], Tensor] = root
    suppression: Callable[[Tensor, Tensor, Tensor, int], ScoredBoxes] = PLAIN_NMS
    threshold_on_score: bool = False
    rank_by_class: bool = False
    rank_anchors: bool = False
    clip: bool = True

    @torch.no_grad()
    def __call__(
        self,
        output: HeadOutput,
        anchors: Anchors,
        code: BoxCode,
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """Return pred_boxes, scores and pred_classes of each image, best first.

        Args:
            output: in float32.
            image_sizes: (height, width) of each image on its canvas.
        """
        return [self._detect(output.at(i), anchors, code, x) for i, x in enumerate(image_sizes)]

    def _detect(
        self, output: HeadOutput, anchors: Anchors, code: BoxCode, image_size: tuple[int, int]
    ) -> Instances:
        anchor, classes, scores = self._candidates(output, anchors)
        decoded = code.decode(
            output.box_regression[anchor], anchors.boxes[anchor], anchors.stride[anchor]
        )
        boxes = Boxes(decoded)
        if self.clip:
            boxes.clip(image_size)
        # Suppression never removes an empty box, which would take the place of a detection. Without
        # clipping, boxes may be infinite.
        valid = boxes.nonempty()
        if not self.clip:
            valid &= boxes.tensor.isfinite().all(dim=1)
        candidates = ScoredBoxes(boxes.tensor, scores, classes).take(valid)
        kept = self.suppression(*candidates, self.max_detections)
        return Instances(
            image_size, pred_boxes=Boxes(kept.boxes), scores=kept.scores, pred_classes=kept.classes
        )

    def in_original(self, detected: Instances, height: int, width: int) -> Instances:
        """Resize detections from the network's input to the original image."""
        if self.clip:
            return detector_postprocess(detected, height, width)
        boxes = Boxes(detected.pred_boxes.tensor.clone())
        boxes.scale(width / detected.image_size[1], height / detected.image_size[0])
        return Instances((height, width), **detected.get_fields() | {"pred_boxes": boxes})

    def _candidates(self, output: HeadOutput, anchors: Anchors) -> tuple[Tensor, Tensor, Tensor]:
        """Return (M,) anchor indices, classes and scores of one image."""
        quality = None if output.quality is None else output.quality.sigmoid()
        kept, first = [], 0
        for count in anchors.per_level:
            level = slice(first, first + count)
            probability = output.at(level).probability()
            level_quality = None if quality is None else quality[level]
            anchor, classes, score = self._level_candidates(probability, level_quality)
            kept.append((anchor + first, classes, score))
            first += count
        anchor, classes, score = (torch.cat(x) for x in zip(*kept, strict=True))
        return anchor, classes, score

    def _level_candidates(
        self, probability: Tensor, quality: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same of a level, from (R, K) probabilities and (R,) quality."""
        anchors = torch.arange(len(probability), device=probability.device)
        if self.rank_anchors:
            rank = probability if self.rank_by_class else self._score(probability, quality, anchors)
            anchors = self._best(rank.amax(dim=1))
        passing = probability[anchors] if self.rank_anchors else probability
        if self.threshold_on_score:
            passing = self._score(passing, quality, anchors)
        row, classes = (passing > self.score_thresh).nonzero().unbind(1)
        anchor = anchors[row]
        chosen = probability[anchor, classes]
        score = self._score(chosen, quality, anchor)
        if self.rank_anchors:
            return anchor, classes, score
        best = self._best(chosen if self.rank_by_class else score)
        return anchor[best], classes[best], score[best]

    def _score(self, probability: Tensor, quality: Tensor | None, anchor: Tensor) -> Tensor:
        if quality is None:
            return probability
        quality = quality[anchor]
        if probability.ndim == 2:
            quality = quality[:, None].expand_as(probability)
        return self.score(probability, quality)

    def _best(self, rank: Tensor) -> Tensor:
        return rank.topk(min(self.topk_candidates, len(rank))).indices
