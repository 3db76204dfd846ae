"""mmdet's detectors on ATSS's network: how they name what predicts, and which config they want."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor

from ..weights import WeightsError


class ConversionError(WeightsError):
    """Says what does not fit, name by name."""


def _nothing(_: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Detector:
    """What is mmdet's, and ours for it.

    Attributes:
        head: class of its head.
        predictors: {our layer of the head: its layer of the head}.
        row: our config that does the same.
        values: {key: value} that its weights want otherwise: where mmdet's differs, and no phase
            that lies behind them.
        also: {key: value} that mmdet's can do as well as what the row says.
        says: {argument: value} of its head, by which it is told from others of the class.
        from_weights: our weights -> {key: value}, what they alone tell.
        settings: our config -> what its head has to be told.
    """

    head: str
    predictors: Mapping[str, str]
    row: str
    values: Mapping[str, Any]
    also: Mapping[str, Any]
    says: Mapping[str, str] = field(default_factory=dict)
    from_weights: Callable[[Mapping[str, Tensor]], dict[str, Any]] = _nothing
    settings: Callable[[CfgNode], dict[str, Any]] = _nothing


def _deltas(cfg: CfgNode) -> dict[str, Any]:
    return {"bbox_coder": {"target_stds": [1 / x for x in cfg.MODEL.ATSS.BBOX_REG_WEIGHTS]}}


_REG_MAX = "MODEL.ATSS.REGRESSIONS.distribution.REG_MAX"


def _deformable(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    layers = [x for x in weights if re.fullmatch(r"head\.stack\.\d+\.0\.offset\.weight", x)]
    return {"MODEL.ATSS.HEADS.TOODHead.NUM_DEFORM": len(layers)}


def _of_tood(cfg: CfgNode) -> dict[str, Any]:
    head = cfg.MODEL.ATSS.HEADS.TOODHead
    return {"num_dcn": head.NUM_DEFORM}


def levels_of(cfg: CfgNode) -> list[int]:
    """Numbers of the pyramid's levels: those made of stages of the backbone, and two more."""
    stages = [int(name.removeprefix("res")) for name in cfg.MODEL.FPN.IN_FEATURES]
    return [*stages, stages[-1] + 1, stages[-1] + 2]


def _of_vfnet(cfg: CfgNode) -> dict[str, Any]:
    node = cfg.MODEL.ATSS
    head = node.HEADS.VFNetHead
    strides = [2**level for level in levels_of(cfg)]
    ends = [head.INITIAL_DISTANCE * stride for stride in strides[:-1]]
    return {
        "dcn_on_last_conv": bool(node.DEFORM_TOWER),
        "strides": strides,
        # The upper ends are the sides of a first box; the last is taken as twice the one before.
        "regress_ranges": (*zip((-1, *ends), (*ends, 1e8), strict=True),),
    }


