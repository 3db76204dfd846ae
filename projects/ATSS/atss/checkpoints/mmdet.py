"""From our weights to mmdet's, and what its config has to say for them."""

from collections.abc import Mapping
from pathlib import Path
from pprint import pformat

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..config.build import head_depth
from ..config.checks import flatten
from ..config.files import get_config
from .convert import check_against, is_tower_bias, load, refuse_to_replace, shapes_of, write
from .detectors import DETECTORS, ConversionError, levels_of
from .names import rename, to_mmdet_rules

# What mmdet's detectors, its FPN and its ResNets do of these keys is what the row of the detector
# says, or what it says that they can do also.
FIXED = (
    *(f"MODEL.ATSS.{x}" for x in ("HEAD", "REGRESSION", "NORM", "CENTERNESS", "LEVEL_SCALE")),
    *(f"MODEL.ATSS.{x}" for x in ("DEFORM_TOWER", "LEGACY_PIXELS", "SUPPRESSION", "SCORE")),
    *("MODEL.ATSS.THRESHOLD_ON_SCORE", "MODEL.ATSS.RANK_ANCHORS", "MODEL.ATSS.CLIP_BOXES"),
    *(f"MODEL.ATSS.HEADS.TOODHead.{x}" for x in ("INNER", "EXPONENTIAL")),
    *("MODEL.ATSS.HEADS.ATSSHead.DEFORM_AT", "MODEL.ATSS.HEADS.ATSSHead.TOWER"),
    "MODEL.ATSS.HEADS.VFNetHead.INITIAL_DISTANCE",
    *("MODEL.BACKBONE.NAME", "MODEL.FPN.FUSE_TYPE", "MODEL.FPN.NORM"),
    *("MODEL.RESNETS.RES5_DILATION", "MODEL.RESNETS.STEM_OUT_CHANNELS"),
)


def to_mmdet(state_dict: Mapping[str, Tensor], cfg: CfgNode) -> dict[str, Tensor]:
    """Our weights under mmdet's names, whole.

    Args:
        state_dict: of a model of ``cfg``, with any number of classes.
        cfg: of the run that the weights come from.

    Raises:
        ConversionError: where mmdet cannot do what the config says, or the weights are not those of
            such a model.
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
    # What counts in training has no place there.
    some = [k for k, x in state_dict.items() if not is_tower_bias(k) and x.is_floating_point()]
    names, unknown = rename(some, to_mmdet_rules(levels[0], len(levels) - 2, theirs.predictors))
    if unknown:
        raise ConversionError(f"mmdet's {theirs.head} has no place for {', '.join(unknown)}")
    converted = {new: state_dict[old] for old, new in names.items()}
    for name in list(converted):
        if name.endswith(".scale"):
            converted[name] = converted[name].reshape(())
        if name.endswith("running_var"):
            count = name.replace("running_var", "num_batches_tracked")
            converted.setdefault(count, torch.zeros((), dtype=torch.long))
    return converted


def mmdet_config(cfg: CfgNode, state_dict: Mapping[str, Tensor]) -> str:
    """What mmdet's own config of the detector (atss_r50_fpn_1x_coco of mmdet 3, for example) has to
    be changed to for weights of :func:`to_mmdet`, as Python.

    Args:
        cfg, state_dict: as there.

    Raises:
        ConversionError: where mmdet cannot do what the config says.
    """
    theirs = DETECTORS[detector_for(cfg)]
    node, resnet = cfg.MODEL.ATSS, cfg.MODEL.RESNETS
    levels = levels_of(cfg)
    count = levels[-1] - 3  # stages, from res2 on
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
            **theirs.says,
            **theirs.settings(cfg),
        },
        "test_cfg": {
            "nms_pre": node.TOPK_CANDIDATES_TEST,
            "score_thr": node.SCORE_THRESH_TEST,
            "nms": {"type": "nms", "iou_threshold": node.NMS_THRESH_TEST},
            "max_per_img": cfg.TEST.DETECTIONS_PER_IMAGE,
        },
    }
    return f"model = {pformat(model, sort_dicts=False)}\n"


def convert_file_to_mmdet(path: Path, target: Path, cfg: CfgNode) -> str:
    """Converts a checkpoint of ours for mmdet, and writes beside it, as .py, what mmdet's config
    has to say, which is returned. Where anything does not fit, nothing is written.

    Raises:
        WeightsError: saying what.
    """
    refuse_to_replace(target, target.with_suffix(".py"))
    weights = load(path)
    config = mmdet_config(cfg, weights)
    content = {"meta": {"cfg": config}, "state_dict": to_mmdet(weights, cfg)}
    write(target, content, target.with_suffix(".py"), config)
    return config


def detector_for(cfg: CfgNode) -> str:
    """Which of mmdet's detectors a config's model is: the one that it is most like.

    Raises:
        ConversionError: naming the key of what mmdet's cannot do.
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
            f"mmdet's {DETECTORS[detector].head} has nothing like {key} {values[key]!r}: only "
            f"{needed!r}"
        )
    depth = head_depth(cfg)
    if DETECTORS[detector].head == "TOODHead" and depth != 6:
        raise ConversionError(
            f"mmdet's TOODHead has nothing like MODEL.ATSS.NUM_CONVS {depth}: only 6"
        )
    if cfg.MODEL.RESNETS.NUM_GROUPS == 1 and cfg.MODEL.RESNETS.WIDTH_PER_GROUP != 64:
        raise ConversionError(
            "mmdet's ResNet has nothing like MODEL.RESNETS.WIDTH_PER_GROUP: only 64"
        )
    if len(cfg.MODEL.ATSS.ANCHOR_SCALES) * len(cfg.MODEL.ATSS.ANCHOR_RATIOS) > 1:
        raise ConversionError("only models with one anchor per location are converted for mmdet")
    if len(cfg.MODEL.ATSS.IN_FEATURES) != len(levels_of(cfg)):
        raise ConversionError("mmdet uses all levels of its FPN, MODEL.ATSS.IN_FEATURES not")
    return detector


def _with_classes_of(cfg: CfgNode, state_dict: Mapping[str, Tensor]) -> CfgNode:
    """The config with as many classes as the weights have, whatever the data."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    if "head.cls_score.bias" in state_dict:
        cfg.MODEL.ATSS.NUM_CLASSES = len(state_dict["head.cls_score.bias"])
    return cfg
