#!/usr/bin/env python3
"""How many samples each object of a data set gets, by its size, shape and place: for every rule, or
for several configs.

    tools/assignment_statistics.py --annotations datasets/coco/annotations/instances_val2017.json
    tools/assignment_statistics.py --annotations train.json --config-file configs/tables/atss_*.yaml
    tools/assignment_statistics.py --annotations train.json --rules ATSS SpatialScale \\
        --config-file configs/ATSS_R_18_FPN_small.yaml --output output/statistics

Reads annotations only, no image. Canvases are those of testing: INPUT.MIN_SIZE_TEST and
INPUT.MAX_SIZE_TEST of the first config, padded to multiples of 32. Writes a table, a plot, and one
line per object.
"""

import argparse
import csv
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from tqdm import tqdm

from atss import Anchors, GroundTruth
from atss.assigners import ASSIGNER_REGISTRY, ATSS
from atss.config import build_assigner
from atss.config_file import load_config

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
STRIDES = (8, 16, 32, 64, 128)
DIVISIBILITY = 32
# Ticks of the plots.
COUNTS, SHAPES = (0, 1, 2, 5, 10, 20, 50, 100), (1, 2, 3, 5, 10)
# name -> (what an object is sorted by, [(label, lower end, upper end)]).
GROUPS = {
    "size in the image (COCO's)": (
        "area",
        [("small, < 32²", 0, 32**2), ("medium", 32**2, 96**2), ("large, ≥ 96²", 96**2, np.inf)],
    ),
    "longer / shorter side": (
        "aspect",
        [("< 1.5", 1, 1.5), ("1.5 to 3", 1.5, 3), ("≥ 3", 3, np.inf)],
    ),
    "place": (
        "border",
        [("at the image's border", -np.inf, 2), ("elsewhere", 2, np.inf)],
    ),
}


def rule_config(config_file: str, rule: str, opts: list[str]) -> CfgNode:
    """The config with another rule."""
    cfg = load_config(config_file, opts=opts)
    cfg.MODEL.ATSS.ASSIGNER = rule
    return cfg


