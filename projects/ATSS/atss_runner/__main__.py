"""Draw the detections of an exported file on images and videos, and write them as json.

python -m atss_runner model.onnx photos film.mp4 --output out
"""

import argparse
import json
import sys
from pathlib import Path

from .annotate import annotate, targets
from .detector import load, read_bgr
from .images import SUFFIXES
from .media import FileError, find_media


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m atss_runner",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="a file of tools/export.py")
    add("inputs", nargs="+", metavar="INPUT", help="images, videos, or folders of them")
    add("--output", type=Path, required=True, help="folder for the results")
    add("--score-threshold", type=float, default=0.4, help="least score (default: 0.4)")
    add("--batch", type=int, default=4, help="images at a time (default: 4)")
    add("--threads", type=int, default=0, help="of the engine (default: all cores)")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    records: list[dict] = []
    num_images = 0
    try:
        for name, least in (("batch", 1), ("threads", 0)):
            if (value := getattr(args, name)) < least:
                raise FileError(f"--{name} must be >= {least}, got {value}")
        if not 0 <= args.score_threshold <= 1:
            raise FileError(
                f"--score-threshold must be between 0 and 1, got {args.score_threshold}"
            )
        inputs, skipped = find_media(args.inputs, SUFFIXES, args.output)
        for problem in skipped:
            print(f"skipped: {problem}", file=sys.stderr)
        places = targets(inputs, args.output)
        detector = load(args.model, args.threads, args.batch)
        for folder in {args.output, *(place.parent for place in places.values())}:
            folder.mkdir(parents=True, exist_ok=True)
        options = (args.score_threshold, args.batch)
        try:
            for detections in annotate(detector, places, *options, read=read_bgr):
                records += detections
                num_images += 1
        finally:  # also after an error or ctrl-C
            if num_images:
                (args.output / "detections.json").write_text(json.dumps(records))
    except OSError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    if not num_images:
        sys.exit("error: none of the inputs could be read")
    print(f"{len(records)} detections: pictures and detections.json are in {args.output}")


if __name__ == "__main__":
    main()