_OF_ATSS = {"cls_score": "atss_cls", "bbox_pred": "atss_reg", "ctrness": "atss_centerness"}
_OF_VFNET = {
    **{"cls_conv": "vfnet_cls_dconv", "cls_score": "vfnet_cls", "bbox_pred": "vfnet_reg"},
    **{"bbox_conv.0": "vfnet_reg_conv.conv", "bbox_conv.1": "vfnet_reg_conv.gn"},
    **{"refine_conv": "vfnet_reg_refine_dconv", "refine_pred": "vfnet_reg_refine"},
    **{f"refine_scales.{i}": f"scales_refine.{i}" for i in range(6)},  # of P2 to P7 at most
}
_OF_TOOD = {
    **{f"stack.{i}.0": f"inter_convs.{i}.conv" for i in range(6)},
    **{f"stack.{i}.1": f"inter_convs.{i}.gn" for i in range(6)},
    # Where they are deformable.
    **{f"stack.{i}.0.conv": f"inter_convs.{i}.conv" for i in range(6)},
    **{f"stack.{i}.0.offset": f"inter_convs.{i}.conv.conv_offset" for i in range(6)},
    **{
        f"{ours}_decomposition.{part}": f"{theirs}_decomp.{their_part}"
        for ours, theirs in (("cls", "cls"), ("bbox", "reg"))
        for part, their_part in (
            *((f"attention.{i}", f"layer_attention.{i}") for i in (0, 2)),
            *(("mixture", "reduction_conv.conv"), ("after.0", "reduction_conv.gn")),
        )
    },
    **{"cls_score": "tood_cls", "bbox_pred": "tood_reg"},
    **{f"cls_alignment.{i}": f"cls_prob_module.{i}" for i in (0, 2)},
    **{f"bbox_alignment.{i}": f"reg_offset_module.{i}" for i in (0, 2)},
}
_TOOD = Detector(
    head="TOODHead",
    predictors=_OF_TOOD,
    row="successors/TOOD_R_50_FPN_1x",
    values={"MODEL.ATSS.PHASES": [], "MODEL.ATSS.CLIP_BOXES": False},
    also={"MODEL.ATSS.CLIP_BOXES": False},
    says={"anchor_type": "anchor_free"},
    from_weights=_deformable,
    settings=_of_tood,
)
DETECTORS = {
    "atss": Detector(
        head="ATSSHead",
        predictors=_OF_ATSS,
        row="ATSS_R_50_FPN_1x",
        values={
            "MODEL.ATSS.SCORE": "product",
            "MODEL.ATSS.RANK_BY_CLASS": True,
            "MODEL.ATSS.BOX_NORMALISER_MIN": 1.0,
        },
        also={"MODEL.ATSS.SCORE": "product"},
        settings=_deltas,
    ),
    "paa": Detector(
        head="PAAHead",
        predictors=_OF_ATSS,
        row="successors/PAA_R_50_FPN_1x",
        values={"MODEL.ATSS.NORMALISER_PER_IMAGE": True},
        also={"MODEL.ATSS.SUPPRESSION": "nms"},
        settings=lambda cfg: {
            **_deltas(cfg),
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
        predictors=_OF_VFNET,
        row="successors/VFNet_R_50_FPN_1x",
        values={"MODEL.ATSS.RELU_BEFORE_P7": True},
        also={"MODEL.ATSS.DEFORM_TOWER": "v2"},
        settings=_of_vfnet,
    ),
    "tood": _TOOD,
    "tood_anchor": replace(
        _TOOD,
        row="successors/TOOD_anchor_R_50_FPN_1x",
        says={"anchor_type": "anchor_based"},
        settings=lambda cfg: _deltas(cfg) | _of_tood(cfg),
    ),
    "ddod": Detector(
        head="DDODHead",
        predictors=_OF_ATSS | {"ctrness": "atss_iou"},
        row="successors/DDOD_R_50_FPN_1x",
        values={
            "MODEL.ATSS.SCORE": "product",
            "MODEL.ATSS.RANK_BY_CLASS": True,
            "MODEL.ATSS.LEVEL_WEIGHT": "balance",
        },
        also={"MODEL.ATSS.SCORE": "product"},
        settings=_deltas,
    ),
}
# Parts of mmdet's heads that predict nothing.
_TOWERS = ("cls_convs", "reg_convs", "scales", "integral")


def detector_of(names: Iterable[str], config: str = "", given: str | None = None) -> str:
    """Which of mmdet's detectors weights are of.

    Args:
        names: of its state dict.
        config: the text of the config in its file, "" for none. It decides where names are alike.
        given: what somebody says it is.

    Raises:
        ConversionError: where they are of none that is known, of another than is said, or of
            several and nothing decides.
    """
    if given is not None and given not in DETECTORS:
        raise ConversionError(f"unknown detector {given!r}: choose from {sorted(DETECTORS)}")
    parts = {name.split(".")[1] for name in names if name.startswith("bbox_head.")}
    predictors = parts - {*_TOWERS}
    alike = [
        name
        for name, theirs in DETECTORS.items()
        if {x.split(".")[0] for x in theirs.predictors.values()} == predictors
    ]
    if not alike:
        raise ConversionError(
            f"what predicts in these weights is called {sorted(predictors)}, as in none of mmdet's "
            f"detectors that are known: {sorted(DETECTORS)}"
        )
    if given is not None and given not in alike:
        raise ConversionError(
            f"by their names these are weights of mmdet's {' or '.join(alike)}, not of {given}"
        )
    # Of classes, with the modules before them or without.
    words = {*re.findall(r"(\w+)['\"]?\s*[=:]\s*['\"](?:\w+\.)*(\w+)['\"]", config)}
    said = [x for x in alike if {("type", DETECTORS[x].head), *DETECTORS[x].says.items()} <= words]
    if len(said) == 1 and given not in (None, *said):
        raise ConversionError(
            f"the config in the file says that these are mmdet's {said[0]}, not {given}"
        )
    if given is not None:
        return given
    if len(alike) > 1 and len(said) != 1:
        raise ConversionError(
            f"weights of mmdet's {' and '.join(alike)} have the same names, and the file holds no "
            "config that tells which of them these are: say it by --detector"
        )
    return (said if len(alike) > 1 else alike)[0]
