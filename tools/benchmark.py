#!/usr/bin/env python3
"""Measure time and memory of training, inference, assignment and loading.

    tools/benchmark.py model                     a training step, inference, and their parts
    tools/benchmark.py model --against all       beside every peer that is installed
    tools/benchmark.py configs                   a training step of each of ATSS's successors
    tools/benchmark.py batching                  inference of 8 images, together and one by one
    tools/benchmark.py assignment                the assigner beside dense ones
    tools/benchmark.py rules                     rules that look at predictions, beside mmdet's
    tools/benchmark.py proposals                 rules in a region proposal network
    tools/benchmark.py operators                 operators that start on a GPU, counted on a CPU
    tools/benchmark.py scaling                   the growth of assignment; draws scaling.png
    tools/benchmark.py data                      the time of loading images
    tools/benchmark.py labels                    registering 100,000 images, by format
    tools/benchmark.py files RUN FILE...         exported files beside the detector
    tools/benchmark.py against COMMIT            the working tree beside a commit

Compared functions are measured in one run, in turn. A ratio is the median of the ratios of each
turn, except between two precisions or canvases; an interval contains the median with 95 %
confidence. Peers are the detectors of Detectron2 and torchvision, and of mmdet if it is
installed: pip install -e '.[peers]'
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
from benchmarks import against, assignment, data, files, labels, model, operators, proposals, rules
from benchmarks.peers import NUM_CLASSES, PEERS, installed
from benchmarks.timing import Seconds, table

from atss import load_config, model_zoo
from atss.config import config_names
from atss.engine.launch import keep_freed_memory
from atss.engine.run import add_import, import_modules
from atss.errors import check_writable

DEFAULT_CONFIG = "ATSS_R_50_FPN_1x.yaml"


def measure_model(args: argparse.Namespace) -> dict:
    """Measure our detector beside peers, in each precision and memory layout."""
    peers = [name for name in PEERS if installed(name)] if args.against == ["all"] else args.against
    names = [model.OURS, *peers]
    report = {}
    for case in _cases(args):
        print(f"\n## {case.title}: {case.batch} x {case.height}x{case.width}, {case.boxes} boxes")
        compared = model.beside_peers(names, case, args.runs)
        for task, seconds in compared.items():
            _print_comparison(task, seconds, case.batch)
        memory = {name: model.peak_memory(name, case) for name in names} if args.memory else {}
        if memory:
            print("\npeak memory of training\n")
            print(table(["", "MiB"], [[name, f"{mib:.0f}"] for name, mib in memory.items()]))
        parts = model.parts(case, args.runs)
        for task, seconds in parts.items():
            _print_parts(task, seconds)
        floor = model.floor(case)
        _print_floor(floor)
        report[case.title] = {
            "compared": _plain(compared),
            "MiB": memory,
            "parts": _plain(parts),
            "floor": floor,
        }
    _print_across(report)
    return report


def _print_comparison(task: str, seconds: dict[str, Seconds], batch: int) -> None:
    ours = seconds[model.OURS]
    rows = [
        [name, _interval(s), f"{batch / s.median:.2f}", _interval(ours.over(s))]
        for name, s in seconds.items()
    ]
    print(f"\n{task}\n")
    print(table(["", "seconds (95 %)", "images/s", "ours / this (95 %)"], rows))


def _print_parts(task: str, seconds: dict[str, Seconds]) -> None:
    whole = sum(s.median for s in seconds.values())
    rows = [
        [name, f"{s.median * 1e3:.2f}", f"{100 * s.median / whole:.2f} %"]
        for name, s in seconds.items()
    ]
    print(f"\nparts of our {task}\n")
    print(table(["", "ms", "share"], rows))


def _print_floor(floor: dict[str, float]) -> None:
    operations, rate = floor["operations"], floor["operations per second"]
    traffic, bandwidth = floor["bytes"], floor["bytes per second"]
    print(
        f"\nfloor of our training step: {operations / 1e9:.0f} billion operations at "
        f"{rate / 1e9:.0f} billion/s (a matrix product) are {operations / rate:.2f} s; "
        f"{traffic / 1e9:.1f} GB, operator by operator, at {bandwidth / 1e9:.1f} GB/s (a copy) "
        f"are {traffic / bandwidth:.2f} s"
    )


def _print_across(report: dict) -> None:
    """Print our step in the last variant against all steps in the first."""
    if len(report) < 2:
        return
    first, *_, last = report
    ours = report[last]["compared"]["training step"][model.OURS]["median"]
    print(f"\nour step in {last}, against the steps in {first}\n")
    steps = report[first]["compared"]["training step"]
    print(table(["", "ratio"], [[name, f"{ours / s['median']:.3f}"] for name, s in steps.items()]))


def measure_configs(args: argparse.Namespace) -> dict:
    """Measure several configs beside one."""
    files = args.beside or [x for x in config_names() if x.startswith("successors/")]
    report = {}
    for case in _cases(args):
        measured = model.beside_configs(files, case, args.runs)
        first = next(iter(measured.values()))[0]
        rows = [
            [name, f"{count / 1e6:.2f}", _interval(s), _interval(s.over(first))]
            for name, (s, count) in measured.items()
        ]
        print(f"\n## {case.title}: {case.batch} x {case.height}x{case.width}, {case.boxes} boxes\n")
        print(table(["", "million parameters", "seconds (95 %)", "this / the first (95 %)"], rows))
        report[case.title] = {
            name: {"parameters": count, "median": s.median, "values": s.values}
            for name, (s, count) in measured.items()
        }
    return report


def measure_batching(args: argparse.Namespace) -> dict:
    """Measure inference of a batch against inference of its images one by one."""
    report = {}
    for case in _cases(args):
        seconds, difference = model.batching(case, args.runs)
        rows = [[name, _interval(s)] for name, s in seconds.items()]
        print(f"\n## {case.title}: {case.batch} x {case.height}x{case.width}\n")
        print(table(["", "seconds per image (95 %)"], rows))
        ratio = seconds["together"].over(seconds["one by one"])
        print(f"together / one by one: {_interval(ratio)}; {difference}")
        report[case.title] = {name: s.median for name, s in seconds.items()}
    return report


def _cases(args: argparse.Namespace) -> list[model.Case]:
    height, width = args.size
    cases = []
    for variant in args.variants:
        precision, _, layout = variant.partition("-")
        cases.append(
            model.Case(
                *(precision, layout == "channels_last", args.batch, height, width, args.boxes),
                *(args.device, args.config_file, tuple(args.opts), args.classes),
            )
        )
    return cases


def _interval(s: Seconds) -> str:
    low, high = s.interval
    return f"{s.median:.3f} ({low:.3f} to {high:.3f})"


def _plain(seconds: dict[str, dict[str, Seconds]]) -> dict:
    return {
        task: {n: {"median": s.median, "values": s.values} for n, s in by_name.items()}
        for task, by_name in seconds.items()
    }


def measure_assignment(args: argparse.Namespace) -> dict:
    return assignment.beside_dense(args.runs, installed("mmdet-atss"))


def measure_rules(args: argparse.Namespace) -> dict:
    return rules.beside_mmdet(args.runs, installed("mmdet-atss"), args.crowd)


def measure_proposals(args: argparse.Namespace) -> dict:
    seconds = proposals.rules(tuple(args.size), args.batch, args.runs)
    theirs = seconds[proposals.THEIRS]
    rows = [[n, f"{1e3 * s.median:.1f}", _interval(s.over(theirs))] for n, s in seconds.items()]
    print(table(["", "milliseconds", "this / Detectron2's (95 %)"], rows))
    return _plain({"": seconds})


def count_operators(args: argparse.Namespace) -> dict:
    """Count operators of every rule, and of a training step beside Detectron2's."""
    import_modules(args.imports)
    images, side, boxes = 2, 128, 7
    case = model.Case(
        *("fp32", False, images, side, side, boxes, "cpu", args.config_file, tuple(args.opts))
    )
    return {"rules": operators.print_rules(), "steps": operators.print_steps(case, args.compile)}


