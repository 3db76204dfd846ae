"""How a config chooses samples, to be asked without a model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from detectron2.config import CfgNode

from ..anchors import Anchors
from ..structures import Assigner
from .build import build_anchors, build_assigner, build_levels
from .checks import check_values


@dataclass(frozen=True)
class Sampling:
    """How a config chooses samples, without a model.

    Attributes:
        anchors: (height, width) of a canvas -> its anchors.
        assigner: the rule.
        divisibility: canvases are padded to multiples of it.
    """

    anchors: Callable[[tuple[int, int]], Anchors]
    assigner: Assigner
    divisibility: int


def with_rule(cfg: CfgNode, rule: str) -> CfgNode:
    """The same config with another rule."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ATSS.ASSIGNER = rule
    return cfg


def candidates_per_object(cfg: CfgNode) -> int:
    """k * L of ATSS, whatever the rule of the config."""
    return cfg.MODEL.ATSS.ASSIGNERS.ATSS.TOP_K * len(cfg.MODEL.ATSS.IN_FEATURES)


def build_sampling(cfg: CfgNode) -> Sampling:
    """Anchors and rule of a config.

    Raises:
        ValueError: naming the key.
    """
    check_values(cfg)
    with torch.device("meta"):  # shapes without weights
        built, shapes = build_levels(cfg)
    generator = build_anchors(cfg, shapes)
    layout = {name: getattr(generator, name) for name in ("strides", "scales", "ratios", "offset")}
    return Sampling(
        anchors=partial(Anchors.grid, **layout),
        assigner=build_assigner(cfg),
        divisibility=max(built.size_divisibility, 1),
    )
