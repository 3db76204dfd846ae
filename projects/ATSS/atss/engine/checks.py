"""Checks of data, config and processes before a run."""

import argparse
import logging
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from urllib.parse import urlsplit

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import autocast_dtype
from ..config.branches import kinds, unnamed_overlays, unread_keys
from ..config.checks import NO_EFFECT, OF_DETECTIONS, flatten, has_no_effect
from ..config.derive import RESNET, TIMM
from ..data import datasets
from ..errors import UserError, check_range
from .best import best_metric, check_metric, known_metrics
from .environment import check_host, is_started, local_size, shares_agent_store, world_size
from .evaluation import check_metadata
from .loggers import build_run_writers
from .values import TRAINING_LIMITS

# SOLVER.IMS_PER_BATCH of :func:`~atss.engine.batch.choose_batch`.
MEASURED = -1
CHECKPOINTING = "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING"


def check_data(cfg: CfgNode, training: bool, images: bool = True) -> None:
    """Check the data sets and, if ``images``, that their images exist.

    Raises:
        UserError: naming the data set, an image or the key.
    """
    used = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if training else cfg.DATASETS.TEST
    for name in used:
        if name not in DatasetCatalog:
            raise UserError(
                f"DATASETS names {name!r}, which neither Detectron2 nor --register has registered"
            )
        annotations = MetadataCatalog.get(name).get("json_file")
        if annotations and "://" not in annotations and not os.path.exists(annotations):
            key = "TRAIN" if training and name in cfg.DATASETS.TRAIN else "TEST"
            raise UserError(
                f"DATASETS.{key} names {name}, whose annotations {annotations} do not exist"
            )
    if (training and not cfg.DATASETS.TRAIN) or not used:
        raise UserError(f"DATASETS.{'TRAIN' if training else 'TEST'} names no data set")
    for name in cfg.DATASETS.TEST:
        check_metadata(name)
    if training:
        datasets.refuse_unannotated(cfg.DATASETS.TRAIN)
        if images:
            filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
            datasets.refuse_missing_images(cfg.DATASETS.TRAIN, filter_empty)
    if images:
        datasets.refuse_missing_images(cfg.DATASETS.TEST)


def check_config(cfg: CfgNode, training: bool, given: Collection[str] = ()) -> None:
    """Check keys whose errors would show late, or not at all.

    Args:
        given: keys of the command line.

    Raises:
        UserError: naming the key.
    """
    if training:
        for key, value, without in (
            ("SOLVER.ACCUMULATE", cfg.SOLVER.ACCUMULATE, 1),
            (CHECKPOINTING, cfg.MODEL.BACKBONE.ACTIVATION_CHECKPOINTING, False),
        ):
            if value != without and cfg.MODEL.META_ARCHITECTURE != "ATSSDetector":
                raise UserError(
                    f"{key} {value} needs MODEL.META_ARCHITECTURE ATSSDetector, got "
                    f"{cfg.MODEL.META_ARCHITECTURE}"
                )
        jitter = cfg.INPUT.SCALE_JITTER
        if jitter and cfg.INPUT.FULL_SIZE_CROP:
            raise UserError(
                "INPUT.FULL_SIZE_CROP replaces resizing by a crop, and INPUT.SCALE_JITTER has its "
                "own: set one of them to 0 or []"
            )
        if jitter and not (len(jitter) == 2 and 0 < jitter[0] <= jitter[1]):
            raise UserError(
                "INPUT.SCALE_JITTER must be two factors, such as [0.5, 2.0], or empty, got "
                f"{jitter}"
            )
        if jitter and cfg.INPUT.RESIZE == "stretch":
            raise UserError(
                "INPUT.SCALE_JITTER keeps the aspect ratio of training images, and INPUT.RESIZE "
                "stretch changes that of test images: set SCALE_JITTER [] or RESIZE shortest"
            )
        if cfg.INPUT.MOSAIC and (cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON):
            raise UserError(
                "INPUT.MOSAIC keeps boxes alone: it must be 0 with MODEL.MASK_ON or KEYPOINT_ON, "
                f"got {cfg.INPUT.MOSAIC}"
            )
        profile = cfg.SOLVER.PROFILE
        if profile and not (len(profile) == 2 and 0 <= profile[0] <= profile[1]):
            raise UserError(
                "SOLVER.PROFILE must be [first, last] iteration, such as [10, 12], or empty, got "
                f"{profile}"
            )
        build_run_writers(cfg)
        check_best(cfg, given)
    if cfg.TEST.AUG.ENABLED and cfg.MODEL.KEYPOINT_ON:
        raise UserError("TEST.AUG.ENABLED True is not possible with MODEL.KEYPOINT_ON True")
    if cfg.TEST.TILES.ENABLED and (cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON):
        raise UserError(
            "TEST.TILES merges boxes alone: ENABLED must be False with MODEL.MASK_ON or "
            "KEYPOINT_ON, got True"
        )
    check_expected(cfg, training)


