"""Conversion of our weights to mmdet."""

from collections.abc import Mapping
from pathlib import Path
from pprint import pformat

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..config.build import candidates_per_level, head_depth
from ..config.checks import flatten
from ..config.files import get_config
from .convert import check_against, is_tower_bias, load, refuse_to_replace, shapes_of, write
from .detectors import DETECTORS, ConversionError, levels_of
from .names import rename, to_mmdet_rules

# Keys for which mmdet supports only the values of a detector's row and of its ``also``.
# fmt: off
FIXED = (
    "MODEL.ATSS.HEAD", "MODEL.ATSS.REGRESSION", "MODEL.ATSS.NORM", "MODEL.ATSS.CENTERNESS",
    "MODEL.ATSS.LEVEL_SCALE", "MODEL.ATSS.DEFORM_TOWER", "MODEL.ATSS.LEGACY_PIXELS",
    "MODEL.ATSS.SUPPRESSION", "MODEL.ATSS.SCORE", "MODEL.ATSS.THRESHOLD_ON_SCORE",
    "MODEL.ATSS.RANK_ANCHORS", "MODEL.ATSS.CLIP_BOXES",
    "MODEL.ATSS.HEADS.TOODHead.INNER", "MODEL.ATSS.HEADS.TOODHead.EXPONENTIAL",
    "MODEL.ATSS.HEADS.ATSSHead.DEFORM_AT",
    "MODEL.ATSS.HEADS.ATSSHead.TOWER", "MODEL.ATSS.HEADS.VFNetHead.INITIAL_DISTANCE",
    "MODEL.BACKBONE.NAME", "MODEL.FPN.FUSE_TYPE", "MODEL.FPN.NORM",
    "MODEL.RESNETS.RES5_DILATION", "MODEL.RESNETS.STEM_OUT_CHANNELS",
)
# fmt: on


def to_mmdet(state_dict: Mapping[str, Tensor], cfg: CfgNode) -> dict[str, Tensor]:
    """Return weights under mmdet's names.

    Args:
        state_dict: of a model of ``cfg``, with any number of classes.

    Raises:
        ConversionError: if mmdet does not support the config, or the weights do not fit it.
    """
    theirs = DETECTORS[detector_for(cfg)]
    for name, value in state_dict.items():
        if is_tower_bias(name) and value.abs().max() > 0:
            raise ConversionError(
                f"mmdet's towers have no biases, but {name} is not zero: train with "
                "MODEL.ATSS.TOWER_BIAS False"
            )
    check_against(state_dict, [], shapes_of(_with_classes_of(cfg, state_dict)))
    levels = levels_of(cfg)
    # mmdet has no counts of a training.
    kept = [k for k, x in state_dict.items() if not is_tower_bias(k) and x.is_floating_point()]
    names, unknown = rename(kept, to_mmdet_rules(levels[0], len(levels) - 2, theirs.predictors))
    if unknown:
        raise ConversionError(f"mmdet's {theirs.head} has no parameters for {', '.join(unknown)}")
    converted = {new: state_dict[old] for old, new in names.items()}
    for name in list(converted):
        if name.endswith(".scale"):
            converted[name] = converted[name].reshape(())
        if name.endswith("running_var"):
            count = name.replace("running_var", "num_batches_tracked")
            converted.setdefault(count, torch.zeros((), dtype=torch.long))
    return converted


