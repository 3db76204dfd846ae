"""Factories of backbones for Detectron2's registry."""

import logging
import re

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone, build_resnet_backbone

from ..errors import UserError
from ..modeling import pretrained
from ..modeling.backbone import build_fpn, freeze_unused, make_deformable
from ..modeling.timm_backbone import TimmBackbone
from .derive import TIMM, check_pixels, is_two_stage


@BACKBONE_REGISTRY.register()
def build_atss_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a ResNet with an FPN whose P6 is computed from P5."""
    # Detectron2 builds it without deformable convolutions, because its own require a compiler.
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
    make_deformable(bottom_up, deform, resnet.DEFORM_MODULATED, resnet.DEFORM_NUM_GROUPS)
    return _under_fpn(cfg, bottom_up)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a timm model with the same FPN, and the weights of MODEL.TIMM unless MODEL.WEIGHTS is
    set."""
    node, levels = cfg.MODEL.TIMM, cfg.MODEL.FPN.IN_FEATURES
    wrong = [x for x in levels if not re.fullmatch(r"s\d+", x)]
    if wrong:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES names {wrong}: name maps of timm by stride, as s8, s16, s32"
        )
    check_pixels(cfg)
    weights = None
    loaded = begins_pretrained(cfg) or bool(cfg.MODEL.WEIGHTS)
    has_values = torch.get_default_device().type != "meta"  # there are shapes alone
    if loaded and not cfg.MODEL.WEIGHTS and has_values:
        weights = pretrained.load_pretrained(node.NAME, node.WEIGHTS)
    if has_values and not loaded and (node.FREEZE_STATISTICS or cfg.MODEL.BACKBONE.FREEZE_AT):
        logging.getLogger(__name__).warning(
            "%s begins with random weights: all of it is trained, and "
            "MODEL.BACKBONE.FREEZE_AT and MODEL.TIMM.FREEZE_STATISTICS are ignored",
            node.NAME,
        )
    bottom_up = TimmBackbone(
        node.NAME,
        strides=[int(x[1:]) for x in levels],
        weights=weights,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT if loaded else 0,
        freeze_statistics=node.FREEZE_STATISTICS and loaded,
        channels=input_shape.channels,
    )
    return _under_fpn(cfg, bottom_up)


def _under_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    built = build_fpn(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
        relu_before_p7=cfg.MODEL.ATSS.RELU_BEFORE_P7,
    )
    if is_two_stage(cfg):
        freeze_unused(built, {*cfg.MODEL.ATSS.IN_FEATURES, *cfg.MODEL.ROI_HEADS.IN_FEATURES})
    return built


def begins_pretrained(cfg: CfgNode) -> bool:
    node = cfg.MODEL.TIMM
    return cfg.MODEL.BACKBONE.NAME == TIMM and bool(node.PRETRAINED or node.WEIGHTS)
