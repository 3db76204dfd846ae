#!/usr/bin/env python3
"""Measure the detections of a run, or of any detector: AP by class and size, kinds of errors,
confusion matrix, thresholds, worst images, suspected errors of labels.

    tools/report.py output/run                    # writes output/run/report.html
    tools/report.py output/run output/other_run
    tools/report.py --annotations labels.json --detections results.json --output page.html

The results of a run are those of its best weights, or else of its last evaluation. Two runs are
compared, with intervals.
"""

import argparse
import json
import sys
from pathlib import Path

from atss.analysis.figures import METRICS
from atss.analysis.page import write_page
from atss.analysis.report import SCORE, all_figures, load_run
from atss.analysis.results import Files, find_results
from atss.engine.coco import COCO_LIMIT
from atss.engine.run import add_import, import_modules
from atss.errors import UserError, check_range, check_writable


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="*", metavar="OUTPUT_DIR", help="folder of a training; two are compared")
    add("--annotations", metavar="FILE", help="ground truth in COCO's format")
    add("--detections", nargs="+", metavar="FILE", help="in COCO's format of results; one or two")
    add("--images", default="", metavar="FOLDER", help="with the images, to show the worst")
    add("--output", type=Path, metavar="FILE", help="the page (default: OUTPUT_DIR/report.html)")
    add("--json", type=Path, metavar="FILE", help="for all figures")
    add(
        "--score-threshold",
        type=float,
        default=SCORE,
        metavar="SCORE",
        help="least score in the confusion matrix (default: %(default)s)",
    )
    add(
        "--max-detections",
        type=int,
        metavar="COUNT",
        help="detections of an image and class that count, at least 100 (default: of a training "
        "its TEST.DETECTIONS_PER_IMAGE, else 100)",
    )
    add_import(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    try:
        import_modules(args.imports)
        check_range("--score-threshold", args.score_threshold, 0, 1)
        limit = args.max_detections
        if limit is not None:
            check_range("--max-detections", limit, 1)
        sources = find_files(args)
        if limit is not None:
            sources = [files._replace(limit=limit) for files in sources]
        folders = [Path(x) for x in args.runs] or [None] * len(sources)
        page = args.output or (folders[0] / "report.html" if folders[0] else None)
        inputs = {Path(x).resolve() for files in sources for x in files[:2]}
        for option, target in (("--output", page), ("--json", args.json)):
            if target is None:
                continue
            if target.resolve() in inputs:
                raise UserError(f"{option} {target} would replace an input")
            check_writable(option, target)
        runs = [
            load_run(files, name, folder, args.score_threshold)
            for files, name, folder in zip(sources, names(args), folders, strict=True)
        ]
        content = all_figures(runs)
        print(format_figures(content))
        if args.json:
            args.json.write_text(json.dumps(content, allow_nan=False))
        if page:
            write_page(runs, page, content.get("difference"))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    for target in filter(None, (page, args.json)):
        print(f"Written: {target}")


def names(args: argparse.Namespace) -> list[str]:
    """Return a name of each of the results; equal names get their parent folder."""
    paths = [Path(x).resolve() for x in args.runs or args.detections]
    if len({x.name for x in paths}) < len(paths):
        return [f"{x.parent.name}/{x.name}" for x in paths]
    return [x.name for x in paths]


def find_files(args: argparse.Namespace) -> list[Files]:
    """Return the files of one or two results.

    Raises:
        UserError: if options are missing or exclude each other.
    """
    if args.runs and (args.annotations or args.detections):
        raise UserError("pass OUTPUT_DIR, or --annotations and --detections")
    if not args.runs and not (args.annotations and args.detections):
        raise UserError("no results: pass OUTPUT_DIR, or --annotations and --detections")
    if len(args.runs or args.detections) > 2:
        raise UserError("at most two results can be compared")
    if args.runs:
        return [find_results(folder) for folder in args.runs]
    return [Files(args.annotations, file, args.images) for file in args.detections]


def format_figures(content: dict) -> str:
    """Return the main figures as text."""
    lines = ["  ".join(f"{name} {_points(content[name])}" for name in METRICS), ""]
    if (limit := content["data"]["max_detections"]) != COCO_LIMIT:
        lines[1:1] = [f"of at most {limit} detections of an image and class; COCO counts 100"]
    rows = [["class", "objects", "AP", "AP50", "best threshold", "F1 there"]]
    for name, x in content["per_class"].items():
        best = content["thresholds"][name] or {"score": None, "f1": None}
        rows.append([name, str(x["objects"]), _points(x["AP"]), _points(x["AP50"])])
        rows[-1] += [_points(best["score"], 3), _points(best["f1"], 3)]
    lines += [*_table(rows), ""]
    errors = content["errors"]
    rows = [["error", "count", f"cost in AP50 of {_points(errors['base_ap50'])}"]]
    rows += [[x, str(errors["counts"][x]), _points(errors["dap"][x])] for x in errors["counts"]]
    rows += [[name, "", _points(x)] for name, x in errors["dap_special"].items()]
    lines += _table(rows)
    if difference := content.get("difference"):
        rows = [["second - first", "difference", "95 % interval"]]
        for name, x in difference["metrics"].items():
            interval = f"{x['low']:+.2f} to {x['high']:+.2f}"
            rows.append([name, f"{x['difference']:+.2f}", interval])
        lines += ["", *_table(rows)]
    return "\n".join(lines)


def _points(x: float | None, digits: int = 2) -> str:
    return "n/a" if x is None else f"{x:.{digits}f}"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in rows]


if __name__ == "__main__":
    main()
