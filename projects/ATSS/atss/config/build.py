"""The factories that turn a config into parts. MODEL.ATSS is read in this folder alone.

Each stands in Detectron2's registry under the name of what it builds, so that ``build_model(cfg)``
finds it.
"""

import logging
import re
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_anchor_generator, build_backbone
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone, build_resnet_backbone
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY

from .. import anchors, modeling
from ..assigners import ASSIGNER_REGISTRY
from ..errors import UserError, check_choice, check_range
from ..modeling import backbone, detector, pretrained, timm_backbone
from ..modeling.box_coding import BoxCode, LegacyPixels
from ..modeling.detector import LEGACY_PIXELS_IN_TRAINING
from ..modeling.postprocess import PostProcessor
from ..structures import Assigner
from .branches import build_branches, check_groups
from .checks import building, check_values, lookup, rename_errors
from .classes import resolve_num_classes
from .pixels import TIMM, check_pixels
from .tta import build_merge, build_views


@META_ARCH_REGISTRY.register()
def ATSSDetector(cfg: CfgNode) -> detector.ATSSDetector:
    """The whole model."""
    check_values(cfg)
    node = cfg.MODEL.ATSS
    num_classes = resolve_num_classes(cfg)
    built_backbone, input_shape = build_levels(cfg)
    anchor_generator = build_anchors(cfg, input_shape)
    code = build_box_coder(cfg, anchor_generator.num_anchors[0])
    known = _known(cfg, input_shape, num_classes, anchor_generator, code)
    known["head"] = modeling.HEAD_REGISTRY.build(node, **known)
    model = detector.ATSSDetector(
        backbone=built_backbone,
        head=known["head"],
        head_in_features=node.IN_FEATURES,
        anchor_generator=anchor_generator,
        branches=build_branches(cfg, known),
        inference=node.INFERENCE,
        box_coder=LegacyPixels(code) if node.LEGACY_PIXELS else code,
        postprocess=build_postprocess(cfg),
        num_classes=num_classes,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        input_format=cfg.INPUT.FORMAT,
        vis_period=cfg.VIS_PERIOD,
        precision=autocast_dtype(cfg),
    )
    if node.CHANNELS_LAST:
        # Feature maps follow the weights of the convolutions that make them.
        model = model.to(memory_format=torch.channels_last)
    with building("MODEL.DEVICE", cfg.MODEL.DEVICE):
        model = model.to(cfg.MODEL.DEVICE)
    if compiled := compiled_parts(cfg):
        compile_in_place(model, compiled)
    return model


def _known(
    cfg: CfgNode,
    input_shape: list[ShapeSpec],
    num_classes: int,
    anchor_generator: anchors.GridAnchorGenerator,
    code: BoxCode,
) -> dict[str, Any]:
    """What parts may ask for by the name of a parameter.

    Raises:
        ValueError: for levels of different widths.
    """
    channels = {shape.channels for shape in input_shape}
    if len(channels) > 1:
        raise UserError(f"the head is shared by all levels, but they have {channels} channels")
    return {
        "cfg": cfg,
        "input_shape": input_shape,
        "in_channels": channels.pop(),
        "num_levels": len(input_shape),
        "num_classes": num_classes,
        "num_anchors": anchor_generator.num_anchors[0],
        "anchor_generator": anchor_generator,
        "code": code,
        "box_bias": code.initial,
        "box_channels": code.channels,
        "bins": code.bins,
    }


def head_depth(cfg: CfgNode) -> int:
    """Return the number of convolutions of the head's towers or stack."""
    return modeling.HEAD_REGISTRY.argument(cfg.MODEL.ATSS, "HEAD", "num_convs")


def build_postprocess(cfg: CfgNode) -> PostProcessor:
    """How detections are made."""
    node = cfg.MODEL.ATSS
    with rename_errors(
        score_thresh="MODEL.ATSS.SCORE_THRESH_TEST",
        topk_candidates="MODEL.ATSS.TOPK_CANDIDATES_TEST",
        max_detections="TEST.DETECTIONS_PER_IMAGE",
    ):
        return PostProcessor(
            score_thresh=node.SCORE_THRESH_TEST,
            topk_candidates=node.TOPK_CANDIDATES_TEST,
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
            score=modeling.SCORES.build(node),
            suppression=modeling.SUPPRESSIONS.build(node),
            threshold_on_score=node.THRESHOLD_ON_SCORE,
            rank_by_class=node.RANK_BY_CLASS,
            rank_anchors=node.RANK_ANCHORS,
            clip=node.CLIP_BOXES,
        )


