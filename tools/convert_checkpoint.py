#!/usr/bin/env python3
"""Convert published weights, and write their config beside them.

    tools/convert_checkpoint.py --from official ATSS_R_50_FPN_1x.pth converted.pth
    tools/convert_checkpoint.py --from mmdet gfl_r50_fpn_1x_coco.pth converted.pth
    tools/convert_checkpoint.py --from otx mobilenet_v2-atss.pth small.pth
    tools/train_net.py --config-file converted.yaml --eval-only

    tools/convert_checkpoint.py --to mmdet output/model_final.pth for_mmdet.pth

"official" is the authors' code, "otx" OpenVINO Training Extensions, now getitune: ATSS on
MobileNetV2 or ResNeXt-101. mmdet's detectors are listed below: names of weights decide between
them, or the config in the file, or --detector. Nothing in a file is executed. Names that are
missing, unexpected or of another shape are listed, and nothing is written. An existing OUT is not
replaced. Preprocessing, anchors and thresholds are those in mmdet's file, class names also those in
OTX's; values that cannot be taken over, or are assumed because the file lacks them, are printed.

For mmdet, train with MODEL.ATSS.TOWER_BIAS False: its towers have no biases. The settings of
mmdet's config for these weights are printed, and written beside them.
"""

import argparse
import sys
from pathlib import Path

from atss import load_config
from atss.checkpoints import DETECTORS, SOURCES, convert_file, convert_file_to_mmdet
from atss.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", dest="source", choices=tuple(SOURCES), help="the format of IN")
    direction.add_argument("--to", dest="target", choices=("mmdet",), help="the format of OUT")
    parser.add_argument(
        "--regression",
        choices=("box", "point"),
        help="reference of the authors' regression, which weights do not reveal; box by default",
    )
    parser.add_argument(
        "--detector",
        choices=sorted(DETECTORS),
        help="detector of weights --from mmdet, if the file does not decide",
    )
    parser.add_argument(
        "--entry",
        default="",
        help="entry of the weights in IN; mmdet's EMAHook writes the average as state_dict, the "
        "default",
    )
    parser.add_argument(
        "--config-file",
        type=Path,
        help="with --to: the config of the run that made IN; config.yaml beside it by default",
    )
    parser.add_argument("input", type=Path, metavar="IN", help="the weights to convert")
    parser.add_argument("output", type=Path, metavar="OUT", help="a .pth file")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.source and args.config_file:
        parser.error("--config-file is for --to")
    if args.regression and args.source != "official":
        parser.error("--regression is for --from official")
    if args.detector and args.source != "mmdet":
        parser.error("--detector is for --from mmdet")
    if args.entry and not args.source:
        parser.error("--entry is for --from")
    try:
        if args.output.suffix != ".pth":
            raise UserError(f"OUT must end in .pth, got {args.output.name}")
        if args.output.resolve() == args.input.resolve():
            raise UserError("OUT must not be IN")
        if args.source:
            regression = args.regression or "box"
            cfg, detector = convert_file(
                args.input, args.output, args.source, regression, args.detector, args.entry
            )
            config_file = args.output.with_suffix(".yaml")
            print(f"Written: {args.output}, weights of {detector}, and its config: {config_file}")
            if names := cfg.MODEL.ATSS.CLASS_NAMES:
                print(f"Classes, from the file: {', '.join(names)}")
            elif cfg.DATASETS.TEST:
                print("Eighty classes: assumed to be COCO's, whose names are written, too.")
            else:
                print("The classes have no names: add data sets with --register.")
        else:
            cfg = load_config(args.config_file or args.input.with_name("config.yaml"))
            config = convert_file_to_mmdet(args.input, args.output, cfg)
            settings = args.output.with_suffix(".py")
            print(f"Written: {args.output}, and {settings} for mmdet's config:\n\n{config}")
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
