"""From the weights of the authors' code or of mmdet to ours, and to mmdet's again."""

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
from ..data.datasets import classes_of
from ..errors import UserError
from ..weights import find_weights, load_weights, unwrapped
from .classes import KEY
from .detectors import DETECTORS, ConversionError, detector_of
from .names import OFFICIAL, mmdet_rules, rename

SOURCES = ("official", "mmdet")
# Blocks of the stages res2 to res5 -> depth.
DEPTHS: dict[tuple[int, ...], int] = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
# The authors' frozen batch norm divides by sqrt(var), ours by sqrt(var + this).
BATCH_NORM_EPS = 1e-5


def load(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, whoever wrote it. Nothing in the file is executed.

    Raises:
        WeightsError: where the file is not one, is damaged, or holds more than data.
    """
    return find_weights(load_weights(path), path)


def _config_text(content: Any) -> str:
    """Of a file of mmdet 3, or of mmdet 2; "" where it holds none."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    found = [meta.get(key) for key in ("cfg", "config")] if isinstance(meta, Mapping) else []
    return next((x for x in found if isinstance(x, str)), "")


def convert(
    state_dict: Mapping[str, Tensor], source: str, detector: str | None = None
) -> dict[str, Tensor]:
    """Weights under our names, with our numbers.

    Args:
        state_dict: of a model with one anchor per location.
        source: "official" (the authors' code) or "mmdet".
        detector: of mmdet, which of :data:`~atss.checkpoints.detectors.DETECTORS`; None where the
            names of the weights tell.
    Returns:
        a state dict of the model of :func:`config_for`.

    Raises:
        ConversionError: where anything is missing, unexpected, or of another shape.
    """
    if source not in SOURCES:
        raise ConversionError(f"unknown source {source!r}: choose from {[*SOURCES]}")
    *_, state_dict = unwrapped(dict(state_dict))
    if source == "mmdet":
        detector = detector_of(state_dict, given=detector)
        rules = mmdet_rules(DETECTORS[detector].predictors)
    else:
        rules = OFFICIAL
        if detector is not None:
            raise ConversionError("a detector is said of mmdet's weights alone")
    names, unknown = rename(list(state_dict), rules)
    converted = {new: state_dict[old] for old, new in names.items()}
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
    # What a model counts in training, and others' weights do not hold, as it begins.
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
    """The config that converted weights need.

    Args:
        state_dict: from :func:`convert`.
        source: whose they were.
        regression: "box" or "point", which the authors' weights do not tell.
        detector: of mmdet, whose they were there.

    Raises:
        ConversionError: where the weights are of no backbone that is known, or it is not said of
            which of mmdet's detectors.
    """
    if (source == "mmdet") != (detector in DETECTORS):
        raise ConversionError(
            f"detector is {detector!r}, of {source}: mmdet's are {sorted(DETECTORS)}, and the "
            "authors' code has none to be named"
        )
    theirs = DETECTORS["atss" if detector is None else detector]
    try:
        blocks = tuple(_blocks(state_dict, stage) for stage in range(2, 6))
        conv2 = state_dict["backbone.bottom_up.res2.0.conv2.weight"].shape
        classes = state_dict["head.cls_score.weight"].shape[0]
        depth = DEPTHS[blocks]
        told = theirs.from_weights(state_dict)
    except (KeyError, IndexError, TypeError) as error:
        raise ConversionError(
            f"these are no weights of a detector with a ResNet-50, 101 or 152: {error} is missing "
            "or unknown"
        ) from error
    cfg = get_config(theirs.row)
    resnet = cfg.MODEL.RESNETS
    resnet.DEPTH = depth
    resnet.NUM_GROUPS = conv2[0] // conv2[1]
    resnet.WIDTH_PER_GROUP = conv2[1]
    # The authors stride in the 1 x 1 convolutions of plain ResNets, and in no ResNeXt.
    resnet.STRIDE_IN_1X1 = source == "official" and resnet.NUM_GROUPS == 1
    offsets = {
        stage: f"backbone.bottom_up.res{stage}.0.conv2_offset.weight" for stage in range(2, 6)
    }
    resnet.DEFORM_ON_PER_STAGE = [name in state_dict for name in offsets.values()]
    channels = [state_dict[name].shape[0] for name in offsets.values() if name in state_dict]
    resnet.DEFORM_MODULATED = bool(channels) and channels[0] % 27 == 0
    versions = {27: "v2", 18: "v1"}
    in_tower = r"head\.cls_subnet\.\d+\.offset\.weight"
    found = [len(x) for k, x in state_dict.items() if re.fullmatch(in_tower, k)]
    if found and found[0] not in versions:
        raise ConversionError(
            f"offsets of a tower have {found[0]} channels, as of several groups: not 18 or 27"
        )
    cfg.MODEL.ATSS.DEFORM_TOWER = versions[found[0]] if found else ""
    cfg.MODEL.ATSS.TOWER_BIAS = any(map(is_tower_bias, state_dict))
    cfg.MODEL.ATSS.NUM_CLASSES = classes
    if any(len(classes_of(name) or ()) != classes for name in cfg.DATASETS.TEST):
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()  # not COCO's, and weights do not tell whose
    if source == "official":
        cfg.MODEL.ATSS.REGRESSION = regression
        cfg.MODEL.ATSS.LEGACY_PIXELS = True
    else:
        cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.0
        cfg.MODEL.ATSS.RELU_BEFORE_P7 = False
        for key, value in (dict(theirs.values) | told).items():
            cfg.merge_from_list([key, value])
        cfg.INPUT.FORMAT = "RGB"
        cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
        cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    return cfg


def convert_file(
    path: Path, target: Path, source: str, regression: str = "box", detector: str | None = None
) -> tuple[CfgNode, str]:
    """Converts another project's checkpoint, and writes beside it, as .yaml, the config that it
    needs. Eighty classes get COCO's names, as in :func:`config_for`. Where anything does not fit,
    nothing is written.

    Args:
        detector: of mmdet; None: names of weights tell, or the config that is in the file.
    Returns:
        that config, and the detector.

    Raises:
        WeightsError: saying what.
    """
    refuse_to_replace(target, target.with_suffix(".yaml"))
    content = load_weights(path)
    *_, weights = unwrapped(find_weights(content, path))
    if source == "mmdet":
        detector = detector_of(weights, _config_text(content), detector)
    converted = convert(weights, source, detector)
    cfg = config_for(converted, source, regression, detector)
    cfg.MODEL.WEIGHTS = str(target.absolute())  # a relative one begins where a command is given
    written = {"model": converted, "__author__": f"converted from {source}"}
    written[KEY] = class_names(cfg)
    write(target, written, target.with_suffix(".yaml"), cfg.dump())
    return cfg, detector or "atss"


def refuse_to_replace(*files: Path) -> None:
    """Raises a ValueError that names the first of the files, or folders, that exists."""
    for file in files:
        if file.exists():
            raise UserError(f"{file} already exists: choose another OUT")


def write(target: Path, content: dict, config_file: Path, config: str) -> None:
    """The weights and the config, both or nothing.

    Raises:
        OSError: in a sentence, if they cannot be written.
    """
    unfinished = {file: file.with_name(f"{file.name}.unfinished") for file in (target, config_file)}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(content, unfinished[target])
            unfinished[config_file].write_text(config)
        except BaseException:  # a full disk needs the room
            for file in unfinished.values():
                file.unlink(missing_ok=True)
            raise
        for file in unfinished:
            unfinished[file].rename(file)
    except (OSError, RuntimeError) as error:  # torch hides the disk's error behind one of its own
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or str(cause).partition("\n")[0]
        raise OSError(f"cannot write {target}: {reason}") from error


def is_tower_bias(name: str) -> bool:
    """Whether it is the bias of a convolution (not of a norm or of offsets) that a norm follows."""
    tower = re.fullmatch(r"head\.\w+_subnet\.(\d+)\.(conv\.)?bias", name)
    if tower:
        return int(tower[1]) % 3 == 0
    return bool(
        re.fullmatch(r"head\.(stack\.\d+\.0|bbox_conv\.0|\w+_decomposition\.mixture)\.bias", name)
    )


def _name_deformable(converted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Deformable layers of the towers by our names; in mmdet they carry the weight themselves."""
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
    """The state dict of the model of a config, without numbers."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg).state_dict()


def check_against(
    converted: Mapping[str, Tensor], unknown: list[str], model: Mapping[str, Tensor]
) -> None:
    """Against the state dict of a model, as from :func:`shapes_of`.

    Raises:
        ConversionError: listing what is missing, unexpected or of another shape.
    """
    shapes = {k: tuple(v.shape) for k, v in model.items()}
    problems = [f"unexpected: {name}" for name in unknown]
    problems += [f"unexpected: {name}" for name in converted if name not in shapes]
    problems += [f"missing: {name}" for name in shapes if name not in converted]
    problems += [
        f"wrong shape: {name} is {tuple(value.shape)}, not {shapes[name]}"
        for name, value in converted.items()
        if name in shapes and tuple(value.shape) != shapes[name]
    ]
    if problems:
        raise ConversionError("the weights do not fit:\n  " + "\n  ".join(problems))
