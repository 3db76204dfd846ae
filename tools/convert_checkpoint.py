#!/usr/bin/env python3
"""Converts published weights, and writes the config that they need beside them.

    tools/convert_checkpoint.py --from official ATSS_R_50_FPN_1x.pth converted.pth
    tools/convert_checkpoint.py --from mmdet atss_r50_fpn_1x_coco.pth converted.pth
    tools/train_net.py --config-file converted.yaml --eval-only

    tools/convert_checkpoint.py --to mmdet output/model_final.pth for_mmdet.pth

"official" is the authors' code. Nothing in a file is executed. Where anything is missing,
unexpected or of another shape, it is listed, and nothing is written.

For mmdet, train with MODEL.ATSS.TOWER_BIAS False: its towers have no biases. What its config has to
say for these weights is printed, and written beside them.
"""

import argparse
import sys
from pathlib import Path

import torch

from atss.checkpoints import ConversionError, config_for, convert, load, mmdet_config, to_mmdet
from atss.config_file import load_config


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", dest="source", choices=("official", "mmdet"))
    direction.add_argument("--to", dest="target", choices=("mmdet",))
    parser.add_argument(
        "--regression",
        choices=("box", "point"),
        default="box",
        help="what the authors' weights were trained to regress (weights do not tell)",
    )
    parser.add_argument(
        "--config-file",
        type=Path,
        help="with --to: the config of the run that made IN; config.yaml beside it by default",
    )
    parser.add_argument("input", type=Path, metavar="IN")
    parser.add_argument("output", type=Path, metavar="OUT", help="a .pth file")
    return parser


def write(path: Path, content: dict) -> None:
    """All of it or nothing."""
    unfinished = path.with_name(path.name + ".unfinished")
    torch.save(content, unfinished)
    unfinished.rename(path)


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    try:
        if args.output.suffix != ".pth":
            raise ConversionError(f"OUT must end in .pth, not {args.output.name}")
        if args.output.resolve() == args.input.resolve():
            raise ConversionError("OUT must not be IN")
        weights = load(args.input)
        if args.target:
            config = mmdet_config(
                load_config(args.config_file or args.input.with_name("config.yaml"))
            )
            content = {"meta": {}, "state_dict": to_mmdet(weights)}
        else:
            converted = convert(weights, args.source)
            cfg = config_for(converted, args.source, args.regression)
            cfg.MODEL.WEIGHTS = str(args.output)
            config = cfg.dump()
            content = {"model": converted, "__author__": f"converted from {args.source}"}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write(args.output, content)
        config_file = args.output.with_suffix(".py" if args.target else ".yaml")
        config_file.write_text(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"Written: {args.output}, and the config that it needs: {config_file}")
    if args.target:
        print(f"\n{config}")


if __name__ == "__main__":
    main()
