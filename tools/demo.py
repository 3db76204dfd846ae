#!/usr/bin/env python3
"""Draw detections on images and videos, also of folders and subfolders, and write them as json.

    tools/demo.py --config-file output/cells/config.yaml --weights output/cells/model_final.pth \\
        --input new_images photo.jpg film.mp4 --output output/pictures
"""

import argparse
import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from atss.data.images import read_image
from atss.engine.run import add_import, add_options, import_modules
from atss.engine.watch import EXIT_INTERRUPTED
from atss.errors import UserError, check_range, check_writable
from atss.predictor import Predictor
from atss_runner.annotate import annotate, targets
from atss_runner.detections import Detections, explain_none
from atss_runner.images import SUFFIXES
from atss_runner.media import find_media


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="CONFIG")
    parser.add_argument("--weights", required=True, metavar="FILE")
    add_import(parser)
    parser.add_argument(
        "--input", nargs="+", required=True, help="images, videos or folders of them"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.4,
        help="draw and write detections with at least this score (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=4, help="images at a time")
    add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_intermixed_args(argv)
    logging.basicConfig(level=logging.WARNING)
    records: list[dict] = []
    num_images, num_full, target = 0, 0, args.output / "detections.json"
    try:
        import_modules(args.imports)
        check_range("--batch", args.batch, 1)
        check_range("--score-threshold", args.score_threshold, 0, 1)
        inputs, skipped = find_media(args.input, SUFFIXES, args.output)
        for problem in skipped:
            print(f"skipped: {problem}", file=sys.stderr)
        if not inputs:
            raise UserError("--input contains no image and no video")
        places = targets(inputs, args.output)
        check_writable("--output", target, *places.values())
        predictor = _HighestScore(Predictor(args.config_file, args.weights, args.opts))
        try:
            read = partial(read_image, sizes=[predictor.size])
            options = {"read": read, "progress": tqdm}
            for detections in annotate(
                predictor, places, args.score_threshold, args.batch, **options
            ):
                records += detections
                num_images += 1
                num_full += len(detections) >= predictor.max_detections
        finally:  # also after an error or ctrl-C
            if num_images:
                unfinished = target.with_name("detections.json.unfinished")
                unfinished.write_text(json.dumps(records))
                unfinished.replace(target)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        counts = f": {target} contains {len(records)} detections of {num_images} images or frames"
        print(f"stopped{counts if num_images else ''}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    if not num_images:
        sys.exit("error: none of the inputs could be read")
    print(f"{len(records)} detections: pictures and detections.json are in {args.output}")
    if num_full:
        limit = f"TEST.DETECTIONS_PER_IMAGE ({predictor.max_detections})"
        print(f"{num_full} images or frames reached {limit}: they may have more objects")
    if not records:
        print(explain_none(predictor.score, args.score_threshold, "--score-threshold"))


class _HighestScore:
    """A predictor that keeps the highest score of all its detections."""

    def __init__(self, predictor: Predictor):
        self.predictor, self.score = predictor, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.predictor, name)

    def __call__(self, images: Any) -> list[Detections]:
        results = self.predictor(images)
        self.score = max([self.score, *(float(x.scores.max(initial=0)) for x in results)])
        return results


if __name__ == "__main__":
    main()
