"""Config values that follow from data, epochs or backbone. ``complete_*`` and ``set_*`` work in
place."""

import math
from collections.abc import Collection

from detectron2.config import CfgNode

from ..data.datasets import classes_of, count_training_images, follow, ids_of, without_classes
from ..errors import UserError
from ..modeling.timm_backbone import pixels_of

TIMM = "build_timm_fpn_backbone"
RESNET = "build_atss_resnet_fpn_backbone"
# Key in iterations -> key in epochs.
EPOCHS = {
    "SOLVER.MAX_ITER": "SOLVER.EPOCHS",
    "SOLVER.CHECKPOINT_PERIOD": "SOLVER.CHECKPOINT_EPOCHS",
    "TEST.EVAL_PERIOD": "TEST.EVAL_EPOCHS",
}

# ------------------------------------------------------------------------------------------------
# Classes
# ------------------------------------------------------------------------------------------------


def is_two_stage(cfg: CfgNode) -> bool:
    """Return whether this project makes the proposals of Detectron2's detector of two stages."""
    model = cfg.MODEL
    proposals = model.PROPOSAL_GENERATOR.NAME == "ATSSProposals"
    return proposals and model.META_ARCHITECTURE != "ATSSDetector"


def uses_atss(cfg: CfgNode) -> bool:
    return is_two_stage(cfg) or cfg.MODEL.META_ARCHITECTURE == "ATSSDetector"


def resolve_num_classes(cfg: CfgNode) -> int:
    """Return MODEL.ATSS.NUM_CLASSES, or MODEL.ROI_HEADS.NUM_CLASSES of two stages; if it is -1,
    that of the data sets.

    Raises:
        UserError: if config and data sets differ, or none has a number.
    """
    group = "ROI_HEADS" if is_two_stage(cfg) else "ATSS"
    key, in_config = f"MODEL.{group}.NUM_CLASSES", cfg.MODEL[group].NUM_CLASSES
    number = in_config
    names = list(dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))
    counts = {name: len(c) for name in names if (c := classes_of(name)) is not None}
    for name, count in counts.items():
        if number == -1:
            number = count
        elif number != count:
            first = f"{key} is"
            if in_config == -1:
                first = f"data set {next(iter(counts))} has"
            sets = ""
            if cfg.DATASETS.TRAIN != cfg.DATASETS.TEST:  # one may come from the config's base
                sets = f" (DATASETS.TRAIN is {cfg.DATASETS.TRAIN}, TEST is {cfg.DATASETS.TEST})"
            raise UserError(f"{first} {number}, but data set {name} has {count} classes{sets}")
    if number == -1 and (nameless := without_classes(names)):
        raise UserError(
            f"data set {nameless[0]} has no thing_classes in its metadata, and "
            f"{key} is -1: set one of them"
        )
    if number == -1:
        raise UserError(
            f"{key} is -1 (the number of the data sets), but none of the data sets "
            f"{names} is registered: register one, or set the number"
        )
    if number < 1:
        raise UserError(f"{key} must be >= 1, or -1, got {number}")
    return number


def set_num_classes(cfg: CfgNode) -> None:
    """Set the key of :func:`resolve_num_classes` to its result."""
    group = cfg.MODEL.ROI_HEADS if is_two_stage(cfg) else cfg.MODEL.ATSS
    group.NUM_CLASSES = resolve_num_classes(cfg)


def complete_classes(cfg: CfgNode, training: bool = True) -> None:
    """Set number, names and ids of the classes, and their order in all data sets. Without training,
    the names in the config of a finished run have precedence over those of the data sets.

    Raises:
        UserError: as :func:`resolve_num_classes`, or if data sets have different classes.
    """
    set_num_classes(cfg)
    names_of_run = list(cfg.MODEL.ATSS.CLASS_NAMES)
    cfg.MODEL.ATSS.CLASS_NAMES = []
    names = class_names(cfg)
    cfg.MODEL.ATSS.CLASS_NAMES = names if training or not names_of_run else names_of_run
    follow_classes(cfg)
    cfg.MODEL.ATSS.CLASS_IDS = []
    cfg.MODEL.ATSS.CLASS_IDS = class_ids(cfg)


def follow_classes(cfg: CfgNode) -> None:
    """Renumber the classes of the data sets as MODEL.ATSS.CLASS_NAMES, in each process after
    registration.

    Raises:
        UserError: if a data set has other classes.
    """
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        follow(name, cfg.MODEL.ATSS.CLASS_NAMES)


def class_ids(cfg: CfgNode) -> list[int]:
    """Return MODEL.ATSS.CLASS_IDS, else those of the first registered data set, or []."""
    ids = list(cfg.MODEL.ATSS.CLASS_IDS)
    data_sets = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    return ids or next(filter(None, map(ids_of, data_sets)), [])


def class_names(cfg: CfgNode) -> list[str]:
    """Return MODEL.ATSS.CLASS_NAMES, else those of the first registered data set, or []."""
    names = list(cfg.MODEL.ATSS.CLASS_NAMES)
    data_sets = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    return names or list(next(filter(None, map(classes_of, data_sets)), []))


# ------------------------------------------------------------------------------------------------
# Iterations
# ------------------------------------------------------------------------------------------------


