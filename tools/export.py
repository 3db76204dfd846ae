#!/usr/bin/env python3
"""Export a trained detector to one file that runs without torch and Detectron2.

    tools/export.py out --output model.onnx
    python -m atss_runner model.onnx photos --output pictures

The file takes any batch and any size. It is compared with the detector at three other shapes; if
they differ, no file is written. With `--nms` its outputs are detections. `--precision int8`
calibrates on images of `--calibrate`, and measures AP before and after on `--evaluate`.
"""

import argparse
import sys
from pathlib import Path

from detectron2.modeling import build_model

from atss.analysis.exported import evaluate
from atss.checkpoints import SafeCheckpointer
from atss.config import class_names, for_inference, load_config
from atss.config.inputs import values_in
from atss.engine.run import add_import, add_options, import_modules
from atss.errors import UserError, check_writable
from atss.export import convert_precision, export_onnx, export_openvino, parts, remove
from atss.predictor import find_run
from atss_runner.thresholds import class_thresholds

PRECISIONS = ("fp32", "fp16", "int8")
# The exporter of each format, and the end of its files.
FORMATS = {"onnx": (export_onnx, ".onnx"), "openvino": (export_openvino, ".xml")}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a training, or with --weights a config")
    add("--weights", metavar="FILE", help="default: the best of RUN")
    add("--output", type=Path, required=True, metavar="FILE", help="FILE.onnx, or FILE.xml")
    add("--format", choices=FORMATS, default="onnx", help="openvino writes FILE.xml and FILE.bin")
    add("--nms", action="store_true", help="select and suppress in the file, too")
    add("--thresholds", metavar="FILE", help="json of tools/report.py: least score of each class")
    add(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of the weights: fp16 halves the file, int8 needs --calibrate (default: fp32)",
    )
    add("--calibrate", metavar="FOLDER", help="with int8: images like those of the application")
    add("--evaluate", metavar="SOURCE", help="labels.json:images to measure AP before and after on")
    add("--max-drop", type=float, metavar="AP", help="refuse a file that loses more")
    add_import(parser)
    add_options(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_intermixed_args(argv)
    try:
        check(args)
        import_modules(args.imports)
        check_writable("--output", args.output)
        config, weights = find_run(args.run, args.weights)
        on_cpu = ["MODEL.DEVICE", "cpu", "MODEL.ATSS.PRECISION", "fp32"]
        cfg = load_config(config, opts=[*args.opts, *on_cpu])
        names = class_names(cfg)
        thresholds = class_thresholds(args.thresholds, names) if args.thresholds else None
        if cfg.MODEL.META_ARCHITECTURE != "ATSSDetector":
            raise UserError(
                "only an ATSSDetector can be exported: MODEL.META_ARCHITECTURE is "
                f"{cfg.MODEL.META_ARCHITECTURE!r}"
            )
        cfg.MODEL.WEIGHTS = weights
        cfg = for_inference(cfg)
        model = build_model(cfg).eval()
        trained_with = values_in(cfg)
        SafeCheckpointer(model, class_names=names, trained_with=trained_with, whole=True).load(
            weights
        )
        export, _ = FORMATS[args.format]
        print_parity(export(model, cfg, args.output, args.nms, thresholds))
        before = evaluate(args.output, args.evaluate)["AP"] if args.evaluate else None
        if args.precision != "fp32":
            convert_precision(args.output, args.precision, args.calibrate)
            if before is not None:
                report_drop(args, before, evaluate(args.output, args.evaluate)["AP"])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    megabytes = sum(x.stat().st_size for x in parts(args.output)) / 1e6
    print(f"Written: {args.output} ({megabytes:.1f} MB, {args.precision})")


def check(args: argparse.Namespace) -> None:
    """Check options that belong together."""
    _, suffix = FORMATS[args.format]
    if args.output.suffix != suffix:
        raise UserError(
            f"--output must end in {suffix} with --format {args.format}, got {args.output}"
        )
    if args.precision == "int8" and args.format == "openvino":
        raise UserError(
            "--precision int8 is for --format onnx: OpenVINO quantises by NNCF, which is not used "
            "here; choose fp32 or fp16"
        )
    if args.precision == "int8" and not args.calibrate:
        raise UserError("--precision int8 needs --calibrate FOLDER, images to measure ranges on")
    if args.max_drop is not None and not args.evaluate:
        raise UserError("--max-drop needs --evaluate SOURCE")


def print_parity(parities: list) -> None:
    print("largest differences to the detector (in brackets: how far the detector itself moves")
    print("if its input is multiplied by 1 + 1e-6)")
    for shape, differences, own, detections in parities:
        names = ("boxes [px]", "probabilities", "quality")
        cells = [f"{n} {d:.1e} ({o:.1e})" for n, d, o in zip(names, differences, own)]  # noqa: B905
        if detections is not None:
            total, unmatched = detections
            cells.append(f"detections: {unmatched} of {total} differ from the runner's")
        print(f"  {' x '.join(map(str, shape)):<18} {', '.join(cells)}")


def report_drop(args: argparse.Namespace, before: float, after: float) -> None:
    """Print AP before and after.

    Raises:
        UserError: if it fell by more than --max-drop; the file is removed.
    """
    print(f"AP on {args.evaluate}: {before:.2f} in fp32, {after:.2f} in {args.precision}")
    if args.max_drop is not None and before - after > args.max_drop:
        remove(args.output)
        raise UserError(
            f"AP fell by {before - after:.2f}, more than --max-drop {args.max_drop:g}: "
            f"{args.output} was removed"
        )


if __name__ == "__main__":
    main()
