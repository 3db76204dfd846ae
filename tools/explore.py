#!/usr/bin/env python3
"""See the anchors that rules give to the objects of an image, and those that they compare.

    tools/explore.py --register coco=annotations.json:val2017
    tools/explore.py --register coco=annotations.json:val2017 --image 000000009483.jpg \\
        --rules ATSS "ATSS TOP_K=3" --output page.html

Without --output, a page on http://127.0.0.1:8000, on which you choose images, objects, rules and
arguments. With it, a page (html) of some images that needs no server, or a picture (png, jpg, pdf,
svg) of one image.
docs/explorer.md explains the marks.
"""

import argparse
import sys
from pathlib import Path

from atss.analysis.assignment import draw_assignment
from atss.analysis.explorer import Explorer
from atss.data import datasets
from atss.engine.run import add_import, add_options, import_modules
from atss.errors import UserError, check_choice, check_writable
from atss.labels.formats import add_arguments, reading_of


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--register", required=True, metavar="NAME=SOURCE", help="the data set of the images")
    add("--image", nargs="+", default=[], metavar="FILE", help="names in the data set")
    add(
        "--rules",
        nargs="+",
        default=["MaxIoU", "SpatialScale", "ATSS"],
        metavar="RULE",
        help='with arguments, such as "ATSS TOP_K=3" (default: MaxIoU SpatialScale ATSS)',
    )
    add("--objects", nargs="+", type=int, default=[], metavar="N", help="in a picture, only these")
    add(
        "--config-file",
        default="ATSS_R_50_FPN_1x",
        metavar="FILE",
        help="sets anchors and image size (default: %(default)s)",
    )
    add("--weights", nargs="+", default=[], metavar="FILE", help="checkpoints of a detector")
    add("--output", type=Path, metavar="FILE", help="a picture or a page; default: a server")
    add("--port", type=int, default=8000, help="of the server (default: 8000)")
    add_import(parser)
    add_arguments(parser)
    add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_intermixed_args(argv)
    try:
        explore(args)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


def explore(args: argparse.Namespace) -> None:
    import_modules(args.imports)
    if args.output:
        kinds = (".png", ".jpg", ".pdf", ".svg", ".html")
        check_choice("--output", args.output.suffix.lower(), kinds)
        check_writable("--output", args.output)
        if not args.image:
            raise UserError("--output needs --image FILE")
    name = datasets.register(args.register, reading_of(args))
    if args.output and args.output.suffix.lower() != ".html":
        if len(args.image) > 1 or len(args.weights) > 1:
            raise UserError("a picture has one image and one checkpoint: several need a page.html")
        draw_assignment(
            name,
            args.image[0],
            args.rules,
            args.config_file,
            args.output,
            *args.weights or [""],
            args.opts,
            args.objects,
        )
    else:
        explorer = Explorer(name, args.config_file, args.opts, args.weights)
        for rule in args.rules:
            explorer.rule(rule)
        if args.output is None:
            from atss.analysis.explorer_server import serve

            image = explorer.find(args.image[0]) if args.image else 0
            print(f"Open http://127.0.0.1:{args.port} - ctrl-C ends the server")
            serve(explorer, image, args.rules[-2:], args.port)
            return
        from atss.analysis.explorer_page import write_page

        write_page(explorer, args.image, args.rules, args.output)
    print(f"Written: {args.output}")


if __name__ == "__main__":
    main()
