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


# How class probability and quality make the score, (...) each, of the same shape. Both rank alike;
# the root keeps the score on the scale of a probability (authors' code), without it scores are
# mmdet's.
def product(probability: Tensor, quality: Tensor) -> Tensor:
    return probability * quality


def root(probability: Tensor, quality: Tensor) -> Tensor:
    return product(probability, quality).sqrt()


@dataclass(kw_only=True, eq=False)
class PostProcessor(Checked):
    """Detections of each image.

    A pair of anchor and class is a candidate when its class probability alone exceeds the
    threshold; candidates are ranked by their scores, and only those kept are decoded.

    Args:
        score_thresh: of a candidate.
        topk_candidates: kept per level, before suppression.
        max_detections: kept per image.
        score: (class probability, quality) -> score; class probability where the head has no
            quality.
        suppression: what becomes of boxes that overlap.
        threshold_on_score: the threshold is on the score, and not on the class probability (PAA,
            OTA).
        rank_by_class: candidates are ranked by class probability, and not by score (mmdet).
        rank_anchors: anchors are ranked, by their best class, each with all its classes (PAA).
        clip: boxes end where the image does, before suppression.
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
        """
        Args:
            output: the head's, in float32.
            code: that decodes its numbers.
            image_sizes: (height, width) of each image on its canvas.
        Returns:
            per image: pred_boxes, scores, pred_classes, best first.
        """
        return [self._detect(output.at(i), anchors, code, x) for i, x in enumerate(image_sizes)]

    def _detect(
        self, output: HeadOutput, anchors: Anchors, code: BoxCode, image_size: tuple[int, int]
    ) -> Instances:
        """Of one image, whose output has no N."""
        anchor, classes, scores = self._candidates(output, anchors)
        decoded = code.decode(
            output.box_regression[anchor], anchors.boxes[anchor], anchors.stride[anchor]
        )
        boxes = Boxes(decoded)
        if self.clip:
            boxes.clip(image_size)
        # Nothing overlaps a box without area: it would take the place of a detection. Where nothing
        # is clipped, a box may have no end.
        real = boxes.nonempty()
        if not self.clip:
            real &= boxes.tensor.isfinite().all(dim=1)
        real = ScoredBoxes(boxes.tensor, scores, classes).take(real)
        kept = self.suppression(*real, self.max_detections)
        return Instances(
            image_size,
            pred_boxes=Boxes(kept.boxes),
            scores=kept.scores,
            pred_classes=kept.classes,
        )

    def in_original(self, detected: Instances, height: int, width: int) -> Instances:
        """Detections in pixels of the network's input, in those of an image of another size."""
        if self.clip:
            return detector_postprocess(detected, height, width)
        boxes = Boxes(detected.pred_boxes.tensor.clone())
        boxes.scale(width / detected.image_size[1], height / detected.image_size[0])
        return Instances((height, width), **detected.get_fields() | {"pred_boxes": boxes})

    def _candidates(self, output: HeadOutput, anchors: Anchors) -> tuple[Tensor, Tensor, Tensor]:
        """(M,) anchor index, class and score of an image's candidates, over all levels."""
        quality = None if output.quality is None else output.quality.sigmoid()
        kept, first = [], 0
        for count in anchors.per_level:
            level = slice(first, first + count)
            probability = output.at(level).probability()
            of_level = None if quality is None else quality[level]
            anchor, classes, score = self._of_level(probability, of_level)
            kept.append((anchor + first, classes, score))
            first += count
        anchor, classes, score = (torch.cat(x) for x in zip(*kept, strict=True))
        return anchor, classes, score

    def _of_level(
        self, probability: Tensor, quality: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(R, K) and (R,) of a level -> (M,) anchor index, class and score."""
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
        """Of (M,) or (M, K) probabilities of (M,) anchors."""
        if quality is None:
            return probability
        own = quality[anchor]
        if probability.ndim == 2:
            own = own[:, None].expand_as(probability)
        return self.score(probability, own)

    def _best(self, rank: Tensor) -> Tensor:
        return rank.topk(min(self.topk_candidates, len(rank))).indices