def images_of(annotations: str) -> list[tuple[dict, np.ndarray]]:
    """(image, (G, 4) xywh boxes) of every image that has objects; crowds and empty boxes are left
    out, as in training.

    Raises:
        ValueError: where the file is not what is needed.
    """
    try:
        content = json.loads(Path(annotations).read_text())
        images, boxes = {i["id"]: i for i in content["images"]}, {}
        for annotation in content["annotations"]:
            if not annotation.get("iscrowd") and min(annotation["bbox"][2:]) > 0:
                boxes.setdefault(annotation["image_id"], []).append(annotation["bbox"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{annotations} cannot be read as COCO's json: {error!r}") from error
    if not boxes:
        raise ValueError(f"{annotations} has no objects")
    return [(images[i], np.array(b, dtype=np.float64)) for i, b in boxes.items() if i in images]


def anchors_of(cfg: CfgNode, canvas_hw: Sequence[int]) -> Anchors:
    node, offset = cfg.MODEL.ATSS, cfg.MODEL.ANCHOR_GENERATOR.OFFSET
    return Anchors.grid(canvas_hw, STRIDES, node.ANCHOR_SCALES, node.ANCHOR_RATIOS, offset)


def measure(images: list, cfgs: dict[str, CfgNode]) -> Iterator[dict]:
    """One record per object: what it is, how many positives each config's rule gives it on that
    config's anchors, and the mean and standard deviation of its candidates' IoUs where one of the
    rules is ATSS."""
    rules = {name: build_assigner(cfg) for name, cfg in cfgs.items()}
    with_threshold = [isinstance(rule, ATSS) for rule in rules.values()].count(True) == 1
    cfg = next(iter(cfgs.values()))
    for image, xywh in tqdm(images, unit="image"):
        size = (image["height"], image["width"])
        height, width = ResizeShortestEdge.get_output_shape(
            *size, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        )
        canvas = [-(-side // DIVISIBILITY) * DIVISIBILITY for side in (height, width)]
        x, y, w, h = xywh.T
        zoom = np.array([width / size[1], height / size[0]] * 2)
        boxes = torch.from_numpy(np.stack([x, y, x + w, y + h], axis=1) * zoom).float()
        index = torch.zeros(len(boxes), dtype=torch.long)
        gt = GroundTruth(boxes, index, index, 1)
        columns = {
            "image_id": [image["id"]] * len(boxes),
            "area": w * h,
            "side": np.sqrt(w * h * zoom[0] * zoom[1]),
            "aspect": np.maximum(w, h) / np.minimum(w, h),
            "border": np.stack([x, y, size[1] - x - w, size[0] - y - h]).min(axis=0),
        }
        for name, rule in rules.items():
            anchors = anchors_of(cfgs[name], canvas)
            counts = rule(anchors, gt).positives_per_object(len(gt))
            columns[name] = counts.tolist()
            if with_threshold and isinstance(rule, ATSS):
                mean, std = rule.statistics(anchors, gt.boxes)
                columns["mean"], columns["std"] = mean.tolist(), std.tolist()
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def groups(objects: list[dict]) -> dict[str, list[dict]]:
    """{label: the objects of that kind}, all of them first, without empty ones."""
    found = {"all": objects}
    for group, (key, bins) in GROUPS.items():
        for label, low, high in bins:
            found[f"{group}: {label}"] = [o for o in objects if low <= o[key] < high]
    return {label: some for label, some in found.items() if some}


def positives(objects: list[dict], column: str) -> str:
    """Mean of a column's counts, and in brackets the share that is 0."""
    counts = np.array([o[column] for o in objects])
    return f"{counts.mean():.1f} ({(counts == 0).mean():.1%})"


def table(objects: list[dict], columns: list[str], top: int) -> str:
    """Markdown: positives per object and objects without any, by group; a line for each group, or,
    where there are many columns, a line for each of these."""
    lines = [
        "Positives per object, and in brackets the objects without any. "
        f"0.2 * k * L would be {0.2 * top:.1f}.",
        "",
    ]
    kinds = groups(objects)
    if len(columns) > 6:
        rows = [["", *(f"{label} ({len(some)})" for label, some in kinds.items())]]
        rows += [[c, *(positives(some, c) for some in kinds.values())] for c in columns]
    else:
        rows = [["objects", "count", *columns]]
        rows += [
            [label, str(len(some)), *(positives(some, c) for c in columns)]
            for label, some in kinds.items()
        ]
        if "mean" in objects[0]:
            rows[0] += ["IoU of candidates: mean", "std", "threshold"]
            for row, some in zip(rows[1:], kinds.values(), strict=True):
                mean, std = (np.mean([o[key] for o in some]) for key in ("mean", "std"))
                row += [f"{mean:.3f}", f"{std:.3f}", f"{mean + std:.3f}"]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def plot(objects: list[dict], rules: list[str], top: int, target: Path) -> None:
    """Positives over the object's size and over its shape; mean, std and threshold over size."""
    with_threshold = "mean" in objects[0]
    figure, axes = plt.subplots(
        1, 3 if with_threshold else 2, figsize=(15 if with_threshold else 10, 4.2)
    )
    value = {key: np.array([o[key] for o in objects]) for key in objects[0]}

    def curve(axis, by: np.ndarray, edges: np.ndarray, what: np.ndarray, label: str) -> None:
        place = np.digitize(by, edges)
        counts = np.bincount(place, minlength=len(edges))
        fewest = min(3, counts.max())  # a mean of less says little
        bins = [i for i in range(1, len(edges)) if counts[i] >= fewest]
        middle = [np.sqrt(edges[i - 1] * edges[i]) for i in bins]
        quartiles = [np.percentile(what[place == i], (25, 75)) for i in bins]
        (drawn,) = axis.plot(middle, [what[place == i].mean() for i in bins], "o-", ms=4)
        drawn.set_label(label)
        if quartiles:
            axis.fill_between(middle, *zip(*quartiles, strict=True), alpha=0.15, lw=0)

    size_label = "size of the object on the canvas, √area (px)"
    sizes = np.geomspace(value["side"].min() * 0.99, value["side"].max() * 1.01, 13)
    shapes = np.geomspace(1, max(value["aspect"].max() * 1.01, 2), 9)
    for axis, key, edges in ((axes[0], "side", sizes), (axes[1], "aspect", shapes)):
        for rule in rules:
            curve(axis, value[key], edges, value[rule], rule)
        axis.axhline(0.2 * top, color="black", ls=":", lw=1, label="0.2 · k · L")
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(0, 100)
        axis.set_yticks(COUNTS, [str(n) for n in COUNTS])
        axis.set_ylabel("positives per object (mean, quartiles)")
        axis.set_xlabel("longer / shorter side" if key == "aspect" else size_label)
    if with_threshold:
        for key in ("mean", "std"):
            curve(axes[2], value["side"], sizes, value[key], key)
        curve(axes[2], value["side"], sizes, value["mean"] + value["std"], "threshold")
        axes[2].set_ylabel("IoU of ATSS's candidates")
        axes[2].set_xlabel(size_label)
    for axis in axes:
        axis.set_xscale("log")
    axes[1].set_xticks(SHAPES, [str(n) for n in SHAPES])
    for axis in axes:
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=100)
    plt.close(figure)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotations", required=True, help="in COCO's format")
    parser.add_argument(
        "--config-file",
        nargs="+",
        default=[str(ROOT / "configs/ATSS_R_50_FPN_1x.yaml")],
        help="one whose anchors all rules get, or several, each with its own rule and anchors",
    )
    parser.add_argument("--rules", nargs="+", help="of one config: names of rules; all by default")
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE")
    parser.add_argument("--output", type=Path, default=Path("output/assignment_statistics"))
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="after --: over the config")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    sys.path.insert(0, os.getcwd())
    for module in args.imports:
        importlib.import_module(module)
    try:
        images = images_of(args.annotations)
        if len(args.config_file) == 1:
            rules = args.rules or [name for name, _ in ASSIGNER_REGISTRY]
            cfgs = {rule: rule_config(*args.config_file, rule, args.opts) for rule in rules}
        elif args.rules:
            raise ValueError("--rules is for one config; several have each their own")
        else:
            cfgs = {Path(f).stem: load_config(f, opts=args.opts) for f in args.config_file}
        objects = list(measure(images, cfgs))
    except (ValueError, KeyError) as error:
        sys.exit(f"error: {error.args[0]}")
    top = next(iter(cfgs.values())).MODEL.ATSS.ASSIGNERS.ATSS.TOP_K * len(STRIDES)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "table.md").write_text(table(objects, list(cfgs), top))
    plot(objects, list(cfgs), top, args.output / "plot.png")
    with open(args.output / "objects.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, objects[0])
        writer.writeheader()
        writer.writerows(objects)
    print((args.output / "table.md").read_text())
    print(f"Written: table.md, plot.png and objects.csv in {args.output}")


if __name__ == "__main__":
    main()
