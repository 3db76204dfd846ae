"""From the weights of the authors' code or of mmdet to ours, and to mmdet's again."""

import re
from collections.abc import Mapping
from pathlib import Path
from pprint import pformat

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor

from ..data.datasets import classes_of
from ..model_zoo import get_config
from ..weights import WeightsError, read, require_tensors
from .names import MMDET, OFFICIAL, Rule, rename, to_mmdet_rules

SOURCES: dict[str, list[Rule]] = {"official": OFFICIAL, "mmdet": MMDET}
# Blocks of the stages res2 to res5 -> depth.
DEPTHS = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
# All that mmdet's ATSS can do of these keys of MODEL.ATSS.
MMDETS_ATSS = {
    "HEAD": "ATSSHead",
    "REGRESSION": "box",
    "NORM": "GN",
    "CENTERNESS": "box",
    "LEVEL_SCALE": True,
    "DEFORM_TOWER": "",
    "LEGACY_PIXELS": False,
}
# The authors' frozen batch norm divides by sqrt(var), ours by sqrt(var + this).
BATCH_NORM_EPS = 1e-5


class ConversionError(WeightsError):
    """Says what does not fit, name by name."""


def load(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, whoever wrote it. Nothing in the file is executed.

    Raises:
        WeightsError: where the file is not one, is damaged, or holds more than data.
    """
    content = read(path)
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    require_tensors(content, path)
    return {name: torch.as_tensor(value) for name, value in content.items()}


def convert(state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights under our names, with our numbers.

    Args:
        state_dict: of an ATSS model with one anchor per location.
        source: "official" (the authors' code) or "mmdet".
    Returns:
        a state dict of the model of :func:`config_for`.

    Raises:
        ConversionError: where anything is missing, unexpected, or of another shape.
    """
    if source not in SOURCES:
        raise ConversionError(f"unknown source {source!r}; known are {[*SOURCES]}")
    state_dict = _without_prefix(state_dict)
    names, unknown = rename(list(state_dict), SOURCES[source])
    converted = {new: state_dict[old] for old, new in names.items()}
    if source == "official":
        for name, value in converted.items():
            if name.endswith("running_var"):
                converted[name] = value - BATCH_NORM_EPS
    else:
        converted = _name_deformable(converted)
    for name, value in converted.items():
        if name.startswith("head.scales") and value.ndim == 0:
            converted[name] = value.reshape(1)
    _check(converted, unknown, source)
    return converted


def config_for(state_dict: Mapping[str, Tensor], source: str, regression: str = "box") -> CfgNode:
    """The config that converted weights need.

    Args:
        state_dict: from :func:`convert`.
        source: whose they were.
        regression: "box" or "point", which weights do not tell.

    Raises:
        ConversionError: where the weights are of no backbone that is known.
    """
    try:
        blocks = tuple(_blocks(state_dict, stage) for stage in range(2, 6))
        conv2 = state_dict["backbone.bottom_up.res2.0.conv2.weight"].shape
        classes = state_dict["head.cls_score.weight"].shape[0]
        depth = DEPTHS[blocks]
    except KeyError as error:
        raise ConversionError(
            f"these are no weights of an ATSS with a ResNet-50, 101 or 152: {error} is missing or "
            "unknown"
        ) from error
    cfg = get_config("ATSS_R_50_FPN_1x")
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
    tower = state_dict.get("head.cls_subnet.9.offset.weight")
    cfg.MODEL.ATSS.DEFORM_TOWER = "" if tower is None else ("v2" if len(tower) == 27 else "v1")
    cfg.MODEL.ATSS.TOWER_BIAS = any(map(_is_tower_bias, state_dict))
    cfg.MODEL.ATSS.NUM_CLASSES = classes
    cfg.MODEL.ATSS.REGRESSION = regression
    if any(len(classes_of(name) or ()) != classes for name in cfg.DATASETS.TEST):
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()  # not COCO's, and weights do not tell whose
    if source == "official":
        cfg.MODEL.ATSS.LEGACY_PIXELS = True
    else:
        cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.0
        cfg.MODEL.ATSS.RELU_BEFORE_P7 = False
        cfg.MODEL.ATSS.SCORE = "product"
        cfg.INPUT.FORMAT = "RGB"
        cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
        cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    return cfg


def to_mmdet(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under mmdet's names, whole.

    Raises:
        ConversionError: where mmdet's ATSS has no place for something, or needs what is not there.
    """
    state_dict = dict(state_dict)
    for name in [n for n in state_dict if _is_tower_bias(n)]:
        if state_dict.pop(name).abs().max() > 0:
            raise ConversionError(
                f"mmdet's towers have no biases, but {name} is not zero: train with "
                "MODEL.ATSS.TOWER_BIAS False"
            )
    lateral = re.compile(r"backbone\.fpn_lateral(\d)\.weight")
    laterals = sorted(int(m[1]) for m in map(lateral.fullmatch, state_dict) if m)
    if not laterals:
        raise ConversionError("these are no weights of an ATSS with an FPN")
    names, unknown = rename(list(state_dict), to_mmdet_rules(laterals[0], len(laterals)))
    if unknown:
        raise ConversionError(f"mmdet's ATSS has no place for {', '.join(unknown)}")
    converted = {new: state_dict[old] for old, new in names.items()}
    for name in list(converted):
        if name.startswith("bbox_head.scales"):
            converted[name] = converted[name].reshape(())
        if name.endswith("running_var"):
            count = name.replace("running_var", "num_batches_tracked")
            converted[count] = torch.zeros((), dtype=torch.long)
    needed = [f"bbox_head.scales.{level}.scale" for level in range(len(laterals) + 2)]
    needed += [f"bbox_head.atss_{part}.weight" for part in ("cls", "reg", "centerness")]
    needed += [
        name.replace("conv.weight", "gn.weight")
        for name in converted
        if re.fullmatch(r"bbox_head\.\w+_convs\.\d\.conv\.weight", name)
    ]
    missing = [name for name in needed if name not in converted]
    if missing:
        raise ConversionError(
            f"mmdet's ATSS needs {', '.join(missing)}, which these weights have nothing for"
        )
    return converted


def mmdet_config(cfg: CfgNode) -> str:
    """What mmdet's own config of ATSS (atss_r50_fpn_1x_coco of mmdet 3) has to be
    changed to for weights of :func:`to_mmdet`, as Python.

    Args:
        cfg: of the run that the weights come from, its number of classes resolved.

    Raises:
        ConversionError: where mmdet's ATSS cannot do what the config says.
    """
    node, resnet = cfg.MODEL.ATSS, cfg.MODEL.RESNETS
    for key, needed in MMDETS_ATSS.items():
        if node[key] != needed:
            raise ConversionError(
                f"mmdet's ATSS has nothing like MODEL.ATSS.{key} {node[key]!r}: only {needed!r}"
            )
    if len(node.ANCHOR_SCALES) * len(node.ANCHOR_RATIOS) > 1:
        raise ConversionError("only models with one anchor per location are converted for mmdet")
    stages = [int(name.removeprefix("res")) for name in cfg.MODEL.FPN.IN_FEATURES]
    count = stages[-1] - 1  # from res2 on
    backbone = {
        "type": "ResNet" if resnet.NUM_GROUPS == 1 else "ResNeXt",
        "depth": resnet.DEPTH,
        "num_stages": count,
        "strides": (1, *[2] * (count - 1)),
        "dilations": (1,) * count,
        "out_indices": tuple(range(count)),
        "style": "caffe" if resnet.STRIDE_IN_1X1 else "pytorch",
        "init_cfg": None,
    }
    if resnet.NUM_GROUPS > 1:
        backbone |= {"groups": resnet.NUM_GROUPS, "base_width": resnet.WIDTH_PER_GROUP}
    if any(resnet.DEFORM_ON_PER_STAGE):
        kind, groups = "DCNv2" if resnet.DEFORM_MODULATED else "DCN", resnet.DEFORM_NUM_GROUPS
        backbone["dcn"] = {"type": kind, "deform_groups": groups, "fallback_on_stride": False}
        backbone["stage_with_dcn"] = tuple(resnet.DEFORM_ON_PER_STAGE[:count])
    channels = [resnet.RES2_OUT_CHANNELS * 2**i for i in range(count)]
    strides = [2**level for level in range(stages[0], stages[-1] + 3)]
    model = {
        "data_preprocessor": {
            "mean": list(cfg.MODEL.PIXEL_MEAN),
            "std": list(cfg.MODEL.PIXEL_STD),
            "bgr_to_rgb": cfg.INPUT.FORMAT == "RGB",
        },
        "backbone": backbone,
        "neck": {
            "in_channels": channels,
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "start_level": stages[0] - 2,
            "add_extra_convs": "on_output",
            "relu_before_extra_convs": node.RELU_BEFORE_P7,
            "num_outs": len(strides),
        },
        "bbox_head": {
            "num_classes": node.NUM_CLASSES,
            "in_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "feat_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "stacked_convs": node.NUM_CONVS,
            "anchor_generator": {
                "ratios": list(node.ANCHOR_RATIOS),
                "octave_base_scale": node.ANCHOR_SCALES[0],
                "scales_per_octave": 1,
                "strides": strides,
                "center_offset": cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
            },
            "bbox_coder": {"target_stds": [1 / weight for weight in node.BBOX_REG_WEIGHTS]},
        },
        "test_cfg": {
            "nms_pre": node.TOPK_CANDIDATES_TEST,
            "score_thr": node.SCORE_THRESH_TEST,
            "nms": {"type": "nms", "iou_threshold": node.NMS_THRESH_TEST},
            "max_per_img": cfg.TEST.DETECTIONS_PER_IMAGE,
        },
    }
    return f"model = {pformat(model, sort_dicts=False)}\n"


def _without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without "module.", where a distributed model's names all begin with it."""
    if all(name.startswith("module.") for name in state_dict):
        return {name.removeprefix("module."): value for name, value in state_dict.items()}
    return dict(state_dict)


def _is_tower_bias(name: str) -> bool:
    """Whether it is the bias of a convolution (not of a norm or of offsets) in a tower."""
    parts = name.split(".")
    return (
        parts[0] == "head"
        and parts[1].endswith("_subnet")
        and int(parts[2]) % 3 == 0
        and (parts[3:] in (["bias"], ["conv", "bias"]))
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


def _check(converted: dict[str, Tensor], unknown: list[str], source: str) -> None:
    """Against the model that the weights say they are of."""
    cfg = config_for(converted, source)
    cfg.MODEL.DEVICE = "meta"  # shapes only
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in build_model(cfg).state_dict().items()}
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
