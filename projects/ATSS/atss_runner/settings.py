"""The metadata of an exported file, checked."""

import json
from collections.abc import Mapping
from typing import Any

from .media import FileError
from .postprocess import SUPPRESSIONS
from .thresholds import is_score

SCHEMA = 1
# The fields that the runner reads.
FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("classes", "ids", "inputs", "outputs", "pixel_mean", "strides"), list),
    **dict.fromkeys(("anchors_per_location", "divisor", "max_detections", "topk"), int),
    **dict.fromkeys(("max_size", "min_size"), int),
    **dict.fromkeys(("clip", "legacy_pixels", "nms_inside", "rank_anchors"), bool),
    **dict.fromkeys(("rank_by_class", "threshold_on_score"), bool),
    "score_thresh": (int, float),
    "suppression": dict,
}
CHOICES = {"input_format": ("BGR", "RGB"), "score": ("product", "sqrt")}
CHOICES["resize"] = ("shortest", "stretch")


def read_settings(path: str, properties: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings among the metadata properties of a file.

    Raises:
        FileError: if the exporter did not write them, or a newer one did.
    """
    if "atss" not in properties:
        raise FileError(f"{path} is no exported detector: it has no metadata 'atss'")
    try:
        settings = json.loads(properties["atss"])
        schema = settings["schema"]
        is_newer = schema > SCHEMA
    except (ValueError, TypeError, KeyError) as error:
        raise FileError(f"{path} has damaged metadata 'atss': no JSON with a schema") from error
    if is_newer:
        raise FileError(
            f"{path} has metadata of schema {schema}, this runner reads up to {SCHEMA}: "
            "install a newer atss-runner"
        )
    for name, kind in FIELDS.items():
        if not isinstance(settings.get(name), kind):
            value = repr(settings[name])[:40] if name in settings else "missing"
            raise FileError(f"{path} has damaged metadata 'atss': {name} is {value}")
    thresholds = settings.get("thresholds")
    if thresholds is not None:
        valid = isinstance(thresholds, list) and len(thresholds) == len(settings["classes"])
        if not valid or not all(x is None or is_score(x) for x in thresholds):
            value = repr(thresholds)[:40]
            raise FileError(f"{path} has damaged metadata 'atss': thresholds is {value}")
    parts = {name: settings.get(name) for name in CHOICES}
    parts["suppression"] = settings["suppression"].get("name")
    for name, allowed in (CHOICES | {"suppression": (*SUPPRESSIONS,)}).items():
        if parts[name] not in allowed:
            raise FileError(
                f"{path} needs the {name} {parts[name]!r}, this runner has {', '.join(allowed)}"
            )
    return settings
