"""Every config key with its unit and source, and the factories that turn a config into parts.

Nothing else reads the config. Each factory stands in Detectron2's registry under the name of what
it builds, so that ``build_model(cfg)`` finds it.
"""

import inspect
from collections.abc import Callable
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_anchor_generator, build_backbone
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY
from detectron2.modeling.backbone import FPN, build_resnet_backbone
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY

from . import anchors, backbone, detector, head
from .acceleration import compile_in_place
from .assigners import ASSIGNER_REGISTRY, SpatialScale
from .box_coding import BoxDeltas, LogDistances, PointDistances
from .config_checks import building, check_values, lookup
from .criterion import BoxLoss, Criterion, OnBoxes, OnDeltas
from .data.datasets import classes_of
from .losses import giou_loss, iou_loss, smooth_l1_loss
from .postprocess import SCORES, PostProcessor


def add_atss_config(cfg: CfgNode) -> None:
    """Adds the node MODEL.ATSS, and SOLVER.CHECKPOINTS_TO_KEEP. Detectron2's own keys (solver,
    input, the anchors' offset) are left alone: configs/Base-ATSS.yaml sets them."""
    # Of the checkpoints that SOLVER.CHECKPOINT_PERIOD asks for, how many stay; 0: all.
    cfg.SOLVER.CHECKPOINTS_TO_KEEP = 0

    node = cfg.MODEL.ATSS = CfgNode()
    # Classes, without background. -1: as many as the data sets have.
    node.NUM_CLASSES = -1
    # Their names, for pictures. train_net.py fills them in from the data.
    node.CLASS_NAMES = []
    # Pyramid levels, fine to coarse.
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]

    # Anchors per location: every scale with every ratio. Scale: square root of the area in strides
    # (paper, Table 5); ratio: height / width (Table 6). The offset of the first centre, in strides,
    # is MODEL.ANCHOR_GENERATOR.OFFSET; the other keys of that node belong to other generators.
    node.ANCHOR_SCALES = [8.0]
    node.ANCHOR_RATIOS = [1.0]

    # A name of atss.head.HEAD_REGISTRY.
    node.HEAD = "ATSSHead"
    # Convolutions per tower (RetinaNet, section 4).
    node.NUM_CONVS = 4
    # Normalisation in the towers, by Detectron2's names; "" for none.
    node.NORM = "GN"
    # The towers' convolutions have biases where a norm follows. Weights for mmdet want False.
    node.TOWER_BIAS = True
    # Tower from which centerness is predicted, "box" or "cls"; "" for none: scores are class
    # probabilities then, and all positives weigh alike.
    node.CENTERNESS = "box"
    # A learned scale on each level's regression.
    node.LEVEL_SCALE = True
    # The last convolution of both towers is deformable: "v1" or "v2"; "" for a plain one. In the
    # backbone: MODEL.RESNETS.DEFORM_ON_PER_STAGE and DEFORM_MODULATED.
    node.DEFORM_TOWER = ""
    # Class probability that the head predicts before training (RetinaNet, section 4.1).
    node.PRIOR_PROB = 0.01
    # P7 is computed from P6 after a ReLU. mmdet's checkpoints want False.
    node.RELU_BEFORE_P7 = True

    # The rule that chooses samples: a name of atss.assigners.ASSIGNER_REGISTRY ("matcher" in
    # Detectron2). ASSIGNERS.<name> holds its arguments, in capitals, as its class explains them:
    # for ATSS that is ASSIGNERS.ATSS.TOP_K, 9 (paper, Table 4).
    node.ASSIGNER = "ATSS"
    node.ASSIGNERS = CfgNode(new_allowed=True)
    for name, rule in ASSIGNER_REGISTRY:
        defaults = {
            argument.upper(): parameter.default
            for argument, parameter in inspect.signature(rule).parameters.items()
            if parameter.default is not parameter.empty
        }
        node.ASSIGNERS[name] = CfgNode(defaults, new_allowed=True)

    # What the box predictor says: "box", deltas from the anchor; "point", distances from its centre
    # in strides; "log_point", logarithms of distances in pixels (the first FCOS).
    node.REGRESSION = "box"
    # (wx, wy, ww, wh) of the box deltas.
    node.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)

    # "giou", "iou", or "smooth_l1", which compares deltas.
    node.BBOX_REG_LOSS_TYPE = "giou"
    # Its weight against the class and centerness losses.
    node.BBOX_REG_LOSS_WEIGHT = 2.0
    # Where smooth L1 turns from quadratic to linear.
    node.SMOOTH_L1_LOSS_BETA = 0.11
    node.FOCAL_LOSS_ALPHA = 0.25
    node.FOCAL_LOSS_GAMMA = 2.0

    # For weights of the authors' code, to which coordinates name the centres of pixels, and boxes
    # hold their last pixel: with True they give boxes like everyone's. To fine-tune them: False.
    node.LEGACY_PIXELS = False

    # Inference (paper, section 3.1). The threshold is on the class probability alone.
    node.SCORE_THRESH_TEST = 0.05
    # Kept per level before suppression.
    node.TOPK_CANDIDATES_TEST = 1000
    # IoU.
    node.NMS_THRESH_TEST = 0.6
    # "sqrt": root of probability x centerness; "product": without the root, as mmdet has it.
    node.SCORE = "sqrt"

    # Multi-scale testing (paper, Table 8), under TEST.AUG.ENABLED; views are TEST.AUG.MIN_SIZES,
    # MAX_SIZE and FLIP, besides the plain one of INPUT.
    node.TTA = CfgNode()
    # How views are merged: "soft_vote", "vote" or "nms".
    node.TTA.MERGE = "soft_vote"
    # IoU with the best of a group from which on a box is of it.
    node.TTA.VOTE_THRESH = 0.66
    # Score that a voter keeps at least, under "soft_vote".
    node.TTA.SOFT_MIN_SCORE = 0.05
    # For each of TEST.AUG.MIN_SIZES, what counts: side in pixels of the view, square root of area.
    node.TTA.SIZE_RANGES = [[0, 10000]] * len(cfg.TEST.AUG.MIN_SIZES)
    # Per image. COCO counts 100; the authors' code hands in 1000.
    node.TTA.MAX_DETECTIONS = 1000

    # Images that each process evaluates at a time. Only those of one size, once padded, share a
    # canvas, so that the numbers stay those of single images.
    node.IMS_PER_BATCH_TEST = 1

    # Of backbone and towers, in training and inference: "fp32", "bf16", "fp16" (on GPUs; gradients
    # are scaled), or "auto": bf16 where the processor is fast at it, else fp32.
    node.PRECISION = "fp32"
    # Keep the channels of a feature map together in memory, which convolutions in bf16 like.
    node.CHANNELS_LAST = False
    # Let torch.compile compile backbone and head. The first iterations then take minutes, and again
    # when the size of the images changes for the first time.
    node.COMPILE = False


