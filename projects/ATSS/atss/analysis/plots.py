"""Plots with matplotlib."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .explain import Explanation

# (x1, y1, x2, y2) in pixels, and a label.
Boxes = Iterable[tuple[Sequence[float], str]]
# Colours that colour-blind people can tell apart (Okabe and Ito).
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
# Ticks of the statistics.
COUNTS, SHAPES = (0, 1, 2, 5, 10, 20, 50, 100), (1, 2, 3, 5, 10)


def plot_metrics(metrics_file: Path, target: Path) -> None:
    records = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = {"loss_cls": "class", "loss_box_reg": "box"}
    losses = dict.fromkeys(
        key for r in records for key in r if key.rpartition("/")[2].startswith("loss_")
    )
    curves = {names.get(key, key.replace("loss_", "")): key for key in sorted(losses, key=len)}
    for axis, lines in ((left, curves), (right, {"AP": "bbox/AP", "AP50": "bbox/AP50"})):
        for label, key in lines.items():
            # A resumed run writes some iterations twice: the last line counts.
            points = {r["iteration"]: r[key] for r in records if key in r}
            marker = "o" if axis is right else None
            axis.plot(
                sorted(points), [points[i] for i in sorted(points)], label=label, marker=marker
            )
        axis.set_xlabel("iteration")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.legend()
    left.set_ylabel("loss (median of 20 iterations)")
    left.set_ylim(bottom=0)
    right.set_ylabel("AP on held-out images (%)")
    right.set_ylim(0, 100)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def plot_examples(
    images: Sequence[np.ndarray], truth: Sequence[Boxes], predicted: Sequence[Boxes], target: Path
) -> None:
    """Plot images with ground truth left and detections right, two pairs a row.

    Args:
        images: (H, W, 3) BGR, an even number.
        truth, predicted: labelled boxes (x1, y1, x2, y2) in pixels.
    """
    figure, axes = plt.subplots(len(images) // 2, 4, figsize=(12, 1.55 * len(images)))
    axes = axes.reshape(-1, 2)
    for pair, image, *boxes in zip(axes, images, truth, predicted, strict=True):
        for panel, labelled_boxes, colour, style in zip(
            pair, boxes, ("lime", "orange"), ("-", "--"), strict=True
        ):
            panel.imshow(np.ascontiguousarray(image[:, :, ::-1]))
            panel.set_axis_off()
            for (x1, y1, x2, y2), text in labelled_boxes:
                outline = plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, lw=1.6)
                outline.set(edgecolor=colour, linestyle=style)
                panel.add_patch(outline)
                panel.text(
                    x1,
                    max(y1 - 2, 8),
                    text.replace("$", r"\$"),
                    color="black",
                    fontsize=8,
                    va="bottom",
                    bbox={"facecolor": colour, "pad": 0.8, "lw": 0, "alpha": 0.85},
                )
    for i in range(2):
        axes[i][0].set_title("ground truth", color="green")
        axes[i][1].set_title("detections", color="darkorange")
    figure.tight_layout(pad=0.4)
    figure.savefig(target, dpi=100)
    plt.close(figure)


def plot_experiments(
    results: dict, compared: Sequence[tuple[str, np.ndarray, float]], target: Path
) -> None:
    height = 1.2 + 0.32 * max(len(results), len(compared))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, height), layout="constrained")
    for y, runs in enumerate(results.values()):
        points = [r["AP"] for r in runs.values()]
        left.plot(points, [y] * len(points), "o", color="tab:blue", alpha=0.5)
        left.plot(np.mean(points), y, "|", color="black", ms=16, mew=2)
    left.set_yticks(range(len(results)), list(results))
    left.set_xlabel("AP (%): each seed, and the mean")
    for y, (_, difference, half) in enumerate(compared):
        half = 0 if np.isnan(half) else half
        right.errorbar(difference.mean(), y, xerr=half, fmt="o", color="tab:orange", capsize=3)
        right.plot(difference, [y] * len(difference), ".", color="black", alpha=0.4)
    right.axvline(0, color="black", lw=0.8)
    right.set_yticks(range(len(compared)), [statement for statement, _, _ in compared])
    right.set_xlabel("paired difference of AP (%): mean and its 95 % interval")
    for axis in (left, right):
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def plot_statistics(objects: list[dict], rules: list[str], top: int | None, target: Path) -> None:
    with_threshold = "mean" in objects[0]
    figure, axes = plt.subplots(
        1, 3 if with_threshold else 2, figsize=(15 if with_threshold else 10, 4.2)
    )
    value = {key: np.array([o[key] for o in objects]) for key in objects[0]}

    def curve(axis, x: np.ndarray, edges: np.ndarray, y: np.ndarray, label: str) -> None:
        bin_index = np.digitize(x, edges)
        counts = np.bincount(bin_index, minlength=len(edges))
        min_count = min(3, counts.max())  # means of fewer objects scatter
        bins = [i for i in range(1, len(edges)) if counts[i] >= min_count]
        middle = [np.sqrt(edges[i - 1] * edges[i]) for i in bins]
        quartiles = [np.percentile(y[bin_index == i], (25, 75)) for i in bins]
        (line,) = axis.plot(middle, [y[bin_index == i].mean() for i in bins], "o-", ms=4)
        line.set_label(label)
        if quartiles:
            axis.fill_between(middle, *zip(*quartiles, strict=True), alpha=0.15, lw=0)

    size_label = "size of the object on the canvas, √area (px)"
    sizes = np.geomspace(value["side"].min() * 0.99, value["side"].max() * 1.01, 13)
    shapes = np.geomspace(1, max(value["aspect"].max() * 1.01, 2), 9)
    for axis, key, edges in ((axes[0], "side", sizes), (axes[1], "aspect", shapes)):
        for rule in rules:
            curve(axis, value[key], edges, value[rule], rule)
        if top is not None:
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


def plot_assignments(
    image: np.ndarray,
    boxes: np.ndarray,
    centres: np.ndarray,
    strides: np.ndarray,
    rules: Mapping[str, Explanation],
    target: Path,
) -> None:
    """Plot an image under several rules side by side: objects in their colours, positives as dots
    sized by level, other candidates hollow, lost anchors crossed.

    Args:
        image: (H, W, 3) BGR.
        boxes: (G, 4) objects in pixels of the image.
        centres: (R, 2) of the anchors.
        strides: (R,) of the anchors.
    """
    height, width = image.shape[:2]
    columns = min(len(rules), 3)
    rows = -(-len(rules) // columns)
    size = (5.6 * columns, (5.6 * height / width + 0.35) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    diameter = 3.0 + 1.6 * np.log2(strides / strides.min())
    colours = np.array([COLOURS[i % len(COLOURS)] for i in range(len(boxes))])
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, found) in zip(axes.flat, rules.items(), strict=False):
        axis.imshow(image[:, :, ::-1], alpha=0.75)
        axis.set_xlim(0, width)
        axis.set_ylim(height, 0)
        for (x1, y1, x2, y2), colour in zip(boxes, colours, strict=True):
            outline = plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, lw=2, ec=colour)
            axis.add_patch(outline)
        positive = np.flatnonzero(found.gt_index >= 0)
        owner = found.gt_index[positive]
        chosen = found.gt_index[found.candidates[:, 1]] == found.candidates[:, 0]
        owners, rest = found.candidates[~chosen].T
        axis.scatter(*centres[rest].T, s=diameter[rest] ** 2, lw=0.7, fc="none", ec=colours[owners])
        axis.scatter(
            *centres[positive].T, s=diameter[positive] ** 2, lw=0.6, c=colours[owner], ec="black"
        )
        owners, crossed = found.lost.T
        axis.scatter(
            *centres[crossed].T, s=2 * diameter[crossed] ** 2, lw=1.6, marker="x", c=colours[owners]
        )
        counts = np.bincount(owner, minlength=len(boxes))
        each = (
            ", ".join(map(str, counts)) if len(counts) <= 8 else f"{counts.min()} to {counts.max()}"
        )
        axis.set_title(f"{name}: positives {each}", fontsize=11)
    figure.savefig(target, dpi=100, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)
