"""Options and results shared by `atss predict`, `tools/demo.py` and `python -m atss_runner`."""

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import formats, media
from .annotate import Annotated, annotate, no_progress, targets
from .detections import explain_none
from .images import SUFFIXES
from .media import FileError, Source
from .thresholds import DEFAULT, class_thresholds, per_class

INPUTS = "images, videos, folders of them, 0 for a camera, rtsp://..."
EXIT_INTERRUPTED = 130


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="for results")
    add_detection(parser)


def add_detection(parser: argparse.ArgumentParser) -> None:
    """Add the options but --output, which `atss predict` does not need."""
    add = parser.add_argument
    add("--score-threshold", type=float, metavar="SCORE", help=f"least score (default: {DEFAULT})")
    add(
        "--thresholds",
        metavar="FILE",
        help="json of tools/report.py: least score of each class; --score-threshold is for others",
    )
    add(
        "--format",
        nargs="+",
        choices=formats.FORMATS,
        default=["coco"],
        help="detections.json (coco; the default), yolo/labels, detections.csv, dataset.json",
    )
    add("--batch", type=int, default=4, metavar="N", help="images at a time (default: 4)")


def find_inputs(inputs: list[str], args: argparse.Namespace) -> dict[Source, Path]:
    """Check the options of :func:`add_options`, and find images and films.

    Returns:
        {input: picture or film to write}.

    Raises:
        FileError: if there is no input, or an option is out of range.
    """
    if args.batch < 1:
        raise FileError(f"--batch must be >= 1, got {args.batch}")
    if args.score_threshold is not None and not 0 <= args.score_threshold <= 1:
        raise FileError(f"--score-threshold must be between 0 and 1, got {args.score_threshold}")
    found, skipped = media.find_media(inputs, SUFFIXES, args.output)
    for problem in skipped:
        print(f"skipped: {problem}", file=sys.stderr)
    if not found:
        raise FileError("the inputs contain no image and no video")
    return targets(found, args.output)


def choose_thresholds(args: argparse.Namespace, predictor: Any) -> float | np.ndarray:
    """Return the least score: (K,) of --thresholds, or --score-threshold, or (K,) of the exported
    file, or the default.

    Raises:
        FileError: if the file of thresholds cannot be used.
    """
    least = DEFAULT if args.score_threshold is None else args.score_threshold
    if args.thresholds is not None:
        return per_class(class_thresholds(args.thresholds, predictor.names), least)
    if args.score_threshold is None and predictor.thresholds is not None:
        return per_class(predictor.thresholds, least)
    return least


def detect(
    args: argparse.Namespace,
    places: Mapping[Source, Path],
    predictor: Any,
    progress: Callable[..., Any] = no_progress,
) -> None:
    """Draw and write detections, and print a summary. Detections so far are written after an error
    or ctrl-C, too.

    Args:
        places: from :func:`find_inputs`.
        predictor, progress: as in :func:`annotate`; the predictor with ``ids`` and
            ``thresholds`` of the classes.

    Raises:
        OSError: if a result cannot be written.
    """
    threshold = choose_thresholds(args, predictor)
    formats.check_names(args.format, places, args.output)
    for folder in {args.output, *(place.parent for place in places.values())}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"cannot write --output {folder}: {error.strerror}") from error
    results: list[Annotated] = []
    try:
        results.extend(annotate(predictor, places, threshold, args.batch, progress=progress))
    except KeyboardInterrupt:
        print(f"stopped after {len(results)} images or frames", file=sys.stderr)
        raise
    finally:
        if results:
            run = formats.Run(results, args.output, predictor.names, predictor.ids)
            written = formats.write(args.format, run)
            count = sum(len(x.detections.scores) for x in results)
            print(f"{count} detections: pictures and {', '.join(written)} are in {args.output}")
    if not results:
        raise FileError("none of the inputs could be read")
    limit = getattr(predictor, "max_detections", math.inf)
    if full := sum(len(x.detections.scores) >= limit for x in results):
        name = f"TEST.DETECTIONS_PER_IMAGE ({limit})"
        print(f"{full} images or frames reached {name}: they may have more objects")
    if not count:
        highest = max(x.highest for x in results)
        print(explain_none(highest, threshold, "--score-threshold"))