# ------------------------------------------------------------------------------------------------
# Factories
# ------------------------------------------------------------------------------------------------


@META_ARCH_REGISTRY.register()
def ATSSDetector(cfg: CfgNode) -> detector.ATSSDetector:
    """The whole model."""
    check_values(cfg)
    node = cfg.MODEL.ATSS
    num_classes = resolve_num_classes(cfg)
    lookup(BACKBONE_REGISTRY, cfg.MODEL.BACKBONE.NAME, "MODEL.BACKBONE.NAME")
    with building("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME):
        built_backbone = build_backbone(cfg)
    shapes = built_backbone.output_shape()
    missing = [name for name in node.IN_FEATURES if name not in shapes]
    if missing:
        raise ValueError(
            f"MODEL.ATSS.IN_FEATURES names {missing}, but the backbone makes {sorted(shapes)}"
        )
    input_shape = [shapes[name] for name in node.IN_FEATURES]
    strides = [shape.stride for shape in input_shape]
    if not strides or strides != sorted(set(strides)):
        raise ValueError(
            f"MODEL.ATSS.IN_FEATURES must name levels from fine to coarse, but {node.IN_FEATURES} "
            f"have strides {strides}"
        )
    lookup(
        ANCHOR_GENERATOR_REGISTRY, cfg.MODEL.ANCHOR_GENERATOR.NAME, "MODEL.ANCHOR_GENERATOR.NAME"
    )
    anchor_generator = build_anchor_generator(cfg, input_shape)
    if not hasattr(anchor_generator, "grid"):
        raise ValueError(
            "ATSSDetector needs anchors on grids: set MODEL.ANCHOR_GENERATOR.NAME to "
            f"GridAnchorGenerator, not {cfg.MODEL.ANCHOR_GENERATOR.NAME}"
        )
    num_anchors = anchor_generator.num_anchors[0]
    box_coder = build_box_coder(cfg, num_anchors)
    lookup(SCORES, node.SCORE, "MODEL.ATSS.SCORE")
    build_head = lookup(head.HEAD_REGISTRY, node.HEAD, "MODEL.ATSS.HEAD")
    with building("MODEL.ATSS.HEAD", node.HEAD):
        built_head = build_head(cfg, input_shape, num_classes, num_anchors)
    model = detector.ATSSDetector(
        backbone=built_backbone,
        head=built_head,
        head_in_features=node.IN_FEATURES,
        anchor_generator=anchor_generator,
        assigner=build_assigner(cfg),
        box_coder=box_coder,
        criterion=Criterion(
            box_loss=build_box_loss(cfg, box_coder),
            box_loss_weight=node.BBOX_REG_LOSS_WEIGHT,
            focal_alpha=node.FOCAL_LOSS_ALPHA,
            focal_gamma=node.FOCAL_LOSS_GAMMA,
        ),
        postprocess=PostProcessor(
            score_thresh=node.SCORE_THRESH_TEST,
            topk_candidates=node.TOPK_CANDIDATES_TEST,
            nms_thresh=node.NMS_THRESH_TEST,
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
            score=node.SCORE,
        ),
        num_classes=num_classes,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        input_format=cfg.INPUT.FORMAT,
        vis_period=cfg.VIS_PERIOD,
        precision=autocast_dtype(cfg),
        legacy_pixels=node.LEGACY_PIXELS,
    )
    if node.CHANNELS_LAST:
        # Feature maps follow the weights of the convolutions that make them.
        model = model.to(memory_format=torch.channels_last)
    with building("MODEL.DEVICE", cfg.MODEL.DEVICE):
        model = model.to(cfg.MODEL.DEVICE)
    if node.COMPILE:
        compile_in_place(model.backbone, model.head)
    return model


@ANCHOR_GENERATOR_REGISTRY.register()
def GridAnchorGenerator(cfg: CfgNode, input_shape: list[ShapeSpec]) -> anchors.GridAnchorGenerator:
    """One square anchor of 8 strides per location, unless the config says otherwise."""
    return anchors.GridAnchorGenerator(
        strides=[shape.stride for shape in input_shape],
        scales=cfg.MODEL.ATSS.ANCHOR_SCALES,
        ratios=cfg.MODEL.ATSS.ANCHOR_RATIOS,
        offset=cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
    )


@head.HEAD_REGISTRY.register()
def ATSSHead(
    cfg: CfgNode, input_shape: list[ShapeSpec], num_classes: int, num_anchors: int
) -> head.ATSSHead:
    """The head for levels of ``input_shape``."""
    channels = {shape.channels for shape in input_shape}
    if len(channels) > 1:
        raise ValueError(f"the head is shared by all levels, but they have {channels} channels")
    return head.ATSSHead(
        in_channels=channels.pop(),
        num_levels=len(input_shape),
        num_classes=num_classes,
        num_anchors=num_anchors,
        num_convs=cfg.MODEL.ATSS.NUM_CONVS,
        norm=cfg.MODEL.ATSS.NORM,
        tower_bias=cfg.MODEL.ATSS.TOWER_BIAS,
        prior_prob=cfg.MODEL.ATSS.PRIOR_PROB,
        centerness=cfg.MODEL.ATSS.CENTERNESS,
        level_scale=cfg.MODEL.ATSS.LEVEL_SCALE,
        box_bias=build_box_coder(cfg, num_anchors).initial,
        deform=cfg.MODEL.ATSS.DEFORM_TOWER,
    )


@BACKBONE_REGISTRY.register()
def build_atss_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A ResNet under an FPN with P6 from P5."""
    # Detectron2 builds it plain, because its deformable convolutions have to be compiled.
    resnet, deform = cfg.MODEL.RESNETS, cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE
    missing = [x for x in cfg.MODEL.FPN.IN_FEATURES if x not in resnet.OUT_FEATURES]
    if missing:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES names {missing}, but MODEL.RESNETS.OUT_FEATURES is "
            f"{resnet.OUT_FEATURES}"
        )
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * len(deform)
    bottom_up = build_resnet_backbone(plain, input_shape)
    backbone.make_deformable(bottom_up, deform, resnet.DEFORM_MODULATED, resnet.DEFORM_NUM_GROUPS)
    return backbone.build_fpn(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
        relu_before_p7=cfg.MODEL.ATSS.RELU_BEFORE_P7,
    )


def build_box_coder(cfg: CfgNode, num_anchors: int) -> BoxDeltas | PointDistances | LogDistances:
    """What MODEL.ATSS.REGRESSION names.

    Raises:
        ValueError: for an unknown name, or distances with several anchors per location, which would
            all predict the same.
    """
    node = cfg.MODEL.ATSS
    coders = {
        "box": partial(BoxDeltas, node.BBOX_REG_WEIGHTS),
        "point": partial(PointDistances, node.ANCHOR_SCALES[0]),
        "log_point": LogDistances,
    }
    build = lookup(coders, node.REGRESSION, "MODEL.ATSS.REGRESSION")
    if node.REGRESSION != "box" and num_anchors > 1:
        raise ValueError(
            f"MODEL.ATSS.REGRESSION {node.REGRESSION!r} does not look at the shape of an anchor: "
            "MODEL.ATSS.ANCHOR_SCALES and ANCHOR_RATIOS must make one per location, not "
            f"{num_anchors}"
        )
    return build()


def build_box_loss(cfg: CfgNode, box_coder: BoxDeltas | PointDistances | LogDistances) -> BoxLoss:
    """What MODEL.ATSS.BBOX_REG_LOSS_TYPE names.

    Raises:
        ValueError: for an unknown name, or smooth L1 on distances, which decoding rectifies.
    """
    node = cfg.MODEL.ATSS
    smooth_l1 = partial(smooth_l1_loss, beta=node.SMOOTH_L1_LOSS_BETA)
    losses = {
        "giou": OnBoxes(giou_loss),
        "iou": OnBoxes(iou_loss),
        "smooth_l1": OnDeltas(smooth_l1, box_coder.encode),
    }
    loss = lookup(losses, node.BBOX_REG_LOSS_TYPE, "MODEL.ATSS.BBOX_REG_LOSS_TYPE")
    if node.BBOX_REG_LOSS_TYPE == "smooth_l1" and node.REGRESSION != "box":
        raise ValueError(
            "MODEL.ATSS.BBOX_REG_LOSS_TYPE smooth_l1 compares deltas, which MODEL.ATSS.REGRESSION "
            f"{node.REGRESSION!r} has none of: use giou or iou"
        )
    return loss


def build_assigner(cfg: CfgNode) -> Callable:
    """The rule that MODEL.ATSS.ASSIGNER names, with the arguments that stand under its name."""
    name = cfg.MODEL.ATSS.ASSIGNER
    rule = lookup(ASSIGNER_REGISTRY, name, "MODEL.ATSS.ASSIGNER")
    arguments = {k.lower(): v for k, v in cfg.MODEL.ATSS.ASSIGNERS.get(name, {}).items()}
    known = inspect.signature(rule).parameters
    for argument in arguments:
        if argument not in known:
            raise ValueError(
                f"MODEL.ATSS.ASSIGNERS.{name}.{argument.upper()} is no argument of {name}; "
                f"it takes {[k.upper() for k in known]}"
            )
    with building("MODEL.ATSS.ASSIGNER", name):
        built = rule(**arguments)
    levels = len(cfg.MODEL.ATSS.IN_FEATURES)
    if isinstance(built, SpatialScale) and len(built.ranges) + 1 != levels:
        raise ValueError(
            f"MODEL.ATSS.ASSIGNERS.{name}.RANGES is for {len(built.ranges) + 1} levels, but "
            f"MODEL.ATSS.IN_FEATURES has {levels}"
        )
    return built


def resolve_num_classes(cfg: CfgNode) -> int:
    """The number of classes: MODEL.ATSS.NUM_CLASSES, or that of the data sets where it is -1.

    Raises:
        ValueError: where config and data contradict each other, or nothing tells the number.
    """
    wanted = cfg.MODEL.ATSS.NUM_CLASSES
    names = list(dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))
    known = {name: len(c) for name in names if (c := classes_of(name)) is not None}
    for name, count in known.items():
        if wanted == -1:
            wanted = count
        elif wanted != count:
            first = "MODEL.ATSS.NUM_CLASSES is"
            if cfg.MODEL.ATSS.NUM_CLASSES == -1:
                first = f"data set {next(iter(known))} has"
            raise ValueError(f"{first} {wanted}, but data set {name} has {count} classes")
    if wanted == -1:
        raise ValueError(
            "MODEL.ATSS.NUM_CLASSES is -1 (as many as the data have), but none of the data sets "
            f"{names} is registered: register one, or set the number"
        )
    if wanted < 1:
        raise ValueError(f"MODEL.ATSS.NUM_CLASSES must be positive, or -1, not {wanted}")
    return wanted


def autocast_dtype(cfg: CfgNode) -> torch.dtype | None:
    """What MODEL.ATSS.PRECISION means on MODEL.DEVICE; None for plain float32.

    Raises:
        ValueError: for an unknown name, or for fp16 on a CPU.
    """
    precision, on_gpu = cfg.MODEL.ATSS.PRECISION, cfg.MODEL.DEVICE.startswith("cuda")
    if precision == "auto":
        return torch.bfloat16 if _fast_at_bf16(on_gpu) else None
    if precision == "fp16" and not on_gpu:
        raise ValueError("MODEL.ATSS.PRECISION fp16 needs a GPU; on a CPU use bf16, fp32 or auto")
    known = {"auto": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    return lookup(known, precision, "MODEL.ATSS.PRECISION")


def _fast_at_bf16(on_gpu: bool) -> bool:
    if on_gpu:
        return torch.cuda.get_device_capability() >= (8, 0)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(flag, False) for flag in ("amx_bf16", "avx512_bf16"))
