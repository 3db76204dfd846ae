"""Filter, ranking, clipping and suppression as part of an exported network, for any batch.

Shape letters: R anchors over all levels, K classes, C candidates and M detections of an image. C
and M are constant: levels are filled up to the top-k with candidates of score UNUSED.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, library, nn
from torch.nn import functional as F
from torchvision.ops import nms

from ..errors import UserError
from ..modeling import ATSSDetector, suppression
from ..modeling.postprocess import PostProcessor

OUTPUTS = ("boxes", "scores", "classes", "count")
UNUSED = -1.0
# Scores are at least 0: the engines keep what exceeds this.
LEAST = -0.5


class Selected(nn.Module):
    """A detector with its postprocessing, from pixels to detections.

    Raises:
        UserError: if the suppression is neither NMS nor none.
    """

    def __init__(self, detector: ATSSDetector):
        super().__init__()
        part: Any = detector.postprocess.suppression
        if part is not suppression.keep_all and type(part) is not suppression.NMS:
            raise UserError(
                f"--nms is for the suppressions NMS and none, not {type(part).__name__} "
                "(MODEL.ATSS.SUPPRESSION): leave out --nms, and the runner suppresses"
            )
        self.detector = detector

    def forward(self, image: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Detect, and return the raw outputs for comparison too.

        Args:
            image: (N, C, H, W), as :meth:`ATSSDetector.raw`.
            sizes: (N, 2) int64 height and width of the resized images on their canvas.
        """
        (boxes, probability, *quality), per_level = self.detector.raw_levels(image)
        found = select(
            boxes,
            probability,
            quality[0] if quality else None,
            per_level,
            sizes,
            self.detector.postprocess,
        )
        return *found, boxes, probability, *quality