def build_levels(cfg: CfgNode) -> tuple[Backbone, list[ShapeSpec]]:
    """The backbone, and the shapes of the levels that the head looks at."""
    node = cfg.MODEL.ATSS
    lookup(BACKBONE_REGISTRY, cfg.MODEL.BACKBONE.NAME, "MODEL.BACKBONE.NAME")
    with building("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME):
        built_backbone = build_backbone(cfg)
    shapes = built_backbone.output_shape()
    missing = [name for name in node.IN_FEATURES if name not in shapes]
    if missing:
        raise UserError(
            f"MODEL.ATSS.IN_FEATURES names {missing}, but the backbone makes {sorted(shapes)}"
        )
    input_shape = [shapes[name] for name in node.IN_FEATURES]
    strides = [shape.stride for shape in input_shape]
    if not strides or strides != sorted(set(strides)):
        raise UserError(
            f"MODEL.ATSS.IN_FEATURES must name levels from fine to coarse, but {node.IN_FEATURES} "
            f"have strides {strides}"
        )
    backbone.freeze_unused(built_backbone, node.IN_FEATURES)
    return built_backbone, input_shape


def build_anchors(cfg: CfgNode, input_shape: list[ShapeSpec]) -> anchors.GridAnchorGenerator:
    """What MODEL.ANCHOR_GENERATOR.NAME names, which must have a grid."""
    lookup(
        ANCHOR_GENERATOR_REGISTRY, cfg.MODEL.ANCHOR_GENERATOR.NAME, "MODEL.ANCHOR_GENERATOR.NAME"
    )
    anchor_generator = build_anchor_generator(cfg, input_shape)
    if not hasattr(anchor_generator, "grid"):
        raise UserError(
            "ATSSDetector needs anchors on grids: set MODEL.ANCHOR_GENERATOR.NAME to "
            f"GridAnchorGenerator, not {cfg.MODEL.ANCHOR_GENERATOR.NAME}"
        )
    return anchor_generator


@ANCHOR_GENERATOR_REGISTRY.register()
def GridAnchorGenerator(cfg: CfgNode, input_shape: list[ShapeSpec]) -> anchors.GridAnchorGenerator:
    """One square anchor of 8 strides per location, unless the config says otherwise."""
    with rename_errors(
        scales="MODEL.ATSS.ANCHOR_SCALES",
        ratios="MODEL.ATSS.ANCHOR_RATIOS",
        offset="MODEL.ANCHOR_GENERATOR.OFFSET",
    ):
        return anchors.GridAnchorGenerator(
            strides=[shape.stride for shape in input_shape],
            scales=cfg.MODEL.ATSS.ANCHOR_SCALES,
            ratios=cfg.MODEL.ATSS.ANCHOR_RATIOS,
            offset=cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
        )


@BACKBONE_REGISTRY.register()
def build_atss_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A ResNet under an FPN with P6 from P5."""
    # Detectron2 builds it plain, because its deformable convolutions have to be compiled.
    resnet, deform = cfg.MODEL.RESNETS, cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE
    missing = [x for x in cfg.MODEL.FPN.IN_FEATURES if x not in resnet.OUT_FEATURES]
    if missing:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES names {missing}, but MODEL.RESNETS.OUT_FEATURES is "
            f"{resnet.OUT_FEATURES}"
        )
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * len(deform)
    bottom_up = build_resnet_backbone(plain, input_shape)
    backbone.make_deformable(bottom_up, deform, resnet.DEFORM_MODULATED, resnet.DEFORM_NUM_GROUPS)
    return _under_fpn(cfg, bottom_up)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Any model of timm that makes feature maps, under the same FPN. With the weights that
    MODEL.TIMM asks for, unless MODEL.WEIGHTS brings others."""
    node, levels = cfg.MODEL.TIMM, cfg.MODEL.FPN.IN_FEATURES
    wrong = [x for x in levels if not re.fullmatch(r"s\d+", x)]
    if wrong:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES names {wrong}; maps of timm are named by strides: s8, s16, s32"
        )
    check_pixels(cfg)
    wanted = begins_pretrained(cfg)
    weights = None
    # On "meta" are shapes alone.
    if wanted and not cfg.MODEL.WEIGHTS and torch.get_default_device().type != "meta":
        weights = pretrained.load_pretrained(node.NAME, node.WEIGHTS)
    loaded = wanted or bool(cfg.MODEL.WEIGHTS)
    if not loaded and (node.FREEZE_STATISTICS or cfg.MODEL.BACKBONE.FREEZE_AT):
        logging.getLogger(__name__).warning(
            "%s begins with random weights: all of it is trained, whatever "
            "MODEL.BACKBONE.FREEZE_AT and MODEL.TIMM.FREEZE_STATISTICS say",
            node.NAME,
        )
    bottom_up = timm_backbone.TimmBackbone(
        node.NAME,
        strides=[int(x[1:]) for x in levels],
        weights=weights,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT if loaded else 0,
        freeze_statistics=node.FREEZE_STATISTICS and loaded,
    )
    return _under_fpn(cfg, bottom_up)


def _under_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    return backbone.build_fpn(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
        relu_before_p7=cfg.MODEL.ATSS.RELU_BEFORE_P7,
    )


def begins_pretrained(cfg: CfgNode) -> bool:
    """Whether the config asks for a backbone of timm with weights of its own."""
    node = cfg.MODEL.TIMM
    return cfg.MODEL.BACKBONE.NAME == TIMM and bool(node.PRETRAINED or node.WEIGHTS)