def scales_gradients(cfg: CfgNode) -> bool:
    """Return whether the training needs a gradient scaler, for fp16.

    Raises:
        UserError: if MODEL.ATSS.PRECISION or SOLVER.AMP.ENABLED is not for MODEL.DEVICE.
    """
    scaled = cfg.SOLVER.AMP.ENABLED or autocast_dtype(cfg) == torch.float16
    if scaled and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise UserError("SOLVER.AMP.ENABLED needs a GPU; on a CPU set MODEL.ATSS.PRECISION")
    return scaled


# Groups of the other backbone: {MODEL.BACKBONE.NAME: beginning of its keys}.
OTHER_BACKBONES = {TIMM: "MODEL.RESNETS.", RESNET: "MODEL.TIMM."}


def describe_unread(
    cfg: CfgNode, before: Mapping[str, object], given: Collection[str]
) -> Iterator[str]:
    """Yield a line for each changed key of Detectron2 that ATSSDetector does not read, and for each
    ``given`` argument of a part that the config does not use.

    Args:
        cfg: after :func:`prune`.
        before: keys and values before it.
        given: keys of the command line.
    """
    values = dict(flatten(cfg))
    for key, default in flatten(get_cfg()):
        if isinstance(default, CfgNode) or not has_no_effect(key) or values[key] == default:
            continue
        group, _, name = key.rpartition(".")
        other = NO_EFFECT.get(key, f"{NO_EFFECT.get(group)}.{name}")
        other = next((x for x in (other, f"{other}_TEST") if x in values), "")
        yield f"{key} has no effect on ATSSDetector{f'; use {other}' if other else ''}"
    choices = {kind.group: kind.key for kind in kinds()}
    for key in given:
        group = key.removeprefix("MODEL.ATSS.").partition(".")[0]
        if key in before and key not in values and group in choices:
            choice = f"MODEL.ATSS.{choices[group]}"
            yield f"{key} has no effect with {choice} {values[choice]!r}"


def describe_unused(cfg: CfgNode, given: Collection[str]) -> Iterator[str]:
    """Yield a line for each ``given`` key of another backbone, or that no part reads, and for each
    overlay that nothing names."""
    backbone, unread = cfg.MODEL.BACKBONE.NAME, unread_keys(cfg)
    if cfg.TEST.TILES.ENABLED:
        unread.discard("NMS_THRESH_TEST")
    for key in given:
        if key.startswith(OTHER_BACKBONES.get(backbone, "-")):
            yield f"{key} has no effect with MODEL.BACKBONE.NAME {backbone!r}"
        if key.removeprefix("MODEL.ATSS.") in unread:
            yield f"{key} has no effect: no part that the config names reads it"
    for name in unnamed_overlays(cfg):
        yield f"MODEL.ATSS.BRANCH.{name} has no effect: no branch, phase or part names it"


def describe_unread_by_proposals(given: Collection[str]) -> Iterator[str]:
    """Yield a line for each ``given`` key that selects detections of ATSSDetector: a first stage
    selects proposals as Detectron2's RPN does."""
    for key in given:
        name = key.removeprefix("MODEL.ATSS.")
        if name != key and name in OF_DETECTIONS:
            other = OF_DETECTIONS[name]
            yield f"{key} has no effect on proposals{f'; use {other}' if other else ''}"


def warn_of_objects(cfg: CfgNode, training: bool) -> None:
    """Warn of test sets without objects, and of data sets with images of more objects than
    TEST.DETECTIONS_PER_IMAGE."""
    logger, limit = logging.getLogger(__name__), cfg.TEST.DETECTIONS_PER_IMAGE
    for name in cfg.DATASETS.TEST:
        if not datasets.has_objects(name):
            logger.warning(f"Data set {name} has no objects to measure by")
    trained = cfg.DATASETS.TRAIN if training else ()
    for name in dict.fromkeys((*trained, *cfg.DATASETS.TEST)):
        counts = datasets.objects_per_image(name)
        if number := (counts > limit).sum():
            logger.warning(
                f"Data set {name} has {number} images with more objects than "
                f"TEST.DETECTIONS_PER_IMAGE {limit}: set it to {counts.max()} or more"
            )


def check_best(cfg: CfgNode, given: Collection[str] = ()) -> None:
    """Check that training has the evaluations that TEST.PATIENCE and TEST.BEST_METRIC need. A
    PATIENCE that is not ``given`` may have no effect.

    Raises:
        UserError: naming the key.
    """
    check_metric(cfg)
    if best_metric(cfg):
        return
    names = cfg.DATASETS.TEST
    if names and not any(map(datasets.has_objects, names)):
        for key, value in (("PATIENCE", cfg.TEST.PATIENCE), ("BEST_METRIC", cfg.TEST.BEST_METRIC)):
            if value and f"TEST.{key}" in given:
                sets = f"DATASETS.TEST: {', '.join(names)} has none"
                raise UserError(f"TEST.{key} {value} needs objects in {sets}")
    elif cfg.TEST.PATIENCE and (names or "TEST.PATIENCE" in given):
        raise UserError(
            f"TEST.PATIENCE {cfg.TEST.PATIENCE} ends training by its evaluations: it needs "
            "TEST.EVAL_PERIOD, TEST.BEST_METRIC and DATASETS.TEST"
        )


