#!/usr/bin/env python3
"""How many samples each object of a data set gets, by its size, shape and place: for every rule, or
for several configs.

    tools/assignment_statistics.py --annotations datasets/coco/annotations/instances_val2017.json
    tools/assignment_statistics.py --annotations train.json --config-file configs/tables/atss_*.yaml
    tools/assignment_statistics.py --annotations train.json --rules ATSS SpatialScale \\
        --config-file configs/ATSS_R_18_FPN_small.yaml --output output/statistics
    tools/assignment_statistics.py --annotations train.json --config-file output/config.yaml \\
        --weights output/model_final.pth --images train/ --rules ATSS TAL SimOTA

Reads annotations only, no image; but for rules that look at predictions those of a model with the
given weights, which is shown the images. Canvases are those of testing: INPUT.MIN_SIZE_TEST and
INPUT.MAX_SIZE_TEST of the first config, padded as the backbones need it. Writes a table, a plot,
and one line per object.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from atss.analysis.files import try_to_write
from atss.analysis.plots import plot_statistics
from atss.analysis.statistics import compare, constants, read_objects, table, write_csv
from atss.config import get_config_file
from atss.engine.run import NoSuchModule, import_modules


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotations", required=True, help="in COCO's format")
    parser.add_argument(
        "--config-file",
        nargs="+",
        default=[get_config_file("ATSS_R_50_FPN_1x")],
        help="one whose anchors all rules get, or several, each with its own rule and anchors",
    )
    parser.add_argument(
        "--rules",
        nargs="+",
        help="of one config: names of rules; by default all that can be asked",
    )
    parser.add_argument("--weights", default="", help="of a model for rules to look at")
    parser.add_argument("--images", default="", help="the folder of its images")
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE")
    parser.add_argument("--output", type=Path, default=Path("output/assignment_statistics"))
    parser.add_argument(
        "opts", nargs="*", default=[], metavar="KEY VALUE", help="last: over the config"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_intermixed_args(argv)
    try:
        import_modules(args.imports)
    except NoSuchModule as error:  # a bug in the module keeps its traceback
        sys.exit(f"error: {error}")
    results = [args.output / name for name in ("table.md", "plot.png", "objects.csv")]
    try:
        try_to_write("--output", *results)
        read = read_objects(args.annotations)
        found = compare(
            *(*read, args.config_file, args.rules, args.opts, tqdm),
            *(args.weights, args.images),
        )
        fitting = constants(*read, args.config_file[0], args.opts)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    objects, columns, top = found
    (args.output / "table.md").write_text(table(objects, columns, top))
    plot_statistics(objects, columns, top, args.output / "plot.png")
    write_csv(objects, args.output / "objects.csv")
    print((args.output / "table.md").read_text())
    keys = {"CONSTANT": "nwd.CONSTANT", "M": "simd.M", "N": "simd.N"}
    fitting = ", ".join(f"{keys[name]} {value:.3g}" for name, value in fitting.items())
    print(f"Similarities that fit these objects, under MODEL.ATSS.SIMILARITIES: {fitting}")
    print(f"Written: table.md, plot.png and objects.csv in {args.output}")


if __name__ == "__main__":
    main()
