#!/usr/bin/env python3
"""Train ATSS on handwritten digits over photographs, evaluate it, and draw the detections, in some
minutes on two CPU cores. After an interruption the same command resumes.

    tools/digits.py                         # as `make demo`; results in output/demo
    tools/digits.py --data output/digits    # only write 300 such images, to try commands on
"""

import argparse
import sys
from pathlib import Path

from atss.analysis.demo import train_on_digits
from atss.analysis.digits import DEMO, FEW, make_digits
from atss.config import get_config_file
from atss.engine.explain import exit_with_message
from atss.engine.watch import EXIT_INTERRUPTED
from atss.errors import UserError

ROOT = Path("output/demo")
CONFIG = get_config_file("demo")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="only write a data set there")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    try:
        with exit_with_message(str(args.data or ROOT)):
            if args.data:
                write_few(args.data)
                return
            results = train_on_digits(ROOT, str(CONFIG), DEMO)
    except KeyboardInterrupt:
        print(f"stopped{'' if args.data else ': the same command resumes'}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    print(f"\nAP on {DEMO.images['test']} held-out images:")
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
        print(f"  {name:<5} {results[name]:5.1f}")
    print(f"Pictures: {ROOT}/detections.png and {ROOT}/training.png")


def write_few(folder: Path) -> None:
    """Write a data set such as a user might have.

    Raises:
        UserError: if the folder exists.
    """
    if folder.exists():
        raise UserError(f"--data {folder} already exists: choose another folder")
    make_digits(folder, FEW)
    counts = ", ".join(f"{split}.json ({count} images)" for split, count in FEW.images.items())
    print(f"Written into {folder}: {counts}, and their images in folders of the same names")


if __name__ == "__main__":
    main()
