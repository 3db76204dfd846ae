"""Assignment rules spelled out in float64, over all anchors of one image at a time."""

import numpy as np


def random_boxes(
    rng: np.random.Generator, count: int, hw: tuple[int, int], step: float | None = None
) -> np.ndarray:
    """(count, 4) float32 boxes of all sizes and shapes; some stick out of the canvas, some lie
    outside. On multiples of ``step`` pixels, if given, so that distances and overlaps tie."""
    height, width = hw
    centre = rng.uniform(-0.1, 1.1, (count, 2)) * (width, height)
    size = np.exp(rng.uniform(np.log(2), np.log(1.5 * max(hw)), (count, 2)))
    boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
    return (boxes if step is None else np.round(boxes / step) * step).astype(np.float32)


def pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(G, 4), (R, 4) -> (G, R)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    intersection = np.prod(np.clip(high - low, 0, None), axis=2)
    area_a, area_b = (np.prod(np.clip(x[:, 2:] - x[:, :2], 0, None), axis=1) for x in (a, b))
    return intersection / np.maximum(area_a[:, None] + area_b[None] - intersection, 1e-300)


def locations(anchors) -> np.ndarray:
    """(R, 2) centres of the anchors, from the grids: those of float32 boxes are rounded."""
    centres = []
    for stride, (height, width) in zip(anchors.strides, anchors.sizes, strict=True):
        rows, columns = np.mgrid[:height, :width]
        points = (np.stack([columns, rows], axis=-1).reshape(-1, 2) + anchors.offset) * stride
        centres.append(points.repeat(anchors.num_anchors, axis=0))
    return np.concatenate(centres)


def atss(anchors, gt_boxes: np.ndarray, k: int, count: str) -> np.ndarray:
    """(R,) ground-truth index or -1, by Algorithm 1; ties go to lower indices."""
    boxes = anchors.boxes.double().numpy()
    gt = gt_boxes.astype(np.float64)
    owner, best = np.full(len(boxes), -1), np.full(len(boxes), -np.inf)
    if len(gt) == 0:
        return owner
    overlap = pairwise_iou(gt, boxes)
    centre, gt_centre = locations(anchors), (gt[:, :2] + gt[:, 2:]) / 2
    ends = np.cumsum(anchors.per_level)
    for g in range(len(gt)):
        distance = ((centre - gt_centre[g]) ** 2).sum(axis=1)
        candidates = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            order = np.argsort(distance[start:end], kind="stable")
            taken = k * anchors.num_anchors if count == "locations" else k
            candidates.append(start + order[:taken])
        candidates = np.concatenate(candidates)
        values = overlap[g, candidates]
        threshold = values.mean() + (values.std(ddof=1) if len(values) > 1 else 0)
        inside = np.minimum(centre[candidates] - gt[g, :2], gt[g, 2:] - centre[candidates]).min(
            axis=1
        )
        chosen = candidates[(values >= threshold - 1e-6) & (inside > 0.01)]
        better = overlap[g, chosen] > best[chosen]
        owner[chosen[better]], best[chosen[better]] = g, overlap[g, chosen[better]]
    return owner
