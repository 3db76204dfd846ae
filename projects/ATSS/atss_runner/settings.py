"""The metadata of an exported file, checked."""

import json
from collections.abc import Mapping
from typing import Any

from .media import FileError
from .planes import FORMAT
from .postprocess import SUPPRESSIONS
from .thresholds import is_score

# 2: "resize", "tiles", planes, and "class_agnostic" of suppressions, without which older runners
# detect wrongly or fail.
SCHEMA = 2
# Fields that older files lack.
DEFAULTS: dict[str, Any] = {"resize": "shortest", "tiles": {}, "thresholds": None}
# The fields that the runner reads.
FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("classes", "ids", "inputs", "outputs", "pixel_mean", "strides"), list),
    **dict.fromkeys(("anchors_per_location", "divisor", "max_detections", "topk"), int),
    **dict.fromkeys(("max_size", "min_size"), int),
    **dict.fromkeys(("clip", "legacy_pixels", "nms_inside", "rank_anchors"), bool),
    **dict.fromkeys(("rank_by_class", "threshold_on_score"), bool),
    "score_thresh": (int, float),
    **dict.fromkeys(("suppression", "tiles"), dict),
}
OF_PLANES: dict[str, type | tuple[type, ...]] = {"highest": (int, float), "shown_planes": list}
CHOICES = {
    "input_format": ("BGR", "RGB", FORMAT),
    "resize": ("shortest", "stretch"),
    "score": ("product", "sqrt"),
    "suppression": (*SUPPRESSIONS,),
}


def read_settings(path: str, properties: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings among the metadata properties of a file.

    Raises:
        FileError: if the exporter did not write them, or a newer one did.
    """
    if "atss" not in properties:
        raise FileError(f"{path} is no exported detector: it has no metadata 'atss'")
    try:
        settings = DEFAULTS | json.loads(properties["atss"])
        is_newer = settings["schema"] > SCHEMA
    except (ValueError, TypeError, KeyError) as error:
        raise FileError(f"{path} has damaged metadata 'atss': no JSON with a schema") from error
    if is_newer:
        raise FileError(
            f"{path} has metadata of schema {settings['schema']}, this runner reads up to "
            f"{SCHEMA}: install a newer atss-runner"
        )
    fields = FIELDS | (OF_PLANES if settings.get("input_format") == FORMAT else {})
    damaged = [name for name, kind in fields.items() if not isinstance(settings.get(name), kind)]
    if not damaged and not _are_thresholds(settings["thresholds"], settings["classes"]):
        damaged.append("thresholds")
    for name in damaged:
        value = repr(settings[name])[:40] if name in settings else "missing"
        raise FileError(f"{path} has damaged metadata 'atss': {name} is {value}")
    parts = settings | {"suppression": settings["suppression"].get("name")}
    for name, allowed in CHOICES.items():
        if (part := parts.get(name)) not in allowed:
            choices = ", ".join(allowed)
            raise FileError(f"{path} needs the {name} {part!r}, this runner has {choices}")
    return settings


def _are_thresholds(value: Any, classes: list) -> bool:
    if not isinstance(value, list):
        return value is None
    return len(value) == len(classes) and all(x is None or is_score(x) for x in value)