def build_box_coder(cfg: CfgNode, num_anchors: int) -> BoxCode:
    """What MODEL.ATSS.REGRESSION names.

    Raises:
        ValueError: for an unknown name, or a code that does not look at the shape of an anchor with
            several anchors per location, which would all predict the same.
    """
    node = cfg.MODEL.ATSS
    code = modeling.BOX_CODES.build(node)
    if num_anchors > 1 and not code.uses_shape:
        raise UserError(
            f"MODEL.ATSS.REGRESSION {node.REGRESSION!r} does not look at the shape of an anchor: "
            "MODEL.ATSS.ANCHOR_SCALES and ANCHOR_RATIOS must make one per location, not "
            f"{num_anchors}"
        )
    return code


def build_assigner(cfg: CfgNode) -> Assigner:
    """The rule that MODEL.ATSS.ASSIGNER names, with the arguments that stand under its name."""
    return ASSIGNER_REGISTRY.build(cfg.MODEL.ATSS, num_levels=len(cfg.MODEL.ATSS.IN_FEATURES))


def check_model(cfg: CfgNode, training: bool) -> None:
    """What building the model does not see, or only after a while.

    Args:
        training: or inference alone.

    Raises:
        ValueError: naming the key.
    """
    node = cfg.MODEL.ATSS
    check_groups(node)
    if cfg.MODEL.META_ARCHITECTURE == "ATSSDetector":
        code = build_box_coder(cfg, len(node.ANCHOR_SCALES) * len(node.ANCHOR_RATIOS))
        known = {"num_levels": len(node.IN_FEATURES), "num_classes": resolve_num_classes(cfg)}
        build_branches(cfg, {**known, "code": code})
        build_postprocess(cfg)
    if begins_pretrained(cfg) and not cfg.MODEL.WEIGHTS:
        pretrained.find_pretrained(cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.WEIGHTS)
    images_per_test_batch(cfg)
    compiled_parts(cfg)
    if cfg.TEST.AUG.ENABLED:
        build_views(cfg)
        build_merge(cfg)
    if training and node.LEGACY_PIXELS:
        raise UserError(LEGACY_PIXELS_IN_TRAINING)


def use_available_device(cfg: CfgNode) -> bool:
    """Puts the model on the CPU, in place, where MODEL.DEVICE is a GPU and there is none; whether
    that was so."""
    absent = cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available()
    if absent:
        cfg.MODEL.DEVICE = "cpu"
    return absent


def one_image_at_a_time(cfg: CfgNode) -> CfgNode:
    """A copy for evaluations of models that take one image, as test-time augmentation does."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ATSS.IMS_PER_BATCH_TEST = 1
    return cfg


def images_per_test_batch(cfg: CfgNode) -> int:
    """How many images each process evaluates at a time.

    Raises:
        ValueError: for less than one.
    """
    count = cfg.MODEL.ATSS.IMS_PER_BATCH_TEST
    with rename_errors(count="MODEL.ATSS.IMS_PER_BATCH_TEST"):
        check_range("count", count, 1)
    return count


def autocast_dtype(cfg: CfgNode) -> torch.dtype | None:
    """What MODEL.ATSS.PRECISION means on MODEL.DEVICE; None for plain float32.

    Raises:
        ValueError: for an unknown name, or for fp16 on a CPU.
    """
    precision, on_gpu = cfg.MODEL.ATSS.PRECISION, cfg.MODEL.DEVICE.startswith("cuda")
    if precision == "auto":
        return torch.bfloat16 if _fast_at_bf16(on_gpu) else None
    if precision == "fp16" and not on_gpu:
        raise UserError("MODEL.ATSS.PRECISION fp16 needs a GPU; on a CPU use bf16, fp32 or auto")
    known = {"auto": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    return lookup(known, precision, "MODEL.ATSS.PRECISION")


def _fast_at_bf16(on_gpu: bool) -> bool:
    if on_gpu:
        return torch.cuda.get_device_capability() >= (8, 0)
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(flag, False) for flag in ("amx_bf16", "avx512_bf16"))


def compiled_parts(cfg: CfgNode) -> str | None:
    """What MODEL.ATSS.COMPILE means: "tail", "all", or None for nothing.

    Raises:
        ValueError: naming the key.
    """
    value = cfg.MODEL.ATSS.COMPILE
    if isinstance(value, bool):  # in configs up to 0.2
        return "all" if value else None
    check_choice("MODEL.ATSS.COMPILE", value, (None, "tail", "all"))
    return value


def compile_in_place(model: detector.ATSSDetector, parts: str) -> None:
    """Has torch.compile compile parts of a model when they are first called; names of parameters
    stay. If it does not work at all, for want of a compiler for example, the log says so, and the
    model runs as it is.

    Args:
        parts: "tail", decoding, assignment and criterion; "all", backbone and heads too.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=model.device))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        logging.getLogger(__name__).warning(
            "MODEL.ATSS.COMPILE: torch.compile does not work here, running uncompiled: %s", reason
        )
        return
    model.compile_tail = True
    if parts == "all":
        own_heads = [x.head for x in model.branches.values() if x.head is not None]
        for module in (model.backbone, model.head, *own_heads):
            module.compile()
