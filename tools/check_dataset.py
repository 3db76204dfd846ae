#!/usr/bin/env python3
"""Says what is wrong with a data set in COCO's format, before it costs days of training.

    tools/check_dataset.py train.json images --config-file configs/ATSS_R_18_FPN_small.yaml
    tools/check_dataset.py train.json images --json report.json --deep

Looks at the annotations, at the header of every image, and at whether the anchors of the config
suit the objects. Exits with 0 where there are no errors, with 1 where there are some, and with 2
where the annotations, the folder or the config cannot be read.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_anchor_generator, build_backbone
from tqdm import tqdm

from atss import Anchors, load_config
from atss.config import build_assigner
from atss.data.check import Report, Training, check
from atss.data.coco_json import read_coco
from atss.data.findings import DROPPED, ERROR, LEVELS, NOTE, WARNING

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = 3
# The most frequent, and as many of the rarest.
CLASSES = 10
HEADINGS = {
    ERROR: "Errors: training or evaluation stops there, or would be silently wrong",
    DROPPED: "What training leaves out",
    WARNING: "Worth a look",
    NOTE: "Good to know",
}


def build_training(cfg: CfgNode) -> Training:
    """What the check has to know of the config."""
    with torch.device("meta"):  # shapes without weights
        backbone = build_backbone(cfg)
    shapes = [backbone.output_shape()[name] for name in cfg.MODEL.ATSS.IN_FEATURES]
    generator = build_anchor_generator(cfg, shapes)
    return Training(
        sizes=tuple((size, cfg.INPUT.MAX_SIZE_TRAIN) for size in cfg.INPUT.MIN_SIZE_TRAIN),
        anchors=partial(
            Anchors.grid,
            strides=generator.strides,
            scales=generator.scales,
            ratios=generator.ratios,
            offset=generator.offset,
        ),
        assigner=build_assigner(cfg),
        divisibility=max(backbone.size_divisibility, 1),
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
    )


def page(report: Report) -> str:
    """The report for people."""
    lines = [f"{report.images:,} images, {report.annotations:,} annotations"]
    for level in LEVELS:
        findings = [f for f in report.findings if f.level == level]
        if findings:
            lines += ["", HEADINGS[level]]
        for finding in findings:
            count = len(finding.positions)
            lines.append(f"{count:>9,}  {finding.what}")
            lines += [f"{'':13}{example}" for example in finding.examples(EXAMPLES)]
            if count > EXAMPLES:
                lines.append(f"{'':13}and {count - EXAMPLES:,} more")
    if report.classes:
        lines += ["", "  objects     images  class"]
        by_objects = sorted(report.classes, key=lambda c: -c[1])
        rows = [f"{n:>9,}  {m:>9,}  {name}" for name, n, m in by_objects]
        if len(rows) > 2 * CLASSES:
            rows[CLASSES:-CLASSES] = [f"{'':22} ... {len(rows) - 2 * CLASSES} more classes ..."]
        lines += rows
    summary = report.to_dict()
    if "best_iou" in summary:
        quantiles = summary["best_iou"]
        lines += [
            "",
            f"IoU of an object with its best anchor: median {quantiles['p50']:.2f}, "
            f"5 % below {quantiles['p5']:.2f}, 1 % below {quantiles['p1']:.2f}; "
            f"{summary['positives_per_object']:.1f} positives per object",
        ]
    lines += ["", f"Kinds of errors: {report.errors}" if report.errors else "No errors"]
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("annotations", help="in COCO's format")
    parser.add_argument("image_dir", help="the folder that file names begin in")
    parser.add_argument("--config-file", default=str(ROOT / "configs/ATSS_R_50_FPN_1x.yaml"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every finding in full")
    parser.add_argument("--deep", action="store_true", help="decode every image, which takes long")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="over the config")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_intermixed_args(argv)
    try:
        training = build_training(load_config(args.config_file, opts=args.opts))
        content = read_coco(args.annotations)
        if not Path(args.image_dir).is_dir():
            raise ValueError(f"the image folder {args.image_dir} does not exist")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    progress = partial(tqdm, disable=None, leave=False)  # on a terminal only
    report = check(content, args.image_dir, training, args.deep, progress)
    print(page(report))
    if args.json:
        args.json.write_text(json.dumps(report.to_dict(), indent=1))
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
