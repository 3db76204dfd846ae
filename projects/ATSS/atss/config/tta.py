"""Builds multi-scale testing from TEST.AUG and MODEL.ATSS.TTA."""

from collections.abc import Callable

from detectron2.config import CfgNode
from torch import nn

from ..errors import UserError, check_range
from ..modeling import SUPPRESSIONS
from ..modeling.suppression import ScoredBoxes
from ..modeling.tta import ATSSWithTTA
from .checks import rename_errors


def build_tta(cfg: CfgNode, model: nn.Module) -> ATSSWithTTA:
    """What TEST.AUG and MODEL.ATSS.TTA say.

    Raises:
        ValueError: where the ranges are not as many as the sizes, or the merge is unknown.
    """
    return ATSSWithTTA(
        model,
        plain=(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST),
        sizes=build_views(cfg),
        flip=cfg.TEST.AUG.FLIP,
        merge=build_merge(cfg),
        max_detections=cfg.MODEL.ATSS.TTA.MAX_DETECTIONS,
        input_format=cfg.INPUT.FORMAT,
    )


def build_views(cfg: CfgNode) -> list[tuple[int, int, float, float]]:
    """Short side, longest side, least and greatest size that counts, of each view but the plain.

    Raises:
        ValueError: where the ranges are not as many as the sizes.
    """
    ranges, aug = cfg.MODEL.ATSS.TTA.SIZE_RANGES, cfg.TEST.AUG
    if len(ranges) != len(aug.MIN_SIZES):
        raise UserError(
            f"MODEL.ATSS.TTA.SIZE_RANGES has {len(ranges)} ranges for the {len(aug.MIN_SIZES)} "
            "sizes of TEST.AUG.MIN_SIZES"
        )
    short_plain, longest_plain = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    return [
        # Views smaller than the plain one have its cap.
        (short, longest_plain if short < short_plain else aug.MAX_SIZE, *size_range)
        for short, size_range in zip(aug.MIN_SIZES, ranges, strict=True)
    ]


def build_merge(cfg: CfgNode) -> Callable[..., ScoredBoxes]:
    """What MODEL.ATSS.TTA.MERGE names.

    Raises:
        ValueError: for an unknown name.
    """
    with rename_errors(limit="MODEL.ATSS.TTA.MAX_DETECTIONS"):
        check_range("limit", cfg.MODEL.ATSS.TTA.MAX_DETECTIONS, 1)
    return SUPPRESSIONS.build(cfg.MODEL.ATSS, "TTA.MERGE")
