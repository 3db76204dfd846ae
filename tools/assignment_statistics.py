#!/usr/bin/env python3
"""Count the positives of each object of a data set, by its size, shape, place and class: for
every assigner, or for several configs.

    tools/assignment_statistics.py --annotations datasets/coco/annotations/instances_val2017.json
    tools/assignment_statistics.py --annotations train.json --config-file configs/tables/atss_*.yaml
    tools/assignment_statistics.py --annotations train.json --rules ATSS SpatialScale \\
        --config-file configs/ATSS_R_18_FPN_small.yaml --output output/statistics
    tools/assignment_statistics.py --annotations data.yaml:train --config-file output/config.yaml \\
        --weights output/model_final.pth --rules ATSS TAL SimOTA

Images are read only for assigners that need the predictions of a model (--weights). Their sizes are
INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST of the first config, padded as the backbones need it.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from atss.analysis.plots import plot_statistics
from atss.analysis.statistics import compare, constants, read_objects, table, write_csv
from atss.config import get_config_file
from atss.engine.run import add_import, add_options, import_modules
from atss.errors import UserError, check_writable


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--annotations",
        required=True,
        metavar="SOURCE",
        help="a json in COCO's format, or labels of any format with their images: "
        "annotations.json:image_dir, data.yaml:split or folder:split",
    )
    parser.add_argument(
        "--config-file",
        nargs="+",
        metavar="CONFIG",
        default=[get_config_file("ATSS_R_50_FPN_1x")],
        help="one, for all rules on its anchors, or several, each with its own rule and anchors",
    )
    parser.add_argument(
        "--rules",
        nargs="+",
        metavar="RULE",
        help="names of rules, for one config; by default all that need no missing weights",
    )
    parser.add_argument(
        "--weights", default="", metavar="FILE", help="of a model, for rules that need predictions"
    )
    parser.add_argument("--images", default="", metavar="FOLDER", help="images of a json")
    add_import(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/assignment_statistics"),
        metavar="FOLDER",
        help="for table.md, plot.png and objects.csv (default: %(default)s)",
    )
    add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_intermixed_args(argv)
    results = [args.output / name for name in ("table.md", "plot.png", "objects.csv")]
    try:
        import_modules(args.imports)
        check_writable("--output", *results)
        content, used, image_dir = read_objects(args.annotations)
        objects, columns, top = compare(
            content,
            used,
            args.config_file,
            args.rules,
            args.opts,
            tqdm,
            args.weights,
            args.images or image_dir,
        )
        fitted = constants(content, used, args.config_file[0], args.opts)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    (args.output / "table.md").write_text(table(objects, columns, top))
    plot_statistics(objects, columns, top, args.output / "plot.png")
    write_csv(objects, args.output / "objects.csv")
    print((args.output / "table.md").read_text())
    keys = {"CONSTANT": "nwd.CONSTANT", "M": "simd.M", "N": "simd.N"}
    settings = ", ".join(f"{keys[name]} {value:.3g}" for name, value in fitted.items())
    print(f"Similarities that fit these objects, under MODEL.ATSS.SIMILARITIES: {settings}")
    print(f"Written: table.md, plot.png and objects.csv in {args.output}")


if __name__ == "__main__":
    main()
