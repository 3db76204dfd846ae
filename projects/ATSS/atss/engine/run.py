"""Entry point of a run.

cfg = prepare(args)     once, before any process starts
run(args, cfg)          in every process
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from ..checkpoints import SafeCheckpointer, TrainingCheckpointer
from ..checkpoints.classes import names_in, warn_of_others
from ..config import (
    begins_pretrained,
    check_model,
    complete_classes,
    complete_schedule,
    complete_tiles,
    find_config,
    follow_classes,
    for_inference,
    load_config,
    prune,
    use_available_device,
    uses_atss,
)
from ..config.checks import flatten
from ..config.derive import describe_schedule
from ..config.inputs import values_in
from ..data import datasets
from ..deprecated import renamed_names
from ..errors import UserError
from ..labels.formats import add_arguments, reading_of
from .agreement import facts_of_config, refuse_differences, share_weights
from .batch import choose_batch
from .checks import (
    check_config,
    check_data,
    check_processes,
    describe_unread,
    describe_unread_by_proposals,
    describe_unused,
    scales_gradients,
    warn_of_objects,
    warn_of_unused,
)
from .environment import is_started, local_size
from .folder import (
    check_free_space,
    check_output_dir,
    check_shared,
    lock_folder,
    read_if_exists,
    refuse_used_folder,
    replace_file,
)
from .imports import import_modules
from .launch import keep_freed_memory, launch
from .report import write_report
from .sources import recall, shorten_paths
from .terminal import abridge_terminal, hide_explained_tracebacks
from .trainer import Trainer
from .values import check_training_values, warn_of_frozen, warn_of_sizes, warn_of_warmup

__getattr__ = renamed_names(__name__)


def make_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Make a parser of Detectron2's arguments, --register and --import. With
    ``parse_intermixed_args``, KEY VALUE pairs may precede options."""
    parser = argparse.ArgumentParser(
        epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    parser.add_argument(
        "--num-gpus", type=int, default=1, help="processes on each machine, also without GPUs"
    )
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0, help="0 for the first machine")
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="address for the processes to meet, such as tcp://10.0.0.1:29400 on the first of "
        "several machines (default: a free port of this machine)",
    )
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="NAME=annotations.json:image_dir|NAME=data.yaml:split|NAME=folder:split",
        help="register a data set as NAME: a json in COCO's or LVIS's format, or the split of a "
        "data set in YOLO's layout (data.yaml, obj.data, or a folder with classes.txt) or of a "
        "folder of Pascal VOC's xml (repeatable)",
    )
    add_arguments(parser)
    parser.set_defaults(recalls_classes=False, registered_in=None)
    add_import(parser)
    add_options(parser)
    return parser


def add_import(parser: argparse.ArgumentParser) -> None:
    """Add --import, for :func:`import_modules`."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a Python module or file first, such as one that registers a rule (repeatable)",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the KEY VALUE pairs of a config."""
    parser.add_argument(
        "opts", nargs="*", default=[], metavar="KEY VALUE", help="last: overrides the config"
    )


def prepare(args: argparse.Namespace) -> CfgNode:
    """Return the config of a run, complete and checked. Set ``args.resume`` after a restart by
    torchrun.

    Raises:
        UserError, OSError: if the run cannot start.
    """
    if not args.config_file:
        raise UserError("--config-file is missing, such as configs/ATSS_R_50_FPN_1x.yaml")
    training, given = not args.eval_only, args.opts[::2]
    import_modules(args.imports)
    args.config_file = find_config(args.config_file)  # Detectron2's setup opens it, too
    cfg = load_config(args.config_file, opts=args.opts)
    if uses_atss(cfg) and not training:
        cfg = for_inference(cfg)
    if use_available_device(cfg):
        print("No GPU here: running on the CPU.", file=sys.stderr)
    if training:
        scales_gradients(cfg)  # refuses a precision before data are read

    recall(args, cfg)
    register(args)
    warn_of_unused(args.register, cfg)
    cfg.OUTPUT_DIR = os.path.expanduser(cfg.OUTPUT_DIR)
    check_processes(args, cfg)
    if "DATALOADER.NUM_WORKERS" not in given:
        fit_workers(cfg, local_size(args))
    check_data(cfg, training, images=not is_started())

    if uses_atss(cfg):
        complete_classes(cfg, training)
    if training:
        choose_batch(args, cfg)
        complete_schedule(cfg, given)
        complete_tiles(cfg)
    check_model(_start_from_checkpoint(args, cfg), training)
    if training:
        check_training_values(cfg)
    before = dict(flatten(cfg))
    prune(cfg)  # so that config.yaml can be read without parts that the run does not use
    unread: Iterable[str] = ()
    if cfg.MODEL.META_ARCHITECTURE == "ATSSDetector":
        unread = describe_unread(cfg, before, given)
    elif uses_atss(cfg):
        unread = describe_unread_by_proposals(given)
    if uses_atss(cfg):
        unread = [*unread, *describe_unused(cfg, given)]
    for line in unread:
        print(line, file=sys.stderr)
    check_config(cfg, training, given)
    check_output_dir(cfg.OUTPUT_DIR, cfg.DATASETS.TEST)
    shorten_paths(cfg)
    cfg.freeze()
    return cfg


