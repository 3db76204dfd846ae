"""Builds a model or parts from a config, as factories in Detectron2's registries."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    GeneralizedRCNN,
    GeneralizedRCNNWithTTA,
    build_anchor_generator,
    build_backbone,
)
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY
from torch import nn

from atss_runner import planes

from .. import anchors, modeling
from ..assigners import ASSIGNER_REGISTRY
from ..errors import UserError, check_range
from ..modeling import backbone, detector, pretrained
from ..modeling.box_coding import BoxCode, LegacyPixels
from ..modeling.detector import LEGACY_PIXELS_IN_TRAINING
from ..modeling.postprocess import PostProcessor
from ..modeling.recompute import recompute_stages
from ..modeling.suppression import ScoredBoxes
from ..modeling.tta import ATSSWithTTA
from ..registry import is_own
from ..structures import Assigner
from .backbones import begins_pretrained
from .branches import build_branches, check_groups
from .checks import building, check_first_stage, check_values, lookup, rename_errors
from .derive import is_two_stage, resolve_num_classes, uses_atss
from .execution import (
    autocast_dtype,
    check_device,
    compile_in_place,
    compiled_parts,
    images_per_test_batch,
)
from .tiles import build_tiles


@META_ARCH_REGISTRY.register()
def ATSSDetector(cfg: CfgNode) -> detector.ATSSDetector:
    require_keys(cfg)
    check_values(cfg)
    check_device(cfg)
    node = cfg.MODEL.ATSS
    num_classes = resolve_num_classes(cfg)
    built_backbone, input_shape = build_levels(cfg)
    anchor_generator = build_anchors(cfg, input_shape)
    code = build_box_coder(cfg, anchor_generator.num_anchors[0])
    injected = injected_values(cfg, input_shape, num_classes, anchor_generator, code)
    model = detector.ATSSDetector(
        backbone=built_backbone,
        head=modeling.HEAD_REGISTRY.build(node, **injected),
        head_in_features=node.IN_FEATURES,
        anchor_generator=anchor_generator,
        branches=build_branches(cfg, injected),
        inference=node.INFERENCE,
        box_coder=LegacyPixels(code) if node.LEGACY_PIXELS else code,
        postprocess=build_postprocess(cfg),
        num_classes=num_classes,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        input_format="RGB" if cfg.INPUT.FORMAT == planes.FORMAT else cfg.INPUT.FORMAT,
        shown=cfg.INPUT.SHOWN_PLANES if cfg.INPUT.FORMAT == planes.FORMAT else None,
        vis_period=cfg.VIS_PERIOD,
        precision=autocast_dtype(cfg),
        accumulate=cfg.SOLVER.ACCUMULATE,
    )
    if node.CHANNELS_LAST:
        # A convolution gives its output the memory format of its weights.
        model = model.to(memory_format=torch.channels_last)
    with building("MODEL.DEVICE", cfg.MODEL.DEVICE):
        model = model.to(cfg.MODEL.DEVICE)
    if compiled := compiled_parts(cfg):
        compile_in_place(model, compiled)
    return model


def require_keys(cfg: CfgNode) -> None:
    if "ATSS" not in cfg.MODEL:
        raise UserError(
            "the config has no MODEL.ATSS: call atss.add_atss_config(cfg) before "
            "merge_from_file, or use atss.load_config"
        )


def injected_values(
    cfg: CfgNode,
    input_shape: list[ShapeSpec],
    num_classes: int,
    anchor_generator: anchors.GridAnchorGenerator,
    code: BoxCode,
) -> dict[str, Any]:
    """Return the values that parts receive by the name of a parameter.

    Raises:
        UserError: if levels differ in channels.
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
    return modeling.HEAD_REGISTRY.argument(cfg.MODEL.ATSS, "num_convs")


def build_postprocess(cfg: CfgNode) -> PostProcessor:
    limit = {"max_detections": cfg.TEST.DETECTIONS_PER_IMAGE}
    postprocess = modeling.POSTPROCESSOR.build(cfg.MODEL.ATSS, limit)
    return replace(postprocess, topk_candidates=candidates_per_level(cfg))


def candidates_per_level(cfg: CfgNode) -> int:
    """Return MODEL.ATSS.TOPK_CANDIDATES_TEST, but at least one candidate for each detection, and
    three beyond COCO's 100: one level may have all objects of an image, and each has several
    candidates."""
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    return max(cfg.MODEL.ATSS.TOPK_CANDIDATES_TEST, limit if limit <= 100 else 3 * limit)


