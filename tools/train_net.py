#!/usr/bin/env python3
"""Trains or evaluates a detector.

    tools/train_net.py --config-file configs/ATSS_R_50_FPN_1x.yaml --num-gpus 8
    torchrun --nproc-per-node 8 tools/train_net.py --config-file configs/ATSS_R_50_FPN_1x.yaml
    tools/train_net.py --config-file configs/ATSS_R_18_FPN_small.yaml \\
        --register cells_train=train.json:images --register cells_val=val.json:images \\
        DATASETS.TRAIN "('cells_train',)" DATASETS.TEST "('cells_val',)"
"""

import argparse
import importlib
import logging
import os
import sys

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from atss.acceleration import keep_freed_memory
from atss.config import build_assigner, resolve_num_classes
from atss.config_file import load_config
from atss.data.datasets import (
    classes_of,
    log_remarks,
    refuse_unannotated,
    refuse_unevaluable,
    register_coco,
)
from atss.engine import SafeCheckpointer, Trainer, check_run
from atss.launch import (
    check_free_space,
    check_output_dir,
    check_processes,
    check_shared,
    launch,
)


def make_parser() -> argparse.ArgumentParser:
    parser = default_argument_parser(epilog=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="NAME=annotations.json:image_dir",
        help="an own data set in COCO's format, to be used under NAME in the config (repeatable)",
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="a Python module to import first, such as one that registers a rule (repeatable)",
    )
    return parser


def register(args: argparse.Namespace) -> None:
    """What --import and --register ask for; every process does it for itself.

    Raises:
        ValueError: with a sentence that says what is wrong.
    """
    sys.path.insert(0, os.getcwd())
    for module in args.imports:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(f"--import {module}: {error}") from error
    for spec in args.register:
        register_coco(spec)


def setup(args: argparse.Namespace) -> CfgNode:
    """The config of this run, complete and checked against the data.

    Raises:
        ValueError: with a sentence that says what is wrong.
    """
    register(args)
    cfg = load_config(args.config_file, opts=args.opts)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        print("No GPU here: running on the CPU.", file=sys.stderr)
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.META_ARCHITECTURE == "ATSSDetector":
        cfg.MODEL.ATSS.NUM_CLASSES = resolve_num_classes(cfg)
        data_sets = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
        cfg.MODEL.ATSS.CLASS_NAMES = next(filter(None, map(classes_of, data_sets)), [])
        build_assigner(cfg)
    check_run(cfg, training=not args.eval_only)
    if not args.eval_only:
        refuse_unannotated(cfg.DATASETS.TRAIN)
    refuse_unevaluable(cfg.DATASETS.TEST)
    check_processes(args, cfg)
    check_output_dir(cfg.OUTPUT_DIR)
    cfg.freeze()
    return cfg


def main(args: argparse.Namespace, cfg: CfgNode) -> dict | None:
    """What every process does."""
    register(args)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="atss")
    log_remarks((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    if cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = SafeCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_tta(cfg, model))
        return results
    trainer = Trainer(cfg)
    if comm.is_main_process():
        kept = cfg.SOLVER.CHECKPOINTS_TO_KEEP
        check_free_space(cfg.OUTPUT_DIR, trainer.model, copies=max(kept + 1, 2))
    if args.resume:
        check_shared(trainer.checkpointer.get_checkpoint_file())
    trainer.resume_or_load(resume=args.resume)
    logging.getLogger("atss").info("Starting at iteration %d", trainer.start_iter)
    return trainer.train()


if __name__ == "__main__":
    args = make_parser().parse_args()
    try:
        cfg = setup(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    launch(main, args, cfg)
