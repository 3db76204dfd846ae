"""Anchors and rule of a config, without a model, and the arguments of rules."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode

from .. import anchors
from ..assigners import ASSIGNER_REGISTRY
from ..structures import Assigner
from .build import build_anchors, build_assigner, build_levels
from .checks import check_values
from .files import merge_options

# An integer argument without an upper bound is at most this many times its default, or MOST.
TIMES, MOST = 10, 100


@dataclass(frozen=True)
class Sampling:
    """Anchors and rule of a config, without a model.

    Attributes:
        anchors: (height, width) of a canvas -> its anchors.
        divisibility: of the sides of canvases.
    """

    anchors: Callable[[tuple[int, int]], anchors.Anchors]
    assigner: Assigner
    divisibility: int


def build_sampling(cfg: CfgNode) -> Sampling:
    check_values(cfg)
    with torch.device("meta"):  # shapes without weights
        built, shapes = build_levels(cfg)
    generator = build_anchors(cfg, shapes)
    layout = {name: getattr(generator, name) for name in ("strides", "scales", "ratios", "offset")}
    return Sampling(
        anchors=partial(anchors.Anchors.grid, **layout),
        assigner=build_assigner(cfg),
        divisibility=max(built.size_divisibility, 1),
    )


def with_rule(cfg: CfgNode, rule: str) -> CfgNode:
    """Return a copy with another rule: its name, or name and arguments as in "ATSS TOP_K=3".

    Raises:
        UserError: naming the key of an argument that is unknown or has another type.
    """
    cfg = cfg.clone()
    cfg.defrost()
    name, *arguments = rule.split() or [rule]
    cfg.MODEL.ATSS.ASSIGNER = name
    for argument in arguments:
        key, _, value = argument.partition("=")
        merge_options(cfg, [f"MODEL.ATSS.ASSIGNERS.{name}.{key.upper()}", value])
    return cfg


def rule_arguments(cfg: CfgNode) -> dict[str, dict[str, Any]]:
    """Return {rule: whether it looks at predictions, and its arguments} of all registered rules,
    each argument with key, kind, value and, if it has them, bounds or choices."""
    rules = {}
    for name, part in ASSIGNER_REGISTRY.entries.items():
        own = cfg.MODEL.ATSS.ASSIGNERS.get(name, {})
        arguments = []
        for argument, default in part.defaults.items():
            value = own.get(argument.upper(), default)
            declared = getattr(part.target, "__dataclass_fields__", {}).get(argument)
            check = getattr(declared, "metadata", {}).get("check")
            bounds = dict(check.keywords) if check else {}
            if argument in part.parts:
                bounds = {"choices": [name for name, _ in part.parts[argument]]}
            elif isinstance(default, int) and not isinstance(default, bool):
                most = max(TIMES * default, MOST, value)
                bounds["high"] = min(bounds.get("high", math.inf), most)
            about = {k: v for k, v in bounds.items() if k == "choices" or math.isfinite(v)}
            value = list(value) if isinstance(value, tuple) else value
            about |= {"key": argument.upper(), "kind": type(default).__name__, "value": value}
            arguments.append(about)
        # A property depends on the arguments: the call raises an error without predictions.
        looks = getattr(part.target, "looks_at_predictions", False) is True
        rules[name] = {"predictions": looks, "arguments": arguments}
    return rules


def candidates_per_object(cfg: CfgNode) -> int:
    """Return k * L of ATSS, also with another rule."""
    return cfg.MODEL.ATSS.ASSIGNERS.ATSS.TOP_K * len(cfg.MODEL.ATSS.IN_FEATURES)
