"""Passes over the data become iterations."""

import math
from collections.abc import Collection

from detectron2.config import CfgNode

from ..data.datasets import count_training_images
from ..errors import UserError

# In place of iterations.
EPOCHS = {
    "SOLVER.MAX_ITER": "SOLVER.EPOCHS",
    "SOLVER.CHECKPOINT_PERIOD": "SOLVER.CHECKPOINT_EPOCHS",
    "TEST.EVAL_PERIOD": "TEST.EVAL_EPOCHS",
}


def complete_schedule(cfg: CfgNode, given: Collection[str] = ()) -> None:
    """Fills in, in place, the iterations that SOLVER.EPOCHS, SOLVER.CHECKPOINT_EPOCHS and
    TEST.EVAL_EPOCHS stand for.

    Args:
        given: keys that somebody has typed: iterations among them count, and not the epochs that a
            file asks for.

    Raises:
        ValueError: naming a key whose number cannot be.
    """
    solver, test = cfg.SOLVER, cfg.TEST
    for iterations, epochs in EPOCHS.items():
        group, name = epochs.split(".")
        if iterations in given and epochs not in given:
            cfg[group][name] = 0.0
        if not 0 <= cfg[group][name] < math.inf:
            raise UserError(f"{epochs} must be from 0 on, not {cfg[group][name]}")
    if not (solver.EPOCHS or solver.CHECKPOINT_EPOCHS or test.EVAL_EPOCHS):
        return
    images = count_training_images(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    epoch = images / max(solver.IMS_PER_BATCH, 1)
    if solver.EPOCHS:
        epoch = max(epoch, solver.MIN_ITER / solver.EPOCHS)
        solver.MAX_ITER = math.ceil(epoch * solver.EPOCHS)
    # Rounded up, so that the last period ends with the training and not just before it.
    if solver.CHECKPOINT_EPOCHS:
        solver.CHECKPOINT_PERIOD = max(math.ceil(epoch * solver.CHECKPOINT_EPOCHS), 1)
    if test.EVAL_EPOCHS:
        # An evaluation that a checkpoint precedes can be broken off at once.
        follows = 0 < solver.CHECKPOINT_EPOCHS <= test.EVAL_EPOCHS
        unit = solver.CHECKPOINT_PERIOD if follows else 1
        test.EVAL_PERIOD = max(math.ceil(epoch * test.EVAL_EPOCHS / unit), 1) * unit


def enter_schedule(cfg: CfgNode, done: int, seen: int) -> int:
    """The iteration at which a run goes on with another batch size. If SOLVER.EPOCHS asks for
    passes, or the number of processes scales iterations (SOLVER.REFERENCE_WORLD_SIZE), iterations
    are counted in the new batches from there on, and the remaining images of these passes decide
    how many remain. SOLVER.MAX_ITER that is given without EPOCHS does not change.

    Args:
        cfg: of a whole run with the new batch size.
        done: iterations until now.
        seen: images until now.
    """
    solver = cfg.SOLVER
    if solver.REFERENCE_WORLD_SIZE:
        return seen // solver.IMS_PER_BATCH
    if not solver.EPOCHS:
        return done
    images = count_training_images(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    left = math.ceil((images * solver.EPOCHS - seen) / solver.IMS_PER_BATCH)
    return solver.MAX_ITER - max(left, solver.MIN_ITER - done, 0)
