"""Every config key of this project with its unit and source. This folder alone reads them.

Arguments of parts have their keys from the signatures of these, such as
MODEL.ATSS.ASSIGNERS.<name>.<ARGUMENT>. Those written out here, because they are older or shared,
must have the same defaults.
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
    """Adds the nodes MODEL.ATSS and MODEL.TIMM, and keys of training to Detectron2's own nodes,
    whose keys (solver, input, the anchors' offset) are left alone: configs/Base-ATSS.yaml sets
    them."""
    # "SGD" or "AdamW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Learning rate of the backbone without its FPN, over that of the rest.
    cfg.SOLVER.BACKBONE_LR_FACTOR = 1.0
    # Weight decay of learned scales, of levels in the head and of channels in a backbone; None: as
    # of other weights.
    cfg.SOLVER.WEIGHT_DECAY_SCALE = None
    # Passes over the training images, in place of SOLVER.MAX_ITER; 0: MAX_ITER it is.
    cfg.SOLVER.EPOCHS = 0.0
    # Iterations that SOLVER.EPOCHS are at least: of few images, an epoch is so many passes.
    cfg.SOLVER.MIN_ITER = 0
    # Epochs between checkpoints and between evaluations, in place of SOLVER.CHECKPOINT_PERIOD and
    # TEST.EVAL_PERIOD; 0: these it is.
    cfg.SOLVER.CHECKPOINT_EPOCHS = 0.0
    cfg.TEST.EVAL_EPOCHS = 0.0
    # Of the checkpoints that SOLVER.CHECKPOINT_PERIOD asks for, how many stay; 0: all.
    cfg.SOLVER.CHECKPOINTS_TO_KEEP = 0
    # Minutes that a process waits in a collective (all-reduce, all-gather) before it fails.
    # Evaluations do not count: no collective waits for them.
    cfg.SOLVER.COLLECTIVE_TIMEOUT = 30.0
    # [first, last] iteration, from 0 on, that torch.profiler records: a trace of the first process
    # for each, in OUTPUT_DIR/log/profiler-tensorboard-iter<i>; empty: none.
    cfg.SOLVER.PROFILE = []
    # Averages the weights of all iterations, and evaluates the average too: each step keeps this
    # part of it, or (1 + n) / (10 + n) after n steps, where that is less. 0: none.
    cfg.SOLVER.EMA_DECAY = 0.0
    # The metric by which the best weights of all evaluations (TEST.EVAL_PERIOD) are kept as
    # model_best.pth, by its name in metrics.json. Of several test sets it is that of the first with
    # objects, or of the one in "name/bbox/AP". "": none.
    cfg.TEST.BEST_METRIC = "bbox/AP"
    # Training ends after so many evaluations without a better one; 0: never.
    cfg.TEST.PATIENCE = 0
    # How evaluation treats objects that Pascal VOC's xml marks difficult. False: VOC's rule, by
    # which detections of them are neither right nor wrong. True: they count as others do.
    cfg.TEST.COUNT_DIFFICULT = False

    # What --register, --classes and --first-pixel gave, or a config gives in place of them:
    # NAME=annotations:images, the paths relative to the folder of the config file that is given.
    cfg.DATASETS.REGISTER = []
    cfg.DATASETS.CLASSES = ""
    cfg.DATASETS.FIRST_PIXEL = 1

    # [[name of DATASETS.TRAIN, factor], ...], how often a pass goes through the images of a data
    # set (others: once), under DATALOADER.SAMPLER_TRAIN WeightedTrainingSampler and
    # WeightedCategoryTrainingSampler. Detectron2 reads it, but does not have it in its defaults.
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = []

    # Seconds to wait for a batch from the DATALOADER.NUM_WORKERS loader processes; then the run
    # ends with an error. 0: no limit.
    cfg.DATALOADER.TIMEOUT = 120
    # Batches that each loader process loads ahead.
    cfg.DATALOADER.PREFETCH_FACTOR = 2
    # Keep the loader processes of an evaluation for the next one; those of training always stay.
    cfg.DATALOADER.PERSISTENT_WORKERS = False
    # Batches are copied into page-locked memory, from which a GPU copies them faster.
    cfg.DATALOADER.PIN_MEMORY = False

    # In place of INPUT.MIN_SIZE_TRAIN: an image is made to fit a square of SCALE_JITTER_SIZE pixels
    # times a factor between these two, of which a square of that size is cut out, or padded to it
    # ("large scale jitter", arXiv 2012.07177); empty: none. All images of a batch are of one size.
    cfg.INPUT.SCALE_JITTER = []
    cfg.INPUT.SCALE_JITTER_SIZE = 352
    # Brightness, contrast and saturation of a training image are each multiplied by up to 1 + this,
    # or down to 1 - this. Saturation is of RGB.
    cfg.INPUT.COLOR_JITTER = 0.0
    # Probability with which a training image is put together of four.
    cfg.INPUT.MOSAIC = 0.0
    # Share of the training after which INPUT.CROP, SCALE_JITTER, COLOR_JITTER and MOSAIC no
    # longer act, so that it ends on images as they are.
    cfg.INPUT.AUGMENT_UNTIL = 1.0

    # A backbone of timm, under MODEL.BACKBONE.NAME build_timm_fpn_backbone. Its maps are called s4,
    # s8, ... in MODEL.FPN.IN_FEATURES, by their strides.
    timm = cfg.MODEL.TIMM = CfgNode()
    timm.NAME = ""
    # Its weights: of a package that carries them, or of timm's hub. Where MODEL.WEIGHTS names those
    # of a whole detector, these are not looked at.
    timm.PRETRAINED = False
    # A file of them (.safetensors, .pth), in place of the hub's.
    timm.WEIGHTS = ""
    # INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD are those that its weights were made with.
    timm.PIXELS = True
    # Batch norms keep their means and variances in training. Like MODEL.BACKBONE.FREEZE_AT, n for
    # what comes before the map of stride 2^n, it counts only where weights are loaded.
    timm.FREEZE_STATISTICS = False

    node = cfg.MODEL.ATSS = CfgNode()
    # Classes, without background. -1: as many as the data sets have.
    node.NUM_CLASSES = -1
    # Their names, for pictures and checkpoints. train_net.py fills them in from the data.
    node.CLASS_NAMES = []
    # Their ids in the data, for detections that are written as COCO's json. Filled in, too.
    node.CLASS_IDS = []
    # Pyramid levels, fine to coarse.
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]

    # Anchors per location: every scale with every ratio. Scale: square root of the area in strides
    # (paper, Table 5); ratio: height / width (Table 6). The offset of the first centre, in strides,
    # is MODEL.ANCHOR_GENERATOR.OFFSET; the other keys of that node belong to other generators.
    node.ANCHOR_SCALES = [8.0]
    node.ANCHOR_RATIOS = [1.0]

    # Depth of the head: convolutions per tower, or of TOODHead's stack. None: the head's own
    # default, 4 for ATSSHead (RetinaNet, section 4), 6 for TOODHead, 3 for VFNetHead.
    node.NUM_CONVS = None
    # Normalisation in the towers, by Detectron2's names; "" for none.
    node.NORM = "GN"
    # The towers' convolutions have biases where a norm follows. Weights for mmdet want False.
    node.TOWER_BIAS = True
    # What predicts centerness, or another quality: "box" or "cls", a convolution on that tower;
    # "distribution", the shapes of the distributions of a box's sides, by which class probabilities
    # are multiplied (GFLv2); "" for nothing: scores are class probabilities then.
    node.CENTERNESS = "box"
    # A learned scale on each level's regression.
    node.LEVEL_SCALE = True
    # One convolution of both towers is deformable, the last or, by HEADS.ATSSHead.DEFORM_AT, the
    # first: "v1" or "v2"; "" for none. In the
    # backbone: MODEL.RESNETS.DEFORM_ON_PER_STAGE and DEFORM_MODULATED.
    node.DEFORM_TOWER = ""
    # Class probability that the head predicts before training (RetinaNet, section 4.1).
    node.PRIOR_PROB = 0.01
    # P7 is computed from P6 after a ReLU. mmdet's checkpoints want False.
    node.RELU_BEFORE_P7 = True

    # (wx, wy, ww, wh) of the box deltas.
    node.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)

    # Weight of the box loss, or of each but dfl, against the class and quality losses.
    node.BBOX_REG_LOSS_WEIGHT = 2.0
    # Where smooth L1 turns from quadratic to linear.
    node.SMOOTH_L1_LOSS_BETA = 0.11
    node.FOCAL_LOSS_ALPHA = 0.25
    node.FOCAL_LOSS_GAMMA = 2.0
    # Weight of the quality branch's loss.
    node.QUALITY_LOSS_WEIGHT = 1.0
    # Class and quality losses are divided by what MODEL.ATSS.NORMALISER counts on all processes, at
    # least this, in the whole batch or for each of its images.
    node.NORMALISER_MIN = 1.0
    node.NORMALISER_PER_IMAGE = False
    # Box losses are divided by the sum of box weights, at least this.
    node.BOX_NORMALISER_MIN = 1e-6

    # Branches besides "main", that of the keys of this node: outputs that learn by a rule and a
    # criterion of their own.
    node.BRANCHES = []
    # BRANCH.<name> holds keys of this node with other values: for the branch of that name, for a
    # phase, or for a part that is made of parts.
    node.BRANCH = CfgNode(new_allowed=True)
    # The branch that detects.
    node.INFERENCE = "main"
    # Of a branch: the head's output that it reads, where the head gives several by name.
    node.OUTPUT = ""
    # It has a head of its own under its name, on features through which perhaps nothing is learnt;
    # or it reads that of the branch of this name.
    node.OWN_HEAD = False
    node.DETACHED = False
    node.HEAD_OF = ""
    # It takes the assignment of the branch of this name.
    node.ASSIGNMENT_OF = ""
    # Phases before that of these keys: (name in BRANCH, until which iteration, or which share of
    # SOLVER.MAX_ITER).
    node.PHASES = []

    # For weights of the authors' code, to which coordinates name the centres of pixels, and boxes
    # hold their last pixel: with True they give boxes like everyone's. To fine-tune them: False.
    node.LEGACY_PIXELS = False

    # Inference (paper, section 3.1). The threshold is on the class probability, or on the score
    # (PAA, OTA).
    node.SCORE_THRESH_TEST = 0.05
    node.THRESHOLD_ON_SCORE = False
    # Kept per level before suppression, by their scores or by class probability (mmdet); of pairs
    # of anchor and class, or of anchors by their best class (PAA).
    node.TOPK_CANDIDATES_TEST = 1000
    node.RANK_BY_CLASS = False
    node.RANK_ANCHORS = False
    # Boxes end where the image does, before suppression. False: nowhere (mmdet's TOOD), but where
    # views are merged.
    node.CLIP_BOXES = True
    # IoU.
    node.NMS_THRESH_TEST = 0.6

    # Multi-scale testing (paper, Table 8), under TEST.AUG.ENABLED; views are TEST.AUG.MIN_SIZES,
    # MAX_SIZE and FLIP, besides the plain one of INPUT.
    node.TTA = CfgNode()
    # How views are merged: a name as of MODEL.ATSS.SUPPRESSION.
    node.TTA.MERGE = "soft_vote"
    # IoU with the best of a group from which on a box is of it.
    node.TTA.VOTE_THRESH = 0.66
    # Score that a voter keeps at least, under "soft_vote".
    node.TTA.SOFT_SCORE_MIN = 0.05
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
    # What torch.compile compiles: "tail", decoding, assignment and criterion of a training step, or
    # "all", backbone and head too; None: nothing. The first iterations take minutes, and so do the
    # first with no object, with one, and of each phase; of backbone and head also the first with
    # another size of images. Older configs have False for None, and True for "all".
    node.COMPILE = None

    # Parts by name, and their arguments.
    # The rule that chooses samples ("matcher" in Detectron2). Of ATSS there is
    # ASSIGNERS.ATSS.TOP_K, 9 (paper, Table 4).
    ASSIGNER_REGISTRY.add_keys(node, "ATSS")
    SIMILARITIES.add_keys(node)
    modeling.HEAD_REGISTRY.add_keys(node, "ATSSHead")
    # HEADS.ATSSHead.TOWER: what levels go through together in place of its two towers: "dynamic",
    # blocks of the dynamic head; "": these it is.
    modeling.TOWERS.add_keys(node)
    # What the box predictor says: "box", deltas from the anchor; "point", distances from its centre
    # in strides; "log_point", logarithms of distances in pixels (the first FCOS); "distribution",
    # how likely each distance in strides is (GFL); "corners", boxes in strides.
    modeling.BOX_CODES.add_keys(node, "box")
    # "focal", for class targets of 0 and 1; "quality_focal" (GFL), "varifocal" (VarifocalNet) or
    # "matchability" (DEIM), for others too; "": no class loss.
    modeling.CLS_LOSSES.add_keys(node, "focal")
    # What the class of a positive's object is to say: "one"; "score", that of the rule; "overlap",
    # the IoU of the box that it predicts now.
    modeling.CLS_TARGETS.add_keys(node, "one")
    # "giou", "iou", "nwd"; "smooth_l1", which compares what the head regresses; "dfl", of
    # distributions (GFL); several that act together with "+" between; "": no box loss.
    modeling.BOX_LOSSES.add_keys(node, "giou")
    # Of each positive in the box loss: "one", "score", "centerness", "overlap", or "confidence",
    # its highest class probability; "": what its quality is to be, or 1 where the head predicts
    # none.
    modeling.BOX_WEIGHTS.add_keys(node, "")
    # What the quality branch is to say, "centerness" or "overlap"; "": it has no loss here, and is
    # to be trained by another branch, or left out of the head: MODEL.ATSS.CENTERNESS "".
    modeling.QUALITIES.add_keys(node, "centerness")
    # "positives", or "targets", the sum of class targets.
    modeling.NORMALISERS.add_keys(node, "positives")
    # By which the losses of a level are multiplied: "balance", more where positives have been few
    # (DDOD); "": 1.
    modeling.LEVEL_WEIGHTS.add_keys(node, "")
    # "sqrt": root of probability x quality; "product": without the root, as mmdet has it.
    modeling.SCORES.add_keys(node, "sqrt")
    # What becomes of boxes that overlap: "nms"; "score_vote", after which those that stay are moved
    # by those that went (PAA); "vote", "soft_vote" or "none".
    modeling.SUPPRESSIONS.add_keys(node, "nms")
