#!/usr/bin/env python3
"""Draw detections on images and videos, also of folders, subfolders and cameras, and write them.

    tools/demo.py --config-file output/cells/config.yaml --weights output/cells/model_final.pth \\
        --input new_images photo.jpg film.mp4 --output output/pictures
"""

import argparse
import logging
import sys

from tqdm import tqdm

from atss.engine.run import add_import, add_options, import_modules
from atss.errors import UserError
from atss.predictor import Predictor
from atss_runner import command


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="CONFIG")
    parser.add_argument("--weights", required=True, metavar="FILE")
    add_import(parser)
    parser.add_argument("--input", nargs="+", required=True, help=command.INPUTS)
    command.add_options(parser)
    add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_intermixed_args(argv)
    logging.basicConfig(level=logging.WARNING)
    try:
        import_modules(args.imports)
        places = command.find_inputs(args.input, args)
        predictor = Predictor(args.config_file, args.weights, args.opts)
        command.detect(args, places, predictor, tqdm)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(command.EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