def build_levels(cfg: CfgNode) -> tuple[Backbone, list[ShapeSpec]]:
    node = cfg.MODEL.ATSS
    target = lookup(BACKBONE_REGISTRY, cfg.MODEL.BACKBONE.NAME, "MODEL.BACKBONE.NAME")
    with building("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, is_own(target)):
        built_backbone = build_backbone(cfg)
    input_shape = select_levels(node, built_backbone.output_shape())
    backbone.freeze_unused(built_backbone, node.IN_FEATURES)
    if cfg.MODEL.BACKBONE.ACTIVATION_CHECKPOINTING:
        recompute_stages(built_backbone)
    return built_backbone, input_shape


def select_levels(node: CfgNode, shapes: Mapping[str, ShapeSpec]) -> list[ShapeSpec]:
    """Return the shapes of MODEL.ATSS.IN_FEATURES.

    Raises:
        UserError: if the backbone makes no such level, or levels are not from fine to coarse.
    """
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
    return input_shape


def build_anchors(cfg: CfgNode, input_shape: list[ShapeSpec]) -> anchors.GridAnchorGenerator:
    """Build the anchor generator, which must have a method ``grid``."""
    lookup(
        ANCHOR_GENERATOR_REGISTRY, cfg.MODEL.ANCHOR_GENERATOR.NAME, "MODEL.ANCHOR_GENERATOR.NAME"
    )
    anchor_generator = build_anchor_generator(cfg, input_shape)
    if not hasattr(anchor_generator, "grid"):
        raise UserError(
            "rules need anchors on grids: MODEL.ANCHOR_GENERATOR.NAME must be "
            f"GridAnchorGenerator, got {cfg.MODEL.ANCHOR_GENERATOR.NAME}"
        )
    return anchor_generator


@ANCHOR_GENERATOR_REGISTRY.register()
def GridAnchorGenerator(cfg: CfgNode, input_shape: list[ShapeSpec]) -> anchors.GridAnchorGenerator:
    """Build the anchors; by default one square of 8 strides per location."""
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


def build_box_coder(cfg: CfgNode, num_anchors: int) -> BoxCode:
    """Build the box code.

    Raises:
        UserError: also if it ignores the shape of several anchors per location, which would have
            equal targets.
    """
    node = cfg.MODEL.ATSS
    code = modeling.BOX_CODES.build(node)
    if num_anchors > 1 and not code.uses_shape:
        raise UserError(
            f"MODEL.ATSS.REGRESSION {node.REGRESSION!r} ignores the shape of an anchor: "
            "MODEL.ATSS.ANCHOR_SCALES and ANCHOR_RATIOS must make one per location, got "
            f"{num_anchors}"
        )
    return code


def build_assigner(cfg: CfgNode) -> Assigner:
    return ASSIGNER_REGISTRY.build(cfg.MODEL.ATSS, num_levels=len(cfg.MODEL.ATSS.IN_FEATURES))


def check_model(cfg: CfgNode, training: bool) -> None:
    """Check unused keys and all parts but the network, without allocating weights.

    Raises:
        UserError: naming the key.
    """
    node = cfg.MODEL.ATSS
    check_groups(node)
    if is_two_stage(cfg):
        check_first_stage(cfg)
    if uses_atss(cfg):
        code = build_box_coder(cfg, len(node.ANCHOR_SCALES) * len(node.ANCHOR_RATIOS))
        numbers = {"num_levels": len(node.IN_FEATURES), "num_classes": resolve_num_classes(cfg)}
        build_branches(cfg, {**numbers, "code": code})
        build_postprocess(cfg)
    if begins_pretrained(cfg) and not cfg.MODEL.WEIGHTS:
        pretrained.find_pretrained(cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.WEIGHTS)
    images_per_test_batch(cfg)
    compiled_parts(cfg)
    if cfg.TEST.AUG.ENABLED and not is_two_stage(cfg):
        build_views(cfg)
        build_merge(cfg)
    if cfg.TEST.TILES.ENABLED:
        build_tiles(cfg)
    if training and node.LEGACY_PIXELS:
        raise UserError(LEGACY_PIXELS_IN_TRAINING)


# ------------------------------------------------------------------------------------------------
# Multi-scale testing
# ------------------------------------------------------------------------------------------------


def build_tta(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Build Detectron2's test-time augmentation for GeneralizedRCNN, which merges masks too, else
    that of ATSSDetector."""
    if isinstance(model, GeneralizedRCNN):
        return GeneralizedRCNNWithTTA(cfg, model)
    return ATSSWithTTA(
        model,
        plain=(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST),
        sizes=build_views(cfg),
        flip=cfg.TEST.AUG.FLIP,
        merge=build_merge(cfg),
        max_detections=max(cfg.MODEL.ATSS.TTA.MAX_DETECTIONS, cfg.TEST.DETECTIONS_PER_IMAGE),
        input_format=cfg.INPUT.FORMAT,
    )


def build_views(cfg: CfgNode) -> list[tuple[int, int, float, float]]:
    """Return (short side, longest side, min box size, max box size) of each view but the plain one.

    Raises:
        UserError: if sizes and ranges differ in number.
    """
    ranges, aug = cfg.MODEL.ATSS.TTA.SIZE_RANGES, cfg.TEST.AUG
    if len(ranges) != len(aug.MIN_SIZES):
        raise UserError(
            f"MODEL.ATSS.TTA.SIZE_RANGES has {len(ranges)} ranges for the {len(aug.MIN_SIZES)} "
            "sizes of TEST.AUG.MIN_SIZES"
        )
    short_plain, longest_plain = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    return [
        # Views smaller than the plain one have its longest side.
        (short, longest_plain if short < short_plain else aug.MAX_SIZE, *size_range)
        for short, size_range in zip(aug.MIN_SIZES, ranges, strict=True)
    ]


def build_merge(cfg: CfgNode) -> Callable[..., ScoredBoxes]:
    node = cfg.MODEL.ATSS
    check_range("MODEL.ATSS.TTA.MAX_DETECTIONS", node.TTA.MAX_DETECTIONS, 1)
    return modeling.SUPPRESSIONS.build(node, "TTA.MERGE")
