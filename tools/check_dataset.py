#!/usr/bin/env python3
"""Check a data set before training.

    tools/check_dataset.py train.json:images --config-file ATSS_R_50_FPN_1x
    tools/check_dataset.py train.json:images --json report.json --deep
    tools/check_dataset.py data.yaml:train --against data.yaml:val
    tools/check_dataset.py VOC2007:trainval --pictures look

Check the annotations, the header of every image, and whether the anchors of the config suit the
objects. Exit status: 0 without errors, 1 with errors, 2 if the annotations, the folder or the
config cannot be read.
"""

import argparse
import json
import os
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from atss import load_config
from atss.analysis.dataset_page import write_dataset_page
from atss.analysis.statistics import match
from atss.config import RECIPE, build_sampling
from atss.data.datasets import split_source
from atss.data.images import measure_planes, pixel_format
from atss.engine.run import add_import, add_options, import_modules
from atss.errors import UserError, check_writable
from atss.labels.check import check, format_report
from atss.labels.classes import refuse_unknown
from atss.labels.copies import find_in_others
from atss.labels.formats import add_arguments, read_labels, reading_of
from atss_runner.planes import Planes

PAGE = "index.html"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source",
        metavar="ANNOTATIONS:IMAGES",
        help="annotations.json:image_dir in COCO's or LVIS's format, data.yaml:split or "
        "folder:split; or both as two arguments",
    )
    add_arguments(parser)
    parser.add_argument(
        "--config-file",
        default=RECIPE,
        help="config with the anchors, image sizes and filters to check (default: %(default)s, as "
        "for atss train)",
    )
    add_import(parser)
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="ANNOTATIONS:IMAGES",
        help="another split, to find images that both contain (repeatable)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all cases of all findings")
    parser.add_argument(
        "--pictures",
        type=Path,
        metavar="FOLDER",
        help="write FOLDER/index.html: findings, counts, and the oddest images with labels",
    )
    parser.add_argument("--deep", action="store_true", help="decode every image (slow)")
    parser.add_argument(
        "--planes",
        action="store_true",
        help="only print the keys of all planes of the images (8 or 16 bits)",
    )
    add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Return the exit status."""
    args = make_parser().parse_intermixed_args(argv)
    progress = partial(tqdm, disable=None, leave=False)  # on a terminal only
    opts, source = args.opts, args.source
    try:
        import_modules(args.imports)
        if opts and (os.path.exists(source) or ":" not in source):
            annotations, images, *opts = source, *opts
        else:
            annotations, images = split_source(source)
        if args.json:
            if args.json.exists() and args.json.samefile(annotations):
                raise UserError(f"--json {args.json} would replace the annotations")
            check_writable("--json", args.json)
        if args.pictures:
            check_writable("--pictures", args.pictures / PAGE)
        cfg = load_config(args.config_file, opts=opts)
        sizes = [(size, cfg.INPUT.MAX_SIZE_TRAIN) for size in cfg.INPUT.MIN_SIZE_TRAIN]
        fit = partial(match, sampling=build_sampling(cfg), sizes=sizes, progress=progress)
        labels = read_labels(annotations, images, reading := reading_of(args))
        refuse_unknown(reading.classes, labels.found, labels.names)
        if args.planes:
            entries = progress(labels.content["images"], unit="image")
            files = (os.path.join(labels.image_dir, x["file_name"]) for x in entries)
            print(*map(shlex.quote, map(str, measure_planes(files))))
            return 0
        others = [read_labels(*split_source(other, "--against"), reading) for other in args.against]
        if others:
            shared = find_in_others(labels, others, progress)
            labels = replace(labels, findings=[*labels.findings, *shared])
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    pixels = pixel_format(cfg)
    planes = pixels if isinstance(pixels, Planes) else None
    report = check(labels, sizes, filter_empty, fit, args.deep, progress, limit, planes)
    print(format_report(report))
    if others and not shared:
        print(f"No image of {annotations}:{images} or its scene is in {', '.join(args.against)}")
    if args.json:
        args.json.write_text(json.dumps(report.to_dict(), indent=1))
    if args.pictures:
        write_dataset_page(labels, report, (annotations, images), args.pictures / PAGE)
        print(f"Written: {args.pictures / PAGE}")
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
