#!/usr/bin/env python3
"""Draw the anchors that rules give the objects of one image, side by side.

    tools/explore.py --register coco=annotations.json:val2017 --image 000000000139.jpg \\
        --rules MaxIoU SpatialScale ATSS --output output/rules.png

Dots are positives, larger on coarser levels, in the colour of their object; its label is
#NUMBER: POSITIVES. Hollow ones are candidates that are no positives, grey if several objects have
them; with more than 8 objects they are left out. Crosses are anchors that the object would get if
it were alone. A rule may have arguments, as in --rules ATSS "ATSS TOP_K=3".
"""

import argparse
import sys
from pathlib import Path

from atss.analysis.assignment import draw_assignment
from atss.data import datasets
from atss.engine.run import add_import, add_options, import_modules
from atss.errors import UserError, check_choice, check_writable
from atss.labels.formats import add_arguments, reading_of


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--register", required=True, metavar="NAME=SOURCE", help="the data set of the image")
    add("--image", required=True, metavar="FILE", help="its name in the data set")
    add("--rules", nargs="+", default=["MaxIoU", "SpatialScale", "ATSS"], metavar="RULE")
    add("--objects", nargs="+", type=int, default=[], metavar="NUMBER", help="draw only these")
    add("--config-file", default="ATSS_R_50_FPN_1x", help="sets anchors and size of the image")
    add("--weights", default="", help="of a detector, for rules that need predictions")
    add("--output", type=Path, default=Path("output/rules.png"), metavar="FILE")
    add_import(parser)
    add_arguments(parser)
    add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_intermixed_args(argv)
    try:
        import_modules(args.imports)
        check_choice("--output", args.output.suffix.lower(), (".png", ".jpg", ".pdf", ".svg"))
        check_writable("--output", args.output)
        name = datasets.register(args.register, reading_of(args))
        draw_assignment(
            name,
            args.image,
            args.rules,
            args.config_file,
            args.output,
            args.weights,
            args.opts,
            args.objects,
        )
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"Written: {args.output}")


if __name__ == "__main__":
    main()