def measure_scaling(args: argparse.Namespace) -> dict:
    return assignment.scaling(args.runs, Path(args.plots))


def measure_data(args: argparse.Namespace) -> dict:
    cfg = load_config(args.config_file, opts=args.opts)
    return data.loading(cfg, args.images, tuple(args.workers))


def measure_labels(args: argparse.Namespace) -> dict:
    return labels.registration(args.images, args.boxes)


def measure_files(args: argparse.Namespace) -> dict:
    seconds = files.networks(args.run, args.files, tuple(args.size), args.runs, args.threads)
    eager = seconds["eager, fp32"]
    rows = [[name, _interval(s), _interval(eager.over(s))] for name, s in seconds.items()]
    print(table(["network", "seconds (95 %)", "eager fp32 / this (95 %)"], rows))
    parts = files.around(args.files[0], args.candidates, args.runs, args.threads)
    print()
    times = [[name, f"{1e3 * s.median:.1f}"] for name, s in parts.items()]
    print(table([args.files[0], "milliseconds"], times))
    return {"networks": _plain({"": seconds}), "parts": _plain({"": parts})}


def measure_against(args: argparse.Namespace) -> dict:
    options = against.Options(
        *(
            args.runs,
            args.rounds,
            args.only,
            args.objects,
            tuple(args.size),
            args.batch,
            args.opts,
            args.threads,
        ),
        args.keep_freed_memory,
    )
    return against.against([*args.commits, None][:2], args.parts, options)


