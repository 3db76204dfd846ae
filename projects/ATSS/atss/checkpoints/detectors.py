"""mmdet's detectors on ATSS's network: their parameter names and their configs."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor

from ..weights import WeightsError


class ConversionError(WeightsError):
    """Weights that cannot be converted."""


def _no_values(_: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Detector:
    """A detector of mmdet, and our config for it.

    Attributes:
        head: class of mmdet's head.
        predictors: {our layer of the head: mmdet's}.
        row: our config of the same detector.
        values: {key: value} over ``row`` for converted weights.
        also: {key: value} that mmdet supports besides those of ``row``.
        arguments: {argument: value} that distinguish it within mmdet's class.
        from_weights: our weights -> {key: value} that only they reveal.
        settings: our config -> arguments of mmdet's head.
    """

    head: str
    predictors: Mapping[str, str]
    row: str
    values: Mapping[str, Any]
    also: Mapping[str, Any]
    arguments: Mapping[str, str] = field(default_factory=dict)
    from_weights: Callable[[Mapping[str, Tensor]], dict[str, Any]] = _no_values
    settings: Callable[[CfgNode], dict[str, Any]] = _no_values


def _delta_settings(cfg: CfgNode) -> dict[str, Any]:
    return {"bbox_coder": {"target_stds": [1 / x for x in cfg.MODEL.ATSS.BBOX_REG_WEIGHTS]}}


_REG_MAX = "MODEL.ATSS.REGRESSIONS.distribution.REG_MAX"


def _num_deform(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    layers = [x for x in weights if re.fullmatch(r"head\.stack\.\d+\.0\.offset\.weight", x)]
    return {"MODEL.ATSS.HEADS.TOODHead.NUM_DEFORM": len(layers)}


def _tood_settings(cfg: CfgNode) -> dict[str, Any]:
    head = cfg.MODEL.ATSS.HEADS.TOODHead
    return {"num_dcn": head.NUM_DEFORM}


def levels_of(cfg: CfgNode) -> list[int]:
    """Return the numbers of the pyramid's levels: the backbone's stages and two more."""
    stages = [int(name.removeprefix("res")) for name in cfg.MODEL.FPN.IN_FEATURES]
    return [*stages, stages[-1] + 1, stages[-1] + 2]


def _vfnet_settings(cfg: CfgNode) -> dict[str, Any]:
    node = cfg.MODEL.ATSS
    head = node.HEADS.VFNetHead
    strides = [2**level for level in levels_of(cfg)]
    ends = [head.INITIAL_DISTANCE * stride for stride in strides[:-1]]
    return {
        "dcn_on_last_conv": bool(node.DEFORM_TOWER),
        "strides": strides,
        # mmdet takes the upper ends as sides of the first box; the last counts as twice its
        # predecessor.
        "regress_ranges": (*zip((-1, *ends), (*ends, 1e8), strict=True),),
    }


# fmt: off
_ATSS_LAYERS = {"cls_score": "atss_cls", "bbox_pred": "atss_reg", "ctrness": "atss_centerness"}
_VFNET_LAYERS = {
    "cls_conv": "vfnet_cls_dconv", "cls_score": "vfnet_cls", "bbox_pred": "vfnet_reg",
    "bbox_conv.0": "vfnet_reg_conv.conv", "bbox_conv.1": "vfnet_reg_conv.gn",
    "refine_conv": "vfnet_reg_refine_dconv", "refine_pred": "vfnet_reg_refine",
    **{f"refine_scales.{i}": f"scales_refine.{i}" for i in range(6)},  # at most P2 to P7
}
_TOOD_LAYERS = {
    **{f"stack.{i}.0": f"inter_convs.{i}.conv" for i in range(6)},
    **{f"stack.{i}.1": f"inter_convs.{i}.gn" for i in range(6)},
    # Deformable ones.
    **{f"stack.{i}.0.conv": f"inter_convs.{i}.conv" for i in range(6)},
    **{f"stack.{i}.0.offset": f"inter_convs.{i}.conv.conv_offset" for i in range(6)},
    **{
        f"{ours}_decomposition.{part}": f"{theirs}_decomp.{their_part}"
        for ours, theirs in (("cls", "cls"), ("bbox", "reg"))
        for part, their_part in (
            ("attention.0", "layer_attention.0"), ("attention.2", "layer_attention.2"),
            ("mixture", "reduction_conv.conv"), ("after.0", "reduction_conv.gn"),
        )
    },
    "cls_score": "tood_cls", "bbox_pred": "tood_reg",
    **{f"cls_alignment.{i}": f"cls_prob_module.{i}" for i in (0, 2)},
    **{f"bbox_alignment.{i}": f"reg_offset_module.{i}" for i in (0, 2)},
}
# fmt: on
_TOOD = Detector(
    head="TOODHead",
    predictors=_TOOD_LAYERS,
    row="successors/TOOD_R_50_FPN_1x",
    values={"MODEL.ATSS.PHASES": [], "MODEL.ATSS.CLIP_BOXES": False},
    also={"MODEL.ATSS.CLIP_BOXES": False},
    arguments={"anchor_type": "anchor_free"},
    from_weights=_num_deform,
    settings=_tood_settings,
)
DETECTORS = {
    "atss": Detector(
        head="ATSSHead",
        predictors=_ATSS_LAYERS,
        row="ATSS_R_50_FPN_1x",
        values={
            "MODEL.ATSS.SCORE": "product",
            "MODEL.ATSS.RANK_BY_CLASS": True,
            "MODEL.ATSS.BOX_NORMALISER_MIN": 1.0,
        },
        also={"MODEL.ATSS.SCORE": "product"},
        settings=_delta_settings,
    ),
    "paa": Detector(
        head="PAAHead",
        predictors=_ATSS_LAYERS,
        row="successors/PAA_R_50_FPN_1x",
        values={"MODEL.ATSS.NORMALISER_PER_IMAGE": True},
        also={"MODEL.ATSS.SUPPRESSION": "nms"},
        settings=lambda cfg: {
            **_delta_settings(cfg),
            "score_voting": cfg.MODEL.ATSS.SUPPRESSION == "score_vote",
        },
    ),
    "gfl": Detector(
        head="GFLHead",
        predictors={"cls_score": "gfl_cls", "bbox_pred": "gfl_reg"},
        row="successors/GFL_R_50_FPN_1x",
        values={},
        also={"MODEL.ATSS.SCORE": "product"},
        from_weights=lambda weights: {_REG_MAX: len(weights["head.bbox_pred.weight"]) // 4 - 1},
        settings=lambda cfg: {"reg_max": cfg.MODEL.ATSS.REGRESSIONS.distribution.REG_MAX},
    ),
    "vfnet": Detector(
        head="VFNetHead",
        predictors=_VFNET_LAYERS,
        row="successors/VFNet_R_50_FPN_1x",
        values={"MODEL.ATSS.RELU_BEFORE_P7": True},
        also={"MODEL.ATSS.DEFORM_TOWER": "v2"},
        settings=_vfnet_settings,
    ),
    "tood": _TOOD,
    "tood_anchor": replace(
        _TOOD,
        row="successors/TOOD_anchor_R_50_FPN_1x",
        arguments={"anchor_type": "anchor_based"},
        settings=lambda cfg: _delta_settings(cfg) | _tood_settings(cfg),
    ),
    "ddod": Detector(
        head="DDODHead",
        predictors=_ATSS_LAYERS | {"ctrness": "atss_iou"},
        row="successors/DDOD_R_50_FPN_1x",
        values={
            "MODEL.ATSS.SCORE": "product",
            "MODEL.ATSS.RANK_BY_CLASS": True,
            "MODEL.ATSS.LEVEL_WEIGHT": "balance",
        },
        also={"MODEL.ATSS.SCORE": "product"},
        settings=_delta_settings,
    ),
}
# Parts of mmdet's heads other than predictors.
_OTHER_PARTS = ("cls_convs", "reg_convs", "scales", "integral")


def detector_of(names: Iterable[str], config: str = "", choice: str | None = None) -> str:
    """Return the name of the mmdet detector with these weights.

    Args:
        names: of its state dict.
        config: text in its file, or "". It decides between detectors of equal names.
        choice: the user's.

    Raises:
        ConversionError: if the names fit no detector, not ``choice``, or several.
    """
    if choice is not None and choice not in DETECTORS:
        raise ConversionError(f"unknown detector {choice!r}: choose from {sorted(DETECTORS)}")
    parts = {name.split(".")[1] for name in names if name.startswith("bbox_head.")}
    predictors = parts - {*_OTHER_PARTS}
    candidates = [
        name
        for name, theirs in DETECTORS.items()
        if {x.split(".")[0] for x in theirs.predictors.values()} == predictors
    ]
    if not candidates:
        raise ConversionError(
            f"unknown predictors {sorted(predictors)} in these weights: choose weights of "
            f"{sorted(DETECTORS)}"
        )
    if choice is not None and choice not in candidates:
        raise ConversionError(
            f"expected weights of {choice}, got names of mmdet's {' or '.join(candidates)}"
        )
    # (argument, value); a class may have its module before it.
    words = {*re.findall(r"(\w+)['\"]?\s*[=:]\s*['\"](?:\w+\.)*(\w+)['\"]", config)}
    traits = {k: {("type", x.head), *x.arguments.items()} for k, x in DETECTORS.items()}
    in_config = [x for x in candidates if traits[x] <= words]
    if len(in_config) == 1 and choice not in (None, *in_config):
        raise ConversionError(
            f"expected weights of {choice}, got mmdet's {in_config[0]} in the file's config"
        )
    if choice is not None:
        return choice
    if len(candidates) > 1 and len(in_config) != 1:
        raise ConversionError(
            f"weights of mmdet's {' and '.join(candidates)} have the same names, and no config in "
            "the file distinguishes them: choose one with --detector"
        )
    return (in_config if len(candidates) > 1 else candidates)[0]
