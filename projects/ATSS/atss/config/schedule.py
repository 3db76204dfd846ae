"""Passes over the data become iterations."""

import math

from detectron2.config import CfgNode

from ..data.datasets import count_training_images


def complete_schedule(cfg: CfgNode) -> None:
    """Fills in, in place, the iterations that SOLVER.EPOCHS, SOLVER.CHECKPOINT_EPOCHS and
    TEST.EVAL_EPOCHS stand for.

    Raises:
        ValueError: naming a key whose number cannot be.
    """
    solver, test = cfg.SOLVER, cfg.TEST
    epochs = {
        "SOLVER.EPOCHS": solver.EPOCHS,
        "SOLVER.CHECKPOINT_EPOCHS": solver.CHECKPOINT_EPOCHS,
        "TEST.EVAL_EPOCHS": test.EVAL_EPOCHS,
    }
    for key, value in epochs.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{key} must be from 0 on, not {value}")
    if not any(epochs.values()):
        return
    images = count_training_images(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    epoch = images / max(solver.IMS_PER_BATCH, 1)
    if solver.EPOCHS:
        epoch = max(epoch, solver.MIN_ITER / solver.EPOCHS)
        solver.MAX_ITER = math.ceil(epoch * solver.EPOCHS)
    if solver.CHECKPOINT_EPOCHS:
        solver.CHECKPOINT_PERIOD = max(round(epoch * solver.CHECKPOINT_EPOCHS), 1)
    if test.EVAL_EPOCHS:
        test.EVAL_PERIOD = max(round(epoch * test.EVAL_EPOCHS), 1)
