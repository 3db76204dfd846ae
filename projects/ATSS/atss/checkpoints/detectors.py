"""mmdet's detectors on ATSS's network: how they name what predicts, and which config they want."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor

from .read import WeightsError


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
        values: {key: value} in which mmdet's differs from it.
        also: {key: value} that mmdet's can do as well as what the row says.
        from_weights: our weights -> {key: value}, what they alone tell.
        settings: our config -> what its head has to be told.
    """

    head: str
    predictors: Mapping[str, str]
    row: str
    values: Mapping[str, Any]
    also: Mapping[str, Any]
    from_weights: Callable[[Mapping[str, Tensor]], dict[str, Any]] = _nothing
    settings: Callable[[CfgNode], dict[str, Any]] = _nothing


def _deltas(cfg: CfgNode) -> dict[str, Any]:
    return {"bbox_coder": {"target_stds": [1 / x for x in cfg.MODEL.ATSS.BBOX_REG_WEIGHTS]}}


_REG_MAX = "MODEL.ATSS.REGRESSIONS.distribution.REG_MAX"
_OF_ATSS = {"cls_score": "atss_cls", "bbox_pred": "atss_reg", "ctrness": "atss_centerness"}
DETECTORS = {
    "atss": Detector(
        head="ATSSHead",
        predictors=_OF_ATSS,
        row="ATSS_R_50_FPN_1x",
        values={
            "MODEL.ATSS.SCORE": "product",
            "MODEL.ATSS.RANK_BY_CLASS": True,
            "MODEL.ATSS.BOX_NORMALISER_LEAST": 1.0,
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
        raise ConversionError(f"unknown detector {given!r}; known are {sorted(DETECTORS)}")
    parts = {name.split(".")[1] for name in names if name.startswith("bbox_head.")}
    predictors = parts - {*_TOWERS}
    alike = [x for x in DETECTORS if {*DETECTORS[x].predictors.values()} == predictors]
    if not alike:
        raise ConversionError(
            f"what predicts in these weights is called {sorted(predictors)}, as in none of mmdet's "
            f"detectors that are known: {sorted(DETECTORS)}"
        )
    if given is not None and given not in alike:
        raise ConversionError(
            f"by their names these are weights of mmdet's {' or '.join(alike)}, not of {given}"
        )
    # Of a class, or with the modules before it.
    types = {*re.findall(r"type['\"]?\s*[=:]\s*['\"](?:\w+\.)*(\w+)['\"]", config)}
    said = [x for x in alike if DETECTORS[x].head in types]
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
