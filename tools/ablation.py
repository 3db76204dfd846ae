#!/usr/bin/env python3
"""Train rows of the paper's tables on a small data set, and compare them seed by seed.

    tools/ablation.py                                # the primary rows, three seeds: about an hour
    tools/ablation.py --rows atss_k3 atss_box --seeds 5 --output output/k
    tools/ablation.py --rows all

A row is a config in configs/tables/, overridden by configs/ablation.yaml. With one seed all rows
have the same images in the same order and the same initial weights. After an interruption the same
command continues with the first incomplete run.
"""

import argparse
import logging
import sys
from pathlib import Path

from atss.analysis.experiments import PRIMARY, claims, compare_rows, write_table
from atss.analysis.plots import plot_experiments
from atss.engine.explain import exit_with_message
from atss.errors import check_writable


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=list(PRIMARY), metavar="ROW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("output/ablation"))
    parser.add_argument(
        "opts", nargs="*", default=[], metavar="KEY VALUE", help="last: over every row"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_intermixed_args(argv)
    log = logging.getLogger("detectron2")
    log.setLevel(logging.INFO)  # otherwise the trainer sets up a log
    log.addHandler(logging.NullHandler())  # otherwise Python prints errors twice
    try:
        check_writable("--output", args.output / "table.md", args.output / "plot.png")
    except OSError as error:
        sys.exit(f"error: {error}")
    with exit_with_message(str(args.output)):
        results = compare_rows(args.rows, args.seeds, args.output, args.opts)
    write_table(results, args.output / "table.md")
    plot_experiments(results, claims(results), args.output / "plot.png")
    print((args.output / "table.md").read_text())
    print(f"Table and plot: {args.output}/table.md and {args.output}/plot.png")


if __name__ == "__main__":
    main()
