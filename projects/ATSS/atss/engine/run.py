"""The way in: from a command line to a run.

    cfg = prepare(args)     once, where the command was given: all that can be wrong is said here
    run(args, cfg)          in every process

The checks of a run are called here alone.
"""

import argparse
import importlib
import logging
import math
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from ..checkpoints import SafeCheckpointer, TrainingCheckpointer
from ..checkpoints.checkpointer import NUMBERED
from ..checkpoints.classes import names_in, warn_of_others
from ..config import (
    begins_pretrained,
    check_model,
    complete_classes,
    complete_schedule,
    find_config,
    follow_classes,
    for_inference,
    load_config,
    prune,
    use_available_device,
)
from ..config.checks import check_values
from ..data import datasets
from ..errors import UserError
from ..labels.formats import add_arguments, reading_of
from .agreement import facts_of_config, refuse_differences, share_weights
from .averaging import Averaging
from .best import Best, best_metric, check_metric, known_metrics
from .evaluation import check_metadata
from .launch import (
    abridge_terminal,
    check_host,
    is_started,
    keep_freed_memory,
    keep_tracebacks_to_the_file,
    launch,
    local_size,
    may_be_a_bug,
    shares_agent_store,
    world_size,
)
from .solver import MOMENTS
from .sources import recall, shorten_paths
from .trainer import Trainer

# Of Detectron2's keys: least and greatest value of each number.
TRAINING_LIMITS = {
    "INPUT.AUGMENT_UNTIL": (0, 1),
    "INPUT.COLOR_JITTER": (0, 1),
    "INPUT.MIN_SIZE_TRAIN": (1, math.inf),
    "INPUT.MAX_SIZE_TRAIN": (1, math.inf),
    "INPUT.MOSAIC": (0, 1),
    "INPUT.SCALE_JITTER_SIZE": (32, math.inf),
    "SOLVER.BACKBONE_LR_FACTOR": (0, math.inf),
    "SOLVER.BASE_LR": (0, math.inf),
    "SOLVER.CHECKPOINT_PERIOD": (1, math.inf),
    "SOLVER.COLLECTIVE_TIMEOUT": (0.1, math.inf),
    "SOLVER.EMA_DECAY": (0, 0.999999),
    "SOLVER.IMS_PER_BATCH": (1, math.inf),
    "SOLVER.MAX_ITER": (1, math.inf),
    "SOLVER.MIN_ITER": (0, math.inf),
    "TEST.EVAL_PERIOD": (0, math.inf),
    "TEST.PATIENCE": (0, math.inf),
}


