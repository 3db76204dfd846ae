"""Builds the first stage of Detectron2's detectors of two stages from a config."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY

from .. import modeling
from ..modeling import proposals
from .branches import build_branches
from .build import build_anchors, build_box_coder, injected_values, require_keys, select_levels
from .checks import check_first_stage, check_values, rename_errors


@PROPOSAL_GENERATOR_REGISTRY.register()
def ATSSProposals(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> proposals.ATSSProposals:
    """Build levels, anchors, head, rule and criterion of MODEL.ATSS; the selection of proposals is
    that of MODEL.RPN and MODEL.PROPOSAL_GENERATOR.

    Raises:
        UserError: naming the key.
    """
    require_keys(cfg)
    check_values(cfg)
    check_first_stage(cfg)
    node, rpn = cfg.MODEL.ATSS, cfg.MODEL.RPN
    levels = select_levels(node, input_shape)
    anchor_generator = build_anchors(cfg, levels)
    code = build_box_coder(cfg, anchor_generator.num_anchors[0])
    num_classes = 1 if node.NUM_CLASSES == 1 else cfg.MODEL.ROI_HEADS.NUM_CLASSES
    injected = injected_values(cfg, levels, num_classes, anchor_generator, code)
    with rename_errors(
        pre_nms_topk="MODEL.RPN.PRE_NMS_TOPK_TRAIN or _TEST",
        post_nms_topk="MODEL.RPN.POST_NMS_TOPK_TRAIN or _TEST",
        nms_thresh="MODEL.RPN.NMS_THRESH",
        min_size="MODEL.PROPOSAL_GENERATOR.MIN_SIZE",
    ):
        return proposals.ATSSProposals(
            head=modeling.HEAD_REGISTRY.build(node, **injected),
            branches=build_branches(cfg, injected),
            inference=node.INFERENCE,
            anchor_generator=anchor_generator,
            box_coder=code,
            num_classes=num_classes,
            in_features=node.IN_FEATURES,
            score=modeling.SCORES.build(node),
            pre_nms_topk=(rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
            post_nms_topk=(rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
            nms_thresh=rpn.NMS_THRESH,
            min_size=cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
        )