def make_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--runs", type=int, default=7, help="counted calls of each function")
    shared.add_argument("--json", metavar="FILE", help="also write the figures to a file")
    shared.add_argument(
        "--keep-freed-memory",
        action="store_true",
        help="set the allocator for all as train_net.py does on CPUs",
    )
    configured = argparse.ArgumentParser(add_help=False)
    configured.add_argument(
        "--config-file", default=model_zoo.get_config_file(DEFAULT_CONFIG), metavar="FILE"
    )
    configured.add_argument(
        "opts", nargs="*", default=[], metavar="KEY VALUE", help="last: changes to the config"
    )
    commands = parser.add_subparsers(
        required=True, metavar="WHAT", help="WHAT --help lists options"
    )

    modelled = argparse.ArgumentParser(add_help=False, parents=[shared, configured])
    modelled.add_argument(
        "--variants",
        nargs="+",
        default=["fp32", "bf16-channels_last"],
        metavar="VARIANT",
        help="fp32, bf16 or fp16, with or without -channels_last",
    )
    modelled.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    modelled.add_argument("--size", type=int, nargs=2, default=(800, 1088), metavar="PIXELS")
    modelled.add_argument("--boxes", type=int, default=7, help="objects on each image")
    modelled.set_defaults(classes=NUM_CLASSES)  # those of the peers
    command = commands.add_parser("model", parents=[modelled])
    command.set_defaults(measure=measure_model)
    command.add_argument(
        "--against",
        nargs="+",
        default=[],
        choices=[*PEERS, "all"],
        metavar="PEER",
        help=f"{', '.join(PEERS)}, or all that are installed",
    )
    command.add_argument("--batch", type=int, default=1, help="images")
    command.add_argument("--memory", action="store_true", help="also measure peak memory")

    command = commands.add_parser("configs", parents=[modelled])
    command.set_defaults(measure=measure_configs)
    command.add_argument(
        "--beside", nargs="+", metavar="FILE", help="configs; by default successors/"
    )
    command.add_argument("--batch", type=int, default=1, help="images")
    command.add_argument("--classes", type=int, default=NUM_CLASSES)
    command = commands.add_parser("batching", parents=[modelled])
    command.set_defaults(measure=measure_batching)
    command.add_argument("--batch", type=int, default=8, help="images")
    command = commands.add_parser("assignment", parents=[shared])
    command.set_defaults(measure=measure_assignment)
    command = commands.add_parser("rules", parents=[shared])
    command.set_defaults(measure=measure_rules)
    command.add_argument(
        "--crowd", action="store_true", help="also measure memory for 75,000 objects: minutes"
    )
    command = commands.add_parser("proposals", parents=[shared])
    command.set_defaults(measure=measure_proposals)
    command.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar="PIXELS")
    command.add_argument("--batch", type=int, default=2, help="images")
    command = commands.add_parser("operators", parents=[shared, configured])
    command.set_defaults(measure=count_operators)
    add_import(command)
    command.add_argument(
        "--compile", action="store_true", help="also with MODEL.ATSS.COMPILE: minutes"
    )
    command = commands.add_parser("scaling", parents=[shared])
    command.set_defaults(measure=measure_scaling)
    command.add_argument("--plots", default="output/benchmark", metavar="FOLDER")
    command = commands.add_parser("data", parents=[shared, configured])
    command.set_defaults(measure=measure_data)
    command.add_argument("--images", type=int, default=64)
    command.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    command = commands.add_parser("labels", parents=[shared])
    command.set_defaults(measure=measure_labels)
    command.add_argument("--images", type=int, default=100_000)
    command.add_argument("--boxes", type=int, default=10, help="objects on each image")
    command = commands.add_parser("files", parents=[shared])
    command.set_defaults(measure=measure_files)
    command.add_argument("run", metavar="RUN", help="folder of a training, or a config")
    command.add_argument("files", nargs="+", metavar="FILE", help="of tools/export.py")
    command.add_argument("--size", type=int, nargs=2, default=(320, 448), metavar="PIXELS")
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--candidates", type=int, nargs="+", default=[300, 3000, 20_000])
    command = commands.add_parser("against", parents=[shared])
    command.set_defaults(measure=measure_against)
    command.add_argument(
        "commits",
        nargs="+",
        metavar="COMMIT",
        help="before and after; by default after is the working tree",
    )
    command.add_argument(
        "--parts",
        nargs="+",
        default=["calls", "steps", "lists", "tables"],
        choices=["calls", "steps", *against.MEMORY],
        help="rules alone, training steps, memory of 1,000 objects by engine and of 75,000",
    )
    command.add_argument(
        "--only", nargs="+", default=[""], help="parts of names of rules and configs"
    )
    command.add_argument("--objects", type=int, nargs="+", default=[7, 100, 1000])
    command.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(128, 160),
        metavar="PIXELS",
        help="canvas of training steps; the share of assignment is larger on a small one",
    )
    command.add_argument("--batch", type=int, default=1, help="images of a training step")
    command.add_argument("--threads", type=int, help="of each process")
    command.add_argument("--rounds", type=int, default=3, help="pairs of processes")
    command.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="changes to the configs"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.json:
        try:
            check_writable("--json", Path(args.json))
        except OSError as error:
            sys.exit(f"error: {error}")
    if args.keep_freed_memory:
        keep_freed_memory()
    processor = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        processor += f", {torch.cuda.get_device_name()}"
    print(f"{processor}, {torch.get_num_threads()} threads")
    print(f"Python {platform.python_version()}, torch {torch.__version__}")
    try:
        report = args.measure(args)
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