def select(
    boxes: Tensor,
    probability: Tensor,
    quality: Tensor | None,
    per_level: list[int],
    sizes: Tensor,
    rules: PostProcessor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return boxes (N, M, 4), scores (N, M), classes (N, M) and count (N,), best first, filled up
    with boxes of 0, score 0 and class -1.

    Args:
        boxes: (N, R, 4).
        probability: (N, R, K).
        quality: (N, R).
        per_level: number of anchors of each level.
        sizes: (N, 2) int64 height and width.
        rules: the postprocessing of the model.
    """
    score = probability
    if quality is not None:
        score = rules.score(probability, quality[..., None].expand_as(probability))
    passing = (score if rules.threshold_on_score else probability) > rules.score_thresh
    rank = probability if rules.rank_by_class else score
    best = _best_anchors if rules.rank_anchors else _best_pairs
    chosen, first = [], 0
    levels = (x.split(per_level, dim=1) for x in (rank, passing, score))
    for count, ranks, passes, values in zip(per_level, *levels, strict=True):
        anchor, scores = best(ranks, passes, values, rules.topk_candidates)
        chosen.append((anchor + first, scores))
        first = first + count
    anchor, scores = (torch.cat(x, dim=1) for x in zip(*chosen, strict=True))
    box = boxes.gather(1, anchor[..., None].expand(-1, -1, 4))
    if rules.clip:
        limit = sizes.flip(1).repeat(1, 2)[:, None].to(box.dtype)
        box = torch.minimum(box.clamp(min=0), limit)
    valid = (box[..., 2:] > box[..., :2]).all(dim=2) & (box.abs() < torch.inf).all(dim=2)
    box = torch.where(valid[..., None], box, 0.0)
    scores = torch.where(valid[..., None], scores, UNUSED)
    num_classes, part = scores.shape[2], rules.suppression
    if isinstance(part, suppression.NMS) and part.class_agnostic:
        # One class, in which each box stands once for each of its classes.
        pairs = scores.flatten(1)[:, None]
        repeated = box.repeat_interleave(num_classes, dim=1)
        scores = suppress(repeated, pairs, part.threshold, rules.max_detections)
    elif isinstance(part, suppression.NMS):
        dense = scores.transpose(1, 2)
        scores = suppress(box, dense, part.threshold, rules.max_detections).transpose(1, 2)
    scores = scores.flatten(1)
    scores, index = scores.topk(min(rules.max_detections, scores.shape[1]))
    box = box.gather(1, (index // num_classes)[..., None].expand(-1, -1, 4))
    used = scores > LEAST
    return (
        torch.where(used[..., None], box, 0.0),
        torch.where(used, scores, 0.0),
        torch.where(used, index % num_classes, -1),
        used.sum(dim=1),
    )


def _best_pairs(rank: Tensor, passing: Tensor, score: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return the best pairs of anchor and class of a level: anchors (N, C) and scores (N, C, K),
    which are UNUSED for other classes than the pair's."""
    num_classes = rank.shape[2]
    rank = F.pad(torch.where(passing, rank, UNUSED).flatten(1), (0, top), value=UNUSED)
    score = F.pad(score.flatten(1), (0, top), value=UNUSED)
    value, index = rank.topk(top)
    used = value > LEAST
    # Without a candidate, an index may lie in the filling.
    index = torch.where(used, index, 0)
    chosen = torch.where(used, score.gather(1, index), UNUSED)
    is_class = (index % num_classes)[..., None] == torch.arange(num_classes, device=index.device)
    return index // num_classes, torch.where(is_class, chosen[..., None], UNUSED)


def _best_anchors(rank: Tensor, passing: Tensor, score: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return the best anchors of a level (N, C), and their scores (N, C, K)."""
    value, index = F.pad(rank.amax(dim=2), (0, top), value=UNUSED).topk(top)
    used = value > LEAST
    index = torch.where(used, index, 0)
    score = torch.where(passing, score, UNUSED)
    score = score.gather(1, index[..., None].expand(-1, -1, score.shape[2]))
    return index, torch.where(used[..., None], score, UNUSED)


# ------------------------------------------------------------------------------------------------
# Suppression: one operator of ONNX and OpenVINO
# ------------------------------------------------------------------------------------------------


@library.custom_op("atss::suppress", mutates_args=())
def suppress(boxes: Tensor, scores: Tensor, threshold: float, limit: int) -> Tensor:
    """Set scores (N, K, C) of boxes (N, C, 4) that NMS of each class removes to UNUSED."""
    kept = torch.full_like(scores, UNUSED)
    for i, k in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:2])).tolist():
        index = (scores[i, k] > LEAST).nonzero().squeeze(1)
        index = index[nms(boxes[i, index], scores[i, k, index], threshold)[:limit]]
        kept[i, k, index] = scores[i, k, index]
    return kept


@suppress.register_fake
def _(boxes: Tensor, scores: Tensor, threshold: float, limit: int) -> Tensor:
    return torch.empty_like(scores)


def onnx_translations() -> dict[Any, Any]:
    """Return the operator's translation for torch.onnx.export."""
    from onnxscript import FLOAT, opset20

    op: Any = opset20

    def translated(boxes: FLOAT, scores: FLOAT, threshold: float, limit: int) -> FLOAT:
        index = op.NonMaxSuppression(
            boxes,
            scores,
            op.Constant(value_ints=[limit]),
            op.Constant(value_floats=[threshold]),
            op.Constant(value_floats=[LEAST]),
        )
        nothing = op.Expand(op.Constant(value_float=UNUSED), op.Shape(scores))
        return op.ScatterND(nothing, index, op.GatherND(scores, index))

    return {torch.ops.atss.suppress.default: translated}


def openvino_extension() -> Any:
    """Return the operator's translation for openvino.convert_model."""
    from openvino import opset15 as op
    from openvino.frontend.pytorch import ConversionExtension

    def translated(context: Any) -> list:
        boxes, scores = context.get_input(0), context.get_input(1)
        threshold, limit = (context.get_values_from_const_input(i) for i in (2, 3))
        index = op.non_max_suppression(
            boxes,
            scores,
            op.constant(np.array(limit, np.int64)),
            op.constant(np.array(threshold, np.float32)),
            op.constant(np.array(LEAST, np.float32)),
            output_type="i64",
        ).output(0)
        nothing = op.broadcast(op.constant(np.array(UNUSED, np.float32)), op.shape_of(scores))
        return op.scatter_nd_update(nothing, index, op.gather_nd(scores, index)).outputs()

    return ConversionExtension("atss.suppress.default", translated)