def fit_workers(cfg: CfgNode, processes: int) -> None:
    """Lower Detectron2's default DATALOADER.NUM_WORKERS, in place, to the cores per process."""
    default = get_cfg().DATALOADER.NUM_WORKERS
    if default == cfg.DATALOADER.NUM_WORKERS:
        has_affinity = hasattr(os, "sched_getaffinity")  # on Linux
        cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
        task_cores = os.environ.get("SLURM_CPUS_PER_TASK")
        if task_cores and is_started() and "TORCHELASTIC_RUN_ID" not in os.environ:
            cores, processes = min(cores, int(task_cores)), 1  # this process is a task of SLURM
        cfg.DATALOADER.NUM_WORKERS = min(default, max(cores // processes, 1))


def run(
    args: argparse.Namespace, cfg: CfgNode, trainer_class: type[Trainer] | None = None
) -> dict | None:
    """Train, or evaluate with --eval-only. Return results by task."""
    register(args)
    # Once per machine, after all processes have started: if one finds a fault, all end.
    if is_started() and int(os.environ["LOCAL_RANK"]) == 0:
        check_data(cfg, training=not args.eval_only)
    if uses_atss(cfg):
        follow_classes(cfg)
    config = _set_up(args, cfg)
    hide_explained_tracebacks(cfg.OUTPUT_DIR)
    datasets.log_remarks((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    if comm.is_main_process():
        warn_of_objects(cfg, training=not args.eval_only)
    if cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()
    cfg = _start_from_checkpoint(args, cfg)
    if args.eval_only:
        return _evaluate(args, cfg)
    return _train(args, cfg, config, trainer_class)


def _evaluate(args: argparse.Namespace, cfg: CfgNode) -> dict:
    refuse_differences(facts_of_config(cfg))
    model = Trainer.build_model(cfg)
    checkpointer = SafeCheckpointer(
        model, save_dir=cfg.OUTPUT_DIR, trained_with=values_in(cfg), whole=True
    )
    loaded = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    share_weights(model)
    _follow_weights(names_in(loaded, cfg.MODEL.WEIGHTS), cfg)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_tta(cfg, model))
    if cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
        verify_results(cfg, results)
    return results


def _train(
    args: argparse.Namespace, cfg: CfgNode, config: bytes, trainer_class: type[Trainer] | None
) -> dict | None:
    trainer = (trainer_class or Trainer)(cfg)
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
        replace_file(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), config)
    log = logging.getLogger("atss")
    if hasattr(trainer.data_loader, "records"):  # a user's own loader may have none
        log.info(describe_schedule(trainer.cfg, len(trainer.data_loader.records)))
    warn_of_warmup(trainer.cfg)
    warn_of_frozen(trainer.cfg)
    warn_of_sizes(trainer.cfg)
    log.info("Starting at iteration %d", trainer.start_iter)
    results = trainer.train()
    if cfg.TEST.REPORT:
        write_report(cfg)
    return results


def _follow_weights(names: list[str], cfg: CfgNode) -> None:
    """Renumber the classes of test sets as the weights do; the log warns of other classes."""
    for name in cfg.DATASETS.TEST:
        try:
            datasets.follow(name, names)
        except UserError:
            warn_of_others(names, datasets.classes_of(name) or (), cfg.MODEL.WEIGHTS)


def _start_from_checkpoint(args: argparse.Namespace, cfg: CfgNode) -> CfgNode:
    """Set a resumed run's MODEL.WEIGHTS to its checkpoint, which includes the backbone."""
    if not (args.resume and begins_pretrained(cfg)):
        return cfg
    checkpoint = TrainingCheckpointer(nn.Module(), cfg.OUTPUT_DIR).get_checkpoint_file()
    if not checkpoint:
        return cfg
    resumed = cfg.clone()
    resumed.defrost()
    resumed.MODEL.WEIGHTS = checkpoint
    return resumed


def start(args: argparse.Namespace, trainer_class: type[Trainer] | None = None) -> None:
    """Prepare and run. Exit with ``error: ...`` after an error that the user can fix."""
    with ExitStack() as held:
        try:
            cfg = prepare(args)
            hold_folder(args, cfg, held)
        except (UserError, OSError) as error:
            sys.exit(f"error: {error}")
        launch(partial(run, trainer_class=trainer_class), args, cfg)


def hold_folder(args: argparse.Namespace, cfg: CfgNode, held: ExitStack) -> None:
    """Lock OUTPUT_DIR for a training until ``held`` is closed.

    Raises:
        UserError: if the folder is in use, or contains a run that is not resumed.
    """
    if args.eval_only:
        return
    lock = lock_folder(cfg.OUTPUT_DIR) if _is_first(args) else None
    if lock is not None:
        held.callback(lock.close)
    refuse_used_folder(cfg.OUTPUT_DIR, args.resume)


def _is_first(args: argparse.Namespace) -> bool:
    return not (int(os.environ.get("RANK", 0)) if is_started() else args.machine_rank)


def _set_up(args: argparse.Namespace, cfg: CfgNode) -> bytes:
    """Set up logs and seeds. Return the new content of config.yaml, which evaluation and resumption
    do not write."""
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    rank, first = comm.get_rank(), comm.is_main_process()
    # Called as default_setup calls it, setup_logger returns the same loggers again.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="fvcore")
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="atss")
    abridge_terminal()
    before = read_if_exists(path) if first and (args.eval_only or args.resume) else None
    try:
        default_setup(cfg, args)
        return read_if_exists(path) or b"" if first else b""
    finally:
        if before is not None:
            replace_file(path, before)


def register(args: argparse.Namespace) -> None:
    """Import --import and register --register, once per process.

    Raises:
        UserError: naming the option.
    """
    if args.registered_in == os.getpid():
        return
    args.registered_in = os.getpid()
    import_modules(args.imports)
    datasets.register_all(args.register, reading_of(args), partly=args.recalls_classes)
