"""Draw the detections of an exported file on images and videos, and write them.

python -m atss_runner model.onnx photos film.mp4 --output out
python -m atss_runner model.onnx rtsp://camera/stream --output out --format csv
"""

import argparse
import sys

from . import command
from .detector import load
from .media import FileError


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m atss_runner",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="a file of tools/export.py")
    add("inputs", nargs="+", metavar="INPUT", help=command.INPUTS)
    command.add_options(parser)
    add("--threads", type=int, default=0, help="of the engine (default: all cores)")
    add(
        "--tiles",
        type=int,
        nargs="?",
        const=0,
        metavar="SIZE",
        help="detect on overlapping tiles of large images; their side in pixels (default: that for "
        "the training data)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    try:
        if args.threads < 0:
            raise FileError(f"--threads must be >= 0, got {args.threads}")
        places = command.find_inputs(args.inputs, args)
        detector = load(args.model, args.threads, args.batch, args.tiles)
        command.detect(args, places, detector)
    except OSError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(command.EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
