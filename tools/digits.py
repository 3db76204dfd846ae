#!/usr/bin/env python3
"""`make demo`: trains ATSS on handwritten digits over photographs, evaluates, and draws what came
out, in some minutes on two CPU cores. Run again after an interruption it goes on."""

import argparse
import sys
from pathlib import Path

from atss.analysis.demo import train_on_digits
from atss.config import get_config_file
from atss.data.digits import DEMO
from atss.engine.launch import explain

ROOT = Path("output/demo")
CONFIG = get_config_file("demo")


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    try:
        results = train_on_digits(ROOT, str(CONFIG), DEMO)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {explain(error, str(ROOT))}")
    print(f"\nAP on {DEMO.images['test']} held-out images:")
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
        print(f"  {name:<5} {results[name]:5.1f}")
    print(f"Pictures: {ROOT}/detections.png and {ROOT}/training.png")


if __name__ == "__main__":
    main()
