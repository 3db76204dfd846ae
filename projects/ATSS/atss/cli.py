"""The command ``atss``: one word for each tool.

    atss train --data data.yaml --output out
    atss predict out photos

Other commands than ``train`` and ``predict`` take the options of their tool.
"""

import argparse
import importlib
import re
import sys
from collections.abc import Container, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from atss_runner import command

from .config import RECIPE
from .config.files import check_pairs
from .engine.run import add_import, hold_folder, make_parser, prepare, run, start
from .engine.terminal import release_logs
from .errors import UserError
from .labels import formats
from .labels.folders import VALIDATION, YOLO_CONFIGS
from .labels.yolo_config import read_config
from .predictor import WEIGHTS, find_run

# Command -> the module of atss.tools, and a line for the list of commands.
COMMANDS = {
    "train": ("train_net", "train on your images and labels"),
    "predict": ("demo", "draw the detections of a trained detector on images and videos"),
    "export": ("export", "write a trained detector to one file of ONNX or OpenVINO"),
    "check": ("check_dataset", "find errors in images and labels"),
    "report": ("report", "measure the errors of a trained detector"),
    "convert": ("convert_dataset", "join and split data sets, and write them as COCO json"),
    "convert-weights": ("convert_checkpoint", "convert weights from OTX, from and to mmdet"),
    "statistics": ("assignment_statistics", "count the training samples of each object"),
    "explore": ("explore", "see the anchors that rules give the objects of an image"),
    "demo": ("digits", "train on a small generated data set, in minutes"),
    "bench": ("benchmark", "measure speed (needs a checkout of the project)"),
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="atss",
        description="Train, check and use one-stage detectors on Detectron2.",
        epilog="atss COMMAND --help lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, line) in COMMANDS.items():
        commands.add_parser(name, help=line, add_help=False)
    name = parser.parse_known_args(argv[:1])[0].command
    sys.argv[0] = f"atss {name}"
    pairs, rest = split_pairs(argv[1:])
    try:
        if name == "train":
            words = train_arguments(make_train_parser().parse_args(rest))
            start(_parse(words, pairs))
            return 0
        if name == "predict":
            rest = predict_arguments(make_predict_parser().parse_args(rest))
    except UserError as error:
        sys.exit(f"error: {error}")
    tool = _tool(name)
    # Of the tool's help.
    tool.__doc__ = (tool.__doc__ or "").replace(f"tools/{COMMANDS[name][0]}.py", f"atss {name}")
    return tool.main([*rest, *(["--", *pairs] if pairs else [])]) or 0


def _parse(words: list[str], pairs: list[str]) -> argparse.Namespace:
    """Parse the options of `tools/train_net.py`; values of pairs may begin with "-"."""
    args = make_parser().parse_intermixed_args(words)
    args.opts += pairs
    return args


def _tool(name: str) -> ModuleType:
    module = COMMANDS[name][0]
    try:
        import atss.tools

        sys.path.insert(0, atss.tools.__path__[0])  # of the packages beside the tools
        return importlib.import_module(f"atss.tools.{module}")
    except ModuleNotFoundError as error:
        if error.name not in (f"atss.tools.{module}", "benchmarks"):
            raise
        sys.exit(f"error: atss {name} needs a checkout of the project: run tools/{module}.py there")


def split_pairs(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into KEY VALUE pairs of the config, wherever they are, and the rest.

    A file such as TEST.json or TEST.JPG and a folder such as TEST are no keys.
    """
    nodes = get_cfg()
    pairs: list[str] = []
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        first = word.partition(".")[0]
        is_key = first in nodes and word == first and not isinstance(nodes[first], CfgNode)
        if first in nodes and re.fullmatch(r"\w+(\.\w+)*\.[A-Z][A-Z0-9_]*", word):
            is_key = not Path(word).exists()
        if is_key and words and not words[0].startswith("--"):
            pairs += [word, words.pop(0)]
        else:
            rest.append(word)
    return pairs, rest


def make_train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atss train",
        usage="%(prog)s (--data SOURCE | --train SOURCE --val SOURCE) --output FOLDER [options] "
        "[KEY VALUE ...]",
        description="Train a detector on your images. The best weights are OUTPUT/model_best.pth.",
        epilog="""examples:
  atss train --data data.yaml --output out              YOLO layout (train, val)
  atss train --data VOC2007 --output out                a folder of Pascal VOC xml
  atss train --train a.json:images --val b.json:images --output out
  atss train --data data.yaml --output out --config tables/atss_k17 SOLVER.EPOCHS 30
  atss train --output out --resume""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", metavar="SOURCE", help="data.yaml, obj.data or a folder, with splits train, val")
    add("--train", metavar="SOURCE", help="labels.json:images, data.yaml:split or folder:split")
    add("--val", metavar="SOURCE", help="the same for validation; 'none' trains without")
    add("--output", metavar="FOLDER", required=True, help="for weights, logs and config.yaml")
    config = ("--config", "--config-file")
    add(*config, metavar="NAME", help=f"of the model zoo, or a yaml file (default: {RECIPE})")
    add("--resume", action="store_true", help="continue the training in OUTPUT")
    add("--num-gpus", type=int, default=1, metavar="N", help="N processes, also without GPUs")
    formats.add_arguments(parser)
    add_import(parser)
    return parser


def train_arguments(args: argparse.Namespace) -> list[str]:
    """Return the options of `tools/train_net.py`.

    Raises:
        UserError: if data are not named or do not exist.
    """
    config = args.config
    output = str(Path(args.output).expanduser())
    begun = Path(output, "config.yaml")
    if args.resume and config is None and begun.is_file():
        config = str(begun)
    sources = {split: f"{args.data}:{split}" for split in ("train", "val") if args.data}
    sources |= {k: v for k in ("train", "val") if (v := getattr(args, k)) is not None}
    if sources.get("val") == "none":
        del sources["val"]
    words = ["--config-file", config or RECIPE, "--num-gpus", str(args.num_gpus)]
    words += ["--resume"] * args.resume
    words += [f"--import={x}" for x in args.imports]
    words += [] if args.classes is None else ["--classes", args.classes]
    words += [] if args.first_pixel is None else ["--first-pixel", str(args.first_pixel)]
    words += [f"--register={name}={source}" for name, source in sources.items()]
    if "train" in sources:
        words += ["DATASETS.TRAIN", "('train',)"]
        words += ["DATASETS.TEST", "('val',)" if "val" in sources else "()"]
    elif config != str(begun):
        raise UserError("no training data: pass --data SOURCE, or --train SOURCE and --val SOURCE")
    elif sources or args.val:
        raise UserError("--val needs --train or --data")
    if "val" not in sources and args.val != "none" and "train" in sources:
        raise UserError("no validation data: pass --val SOURCE, or --val none to train without")
    if args.data:
        _check_data(args.data, reads_val=args.val is None)
    return [*words, "OUTPUT_DIR", output]


def _check_data(data: str, reads_val: bool) -> None:
    """Check that --data exists and, if it is a data.yaml or obj.data, names a validation split.

    Raises:
        UserError: naming --data.
    """
    path = Path(data).expanduser()
    if not path.exists():
        file = data.rpartition(":")[0]
        hint = f": --data takes {file} itself" if Path(file).expanduser().is_file() else ""
        raise UserError(f"--data {data} does not exist{hint}")
    if not (reads_val and path.is_file() and path.suffix.lower() in YOLO_CONFIGS):
        return
    try:
        config = read_config(path, "val")
    except UserError:  # the registration of the split 'train' names file and fault
        return
    if not any(config.get(name) for name in VALIDATION):
        raise UserError(
            f"--data {data} has no split 'val': pass --val SOURCE, or --val none to train without"
        )


def train(
    output: str | Path,
    data: str | None = None,
    *,
    train: str | None = None,
    val: str | None = None,
    config: str | Path | None = None,
    resume: bool = False,
    opts: Sequence[Any] = (),
) -> dict | None:
    """Train from Python, in this process, as ``atss train`` does.

        atss.train("out", "data.yaml", opts=["SOLVER.EPOCHS", 30])
        detections = atss.Predictor("out")("photo.jpg")

    Args:
        output: folder for weights, logs and config.yaml.
        data: data.yaml, obj.data or a folder, with splits train and val.
        train, val: labels.json:images, data.yaml:split or folder:split; val "none" for none.
        config: a name of the model zoo or a yaml file; by default the recipe for fine-tuning.
        resume: continue the training in ``output``.
        opts: KEY VALUE pairs over the config.

    Returns:
        the metrics of the last evaluation.

    Raises:
        UserError: if data, config or folder are unusable.
    """
    words = ["--output", str(output), *(["--resume"] * resume)]
    named = {"data": data, "train": train, "val": val, "config": config}
    words += [f"--{name}={value}" for name, value in named.items() if value is not None]
    options = train_arguments(make_train_parser().parse_args(words))
    check_pairs(opts)
    args = _parse(options, list(map(str, opts)))
    registered = {*DatasetCatalog.list()}
    with ExitStack() as held:
        held.enter_context(release_logs())
        held.callback(_forget_others, registered)  # the next call may have other data
        cfg = prepare(args)
        hold_folder(args, cfg, held)
        return run(args, cfg)


def _forget_others(names: Container[str]) -> None:
    for name in [x for x in DatasetCatalog.list() if x not in names]:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def make_predict_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atss predict",
        usage="%(prog)s RUN INPUT [INPUT ...] [options] [KEY VALUE ...]",
        description="Draw detections on images and videos, and write them.",
        epilog="""examples:
  atss predict out photos                  pictures and detections.json in out/predictions
  atss predict out a.jpg film.mp4 --output pictures --score-threshold 0.6
  atss predict out photos --thresholds report.json --format yolo csv
  atss predict out 0                       from a camera, until ctrl-C
  atss predict ATSS_R_50_FPN_1x photos --weights converted.pth --output pictures""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a training; with --weights a config also")
    add("inputs", nargs="+", metavar="INPUT", help=command.INPUTS)
    add("--weights", metavar="FILE", help=f"default: {' or '.join(WEIGHTS)} in RUN")
    add("--output", metavar="FOLDER", help="for the results (default: RUN/predictions)")
    command.add_detection(parser)
    add_import(parser)
    return parser


def predict_arguments(args: argparse.Namespace) -> list[str]:
    """Return the options of `tools/demo.py`.

    Raises:
        UserError: if RUN has no weights.
    """
    run = str(Path(args.run).expanduser())
    config, weights = find_run(run, args.weights)
    output = args.output
    if output is None and Path(run).is_dir():
        output = str(Path(run, "predictions"))
    if output is None:
        raise UserError("--output is missing: the folder for the results")
    words = ["--config-file", config, "--weights", weights, "--output", output]
    words += [] if args.score_threshold is None else [f"--score-threshold={args.score_threshold}"]
    words += [] if args.thresholds is None else ["--thresholds", args.thresholds]
    words += ["--batch", str(args.batch), "--format", *args.format]
    words += [f"--import={x}" for x in args.imports]
    return [*words, "--input", *args.inputs]


if __name__ == "__main__":
    sys.exit(main())
