"""Values of a training's keys that Detectron2 would find wrong late, with a traceback, or never."""

import logging
import math
from collections.abc import Collection

from detectron2.config import CfgNode

from ..config.checks import check_values, flatten
from ..config.derive import TIMM
from ..errors import UserError, check_choice

# Limits of Detectron2's keys: least and greatest value.
TRAINING_LIMITS = {
    "INPUT.AUGMENT_UNTIL": (0, 1),
    "INPUT.COLOR_JITTER": (0, 1),
    "INPUT.FULL_SIZE_CROP": (0, 1),
    "INPUT.FULL_SIZE_CROP_MIN_AREA": (0, 1),
    "INPUT.MIN_SIZE_TRAIN": (1, math.inf),
    "INPUT.MAX_SIZE_TRAIN": (1, math.inf),
    "INPUT.MOSAIC": (0, 1),
    "INPUT.SCALE_JITTER_SIZE": (32, math.inf),
    "SOLVER.ACCUMULATE": (1, math.inf),
    "SOLVER.BACKBONE_LR_FACTOR": (0, math.inf),
    "SEED": (-(2**31), 2**32 - 1),  # NumPy's
    "SOLVER.BASE_LR": (1e-12, math.inf),
    "SOLVER.CHECKPOINT_PERIOD": (1, math.inf),
    "SOLVER.COLLECTIVE_TIMEOUT": (0.1, math.inf),
    "SOLVER.EMA_DECAY": (0, 0.999999),
    "SOLVER.IMS_PER_BATCH": (1, math.inf),
    "SOLVER.MAX_ITER": (1, math.inf),
    "SOLVER.MIN_ITER": (0, math.inf),
    "TEST.EVAL_PERIOD": (0, math.inf),
    "SOLVER.WARMUP_FACTOR": (0, 1),
    "TEST.PATIENCE": (0, math.inf),
}
# Choices of Detectron2's keys.
TRAINING_CHOICES = {
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("none", "horizontal", "vertical"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
    "SOLVER.LR_SCHEDULER_NAME": (
        "WarmupMultiStepLR",
        "WarmupCosineLR",
        "WarmupStepWithFixedGammaLR",
    ),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
}


def check_training_values(cfg: CfgNode, unknown: Collection[str] = ()) -> None:
    """Check limits and choices.

    Args:
        unknown: keys whose values are not known yet.

    Raises:
        UserError: naming the key.
    """
    limits = {key: x for key, x in TRAINING_LIMITS.items() if key not in unknown}
    check_values(cfg, limits)
    values = dict(flatten(cfg))
    for key, choices in TRAINING_CHOICES.items():
        check_choice(key, values[key], choices)
    sizes, steps = cfg.INPUT.MIN_SIZE_TRAIN, cfg.SOLVER.STEPS
    in_range = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    if in_range and not (len(sizes) == 2 and sizes[0] <= sizes[1]):
        raise UserError(
            "INPUT.MIN_SIZE_TRAIN must be the least and the greatest size, because "
            f"MIN_SIZE_TRAIN_SAMPLING is range, got {sizes}"
        )
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and list(steps) != sorted(steps):
        raise UserError(f"SOLVER.STEPS must be rising iterations, got {steps}")


def warn_of_warmup(cfg: CfgNode) -> None:
    """Warn of a warm-up that leaves no time to train: after it the schedule is near its end."""
    warmup, total = cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_ITER
    if warmup > total / 2:
        logging.getLogger(__name__).warning(
            f"SOLVER.WARMUP_ITERS {warmup} is more than half of SOLVER.MAX_ITER {total}: the "
            f"learning rate stays low; set SOLVER.WARMUP_ITERS {max(total // 10, 1)}"
        )


def warn_of_sizes(cfg: CfgNode) -> None:
    """Warn of shorter sides that no image gets, because its longer side is limited to less."""
    node = cfg.INPUT
    for of, shortest in (("TRAIN", max(node.MIN_SIZE_TRAIN)), ("TEST", node.MIN_SIZE_TEST)):
        longest = node[f"MAX_SIZE_{of}"]
        if node.RESIZE != "stretch" and shortest > longest:
            logging.getLogger(__name__).warning(
                f"INPUT.MIN_SIZE_{of} {shortest} is never reached: INPUT.MAX_SIZE_{of} {longest} "
                "limits the longer side. Change them together, for training and test"
            )


def warn_of_frozen(cfg: CfgNode) -> None:
    """Warn of a ResNet whose first layers keep their random values."""
    begins_random = cfg.MODEL.BACKBONE.NAME != TIMM and not cfg.MODEL.WEIGHTS
    if begins_random and cfg.MODEL.BACKBONE.FREEZE_AT:
        logging.getLogger(__name__).warning(
            "MODEL.WEIGHTS is empty, so the backbone begins with random weights, and "
            f"MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT} keeps its first layers so: "
            "set FREEZE_AT 0, and MODEL.RESNETS.NORM BN or GN"
        )
