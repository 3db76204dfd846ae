"""Conversion of the authors', mmdet's and OTX's weights."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor

from ..config.derive import class_names
from ..config.files import get_config
from ..config.inputs import values_in
from ..data.datasets import classes_of
from ..errors import UserError
from ..weights import find_weights, load_weights, unwrapped
from .classes import KEY
from .detectors import DETECTORS, ConversionError, detector_of
from .inputs import ENTRY
from .names import OFFICIAL, mmdet_rules, rename
from .settings import apply_settings, class_names_in

logger = logging.getLogger(__name__)

# {source: {key: value}} over the detector's row. "otx" is OpenVINO Training Extensions, later
# getitune, whose pixels are RGB from 0 to 1.
SOURCES: dict[str, dict[str, Any]] = {
    "official": {"MODEL.ATSS.LEGACY_PIXELS": True},
    "mmdet": {
        "MODEL.ANCHOR_GENERATOR.OFFSET": 0.0,
        "MODEL.ATSS.RELU_BEFORE_P7": False,
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    },
    "otx": {
        "MODEL.ANCHOR_GENERATOR.OFFSET": 0.0,
        "MODEL.ATSS.RELU_BEFORE_P7": True,
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
        "MODEL.PIXEL_STD": [255.0, 255.0, 255.0],
        "INPUT.RESIZE": "stretch",
        "INPUT.MIN_SIZE_TRAIN": (800,),
        "INPUT.MAX_SIZE_TRAIN": 992,
        "INPUT.MIN_SIZE_TEST": 800,
        "INPUT.MAX_SIZE_TEST": 992,
    },
}
# OTX's only backbone besides ResNets: a weight that identifies it, and the row with it.
MOBILENET = ("backbone.bottom_up.net.conv_stem.weight", "ATSS_mobilenetv2_FPN_coco")
# Blocks of the stages res2 to res5 -> depth of the ResNet.
DEPTHS: dict[tuple[int, ...], int] = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
# The authors' frozen batch norm divides by sqrt(var), ours by sqrt(var + this).
BATCH_NORM_EPS = 1e-5


def load(path: str | Path) -> dict[str, Tensor]:
    return find_weights(load_weights(path), path)


def _config_text(content: Any) -> str:
    meta = content.get("meta") if isinstance(content, Mapping) else None
    configs = [meta.get(key) for key in ("cfg", "config")] if isinstance(meta, Mapping) else []
    return next((x for x in configs if isinstance(x, str)), "")


def convert(
    state_dict: Mapping[str, Tensor], source: str, detector: str | None = None
) -> dict[str, Tensor]:
    """Convert weights to our names and values, for :func:`config_for`.

    Args:
        state_dict: of a model with one anchor per location.
        source: "official" (the authors' code), "mmdet" or "otx".
        detector: for mmdet, one of DETECTORS; None: the names of the weights decide.

    Raises:
        ConversionError: listing names that are missing, unexpected, or of another shape.
    """
    if source not in SOURCES:
        raise ConversionError(f"unknown source {source!r}: choose from {[*SOURCES]}")
    *_, state_dict = unwrapped(dict(state_dict))
    if source != "mmdet" and detector is not None:
        raise ConversionError("a detector can be chosen for mmdet's weights only")
    rules = OFFICIAL
    if source != "official":
        found = detector_of(state_dict, choice="atss" if source == "otx" else detector)
        rules = mmdet_rules(DETECTORS[found].predictors)
        detector = found if source == "mmdet" else None
    names, unknown = rename(list(state_dict), rules)
    converted = {new: _single(state_dict[old]) for old, new in names.items()}
    if source == "official":
        for name, value in converted.items():
            if name.endswith("running_var"):
                converted[name] = value - BATCH_NORM_EPS
    else:
        converted = _name_deformable(converted)
    for name, value in converted.items():
        if name.endswith(".scale") and value.ndim == 0:
            converted[name] = value.reshape(1)
    cfg = config_for(converted, source, detector=detector)
    model = shapes_of(cfg)
    # Counts of a training, which other projects' weights lack, begin at 0.
    for name, x in model.items():
        if not x.is_floating_point():
            converted.setdefault(name, torch.zeros(x.shape, dtype=x.dtype))
    check_against(converted, unknown, model)
    return converted


def config_for(
    state_dict: Mapping[str, Tensor],
    source: str,
    regression: str = "box",
    detector: str | None = None,
) -> CfgNode:
    """Return the config for weights from :func:`convert`.

    Args:
        regression: "box" or "point", which the authors' weights do not reveal.
        detector: one of DETECTORS for mmdet, None for the others.

    Raises:
        ConversionError: if the backbone is unknown, or ``detector`` does not fit ``source``.
    """
    if (source == "mmdet") != (detector in DETECTORS):
        raise ConversionError(
            f"unknown detector {detector!r} of {source}: choose from {sorted(DETECTORS)} for "
            "mmdet, and none for official and otx"
        )
    theirs = DETECTORS["atss" if detector is None else detector]
    try:
        classes = state_dict["head.cls_score.weight"].shape[0]
        values = theirs.from_weights(state_dict)
        if MOBILENET[0] in state_dict:
            cfg = get_config(MOBILENET[1])
        else:
            cfg = get_config(theirs.row)
            _set_resnet(cfg, state_dict)
    except (KeyError, IndexError, TypeError) as error:
        raise ConversionError(
            "only detectors with a ResNet-50, 101 or 152, or OTX's MobileNetV2, can be converted: "
            f"in these weights {error} is missing or unknown"
        ) from error
    # The authors' ResNets have the stride in the 1 x 1 convolutions, their ResNeXts have not.
    resnet = cfg.MODEL.RESNETS
    resnet.STRIDE_IN_1X1 = source == "official" and resnet.NUM_GROUPS == 1
    versions = {27: "v2", 18: "v1"}
    in_tower = r"head\.cls_subnet\.\d+\.offset\.weight"
    channels = [len(x) for k, x in state_dict.items() if re.fullmatch(in_tower, k)]
    if channels and channels[0] not in versions:
        raise ConversionError(
            f"offsets of a tower must have 18 or 27 channels (one group), got {channels[0]}"
        )
    cfg.MODEL.ATSS.DEFORM_TOWER = versions[channels[0]] if channels else ""
    cfg.MODEL.ATSS.TOWER_BIAS = any(map(is_tower_bias, state_dict))
    cfg.MODEL.ATSS.NUM_CLASSES = classes
    if any(len(classes_of(name) or ()) != classes for name in cfg.DATASETS.TEST):
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()  # an unknown data set, not COCO
    if source == "official":
        values = {"MODEL.ATSS.REGRESSION": regression}
    else:
        values = {**theirs.values, **values}
    for key, value in (SOURCES[source] | values).items():
        cfg.merge_from_list([key, value])
    return cfg


def _set_resnet(cfg: CfgNode, state_dict: Mapping[str, Tensor]) -> None:
    """Set the keys of the ResNet, in place.

    Raises:
        KeyError: if a weight is missing, or the numbers of blocks are of no known depth.
    """
    resnet = cfg.MODEL.RESNETS
    conv2 = state_dict["backbone.bottom_up.res2.0.conv2.weight"].shape
    resnet.DEPTH = DEPTHS[tuple(_blocks(state_dict, stage) for stage in range(2, 6))]
    resnet.NUM_GROUPS = conv2[0] // conv2[1]
    resnet.WIDTH_PER_GROUP = conv2[1]
    offsets = [f"backbone.bottom_up.res{i}.0.conv2_offset.weight" for i in range(2, 6)]
    resnet.DEFORM_ON_PER_STAGE = [name in state_dict for name in offsets]
    channels = [state_dict[name].shape[0] for name in offsets if name in state_dict]
    resnet.DEFORM_MODULATED = bool(channels) and channels[0] % 27 == 0


def convert_file(
    path: Path,
    target: Path,
    source: str,
    regression: str = "box",
    detector: str | None = None,
    entry: str = "",
) -> tuple[CfgNode, str]:
    """Convert another project's checkpoint, and write its config beside it, as .yaml. Return config
    and detector. Settings are those in mmdet's file, class names those in mmdet's and OTX's;
    warnings name values that are not taken over, or assumed. Eighty classes without names get
    COCO's.

    Args:
        detector: for mmdet; None: the names of the weights decide, or the config in the file.
        entry: of the file with the weights, such as "ema_state_dict"; "": its usual one.

    Raises:
        WeightsError: if the weights cannot be converted.
        UserError, OSError: if a file exists, or cannot be written.
    """
    refuse_to_replace(target, target.with_suffix(".yaml"))
    file_content = load_weights(path)
    chosen = _select(file_content, entry, path) if entry else file_content
    *_, weights = unwrapped(find_weights(chosen, path))
    if source == "mmdet":
        detector = detector_of(weights, _config_text(file_content), detector)
    converted = convert(weights, source, detector)
    cfg = config_for(converted, source, regression, detector)
    if source == "mmdet":
        _take_settings(cfg, file_content, path)
    if source != "official":
        _take_names(cfg, file_content, path)
    cfg.MODEL.WEIGHTS = str(target.absolute())  # independent of the working directory
    content = {"model": converted, "__author__": f"converted from {source}"}
    content |= {KEY: class_names(cfg), ENTRY: values_in(cfg)}
    write(target, content, target.with_suffix(".yaml"), cfg.dump())
    return cfg, detector or "atss"


def _select(content: Any, entry: str, path: Path) -> dict[str, Any]:
    """Return an entry of a file, without the count that mmengine averages by."""
    if not isinstance(content, Mapping) or not isinstance(content.get(entry), Mapping):
        entries = content.items() if isinstance(content, Mapping) else ()
        names = [key for key, value in entries if isinstance(value, Mapping)]
        raise ConversionError(f"{path} has no {entry} with weights: choose from {names}")
    return {name: value for name, value in content[entry].items() if name != "steps"}


def _single(value: Tensor) -> Tensor:
    """Return float32 for weights of any precision."""
    return value.float() if value.is_floating_point() else value


def _take_settings(cfg: CfgNode, content: Any, path: Path) -> None:
    refused, assumed = apply_settings(cfg, _config_text(content))
    if refused:
        logger.warning(f"Not taken over from the config in {path}: {'; '.join(refused)}")
    if assumed:
        logger.warning(f"Assumed, because {path} does not state them: {'; '.join(assumed)}")


def _take_names(cfg: CfgNode, content: Any, path: Path) -> None:
    names = class_names_in(content)
    count = cfg.MODEL.ATSS.NUM_CLASSES
    if names and len(names) != count:
        logger.warning(f"{path} has {len(names)} class names, but weights of {count} classes")
    elif names:
        cfg.MODEL.ATSS.CLASS_NAMES = names
        if any(list(classes_of(name) or ()) != names for name in cfg.DATASETS.TEST):
            cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()


def refuse_to_replace(*files: Path) -> None:
    for file in files:
        if file.exists():
            raise UserError(f"{file} already exists: choose another OUT")


def write(target: Path, content: dict, config_file: Path, config: str) -> None:
    unfinished = {file: file.with_name(f"{file.name}.unfinished") for file in (target, config_file)}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(content, unfinished[target])
            unfinished[config_file].write_text(config)
        except BaseException:  # free the space on a full disk
            for file in unfinished.values():
                file.unlink(missing_ok=True)
            raise
        for file in unfinished:
            unfinished[file].rename(file)
    except (OSError, RuntimeError) as error:  # torch raises its own after the disk's
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or str(cause).partition("\n")[0]
        raise OSError(f"cannot write {target}: {reason}") from error


def is_tower_bias(name: str) -> bool:
    tower = re.fullmatch(r"head\.\w+_subnet\.(\d+)\.(conv\.)?bias", name)
    if tower:
        return int(tower[1]) % 3 == 0
    return bool(
        re.fullmatch(r"head\.(stack\.\d+\.0|bbox_conv\.0|\w+_decomposition\.mixture)\.bias", name)
    )


def _name_deformable(converted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename deformable layers of towers, which in mmdet have the weight themselves."""
    renamed = {}
    for name, value in converted.items():
        parent, _, kind = name.rpartition(".")
        if f"{parent}.offset.weight" in converted:
            name = f"{parent}.conv.{kind}"
        renamed[name] = value
    return renamed


def _blocks(state_dict: Mapping[str, Tensor], stage: int) -> int:
    prefix = f"backbone.bottom_up.res{stage}."
    return len({n.split(".")[3] for n in state_dict if n.startswith(prefix)})


def shapes_of(cfg: CfgNode) -> dict[str, Tensor]:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg).state_dict()


def check_against(
    converted: Mapping[str, Tensor], unknown: list[str], model: Mapping[str, Tensor]
) -> None:
    shapes = {k: tuple(v.shape) for k, v in model.items()}
    problems = [f"unexpected: {name}" for name in unknown]
    problems += [f"unexpected: {name}" for name in converted if name not in shapes]
    problems += [f"missing: {name}" for name in shapes if name not in converted]
    problems += [
        f"wrong shape: {name} must be {shapes[name]}, got {tuple(value.shape)}"
        for name, value in converted.items()
        if name in shapes and tuple(value.shape) != shapes[name]
    ]
    if problems:
        raise ConversionError("the weights do not fit:\n  " + "\n  ".join(problems))
