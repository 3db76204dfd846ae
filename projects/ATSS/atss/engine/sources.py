"""Data sets of --register in the config of a run."""

import argparse
import os
import sys

from detectron2.config import CfgNode

from ..data.datasets import split_source
from ..errors import UserError
from ..labels.folders import YOLO_CONFIGS
from ..labels.formats import ADDRESS


def recall(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Merge --register, --classes and --first-pixel, which have precedence, with the config's, in
    place in ``args`` and ``cfg``. Only data sets that the run uses are registered. Paths, relative
    to the config file, become absolute.

    Raises:
        UserError: if DATASETS.REGISTER is not a list of strings.
    """
    folder = os.path.realpath(os.path.dirname(args.config_file))
    if "DATASETS.REGISTER" in args.opts[::2]:
        folder = os.getcwd()
    if not all(isinstance(spec, str) for spec in cfg.DATASETS.REGISTER):
        raise UserError(f"DATASETS.REGISTER must be a list of strings, got {cfg.DATASETS.REGISTER}")
    new_names = {_name(spec) for spec in args.register}
    earlier = [_absolute(x, folder) for x in cfg.DATASETS.REGISTER if _name(x) not in new_names]
    cfg.DATASETS.REGISTER = [*earlier, *(_absolute(x, os.getcwd()) for x in args.register)]
    used = {*cfg.DATASETS.TEST, *(() if args.eval_only else cfg.DATASETS.TRAIN)}
    args.register = [*(x for x in earlier if _name(x) in used), *args.register]
    args.recalls_classes = args.classes is None
    if args.classes is None:
        args.classes = cfg.DATASETS.CLASSES or None
        if args.classes and new_names:
            print(f"--classes {args.classes}, from {args.config_file}", file=sys.stderr)
    if args.first_pixel is None:
        args.first_pixel = cfg.DATASETS.FIRST_PIXEL
    cfg.DATASETS.CLASSES, cfg.DATASETS.FIRST_PIXEL = args.classes or "", args.first_pixel


def shorten_paths(cfg: CfgNode) -> None:
    """Make the paths of DATASETS.REGISTER relative to OUTPUT_DIR, in place, so that both can
    move."""
    folder = os.path.realpath(cfg.OUTPUT_DIR)
    cfg.DATASETS.REGISTER = [_relative(x, folder) for x in cfg.DATASETS.REGISTER]


def _name(spec: str) -> str:
    return spec.partition("=")[0]


def _absolute(spec: str, folder: str) -> str:
    name, _, source = spec.partition("=")
    if not name or ":" not in source.strip(":"):  # register() raises
        return spec
    annotations, images = split_source(os.path.join(folder, os.path.expanduser(source)))
    if not _has_splits(annotations) and not ADDRESS.match(images):
        images = os.path.normpath(os.path.join(folder, images))
    return f"{name}={os.path.normpath(annotations)}:{images}"


def _relative(spec: str, folder: str) -> str:
    name, _, source = spec.partition("=")
    annotations, images = split_source(source)
    if not _has_splits(annotations) and not ADDRESS.match(images):
        images = _relative_path(folder, images)
    return f"{name}={_relative_path(folder, annotations)}:{images}"


def _relative_path(folder: str, path: str) -> str:
    shared = os.path.commonpath([folder, path])
    return path if shared == os.path.dirname(shared) else os.path.relpath(path, folder)


def _has_splits(annotations: str) -> bool:
    return os.path.isdir(annotations) or annotations.lower().endswith(YOLO_CONFIGS)
