"""Data sets of --register in the config of a run, which --resume and --eval-only read again."""

import argparse
import os
import sys

from detectron2.config import CfgNode

from ..data.datasets import split_source
from ..errors import UserError
from ..labels.formats import ADDRESS

# Endings of annotations whose other half is a split, not a folder of images.
WITH_SPLITS = (".yaml", ".yml", ".data", ".names", ".txt")


def recall(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Complete ``args``, in place, by DATASETS.REGISTER, CLASSES and FIRST_PIXEL, and the config by
    what the command line has besides. Data sets of the config are registered if DATASETS.TRAIN (in
    training) or TEST names them, and the command line none of that name.

    Args:
        args: of :func:`~atss.engine.run.make_parser`.
        cfg: its paths are relative to the folder of the config file; they become absolute.

    Raises:
        ValueError: naming DATASETS.REGISTER, if it is no list of texts.
    """
    folder = os.path.realpath(os.path.dirname(args.config_file))
    if "DATASETS.REGISTER" in args.opts[::2]:
        folder = os.getcwd()
    if not all(isinstance(spec, str) for spec in cfg.DATASETS.REGISTER):
        raise UserError(f"DATASETS.REGISTER is a list of texts, not {cfg.DATASETS.REGISTER}")
    own = {_name(spec) for spec in args.register}
    known = [_absolute(x, folder) for x in cfg.DATASETS.REGISTER if _name(x) not in own]
    cfg.DATASETS.REGISTER = [*known, *(_absolute(x, os.getcwd()) for x in args.register)]
    used = {*cfg.DATASETS.TEST, *(() if args.eval_only else cfg.DATASETS.TRAIN)}
    args.register = [*(x for x in known if _name(x) in used), *args.register]
    args.recalls_classes = args.classes is None
    if args.classes is None:
        args.classes = cfg.DATASETS.CLASSES or None
        if args.classes and own:
            print(f"--classes {args.classes}, as {args.config_file} has it", file=sys.stderr)
    if args.first_pixel is None:
        args.first_pixel = cfg.DATASETS.FIRST_PIXEL
    cfg.DATASETS.CLASSES, cfg.DATASETS.FIRST_PIXEL = args.classes or "", args.first_pixel


def shorten_paths(cfg: CfgNode) -> None:
    """Make the paths of DATASETS.REGISTER relative to OUTPUT_DIR, in place, so that data and runs
    can move together; absolute if they share no folder but the root."""
    folder = os.path.realpath(cfg.OUTPUT_DIR)
    cfg.DATASETS.REGISTER = [_relative(x, folder) for x in cfg.DATASETS.REGISTER]


def _name(spec: str) -> str:
    return spec.partition("=")[0]


def _absolute(spec: str, folder: str) -> str:
    name, _, source = spec.partition("=")
    if not name or ":" not in source.strip(":"):  # register() says what is wrong
        return spec
    annotations, images = split_source(os.path.join(folder, os.path.expanduser(source)))
    if not _has_splits(annotations) and not ADDRESS.match(images):
        images = os.path.normpath(os.path.join(folder, images))
    return f"{name}={os.path.normpath(annotations)}:{images}"


def _relative(spec: str, folder: str) -> str:
    name, _, source = spec.partition("=")
    annotations, images = split_source(source)
    if not _has_splits(annotations) and not ADDRESS.match(images):
        images = _seen_from(folder, images)
    return f"{name}={_seen_from(folder, annotations)}:{images}"


def _seen_from(folder: str, path: str) -> str:
    shared = os.path.commonpath([folder, path])
    return path if shared == os.path.dirname(shared) else os.path.relpath(path, folder)


def _has_splits(annotations: str) -> bool:
    return os.path.isdir(annotations) or annotations.lower().endswith(WITH_SPLITS)