def complete_schedule(cfg: CfgNode, given: Collection[str] = ()) -> None:
    """Set the iterations of SOLVER.EPOCHS, SOLVER.CHECKPOINT_EPOCHS and TEST.EVAL_EPOCHS.

    SOLVER.MAX_ITER of the command line changes the length alone: a small data set has checkpoints
    and evaluations as rarely as with SOLVER.EPOCHS and MIN_ITER.

    Args:
        given: keys of the command line, whose iterations precede epochs of a file.

    Raises:
        UserError: for negative or infinite epochs.
    """
    solver, test = cfg.SOLVER, cfg.TEST
    planned = solver.EPOCHS
    for iterations, epochs in EPOCHS.items():
        group, name = epochs.split(".")
        if iterations in given and epochs not in given:
            cfg[group][name] = 0.0
        if not 0 <= cfg[group][name] < math.inf:
            raise UserError(f"{epochs} must be >= 0, got {cfg[group][name]}")
    if not (solver.EPOCHS or solver.CHECKPOINT_EPOCHS or test.EVAL_EPOCHS):
        return
    images = count_training_images(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    one_pass = epoch = images / max(solver.IMS_PER_BATCH, 1)
    if planned:
        epoch = max(epoch, solver.MIN_ITER / planned)
    if solver.EPOCHS:
        solver.MAX_ITER = math.ceil(epoch * solver.EPOCHS)
    # Epochs that the command line sets beside MAX_ITER are passes over the images.
    exact = () if solver.EPOCHS else given
    save_every, test_every = (
        cfg[group][name] * (one_pass if f"{group}.{name}" in exact else epoch)
        for group, name in (("SOLVER", "CHECKPOINT_EPOCHS"), ("TEST", "EVAL_EPOCHS"))
    )
    # Rounded up, so that the last period ends with the training and not just before it.
    if save_every:
        solver.CHECKPOINT_PERIOD = max(math.ceil(save_every), 1)
    if test_every:
        # A run that is interrupted in an evaluation loses nothing if a checkpoint precedes it.
        unit = solver.CHECKPOINT_PERIOD if 0 < save_every <= test_every else 1
        test.EVAL_PERIOD = max(math.ceil(test_every / unit), 1) * unit
    if epoch > one_pass and not solver.EPOCHS:
        # config.yaml, which --resume reads, has no EPOCHS: keep the periods in iterations.
        solver.CHECKPOINT_EPOCHS = test.EVAL_EPOCHS = 0.0


def describe_schedule(cfg: CfgNode, images: int) -> str:
    """Return the length of a training on a number of images, and the reason if it is
    SOLVER.MIN_ITER."""
    solver, batch = cfg.SOLVER, cfg.SOLVER.IMS_PER_BATCH
    passes = solver.MAX_ITER * batch / max(images, 1)
    count = f"{passes:,.0f}" if passes >= 10 else f"{passes:.1f}"
    reason = ""
    alone = math.ceil(images / batch * solver.EPOCHS)
    if 0 < alone < solver.MIN_ITER <= solver.MAX_ITER:
        reason = (
            f"; SOLVER.MIN_ITER {solver.MIN_ITER} is the least, SOLVER.EPOCHS {solver.EPOCHS:g} "
            f"alone would be {alone}"
        )
    period = cfg.TEST.EVAL_PERIOD
    evaluations = f", evaluations every {period}" if period and cfg.DATASETS.TEST else ""
    return (
        f"{solver.MAX_ITER} iterations of {batch} images ({count} passes over {images} images"
        f"{reason}){evaluations}"
    )


def enter_schedule(cfg: CfgNode, done: int, seen: int) -> int:
    """Return the iteration at which a run continues with another batch size.

    With SOLVER.REFERENCE_WORLD_SIZE it is ``seen`` in new batches. With SOLVER.EPOCHS, the images
    that remain of the epochs give the remaining iterations. Otherwise it is ``done``.

    Args:
        cfg: of a whole run with the new batch size.
        done, seen: iterations and images so far.
    """
    solver = cfg.SOLVER
    if solver.REFERENCE_WORLD_SIZE:
        return seen // solver.IMS_PER_BATCH
    if not solver.EPOCHS:
        return done
    images = count_training_images(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    left = math.ceil((images * solver.EPOCHS - seen) / solver.IMS_PER_BATCH)
    return solver.MAX_ITER - max(left, solver.MIN_ITER - done, 0)


# ------------------------------------------------------------------------------------------------
# Pixels
# ------------------------------------------------------------------------------------------------


def input_size(cfg: CfgNode) -> tuple[int, int] | tuple[int, int, bool]:
    """Return the arguments of :func:`atss_runner.images.resized` after the image's size."""
    size = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    return (*size, True) if cfg.INPUT.RESIZE == "stretch" else size


def complete_pixels(cfg: CfgNode, given: Collection[str] = ()) -> None:
    """Set the channels' order, mean and deviation to those of the timm backbone, if
    MODEL.TIMM.PIXELS is True.

    Raises:
        UserError: if keys of the command line (``given``) differ.
    """
    if _fills_pixels(cfg):
        if {"INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"} & set(given):
            check_pixels(cfg)
        cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = pixels_of(cfg.MODEL.TIMM.NAME)


def check_pixels(cfg: CfgNode) -> None:
    """Raise UserError for other pixel values than the timm backbone's, which would only lower the
    AP."""
    pixels = cfg.INPUT.FORMAT, list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)
    if _fills_pixels(cfg) and pixels != (target := pixels_of(cfg.MODEL.TIMM.NAME)):
        raise UserError(
            "MODEL.TIMM.PIXELS True requires INPUT.FORMAT {}, MODEL.PIXEL_MEAN {} and "
            "MODEL.PIXEL_STD {}, which atss.config.load_config sets; False keeps the values of the "
            "config".format(*target)
        )


def _fills_pixels(cfg: CfgNode) -> bool:
    return cfg.MODEL.BACKBONE.NAME == TIMM and cfg.MODEL.TIMM.PIXELS