def make_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Detectron2's arguments, --register and how it reads, and --import. KEY VALUE pairs may stand
    before options too, with ``parse_intermixed_args``."""
    parser = argparse.ArgumentParser(
        epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS alone")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on each machine")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0, help="of this machine, from 0 on")
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="where processes meet, such as tcp://10.0.0.1:29400 on the first of several machines "
        "(default: a free port of this machine)",
    )
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="NAME=annotations.json:image_dir|NAME=data.yaml:split|NAME=folder:split",
        help="an own data set in COCO's or LVIS's format, or the split of one in YOLO's layout "
        "(data.yaml, obj.data, or a folder with classes.txt) or of a folder of Pascal VOC's xml; "
        "the config uses it under NAME (repeatable)",
    )
    add_arguments(parser)
    parser.set_defaults(recalls_classes=False, registered_in=None)
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="a Python module or file to import first, such as one that registers a rule "
        "(repeatable)",
    )
    parser.add_argument(
        "opts", nargs="*", default=[], metavar="KEY VALUE", help="last: over the config"
    )
    return parser


def prepare(args: argparse.Namespace) -> CfgNode:
    """The config of a run, complete and checked.

    Args:
        args: of :func:`make_parser`; ``resume`` is set where torchrun has restarted this process.

    Raises:
        ValueError, OSError: with a sentence that says what is wrong.
    """
    if not args.config_file:
        raise UserError("--config-file is missing, such as configs/ATSS_R_50_FPN_1x.yaml")
    import_modules(args.imports)
    args.config_file = find_config(args.config_file)  # Detectron2's setup opens it, too.
    cfg = load_config(args.config_file, opts=args.opts)
    recall(args, cfg)
    register(args)
    if args.eval_only and cfg.MODEL.META_ARCHITECTURE == "ATSSDetector":
        cfg = for_inference(cfg)
    if use_available_device(cfg):
        print("No GPU here: running on the CPU.", file=sys.stderr)
    if cfg.MODEL.META_ARCHITECTURE == "ATSSDetector":
        complete_classes(cfg, training=not args.eval_only)
    cfg.OUTPUT_DIR = os.path.expanduser(cfg.OUTPUT_DIR)
    check_processes(args, cfg)
    check_data(cfg, training=not args.eval_only)
    if not is_started():
        check_images(cfg, training=not args.eval_only)
    if "DATALOADER.NUM_WORKERS" not in args.opts[::2]:
        fit_workers(cfg, local_size(args))
    if not args.eval_only:
        complete_schedule(cfg, given=args.opts[::2])
    check_config(_weights_at_hand(args, cfg), not args.eval_only, given=args.opts[::2])
    check_output_dir(cfg.OUTPUT_DIR, cfg.DATASETS.TEST)
    shorten_paths(cfg)
    prune(cfg)  # what the run writes into its folder can be read where other parts are not known
    cfg.freeze()
    return cfg


def fit_workers(cfg: CfgNode, processes: int) -> None:
    """Detectron2 asks for four processes that load images whatever the machine. Where that has
    stayed, no more than there are cores for, in place.

    Args:
        processes: of the training, on this machine.
    """
    default = get_cfg().DATALOADER.NUM_WORKERS
    if default == cfg.DATALOADER.NUM_WORKERS:
        known = hasattr(os, "sched_getaffinity")  # on Linux
        cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
        own = os.environ.get("SLURM_CPUS_PER_TASK")
        if own and is_started() and "TORCHELASTIC_RUN_ID" not in os.environ:
            cores, processes = min(cores, int(own)), 1  # this process is a task of SLURM
        cfg.DATALOADER.NUM_WORKERS = min(default, max(cores // processes, 1))


def run(args: argparse.Namespace, cfg: CfgNode) -> dict | None:
    """What every process does: evaluates with --eval-only, or trains; results by task."""
    register(args)
    # Once per machine; all processes are there, and end together if one finds a fault.
    if is_started() and int(os.environ["LOCAL_RANK"]) == 0:
        check_images(cfg, training=not args.eval_only)
    if cfg.MODEL.META_ARCHITECTURE == "ATSSDetector":
        follow_classes(cfg)
    config = _set_up(args, cfg)
    keep_tracebacks_to_the_file(cfg.OUTPUT_DIR)
    datasets.log_remarks((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    for name in cfg.DATASETS.TEST:
        if not datasets.has_objects(name):
            logging.getLogger("atss").warning("Data set %s has no objects to measure by", name)
    if cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()
    cfg = _weights_at_hand(args, cfg)
    if args.eval_only:
        refuse_differences(facts_of_config(cfg))
        model = Trainer.build_model(cfg)
        checkpointer = SafeCheckpointer(model, save_dir=cfg.OUTPUT_DIR, whole=True)
        loaded = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        share_weights(model)
        _follow_weights(names_in(loaded, cfg.MODEL.WEIGHTS), cfg)
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_tta(cfg, model))
        if cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    if comm.is_main_process():
        check_free_space(trainer.cfg, trainer.model)
    if args.resume:
        checkpoint = trainer.checkpointer.get_checkpoint_file()
        check_shared(checkpoint)
        if not checkpoint:
            logging.getLogger("atss").warning(
                "--resume: OUTPUT_DIR %s contains no checkpoint, training starts at iteration 0",
                cfg.OUTPUT_DIR,
            )
    trainer.resume_or_load(resume=args.resume)
    if comm.is_main_process():
        _replace(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), config)
    logging.getLogger("atss").info("Starting at iteration %d", trainer.start_iter)
    return trainer.train()


def _follow_weights(names: list[str], cfg: CfgNode) -> None:
    """Data sets that have the classes of the weights number them as these do; where they have
    others, the log says so."""
    for name in cfg.DATASETS.TEST:
        try:
            datasets.follow(name, names)
        except ValueError:
            warn_of_others(names, datasets.classes_of(name) or (), cfg.MODEL.WEIGHTS)


def _weights_at_hand(args: argparse.Namespace, cfg: CfgNode) -> CfgNode:
    """Of a run that goes on from a checkpoint: the backbone is in it, so that a file or a hub from
    which it once came is not needed again."""
    if not (args.resume and begins_pretrained(cfg)):
        return cfg
    checkpoint = TrainingCheckpointer(nn.Module(), cfg.OUTPUT_DIR).get_checkpoint_file()
    if not checkpoint:
        return cfg
    resumed = cfg.clone()
    resumed.defrost()
    resumed.MODEL.WEIGHTS = checkpoint
    return resumed


def start(args: argparse.Namespace) -> None:
    """Prepares and runs in as many processes as asked for; leaves Python with ``error: ...`` where
    something is wrong. What may be a bug, of somebody's own rule for example, keeps its
    traceback."""
    try:
        cfg = prepare(args)
        lock = None
        if not args.eval_only:
            lock = lock_folder(cfg.OUTPUT_DIR) if _is_first(args) else None
            refuse_used_folder(cfg.OUTPUT_DIR, args.resume)
    except (ValueError, OSError) as error:
        if may_be_a_bug(error) and not isinstance(error, NoSuchModule):
            raise
        sys.exit(f"error: {error}")
    launch(run, args, cfg)
    if lock is not None:
        lock.close()


def _is_first(args: argparse.Namespace) -> bool:
    """Whether this is the only process of a run, or the first."""
    return not (int(os.environ.get("RANK", 0)) if is_started() else args.machine_rank)


def _set_up(args: argparse.Namespace, cfg: CfgNode) -> bytes:
    """Detectron2's setup of logs and seeds. An evaluation, and until it has succeeded a resumption,
    leave the config.yaml of the training as it is.

    Returns:
        what a training is to write there.
    """
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    rank, first = comm.get_rank(), comm.is_main_process()
    # Called as default_setup calls it, setup_logger gives the same loggers again.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="fvcore")
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="atss")
    abridge_terminal()
    before = _read(path) if first and (args.eval_only or args.resume) else None
    try:
        default_setup(cfg, args)
        return _read(path) or b"" if first else b""
    finally:
        if before is not None:
            _replace(path, before)


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


def _replace(path: str, content: bytes) -> None:
    with open(f"{path}.unfinished", "wb") as file:
        file.write(content)
    os.replace(f"{path}.unfinished", path)


def refuse_used_folder(path: str, resume: bool) -> None:
    """That a new training does not replace another.

    Raises:
        ValueError: naming the folder.
    """
    if not resume and os.path.exists(os.path.join(path, "last_checkpoint")):
        raise UserError(
            f"OUTPUT_DIR {path} holds a training already: --resume goes on with it, another "
            "OUTPUT_DIR begins a new one"
        )


def lock_folder(path: str) -> IO | None:
    """Keeps other runs out of a folder for as long as the file that is returned is open; None
    where the system has no such locks. What a killed run was writing is removed.

    Raises:
        ValueError: where another run is there.
    """
    try:
        import fcntl
    except ImportError:
        return None
    file = open(os.path.join(path, "lock"), "a+")  # noqa: SIM115
    try:
        # Not flock, which processes that load data would hold for a while after a kill.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read().strip() or "another run"
        file.close()
        raise UserError(
            f"OUTPUT_DIR {path} is in use by {owner}: wait for it, or choose another; if that "
            f"machine is gone, remove {file.name}"
        ) from error
    except OSError:  # a file system without locks
        return file
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    for name in os.listdir(path):
        if name.startswith(TrainingCheckpointer.UNFINISHED):
            os.remove(os.path.join(path, name))
    return file


def register(args: argparse.Namespace) -> None:
    """What --import and --register ask for; every process does it for itself, once.

    Raises:
        ValueError: with a sentence that says what is wrong.
    """
    if args.registered_in == os.getpid():
        return
    args.registered_in = os.getpid()
    import_modules(args.imports)
    datasets.register_all(args.register, reading_of(args), partly=args.recalls_classes)


class NoSuchModule(UserError):
    """What --import names is not there."""


def import_modules(names: list[str]) -> None:
    """Import the user's modules, by name (from the current folder too) or by file.

    Raises:
        NoSuchModule: naming one that does not exist, or what it lacks itself.
    """
    sys.path.insert(0, os.getcwd())
    for name in names:
        file = None
        if name.endswith(".py") or os.sep in name or not all(name.split(".")):
            file = Path(name).expanduser().resolve()
            if not file.is_file():
                raise NoSuchModule(f"--import {name}: there is no such file")
            sys.path.insert(0, str(file.parent))  # for modules beside it
        try:
            module = importlib.import_module(file.stem if file else name)
        except ModuleNotFoundError as error:
            raise NoSuchModule(f"--import {name}: {error}") from error
        if file and Path(str(getattr(module, "__file__", None))).resolve() != file:
            raise NoSuchModule(f"--import {name}: {module} has that name: rename the file")


# ------------------------------------------------------------------------------------------------
# Checks
# ------------------------------------------------------------------------------------------------


def check_config(cfg: CfgNode, training: bool, given: Collection[str] = ()) -> None:
    """What would stop a run only after a while, or be passed over silently.

    Args:
        training: or evaluation alone.
        given: keys of the command line.

    Raises:
        ValueError: naming the key.
    """
    check_model(cfg, training)
    if training:
        check_values(cfg, TRAINING_LIMITS)
        jitter = cfg.INPUT.SCALE_JITTER
        if jitter and not (len(jitter) == 2 and 0 < jitter[0] <= jitter[1]):
            raise UserError(
                "INPUT.SCALE_JITTER must be two factors, such as [0.5, 2.0], or empty for none, "
                f"not {jitter}"
            )
        profile = cfg.SOLVER.PROFILE
        if profile and not (len(profile) == 2 and 0 <= profile[0] <= profile[1]):
            raise UserError(
                "SOLVER.PROFILE must be [first, last] iteration, such as [10, 12], or empty for "
                f"none, not {profile}"
            )
        check_best(cfg, given)
    check_expected(cfg, training)


def check_data(cfg: CfgNode, training: bool) -> None:
    """Whether the data sets can be used for what they are to be.

    Args:
        training: or evaluation alone.

    Raises:
        ValueError: naming the data set, or the key.
    """
    used = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if training else cfg.DATASETS.TEST
    for name in used:
        if name not in DatasetCatalog:
            raise UserError(
                f"DATASETS names {name!r}, which neither Detectron2 nor --register knows"
            )
        annotations = MetadataCatalog.get(name).get("json_file")
        if annotations and "://" not in annotations and not os.path.exists(annotations):
            key = "TRAIN" if training and name in cfg.DATASETS.TRAIN else "TEST"
            raise UserError(
                f"DATASETS.{key} names {name}, whose annotations {annotations} do not exist"
            )
    if not used:
        raise UserError(f"DATASETS.{'TRAIN' if training else 'TEST'} names no data set")
    if training:
        if not cfg.DATASETS.TRAIN:
            raise UserError("DATASETS.TRAIN names no data set")
        datasets.refuse_unannotated(cfg.DATASETS.TRAIN)
    for name in cfg.DATASETS.TEST:
        check_metadata(name)


def check_images(cfg: CfgNode, training: bool) -> None:
    """Check that the images of the data sets are there.

    Args:
        training: or evaluation alone.

    Raises:
        ValueError: naming the data set and an image.
    """
    if training:
        datasets.refuse_missing_images(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    datasets.refuse_missing_images(cfg.DATASETS.TEST)


def check_best(cfg: CfgNode, given: Collection[str] = ()) -> None:
    """Check that there will be evaluations for what depends on them.

    Args:
        given: keys of the command line. A recipe's PATIENCE does nothing without test sets, or
            with test sets that have no objects.

    Raises:
        ValueError: naming the key.
    """
    check_metric(cfg)
    if best_metric(cfg):
        return
    names = cfg.DATASETS.TEST
    if names and not any(map(datasets.has_objects, names)):
        for key, value in (("PATIENCE", cfg.TEST.PATIENCE), ("BEST_METRIC", cfg.TEST.BEST_METRIC)):
            if value and f"TEST.{key}" in given:
                where = f"DATASETS.TEST: {', '.join(names)} has none"
                raise UserError(f"TEST.{key} {value} needs objects in {where}")
    elif cfg.TEST.PATIENCE and (names or "TEST.PATIENCE" in given):
        raise UserError(
            f"TEST.PATIENCE {cfg.TEST.PATIENCE} ends training by its evaluations: it needs "
            "TEST.EVAL_PERIOD, TEST.BEST_METRIC and DATASETS.TEST"
        )


def check_expected(cfg: CfgNode, training: bool) -> None:
    """Check that the last evaluation can be compared with TEST.EXPECTED_RESULTS.

    Raises:
        ValueError: for an entry that is not [task, metric, value, tolerance], or is of no
            evaluation.
    """
    expected, names = cfg.TEST.EXPECTED_RESULTS, cfg.DATASETS.TEST
    if expected and len(names) != 1:
        raise UserError(
            f"TEST.EXPECTED_RESULTS needs one data set in DATASETS.TEST, not {len(names)}"
        )
    tasks = {"bbox", "bbox_EMA" if training and cfg.SOLVER.EMA_DECAY else "bbox"}
    if not training and cfg.TEST.AUG.ENABLED:
        tasks.add("bbox_TTA")
    for entry in expected:
        known = [x.rpartition("/")[2] for x in known_metrics(names[0])]
        if not (
            isinstance(entry, list | tuple)
            and len(entry) == 4
            and entry[0] in tasks
            and (entry[1] in known or str(entry[1]).startswith("AP-"))
            and all(isinstance(x, int | float) for x in entry[2:])
        ):
            raise UserError(
                "TEST.EXPECTED_RESULTS takes [task, metric, value, tolerance] with a task of "
                f"{sorted(tasks)} and a metric of {known}, not {entry}"
            )


def check_processes(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Whether so many processes can do what the config asks for. Where torchrun has restarted this
    one, it resumes.

    Raises:
        ValueError: with a sentence that says what is wrong.
    """
    for option in ("num_gpus", "num_machines"):
        if getattr(args, option) < 1:
            name = option.replace("_", "-")
            raise UserError(f"--{name} must be at least 1, not {getattr(args, option)}")
    count, images = world_size(args), cfg.SOLVER.IMS_PER_BATCH
    if is_started() and args.num_gpus * args.num_machines > 1:
        raise UserError("torchrun has started the processes: leave out --num-gpus, --num-machines")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError(
            f"--num-machines {args.num_machines} needs --dist-url, such as tcp://10.0.0.1:29400: "
            "the address of the first machine and a free port there"
        )
    if count > 1 and args.dist_url.startswith("tcp://"):
        check_host("--dist-url", urlsplit(args.dist_url).hostname or "")
    if not args.eval_only and not cfg.SOLVER.REFERENCE_WORLD_SIZE and images % count:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {images}, which {count} processes cannot share evenly"
        )
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    local = local_size(args)
    gpus = torch.cuda.device_count() if on_gpu else local
    # A scheduler may show each of its processes one GPU alone.
    if local > gpus and not (gpus == 1 and is_started()):
        raise UserError(f"{local} processes on a machine of {gpus} GPUs")
    if not (on_gpu or is_started()) and count > 1 and torch.cuda.is_available():
        raise UserError("--num-gpus uses GPUs: for processes with MODEL.DEVICE cpu use torchrun")

    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and not args.eval_only:
        args.resume = True
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    exported = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1"
    if restarts and is_started() and count > local and shares_agent_store() and not exported:
        raise UserError(
            "torchrun's restarts on several machines need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, "
            "exported before torchrun on each of them, and --rdzv-backend c10d: otherwise machines "
            "that count restarts differently wait for each other in vain (docs/clusters.md)"
        )
    may_restart = restarts and not args.eval_only
    if may_restart and not args.resume and os.path.exists(f"{cfg.OUTPUT_DIR}/last_checkpoint"):
        raise UserError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} has a checkpoint, from which a restart would go on: "
            "give --resume, or another OUTPUT_DIR"
        )


