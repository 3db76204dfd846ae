#!/usr/bin/env python3
"""Train configs on the same data, and compare them seed by seed.

    tools/ablation.py docs/ablation/digits.yaml
    tools/ablation.py docs/ablation/paper_bccd.yaml --data datasets --jobs 2
    tools/ablation.py docs/ablation/paper_bccd.yaml --tables

A plan names the rows, the data and the seeds (docs/ablation.md). With one seed all rows have the
same images in the same order, and the same initial weights. Beside the plan, paper_bccd.csv gets a
line for each run; tables are in paper_bccd.md, a plot in paper_bccd.png. After an interruption at
any moment the same command continues; runs with a line are not repeated.
"""

import argparse
import sys
from pathlib import Path

from atss.analysis.comparison import compared, tables
from atss.analysis.experiments import Comparison
from atss.analysis.plans import read_plan
from atss.analysis.plots import plot_experiments
from atss.engine.explain import exit_with_message
from atss.engine.run import add_import, add_options, import_modules
from atss.errors import check_writable


def csv_file(text: str) -> Path:
    """Refuse keys and values of a config, which ``--results`` would take if they followed it."""
    if not text.lower().endswith(".csv"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no .csv file (keys and values of a config go before --results)"
        )
    return Path(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("--data", type=Path, default=Path(), help="folder of the plan's data")
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="default: the plan's")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time: cores are shared, GPUs taken in turn"
    )
    parser.add_argument(
        "--output", type=Path, help="folder of the runs (default: output/ablation/NAME)"
    )
    parser.add_argument(
        "--results",
        nargs="+",
        type=csv_file,
        metavar="FILE",
        help="csv files, of which the first gets the new lines (default: PLAN.csv)",
    )
    parser.add_argument("--tables", action="store_true", help="only write tables and plot")
    add_import(parser)
    add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_intermixed_args(argv)
    output = args.output or Path("output/ablation", args.plan.stem)
    results = args.results or [args.plan.with_suffix(".csv")]
    table, plot = (results[0].with_suffix(x) for x in (".md", ".png"))
    done = True
    try:
        with exit_with_message(str(output)):
            import_modules(args.imports)
            plan = read_plan(args.plan, args.opts)
            check_writable("--output", output / "log.txt")
            check_writable("--results", results[0])
            comparison = Comparison(plan, args.data, output, results, args.imports)
            if not args.tables:
                done = comparison.carry_out(plan.choose(args.rows, args.seeds), args.jobs)
            found = comparison.find()
    except KeyboardInterrupt:
        print("stopped: the same command continues", file=sys.stderr)
        sys.exit(130)
    if found:
        plot_experiments(found, compared(plan, found), plot)
        how = "AP in percent. Means over the seeds; of times, the shortest."
        title = f"# Results of {args.plan.name}\n\n{how}\n\n"
        figure = f"\n![AP of each seed, and the differences with their intervals]({plot.name})\n"
        table.write_text(title + tables(plan, found) + figure)
        print(f"\n{table.read_text()}")
    sys.exit(not done)


if __name__ == "__main__":
    main()
