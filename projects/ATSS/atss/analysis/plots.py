"""Plots with matplotlib."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

# Not pyplot, whose backend is the user's choice: with Agg, a notebook would show no plots.
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from .comparison import Difference
from .curves import loss_curves, read_series
from .explain import Explanation

# (x1, y1, x2, y2) in pixels, and a label.
Boxes = Iterable[tuple[Sequence[float], str]]
# Colours that colour-blind people can tell apart (Okabe and Ito).
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
# Anchors of several objects, and objects that are not shown.
SHARED = "#A8A8A8"
# Legend of assignments: a line for each kind of anchor in the picture.
LEGEND: dict[str, dict[str, Any]] = {
    "positive (counted at its object), larger on coarser levels": {"mfc": "gray", "mec": "black"},
    "candidate": {"mfc": "none", "mec": "black"},
    "candidate of several objects": {"mfc": "none", "mec": SHARED},
    "positive if the object were alone": {"marker": "x", "mec": "black", "mew": 1.6},
}
# Size of labels in points.
FONT = 7.5
# With more objects, candidates would cover the image.
MOST_WITH_CANDIDATES = 8
# Ticks of the statistics.
COUNTS, SHAPES = (0, 1, 2, 5, 10, 20, 50, 100), (1, 2, 3, 5, 10)


def plot_metrics(metrics_file: Path, target: Path) -> None:
    series = read_series(metrics_file)
    scores = {name: series[f"bbox/{name}"] for name in ("AP", "AP50") if f"bbox/{name}" in series}
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, lines in ((left, loss_curves(series)), (right, scores)):
        for label, line in lines.items():
            axis.plot(*line, label=label, marker="o" if axis is right else None)
        axis.set_xlabel("iteration")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.legend()
    left.set_ylabel("loss (median of 20 iterations)")
    left.set_ylim(bottom=0)
    right.set_ylabel("AP on held-out images (%)")
    right.set_ylim(0, 100)
    figure.savefig(target, dpi=110)


def plot_examples(
    images: Sequence[np.ndarray], truth: Sequence[Boxes], predicted: Sequence[Boxes], target: Path
) -> None:
    """Plot images with ground truth left and detections right, two pairs a row.

    Args:
        images: (H, W, 3) BGR, an even number.
        truth, predicted: labelled boxes (x1, y1, x2, y2) in pixels.
    """
    figure = Figure(figsize=(12, 1.55 * len(images)))
    axes = figure.subplots(len(images) // 2, 4).reshape(-1, 2)
    for pair, image, *boxes in zip(axes, images, truth, predicted, strict=True):
        for panel, labelled_boxes, colour, style in zip(
            pair, boxes, ("lime", "orange"), ("-", "--"), strict=True
        ):
            panel.imshow(np.ascontiguousarray(image[:, :, ::-1]))
            panel.set_axis_off()
            for (x1, y1, x2, y2), text in labelled_boxes:
                outline = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, lw=1.6)
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


def plot_experiments(results: dict, compared: Sequence[Difference], target: Path) -> None:
    height = 1.2 + 0.32 * max(len(results), len(compared))
    figure = Figure(figsize=(12, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    for y, runs in enumerate(results.values()):
        points = [r["AP"] for r in runs.values()]
        left.plot(points, [y] * len(points), "o", color="tab:blue", alpha=0.5)
        left.plot(np.mean(points), y, "|", color="black", ms=16, mew=2)
    left.set_yticks(range(len(results)), list(results))
    left.set_xlabel("AP (%): each seed, and the mean")
    for y, difference in enumerate(compared):
        half = difference.alone if np.isnan(difference.half) else difference.half
        half = np.nan_to_num(half)
        right.errorbar(difference.each.mean(), y, xerr=half, fmt="o", color="tab:orange", capsize=3)
        right.plot(difference.each, [y] * len(difference.each), ".", color="black", alpha=0.4)
    right.axvline(0, color="black", lw=0.8)
    right.set_yticks(range(len(compared)), [x.statement for x in compared])
    right.set_xlabel("difference of AP: each seed, mean, 95 % interval")
    for axis, count in ((left, len(results)), (right, len(compared))):
        axis.set_ylim(max(count, 1) - 0.5, -0.5)  # the first at the top
        axis.grid(axis="x", alpha=0.3)
        axis.locator_params(axis="x", nbins=7)
    figure.savefig(target, dpi=110)


def plot_statistics(objects: list[dict], rules: list[str], top: int | None, target: Path) -> None:
    with_threshold = "mean" in objects[0]
    panels = 3 if with_threshold else 2
    figure = Figure(figsize=(5 * panels, 4.2))
    axes = figure.subplots(1, panels)
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


def plot_assignments(
    image: np.ndarray,
    boxes: np.ndarray,
    centres: np.ndarray,
    strides: np.ndarray,
    rules: Mapping[str, Explanation],
    target: Path,
    objects: Sequence[int] = (),
) -> None:
    """Plot an image under several rules side by side: objects in their colours with the number of
    their positives, which are dots sized by level; other candidates are hollow, grey if several
    objects have them, and lost anchors crossed.

    Args:
        image: (H, W, 3) BGR.
        boxes: (G, 4) objects in pixels of the image.
        centres: (R, 2) of the anchors.
        strides: (R,) of the anchors.
        objects: indices of the objects whose anchors are drawn; empty for all.
    """
    height, width = image.shape[:2]
    columns = min(len(rules), 3)
    rows = -(-len(rules) // columns)
    panel = 5.6  # inches
    size = (panel * columns, (panel * height / width + 0.35) * rows + 0.35)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    # Points; dots of a fine level do not touch.
    diameter = 3.0 + 1.6 * np.log2(strides / strides.min())
    diameter = np.minimum(diameter, 0.85 * strides * panel * 72 / width)
    area, rim = diameter**2, np.where(diameter < 4, 0, 0.6)
    drawn = np.zeros(len(boxes), dtype=bool)
    drawn[list(objects) or slice(None)] = True
    colours = np.array([COLOURS[i % len(COLOURS)] for i in range(len(boxes))])
    is_inside = (centres[:, 0] <= width) & (centres[:, 1] <= height)
    has_kind = np.array([True, False, False, False])
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, found) in zip(axes.flat, rules.items(), strict=False):
        axis.imshow(image[:, :, ::-1], alpha=0.75)
        axis.set_xlim(0, width)
        axis.set_ylim(height, 0)
        counts = np.bincount(found.gt_index[found.gt_index >= 0], minlength=len(boxes))
        labels = [f"#{i}: {count}" if drawn[i] else "" for i, count in enumerate(counts)]
        _label_objects(axis, boxes, labels, colours, width / (panel * 72))
        positive = np.flatnonzero(found.gt_index >= 0)
        positive = positive[drawn[found.gt_index[positive]]]
        if drawn.sum() <= MOST_WITH_CANDIDATES:
            owners, rest = found.pairs["owner"], found.pairs["index"]
            kept = drawn[owners] & (found.gt_index[rest] < 0) & is_inside[rest]
            rest, first, times = np.unique(rest[kept], return_index=True, return_counts=True)
            edges = np.where(times > 1, SHARED, colours[owners[kept]][first])
            axis.scatter(*centres[rest].T, s=area[rest], lw=0.8, fc="none", ec=edges, clip_on=False)
            has_kind[1:3] |= (times == 1).any(), (times > 1).any()
        fills = colours[found.gt_index[positive]]
        axis.scatter(
            *centres[positive].T,
            **{"s": area[positive], "lw": rim[positive], "c": fills, "ec": "black"},
            clip_on=False,
        )
        owners, crossed = found.pairs["owner"], found.pairs["index"]
        kept = found.is_lost & drawn[owners]
        owners, crossed = owners[kept], crossed[kept]
        axis.scatter(
            *centres[crossed].T, s=2 * area[crossed], lw=1.6, marker="x", c=colours[owners]
        )
        has_kind[3] |= len(crossed) > 0
        counts = counts[drawn]
        spread = f"{counts.min()} to {counts.max()} positives per object, mean {counts.mean():.1f}"
        axis.set_title(f"{name}: {spread}", fontsize=11)
    handles = [
        Line2D([], [], **{"ls": "", "marker": "o", "label": label} | style)
        for (label, style), is_drawn in zip(LEGEND.items(), has_kind, strict=True)
        if is_drawn
    ]
    ncols = 4 if columns > 1 else 1
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False)
    figure.savefig(target, dpi=100, bbox_inches="tight", pad_inches=0.05)


def _label_objects(
    axis: Axes, boxes: np.ndarray, labels: Sequence[str], colours: np.ndarray, scale: float
) -> None:
    """Draw boxes, grey if the label is empty, and each label where it covers no other one.

    Args:
        scale: pixels of the image per point.
    """
    right, bottom = axis.get_xlim()[1], axis.get_ylim()[0]
    taken = np.zeros((0, 4))
    for (x1, y1, x2, y2), label, colour in zip(boxes, labels, colours, strict=True):
        outline = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False)
        outline.set(linewidth=2 if label else 1, edgecolor=colour if label else SHARED)
        axis.add_patch(outline)
        if not label:
            continue
        w, h = np.array([0.65 * FONT * len(label) + 2, FONT + 4]) * scale
        # Above, below, right, left; inside if there is no room.
        corners = ((x1, y1 - h), (x1, y2), (x2, y1), (x1 - w, y1), (x1, y1))
        for left, top in corners:
            left = min(left, right - w) if (left, top) == (x1, y1) else left
            area = np.array([left, top, left + w, top + h])
            is_inside = left >= 0 and top >= 0 and area[2] <= right and area[3] <= bottom
            covers = (area[:2] < taken[:, 2:]) & (area[2:] > taken[:, :2])
            if is_inside and not covers.all(axis=1).any():
                break
        taken = np.vstack([taken, area])
        axis.text(
            left + scale,
            top + h / 2,
            label,
            fontsize=FONT,
            color="black" if sum(to_rgb(colour)) > 1.2 else "white",
            va="center",
            bbox={"facecolor": colour, "pad": 1, "lw": 0},
        )