def check_output_dir(path: str, test_sets: Sequence[str] = ()) -> None:
    """Make the folder, and write a byte into it and into the folders of results that are there.

    Args:
        test_sets: names of data sets that are evaluated.

    Raises:
        ValueError: naming the folder.
    """
    inference = [os.path.join(path, x, "inference") for x in ("", "ema", "tta")]
    results = [*inference, *(os.path.join(x, name) for x in inference for name in test_sets)]
    folder = path
    try:
        if not os.path.exists(path):  # a file: "Not a directory", below
            os.makedirs(path, exist_ok=True)
        for folder in (path, *filter(os.path.exists, results)):
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"\0")
    except OSError as error:
        raise UserError(f"cannot write into OUTPUT_DIR {folder}: {error.strerror}") from error


def check_free_space(cfg: CfgNode, model: nn.Module) -> None:
    """Whether OUTPUT_DIR has room for checkpoints (weights, what the optimizer remembers of each
    that is trained, averaged weights), for the best weights and the averaged ones. For one
    checkpoint more than are kept, because one is written before the other is deleted. What is there
    and will be replaced or deleted gives its room.

    Raises:
        ValueError: naming the folder and the sizes.
    """
    path, keep = cfg.OUTPUT_DIR, cfg.SOLVER.CHECKPOINTS_TO_KEEP
    averaged, best = cfg.SOLVER.EMA_DECAY > 0, bool(best_metric(cfg))
    weights = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    momenta = sum(x.numel() * x.element_size() for x in model.parameters() if x.requires_grad)
    saved = weights * (2 if averaged else 1) + momenta * MOMENTS[cfg.SOLVER.OPTIMIZER]
    copies = max(keep + 1, 2)
    replaced = [f"{x}.pth" for x in ("model_final", Averaging.FILE, Best.FILE)]
    if keep:
        numbers = {x: NUMBERED.fullmatch(x) for x in os.listdir(path)}
        replaced += [x for x, n in numbers.items() if n and int(n[1]) < cfg.SOLVER.MAX_ITER]
    files = [os.path.join(path, x) for x in replaced]
    there = sum(os.path.getsize(x) for x in files if os.path.isfile(x))
    need = max(copies * saved + weights * (averaged + best) - there, saved)
    free = shutil.disk_usage(path).free
    if free < need:
        what = f"{copies} checkpoints" + (" and the best weights" if best else "")
        also = "besides what is there " if there else ""
        raise UserError(
            f"OUTPUT_DIR {path} has {free / 1e6:.0f} MB free, but {what} {also}take "
            f"{need / 1e6:.0f} MB"
        )


def check_shared(checkpoint: str) -> None:
    """Whether all processes would resume from the same checkpoint.

    Raises:
        ValueError: naming those that they see.
    """
    about = f"{checkpoint} ({os.path.getsize(checkpoint)} bytes)" if checkpoint else ""
    seen = set(comm.all_gather(about))
    if len(seen) > 1:
        raise UserError(
            "OUTPUT_DIR must be a folder that all machines share; as the last checkpoint they see "
            + " and ".join(sorted(path or "none" for path in seen))
        )