def check_expected(cfg: CfgNode, training: bool) -> None:
    """Check that the last evaluation gives TEST.EXPECTED_RESULTS.

    Raises:
        UserError: naming an entry of another form, task or metric.
    """
    expected, names = cfg.TEST.EXPECTED_RESULTS, cfg.DATASETS.TEST
    if expected and len(names) != 1:
        raise UserError(
            f"TEST.EXPECTED_RESULTS needs one data set in DATASETS.TEST, got {len(names)}"
        )
    tasks = {"bbox", "bbox_EMA" if training and cfg.SOLVER.EMA_DECAY else "bbox"}
    if not training and cfg.TEST.AUG.ENABLED:
        tasks.add("bbox_TTA")
    for entry in expected:
        metrics = [x.rpartition("/")[2] for x in known_metrics(names[0])]
        if not (
            isinstance(entry, list | tuple)
            and len(entry) == 4
            and entry[0] in tasks
            and (entry[1] in metrics or str(entry[1]).startswith("AP-"))
            and all(isinstance(x, int | float) for x in entry[2:])
        ):
            raise UserError(
                "TEST.EXPECTED_RESULTS takes [task, metric, value, tolerance] with a task of "
                f"{sorted(tasks)} and a metric of {metrics}, got {entry}"
            )


def check_processes(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Check the processes of a run. Set ``args.resume`` after a restart by torchrun.

    Raises:
        UserError: naming the option or variable.
    """
    for option in ("num_gpus", "num_machines"):
        if getattr(args, option) < 1:
            name = option.replace("_", "-")
            raise UserError(f"--{name} must be >= 1, got {getattr(args, option)}")
    count = world_size(args)
    if is_started() and args.num_gpus * args.num_machines > 1:
        raise UserError("torchrun has started the processes: leave out --num-gpus, --num-machines")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError(
            f"--num-machines {args.num_machines} needs --dist-url, such as tcp://10.0.0.1:29400: "
            "the address of the first machine and a free port there"
        )
    if count > 1 and args.dist_url.startswith("tcp://"):
        check_host("--dist-url", urlsplit(args.dist_url).hostname or "")
    if not args.eval_only and cfg.SOLVER.IMS_PER_BATCH != MEASURED:
        check_batch(cfg, count)
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    local = local_size(args)
    gpus = torch.cuda.device_count() if on_gpu else local
    # A scheduler may show each of its processes only one GPU.
    if local > gpus and not (gpus == 1 and is_started()):
        raise UserError(f"{local} processes on a machine with {gpus} GPUs")
    if not (on_gpu or is_started()) and count > 1 and torch.cuda.is_available():
        raise UserError("--num-gpus uses GPUs: for processes with MODEL.DEVICE cpu use torchrun")

    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and not args.eval_only:
        args.resume = True
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    exported = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1"
    if restarts and is_started() and count > local and shares_agent_store() and not exported:
        raise UserError(
            "torchrun's restarts on several machines need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, "
            "exported before torchrun on each machine, and --rdzv-backend c10d: otherwise machines "
            "with different restart counts wait for each other forever (docs/clusters.md)"
        )
    may_restart = restarts and not args.eval_only
    if may_restart and not args.resume and os.path.exists(f"{cfg.OUTPUT_DIR}/last_checkpoint"):
        raise UserError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} already contains a run, from which a restart would "
            "continue: pass --resume or choose another folder"
        )


def check_batch(cfg: CfgNode, processes: int) -> None:
    """Check that processes, and their parts of SOLVER.ACCUMULATE, share a batch evenly.

    Raises:
        UserError: naming the key.
    """
    solver = cfg.SOLVER
    images, count = solver.IMS_PER_BATCH, solver.REFERENCE_WORLD_SIZE or processes
    if images % processes and not solver.REFERENCE_WORLD_SIZE:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH must be divisible by {processes}, the number of processes, got "
            f"{images}"
        )
    limits = TRAINING_LIMITS["SOLVER.ACCUMULATE"]
    check_range("SOLVER.ACCUMULATE", solver.ACCUMULATE, *limits)  # a divisor
    if images % (count * solver.ACCUMULATE):
        parts = f"SOLVER.ACCUMULATE {solver.ACCUMULATE}"
        each = f" in each of {count} processes" if count > 1 else ""
        raise UserError(
            f"{parts} must divide SOLVER.IMS_PER_BATCH {images} into parts of whole images{each}"
        )


def warn_of_unused(specs: Sequence[str], cfg: CfgNode) -> None:
    """Print the data sets of --register that the config does not use."""
    for name in (spec.partition("=")[0] for spec in specs):
        if name not in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            print(
                f"--register {name}: not used, because neither DATASETS.TRAIN {cfg.DATASETS.TRAIN} "
                f"nor DATASETS.TEST {cfg.DATASETS.TEST} names it",
                file=sys.stderr,
            )
