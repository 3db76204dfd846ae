"""Every config key of this project: meaning, unit, allowed values, source.

Other arguments of a part are keys by its signature, such as MODEL.ATSS.ASSIGNERS.<name>.<ARGUMENT>.
"""

from detectron2.config import CfgNode

from .. import modeling
from ..assigners import ASSIGNER_REGISTRY, SIMILARITIES

# Old name -> name, of keys below MODEL.ATSS.
RENAMED_KEYS = {
    "BOX_NORMALISER_LEAST": "BOX_NORMALISER_MIN",
    "NORMALISER_LEAST": "NORMALISER_MIN",
    "REACH": "INITIAL_DISTANCE",
    "SOFT_MIN_SCORE": "SOFT_SCORE_MIN",
}


def add_atss_config(cfg: CfgNode) -> None:
    """Add MODEL.ATSS, MODEL.TIMM and keys of training to Detectron2's defaults.
    configs/Base-ATSS.yaml sets Detectron2's own keys."""
    # Optimizer: "SGD" or "AdamW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Learning rate of the backbone without its FPN, divided by SOLVER.BASE_LR.
    cfg.SOLVER.BACKBONE_LR_FACTOR = 1.0
    # Weight decay of learned scales (per level in a head, per channel in a backbone); None for
    # SOLVER.WEIGHT_DECAY.
    cfg.SOLVER.WEIGHT_DECAY_SCALE = None
    # Images of an iteration, of all processes. -1, on the command line alone: the largest number
    # that fits into the memory of the GPU, or of this process on a CPU, measured by steps on images
    # of the largest size of INPUT, without masks or key points. SOLVER.BASE_LR, for the number in
    # the config file, is scaled: linearly for SGD, by the square root for AdamW. Keys in
    # iterations, such as MAX_ITER, are not scaled.
    cfg.SOLVER.IMS_PER_BATCH = 16
    # Length of the training in passes over the images, replaces SOLVER.MAX_ITER; 0 to use that.
    # MAX_ITER of the command line replaces EPOCHS of a file, without more frequent checkpoints and
    # evaluations.
    cfg.SOLVER.EPOCHS = 0.0
    # Lower bound on the iterations of SOLVER.EPOCHS, for small data sets.
    cfg.SOLVER.MIN_ITER = 0
    # Epochs between checkpoints, replaces SOLVER.CHECKPOINT_PERIOD; 0 to use that.
    cfg.SOLVER.CHECKPOINT_EPOCHS = 0.0
    # Epochs between evaluations, replaces TEST.EVAL_PERIOD; 0 to use that.
    cfg.TEST.EVAL_EPOCHS = 0.0
    # Number of parts into which a step divides its SOLVER.IMS_PER_BATCH images (gradient
    # accumulation). A step needs the memory of one part, and more time, because the backward pass
    # computes each part again. Losses, their normalisers and gradients are those of the whole
    # batch, but batch norms that are not frozen take the statistics of a part. Each part of each
    # process has the same number of images.
    cfg.SOLVER.ACCUMULATE = 1
    # Number of periodic checkpoints to keep; 0 for all.
    cfg.SOLVER.CHECKPOINTS_TO_KEEP = 0
    # Minutes that a process waits for the others in a collective (all-reduce, all-gather) before it
    # fails. An evaluation does not count, because no collective waits for it.
    cfg.SOLVER.COLLECTIVE_TIMEOUT = 30.0
    # [first, last] iteration, counted from 0, that torch.profiler records: one trace of the first
    # process for each, in OUTPUT_DIR/log/profiler-tensorboard-iter<i>. [] for none.
    cfg.SOLVER.PROFILE = []
    # Services that get scalars and the config, besides TensorBoard: "wandb" (Weights & Biases),
    # "mlflow", or your own of --import (docs/tools.md).
    cfg.SOLVER.LOGGERS = ()
    # Decay of the exponential moving average of the weights, which is also evaluated. After n steps
    # it is at most (1 + n) / (10 + n). 0 for no average.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Metric of metrics.json by which the best weights of all evaluations are kept as
    # model_best.pth: on the first test set with objects, or on the set in "<set>/bbox/AP". "" for
    # none.
    cfg.TEST.BEST_METRIC = "bbox/AP"
    # Number of evaluations without a better one after which training stops; 0 for no limit.
    cfg.TEST.PATIENCE = 0
    # Write a report of the best weights' detections at the end of a training: report.html and
    # report.json in OUTPUT_DIR (docs/report.md). It needs hotcoco.
    cfg.TEST.REPORT = False
    # Evaluate objects that Pascal VOC marks difficult like all others. False for VOC's protocol, in
    # which their detections are neither true nor false positives.
    cfg.TEST.COUNT_DIFFICULT = False

    # Detection on overlapping square tiles of large images, in evaluations, Predictor and demo.py.
    # Each tile is an image to the network: it is resized by INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST.
    # A tile of MIN_SIZE_TEST pixels is not resized.
    tiles = cfg.TEST.TILES = CfgNode()
    tiles.ENABLED = False
    # Side of a tile in pixels of the image; 0 for SIZE_OF_DATA. In images that are not larger, the
    # detections are those without tiles.
    tiles.SIZE = 0
    # train_net.py sets it from the training data: an object covers 3 % of a tile on average.
    tiles.SIZE_OF_DATA = 0
    # Overlap of neighbouring tiles, as a share of the size. Objects up to this share are complete
    # on a tile.
    tiles.OVERLAP = 0.25
    # Detect on the whole image, too, for objects that are larger than a tile.
    tiles.WHOLE = True
    # Detections of all tiles are merged by NMS: by "iou", or by "ios", intersection over the
    # smaller box. The threshold is MODEL.ATSS.NMS_THRESH_TEST.
    tiles.MERGE = "iou"
    # Tiles in the network at a time.
    tiles.BATCH = 4

    # Values of --register (NAME=annotations:images, relative to the folder of the config file),
    # --classes and --first-pixel.
    cfg.DATASETS.REGISTER = []
    cfg.DATASETS.CLASSES = ""
    cfg.DATASETS.FIRST_PIXEL = 1

    # [[name in DATASETS.TRAIN, factor], ...]: repetitions of a data set per epoch, by default 1,
    # with DATALOADER.SAMPLER_TRAIN WeightedTrainingSampler or WeightedCategoryTrainingSampler.
    # Detectron2 reads this key, but has no default for it.
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = []

    # Seconds to wait for a batch of the DATALOADER.NUM_WORKERS loader processes before the run
    # fails; 0 for no limit.
    cfg.DATALOADER.TIMEOUT = 120
    # Batches that each loader process loads in advance.
    cfg.DATALOADER.PREFETCH_FACTOR = 2
    # Keep the loader processes of an evaluation for the next one. Those of training always stay.
    cfg.DATALOADER.PERSISTENT_WORKERS = False
    # Load batches into page-locked memory, which a GPU copies faster.
    cfg.DATALOADER.PIN_MEMORY = False

    # For INPUT.FORMAT "planes": the value in files that becomes 255: 65535 for 16 bits, or the
    # largest that the camera writes. This format reads all planes of image files of 8 or 16 bits,
    # in their order (red before blue). MODEL.PIXEL_MEAN and PIXEL_STD have a value for each, and
    # MODEL.TIMM.PIXELS is False: tools/check_dataset.py --planes prints these keys. The first
    # convolution of pretrained weights is widened; MODEL.BACKBONE.FREEZE_AT 0 trains it.
    cfg.INPUT.HIGHEST = 255
    # The planes that pictures show in red, green and blue.
    cfg.INPUT.SHOWN_PLANES = [0, 1, 2]
    # [low, high] factor of large scale jitter (arXiv 2012.07177), replaces INPUT.MIN_SIZE_TRAIN: an
    # image is resized to fit a square of SCALE_JITTER_SIZE pixels times the factor, then cropped or
    # padded to the square. All images of a batch have one size. [] for none.
    cfg.INPUT.SCALE_JITTER = []
    cfg.INPUT.SCALE_JITTER_SIZE = 352
    # Probability that a training image that MIN_SIZE_TRAIN and MAX_SIZE_TRAIN would shrink is
    # replaced by a crop of the shrunk size around a random object. AUGMENT_UNTIL does not end it.
    cfg.INPUT.FULL_SIZE_CROP = 0.0
    # Share of its area, 0 to 1, that an object must have in such a crop; others are dropped.
    cfg.INPUT.FULL_SIZE_CROP_MIN_AREA = 0.1
    # "shortest": the shorter side becomes MIN_SIZE_TRAIN or MIN_SIZE_TEST, the longer one at most
    # MAX_SIZE_*. "stretch": the height becomes MIN_SIZE_*, the width MAX_SIZE_*, and the
    # aspect ratio is lost.
    cfg.INPUT.RESIZE = "shortest"
    # Brightness, contrast and saturation (of RGB) of a training image are each multiplied by a
    # factor between 1 - this and 1 + this.
    cfg.INPUT.COLOR_JITTER = 0.0
    # Probability that a training image is a mosaic of four.
    cfg.INPUT.MOSAIC = 0.0
    # Share of the training, 0 to 1, after which INPUT.CROP, SCALE_JITTER, COLOR_JITTER and MOSAIC
    # are switched off.
    cfg.INPUT.AUGMENT_UNTIL = 1.0

    # Do not store the activations of the backbone's stages: the backward pass computes them again
    # (activation checkpointing). A step needs less memory and more time. Not with
    # MODEL.ATSS.COMPILE "all".
    cfg.MODEL.BACKBONE.ACTIVATION_CHECKPOINTING = False

    # timm model of MODEL.BACKBONE.NAME build_timm_fpn_backbone. MODEL.FPN.IN_FEATURES names its
    # feature maps by stride: s4, s8, ...
    timm = cfg.MODEL.TIMM = CfgNode()
    timm.NAME = ""
    # Load its pretrained weights, from a package that contains them or from timm's hub, if
    # MODEL.WEIGHTS is empty.
    timm.PRETRAINED = False
    # File of pretrained weights (.safetensors, .pth), replaces the hub.
    timm.WEIGHTS = ""
    # Set INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD to those of the pretrained weights.
    timm.PIXELS = True
    # Batch norms keep their means and variances in training. This and MODEL.BACKBONE.FREEZE_AT
    # (n freezes all layers before the map of stride 2^n) have an effect only if weights are loaded.
    timm.FREEZE_STATISTICS = False

    node = cfg.MODEL.ATSS = CfgNode()
    # Number of classes without background; -1 for that of the data sets. In a first stage: 1 for
    # proposals of any class, -1 for MODEL.ROI_HEADS.NUM_CLASSES.
    node.NUM_CLASSES = -1
    # Names of the classes, for pictures and checkpoints. train_net.py sets them from the data sets.
    node.CLASS_NAMES = []
    # Ids of the classes in COCO json. train_net.py sets them from the data sets.
    node.CLASS_IDS = []
    # Names of the pyramid levels, fine to coarse.
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]

    # Anchors per location: each scale with each ratio. Scale: square root of the area, in strides
    # (paper, Table 5). Ratio: height / width (Table 6). The offset of the first centre, in strides,
    # is MODEL.ANCHOR_GENERATOR.OFFSET; other keys of that node have no effect.
    node.ANCHOR_SCALES = [8.0]
    node.ANCHOR_RATIOS = [1.0]

    # Depth of the head: convolutions per tower, or of TOODHead's stack. None: the head's own
    # default, 4 for ATSSHead (RetinaNet, section 4), 6 for TOODHead, 3 for VFNetHead.
    node.NUM_CONVS = None
    # Normalisation in the towers, by Detectron2's names; "" for none.
    node.NORM = "GN"
    # Convolutions of the towers have biases before a norm. False for weights of mmdet.
    node.TOWER_BIAS = True
    # Source of the quality prediction (centerness, IoU): "box" or "cls", a convolution on that
    # tower; "distribution", the shape of the distributions of the box's sides, as a factor of the
    # class probabilities (GFLv2); "" for none: scores are class probabilities.
    node.CENTERNESS = "box"
    # The box regression of each level has a learned scale.
    node.LEVEL_SCALE = True
    # Deformable convolution in both towers, "v1" or "v2"; "" for none. It is the last one, or the
    # first one with HEADS.ATSSHead.DEFORM_AT. For the backbone: MODEL.RESNETS.DEFORM_ON_PER_STAGE
    # and DEFORM_MODULATED.
    node.DEFORM_TOWER = ""
    # Class probability that the head predicts at initialisation (RetinaNet, section 4.1).
    node.PRIOR_PROB = 0.01
    # A ReLU precedes the convolution from P6 to P7. False for weights of mmdet.
    node.RELU_BEFORE_P7 = True

    # Weights (wx, wy, ww, wh) of the box deltas.
    node.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)

    # Weight of each box loss but dfl, relative to the class loss.
    node.BBOX_REG_LOSS_WEIGHT = 2.0
    # Difference at which smooth L1 changes from quadratic to linear.
    node.SMOOTH_L1_LOSS_BETA = 0.11
    # Focal loss (arXiv 1708.02002, equation 5).
    node.FOCAL_LOSS_ALPHA = 0.25
    node.FOCAL_LOSS_GAMMA = 2.0
    # Weight of the quality loss, relative to the class loss.
    node.QUALITY_LOSS_WEIGHT = 1.0
    # Lower bound of MODEL.ATSS.NORMALISER over all processes, which divides class and quality
    # losses.
    node.NORMALISER_MIN = 1.0
    # Lower bound of the sum of box weights, which divides box losses.
    node.BOX_NORMALISER_MIN = 1e-6
    # Both bounds are for each image of the batch, not for the whole batch.
    node.NORMALISER_PER_IMAGE = False

    # Names of the branches besides "main": outputs with a rule and a criterion of their own.
    node.BRANCHES = []
    # BRANCH.<name> contains keys of this node with other values: for the branch of that name, for a
    # phase, or for an argument of a part that is a part itself.
    node.BRANCH = CfgNode(new_allowed=True)
    # Name of the branch that detects.
    node.INFERENCE = "main"
    # Output of the head that the branch reads, if the head has several.
    node.OUTPUT = ""
    # The branch has its own head; with DETACHED, features get no gradient from it.
    node.OWN_HEAD = False
    node.DETACHED = False
    # Name of the branch whose own head this branch reads; "" for the detector's.
    node.HEAD_OF = ""
    # Name of the branch whose assignment this branch uses; "" for its own.
    node.ASSIGNMENT_OF = ""
    # Earlier phases with other keys, [[name in BRANCH, end], ...]. The end is an iteration (int) or
    # a share of SOLVER.MAX_ITER (float between 0 and 1).
    node.PHASES = []

    # Convert coordinates for weights of the authors' code, in which they refer to centres of pixels
    # and boxes include their last pixel. Inference only: False to fine-tune them.
    node.LEGACY_PIXELS = False

    # Score threshold of inference (paper, section 3.1): on the class probability, or on the score
    # (PAA, OTA).
    node.SCORE_THRESH_TEST = 0.05
    node.THRESHOLD_ON_SCORE = False
    # Candidates per level before suppression, at least TEST.DETECTIONS_PER_IMAGE and, if that is
    # more than 100, three times as many.
    node.TOPK_CANDIDATES_TEST = 1000
    # Rank candidates by class probability (mmdet), not by score.
    node.RANK_BY_CLASS = False
    # Rank anchors by their best class (PAA), not pairs of anchor and class.
    node.RANK_ANCHORS = False
    # Clip boxes to the image before suppression. mmdet's TOOD does not. Boxes of merged views are
    # always clipped.
    node.CLIP_BOXES = True
    # IoU threshold of NMS.
    node.NMS_THRESH_TEST = 0.6
    # Boxes suppress overlapping boxes of other classes, too: in NMS, in votes, and in the merging
    # of views (class-agnostic NMS). The class of the best box stays.
    node.CLASS_AGNOSTIC_NMS = False

    # Multi-scale testing (paper, Table 8), with TEST.AUG.ENABLED. Views are those of
    # TEST.AUG.MIN_SIZES, MAX_SIZE and FLIP, and the plain one of INPUT.
    node.TTA = CfgNode()
    # How boxes of all views are merged: a name of MODEL.ATSS.SUPPRESSION.
    node.TTA.MERGE = "soft_vote"
    # IoU of a group's members with its best box, at least.
    node.TTA.VOTE_THRESH = 0.66
    # With "soft_vote", the lowest score of a group's other members that stay.
    node.TTA.SOFT_SCORE_MIN = 0.05
    # [min, max] box size of each of TEST.AUG.MIN_SIZES: square root of the area, in pixels of the
    # view. Other boxes are dropped.
    node.TTA.SIZE_RANGES = [[0, 10000]] * len(cfg.TEST.AUG.MIN_SIZES)
    # Detections per image, at least TEST.DETECTIONS_PER_IMAGE; the authors' code returns 1000.
    # Evaluation counts 100 of an image and class, or TEST.DETECTIONS_PER_IMAGE if that is more.
    node.TTA.MAX_DETECTIONS = 1000

    # Images per process and step of an evaluation. Only images of one padded size are stacked, so
    # that detections are those of single images.
    node.IMS_PER_BATCH_TEST = 1

    # Precision of backbone and towers: "fp32", "bf16", "fp16" (GPUs only; gradients are scaled) or
    # "auto": bf16 if the processor is fast at it, else fp32. SOLVER.AMP.ENABLED (GPUs only) trains
    # them in fp16 if this is fp32, and evaluates in fp32; with other values it scales gradients.
    node.PRECISION = "fp32"
    # Memory format channels_last, which is faster for convolutions in bf16.
    node.CHANNELS_LAST = False
    # Parts to compile with torch.compile: None, "tail" (decoding, assignment and criterion of a
    # training step) or "all" (backbone and heads too). The first iteration takes minutes, and so
    # does the first without objects, with one object, of each phase and, with "all", of each image
    # size. Configs up to 0.2 have False for None, True for "all".
    node.COMPILE = None

    # Parts: a key names one, a group contains the arguments of all.

    # Rule that selects training samples ("matcher" in Detectron2). ASSIGNERS.ATSS.TOP_K is the k of
    # ATSS (paper, Table 4).
    ASSIGNER_REGISTRY.add_keys(node, "ATSS")
    SIMILARITIES.add_keys(node)
    # Head: "ATSSHead", two towers (RetinaNet, FCOS); "VFNetHead"; "TOODHead"; "RPNHead",
    # Detectron2's for proposals.
    modeling.HEAD_REGISTRY.add_keys(node, "ATSSHead")
    # HEADS.ATSSHead.TOWER: module of all levels, replaces the two towers: "dynamic" (dynamic head);
    # "" for the two towers.
    modeling.TOWERS.add_keys(node)
    # Box code: "box", deltas from the anchor; "point", distances from its centre in strides;
    # "log_point", logarithms of distances in pixels (FCOS, first version); "distribution",
    # probabilities of distances in strides (GFL); "corners", boxes in strides.
    modeling.BOX_CODES.add_keys(node, "box")
    # Class loss: "focal", for class targets 0 and 1; "cross_entropy", "quality_focal" (GFL),
    # "varifocal" (VarifocalNet) or "matchability" (DEIM), also for targets between; "" for none.
    modeling.CLS_LOSSES.add_keys(node, "focal")
    # Class target of a positive: "one"; "score", that of the rule; "overlap", the IoU of its
    # predicted box and its object.
    modeling.CLS_TARGETS.add_keys(node, "one")
    # Box loss: "giou", "iou", "nwd"; "smooth_l1", of the box regression; "dfl", of distributions
    # (GFL); several with "+" between; "" for none.
    modeling.BOX_LOSSES.add_keys(node, "giou")
    # Weight of a positive in the box loss: "one", "score", "centerness", "overlap" or "confidence"
    # (its highest class probability); "" for its quality target, or 1 if the head has no quality.
    modeling.BOX_WEIGHTS.add_keys(node, "")
    # Target of the quality prediction: "centerness" or "overlap"; "" for no loss: another branch
    # trains it, or the head has none (MODEL.ATSS.CENTERNESS "").
    modeling.QUALITIES.add_keys(node, "centerness")
    # Divisor of class and quality losses: "positives", their number; "targets", the sum of class
    # targets.
    modeling.NORMALISERS.add_keys(node, "positives")
    # Factor of the losses of a level: "balance", higher for levels with few positives so far
    # (DDOD); "" for 1.
    modeling.LEVEL_WEIGHTS.add_keys(node, "")
    # Score of a detection: "sqrt", root of class probability x quality; "product" (mmdet).
    modeling.SCORES.add_keys(node, "sqrt")
    # Suppression of overlapping boxes: "nms"; "score_vote", NMS and a weighted mean with the
    # suppressed boxes (PAA); "vote", "soft_vote" or "none".
    modeling.SUPPRESSIONS.add_keys(node, "nms")