def mmdet_config(cfg: CfgNode, state_dict: Mapping[str, Tensor]) -> str:
    """Return the changes to mmdet's own config (such as atss_r50_fpn_1x_coco of mmdet 3) as Python
    code.

    Raises:
        ConversionError: if mmdet does not support the config.
    """
    theirs = DETECTORS[detector_for(cfg)]
    node, resnet = cfg.MODEL.ATSS, cfg.MODEL.RESNETS
    levels = levels_of(cfg)
    num_stages = levels[-1] - 3  # from res2 on
    backbone = {
        "type": "ResNet" if resnet.NUM_GROUPS == 1 else "ResNeXt",
        "depth": resnet.DEPTH,
        "num_stages": num_stages,
        "strides": (1, *[2] * (num_stages - 1)),
        "dilations": (1,) * num_stages,
        "out_indices": tuple(range(num_stages)),
        "style": "caffe" if resnet.STRIDE_IN_1X1 else "pytorch",
        "init_cfg": None,
    }
    if resnet.NUM_GROUPS > 1:
        backbone |= {"groups": resnet.NUM_GROUPS, "base_width": resnet.WIDTH_PER_GROUP}
    if any(resnet.DEFORM_ON_PER_STAGE):
        kind, groups = "DCNv2" if resnet.DEFORM_MODULATED else "DCN", resnet.DEFORM_NUM_GROUPS
        backbone["dcn"] = {"type": kind, "deform_groups": groups, "fallback_on_stride": False}
        backbone["stage_with_dcn"] = tuple(resnet.DEFORM_ON_PER_STAGE[:num_stages])
    channels = [resnet.RES2_OUT_CHANNELS * 2**i for i in range(num_stages)]
    strides = [2**level for level in levels]
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
            "start_level": levels[0] - 2,
            "add_extra_convs": "on_output",
            "relu_before_extra_convs": node.RELU_BEFORE_P7,
            "num_outs": len(strides),
        },
        "bbox_head": {
            "type": theirs.head,
            "num_classes": len(state_dict["head.cls_score.bias"]),
            "in_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "feat_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "stacked_convs": head_depth(cfg),
            "anchor_generator": {
                "type": "AnchorGenerator",
                "ratios": list(node.ANCHOR_RATIOS),
                "octave_base_scale": node.ANCHOR_SCALES[0],
                "scales_per_octave": 1,
                "strides": strides,
                "center_offset": cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
            },
            **theirs.arguments,
            **theirs.settings(cfg),
        },
        "test_cfg": {
            "nms_pre": candidates_per_level(cfg),
            "score_thr": node.SCORE_THRESH_TEST,
            "nms": {
                "type": "nms",
                "iou_threshold": node.NMS_THRESH_TEST,
                **({"class_agnostic": True} if node.CLASS_AGNOSTIC_NMS else {}),
            },
            "max_per_img": cfg.TEST.DETECTIONS_PER_IMAGE,
        },
    }
    return f"model = {pformat(model, sort_dicts=False)}\n"


def convert_file_to_mmdet(path: Path, target: Path, cfg: CfgNode) -> str:
    """Convert our checkpoint, write mmdet's settings beside it, as .py, and return them.

    Raises:
        WeightsError: if the weights cannot be converted.
        UserError, OSError: if a file exists, or cannot be written.
    """
    refuse_to_replace(target, target.with_suffix(".py"))
    weights = load(path)
    config = mmdet_config(cfg, weights)
    content = {"meta": {"cfg": config}, "state_dict": to_mmdet(weights, cfg)}
    write(target, content, target.with_suffix(".py"), config)
    return config


def detector_for(cfg: CfgNode) -> str:
    """Return the mmdet detector that differs least from a config.

    Raises:
        ConversionError: naming a key that mmdet does not support.
    """
    values, differ = dict(flatten(cfg)), {}
    for name, theirs in DETECTORS.items():
        row = dict(flatten(get_config(theirs.row)))
        differ[name] = {
            key: row[key]
            for key in FIXED
            if values[key] not in (row[key], theirs.also.get(key, row[key]))
        }
    detector = min(differ, key=lambda name: len(differ[name]))
    for key, needed in differ[detector].items():
        raise ConversionError(
            f"mmdet's {DETECTORS[detector].head} has only {key} {needed!r}, got {values[key]!r}"
        )
    depth = head_depth(cfg)
    if DETECTORS[detector].head == "TOODHead" and depth != 6:
        raise ConversionError(f"mmdet's TOODHead has only MODEL.ATSS.NUM_CONVS 6, got {depth}")
    if cfg.MODEL.RESNETS.NUM_GROUPS == 1 and cfg.MODEL.RESNETS.WIDTH_PER_GROUP != 64:
        raise ConversionError(
            "mmdet's ResNet has only MODEL.RESNETS.WIDTH_PER_GROUP 64, got "
            f"{cfg.MODEL.RESNETS.WIDTH_PER_GROUP}"
        )
    if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
        raise ConversionError(f"mmdet has only INPUT.FORMAT BGR and RGB, got {cfg.INPUT.FORMAT}")
    if len(cfg.MODEL.ATSS.ANCHOR_SCALES) * len(cfg.MODEL.ATSS.ANCHOR_RATIOS) > 1:
        raise ConversionError("only models with one anchor per location can be converted for mmdet")
    if len(cfg.MODEL.ATSS.IN_FEATURES) != len(levels_of(cfg)):
        raise ConversionError("MODEL.ATSS.IN_FEATURES must have all levels of the FPN for mmdet")
    return detector


def _with_classes_of(cfg: CfgNode, state_dict: Mapping[str, Tensor]) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    if "head.cls_score.bias" in state_dict:
        cfg.MODEL.ATSS.NUM_CLASSES = len(state_dict["head.cls_score.bias"])
    return cfg
