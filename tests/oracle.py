"""Assignment rules spelled out in float64, over all anchors of one image at a time."""

import numpy as np
from scipy.optimize import linear_sum_assignment


def random_boxes(
    rng: np.random.Generator, count: int, hw: tuple[int, int], step: float | None = None
) -> np.ndarray:
    """Return (count, 4) float32 boxes of all sizes and shapes, also beyond the canvas; on multiples
    of ``step`` pixels, if given, so that distances and overlaps tie."""
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
    """Return the (R, 2) centres of anchors from the grids: centres of float32 boxes are rounded."""
    centres = []
    for stride, (height, width) in zip(anchors.strides, anchors.sizes, strict=True):
        rows, columns = np.mgrid[:height, :width]
        points = (np.stack([columns, rows], axis=-1).reshape(-1, 2) + anchors.offset) * stride
        centres.append(points.repeat(anchors.num_anchors, axis=0))
    return np.concatenate(centres)


def atss(
    anchors, gt_boxes: np.ndarray, k: int, count: str, like: str = "iou", **constants: float
) -> np.ndarray:
    """(R,) ground-truth index or -1, by Algorithm 1; ties go to lower indices."""
    boxes = anchors.boxes.double().numpy()
    gt = gt_boxes.astype(np.float64)
    owner, best = np.full(len(boxes), -1), np.full(len(boxes), -np.inf)
    if len(gt) == 0:
        return owner
    overlap = SIMILARITIES[like](gt, boxes, **constants)
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
        chosen = candidates[(values >= threshold) & (inside > 0.01)]
        better = overlap[g, chosen] > best[chosen]
        owner[chosen[better]], best[chosen[better]] = g, overlap[g, chosen[better]]
    return owner


# ------------------------------------------------------------------------------------------------
# Rules that look at predictions: one image, matrices (G, R), every class written out
# ------------------------------------------------------------------------------------------------


def nwd(a: np.ndarray, b: np.ndarray, constant: float = 12.8) -> np.ndarray:
    """(G, 4), (R, 4) -> (G, R)."""
    apart, sides = _differences(a, b)
    return np.exp(-np.sqrt((apart**2).sum(2) + (sides**2).sum(2) / 4) / constant)


def simd(a: np.ndarray, b: np.ndarray, m: float = 6.13, n: float = 4.59) -> np.ndarray:
    """(G, 4), (R, 4) -> (G, R)."""
    apart, sides = _differences(a, b)
    together = np.maximum((a[:, 2:] - a[:, :2])[:, None] + (b[:, 2:] - b[:, :2])[None], 1e-300)
    steep = np.array([m, n]) / together
    return np.exp(-np.linalg.norm(apart * steep, axis=2) - np.linalg.norm(sides * steep, axis=2))


def _differences(a, b):
    centre_a, centre_b = (a[:, :2] + a[:, 2:]) / 2, (b[:, :2] + b[:, 2:]) / 2
    side_a, side_b = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]
    return centre_a[:, None] - centre_b[None], side_a[:, None] - side_b[None]


SIMILARITIES = {"iou": pairwise_iou, "nwd": nwd, "simd": simd}


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.maximum(logits, 0) - logits * targets + np.log1p(np.exp(-np.abs(logits)))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def one_hot(classes: np.ndarray, num_classes: int) -> np.ndarray:
    return np.eye(num_classes)[classes]


def focal(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    p = sigmoid(logits)
    wrong = np.abs(targets - p)
    return np.where(targets > 0, 0.25, 0.75) * wrong**2 * cross_entropy(logits, targets)


def class_costs(loss, logits, classes, targets) -> np.ndarray:
    """(G, R) sum over classes; targets (G, R) for the class of the object."""
    hot = one_hot(classes, logits.shape[1])  # (G, K)
    return loss(logits[None], hot[:, None] * targets[..., None]).sum(axis=2)


def inside_distance(points: np.ndarray, gt: np.ndarray) -> np.ndarray:
    """(G, R) to the nearest side, negative outside."""
    low, high = points[None] - gt[:, None, :2], gt[:, None, 2:] - points[None]
    return np.minimum(low, high).min(axis=2)


def centre_distance(points: np.ndarray, gt: np.ndarray) -> np.ndarray:
    """(G, R, 2) along each axis."""
    return np.abs(points[None] - ((gt[:, :2] + gt[:, 2:]) / 2)[:, None])


def strides(anchors) -> np.ndarray:
    return np.repeat(np.array(anchors.strides, dtype=np.float64), anchors.per_level)


def tal(anchors, gt, classes, logits, boxes, k=13, alpha=1.0, beta=6.0, before=False, like="iou"):
    """(R,) index or -1, and (R,) score."""
    points = locations(anchors)
    overlap = SIMILARITIES[like](gt, boxes)
    metric = sigmoid(logits)[:, classes].T ** alpha * overlap**beta
    inside = inside_distance(points, gt) > 0.01
    ranked = np.where(inside, metric, 0) if before else metric
    positive = np.zeros_like(inside)
    for g in range(len(gt)):
        best = np.argsort(-ranked[g], kind="stable")[:k]
        positive[g, best] = (ranked[g, best] > 0) & inside[g, best]
    owner = np.where(positive.any(axis=0), np.where(positive, overlap, -1).argmax(axis=0), -1)
    score = np.zeros(len(points))
    for g in range(len(gt)):
        own = owner == g
        if own.any():
            score[own] = metric[g, own] / (metric[g, own].max() + 1e-7) * overlap[g, own].max()
    return owner, score


def dynamic_k(cost, overlap, eligible, top_k):
    """(R,) index or -1: SimOTA's and RTMDet's matching of eligible anchors."""
    chosen = np.zeros_like(eligible[None] & (cost > -1))
    for g in range(len(cost)):
        k = max(1, int(np.sort(np.where(eligible, overlap[g], 0))[::-1][:top_k].sum()))
        order = np.argsort(np.where(eligible, cost[g], np.inf), kind="stable")[:k]
        chosen[g, order[eligible[order]]] = True
    owner = chosen.argmax(axis=0)
    several = chosen.sum(axis=0) > 1
    owner[several] = cost[:, several].argmin(axis=0)
    return np.where(chosen.any(axis=0), owner, -1)


def simota(anchors, gt, classes, logits, boxes, top_k=10, radius=2.5, like="iou"):
    """(R,) index or -1, and (R,) score."""
    points, overlap = locations(anchors), SIMILARITIES[like](gt, boxes)
    inside = inside_distance(points, gt) > 0
    central = (centre_distance(points, gt) < radius * strides(anchors)[None, :, None]).all(axis=2)
    cost = class_costs(cross_entropy, logits, classes, np.ones_like(overlap))
    cost = cost - 3 * np.log(overlap + 1e-7) + 1e5 * ~(inside & central)
    owner = dynamic_k(cost, overlap, (inside | central).any(axis=0), top_k)
    return owner, _of_owner(owner, overlap)


def soft_label(anchors, gt, classes, logits, boxes, top_k=13, radius=3.0, like="iou"):
    """(R,) index or -1, and (R,) score."""
    points, overlap = locations(anchors), SIMILARITIES[like](gt, boxes)

    def quality_focal(x, t):
        return (t - sigmoid(x)) ** 2 * cross_entropy(x, t)

    distance = np.linalg.norm(centre_distance(points, gt), axis=2) / strides(anchors)
    cost = class_costs(quality_focal, logits, classes, overlap)
    cost = cost - 3 * np.log(overlap + 1e-7) + 10 ** np.minimum(distance - radius, 100)
    owner = dynamic_k(cost, overlap, (inside_distance(points, gt) > 0).any(axis=0), top_k)
    return owner, _of_owner(owner, overlap)


def _of_owner(owner, overlap):
    return np.where(owner >= 0, overlap[owner, np.arange(len(owner))], 0)


def ota(
    anchors,
    gt,
    classes,
    logits,
    boxes,
    top_k=20,
    radius=2.5,
    like="iou",
    regularisation=0.1,
    iterations=50,
):
    """(R,) index or -1, and (R,) score: by the whole plan of objects with candidates, with a row
    for the background; a pair that is not a candidate costs a million."""
    points, overlap = locations(anchors), SIMILARITIES[like](gt, boxes)
    central = (centre_distance(points, gt) < radius * strides(anchors)[None, :, None]).all(axis=2)
    right = (inside_distance(points, gt) > 0.01) & central
    cost = class_costs(focal, logits, classes, np.ones_like(overlap))
    cost = cost - 1.5 * np.log(np.maximum(overlap, np.finfo(np.float32).eps)) + 1e6 * ~right
    some = right.any(axis=1)
    if not some.any():
        return np.full(len(points), -1), np.zeros(len(points))
    cost, right, all_overlap, overlap = cost[some], right[some], overlap, overlap[some]
    background = focal(logits, np.zeros_like(logits)).sum(axis=1)
    counted = np.sort(np.where(right, overlap, 0), axis=1)[:, ::-1]
    k = np.maximum(1, counted[:, :top_k].sum(axis=1).astype(int))
    supply = np.append(k, max(len(points) - k.sum(), 0))
    cost = np.vstack([cost, background])
    u, v = np.ones(len(cost)), np.ones(len(points))
    eps = regularisation
    for _ in range(iterations):
        v = eps * (np.log(1 + 1e-8) - _logsumexp((u[:, None] + v - cost) / eps, 0)) + v
        u = eps * (np.log(supply + 1e-8) - _logsumexp((u[:, None] + v - cost) / eps, 1)) + u
    plan = (u[:, None] + v - cost) / eps
    owner = (plan - plan.max(axis=1, keepdims=True)).argmax(axis=0)
    owner = np.append(np.flatnonzero(some), -1)[owner]
    return owner, _of_owner(owner, all_overlap)


def _logsumexp(values, axis):
    peak = values.max(axis=axis, keepdims=True)
    return peak.squeeze(axis) + np.log(np.exp(values - peak).sum(axis=axis))


def paa(
    anchors,
    gt,
    classes,
    logits,
    boxes,
    k=9,
    take="component",
    like="iou",
    box_weight=1.3,
    own=False,
):
    """(R,) index or -1, by scikit-learn's mixture."""
    from sklearn.mixture import GaussianMixture

    overlap = SIMILARITIES[like](gt, anchors.boxes.double().numpy())
    first = np.where(overlap.max(axis=0) >= 0.1, overlap.argmax(axis=0), -1)
    for g in range(len(gt)):
        if overlap[g].max() > 0:
            best = overlap[g] == overlap[g].max()
            first[best] = overlap[:, best].argmax(axis=0) if own else g
    cost = class_costs(focal, logits, classes, np.ones_like(overlap))
    cost = cost + box_weight * _giou_losses(gt, boxes)
    owner = np.full(len(boxes), -1)
    ends = np.cumsum(anchors.per_level)
    for g in range(len(gt)):
        pooled = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            mine = start + np.flatnonzero(first[start:end] == g)
            pooled.append(mine[np.argsort(cost[g, mine], kind="stable")[:k]])
        pooled = np.concatenate(pooled)
        pooled = pooled[np.argsort(cost[g, pooled], kind="stable")]
        if len(pooled) < 2:
            chosen = pooled if take == "all" else pooled[:0]
        else:
            x = cost[g, pooled][:, None]
            model = GaussianMixture(
                2,
                weights_init=[0.5, 0.5],
                means_init=[x.min(axis=0), x.max(axis=0)],
                precisions_init=np.ones((2, 1)),
                covariance_type="diag",
            ).fit(x)
            good, density = model.predict(x) == 0, model.score_samples(x)
            if good.any():
                peak = np.flatnonzero(good & (density >= density[good].max() - 1e-6))[0]
                chosen = pooled[: peak + 1]
                if take == "component":
                    chosen = pooled[: peak + 1][good[: peak + 1]]
            else:
                chosen = pooled if take == "all" else pooled[:0]
        owner[chosen] = g
    return owner, None


def _giou_losses(gt, boxes):
    low = np.minimum(gt[:, None, :2], boxes[None, :, :2])
    high = np.maximum(gt[:, None, 2:], boxes[None, :, 2:])
    hull = np.prod(high - low, axis=2)
    area_a, area_b = (np.prod(np.clip(x[:, 2:] - x[:, :2], 0, None), axis=1) for x in (gt, boxes))
    low = np.maximum(gt[:, None, :2], boxes[None, :, :2])
    high = np.minimum(gt[:, None, 2:], boxes[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    union = area_a[:, None] + area_b[None] - shared
    return 1 - shared / (union + 1e-7) + (hull - union) / (hull + 1e-7)


def ddod(anchors, gt, classes, logits, boxes, k=9, alpha=0.8):
    """(R,) index or -1: Algorithm 1 on the scores of predictions."""
    points = locations(anchors)
    score = sigmoid(logits)[:, classes].T ** (1 - alpha) * pairwise_iou(gt, boxes) ** alpha
    apart = (centre_distance(points, gt) ** 2).sum(axis=2)
    inside = inside_distance(points, gt) > 0.01
    chosen = np.full(score.shape, -1.0)
    ends = np.cumsum(anchors.per_level)
    for g in range(len(gt)):
        candidates = np.concatenate(
            [
                start + np.argsort(apart[g, start:end], kind="stable")[:k]
                for start, end in zip([0, *ends[:-1]], ends, strict=True)
            ]
        )
        values = score[g, candidates]
        threshold = values.mean() + (values.std(ddof=1) if len(values) > 1 else 0)
        positive = candidates[(values >= threshold) & inside[g, candidates]]
        chosen[g, positive] = score[g, positive]
    return np.where(chosen.max(axis=0) >= 0, chosen.argmax(axis=0), -1), None


def poto_qualities(anchors, gt, classes, logits, boxes, alpha=0.8, radius=1.5, like="iou"):
    """(G, R) quality of each anchor for each object, -1 if it is not a candidate."""
    points = locations(anchors)
    quality = sigmoid(logits)[:, classes].T ** (1 - alpha) * SIMILARITIES[like](gt, boxes) ** alpha
    near = centre_distance(points, gt).max(axis=2) < radius * strides(anchors)
    return np.where((inside_distance(points, gt) > 0) & near, quality, -1.0)


def best_total(quality: np.ndarray) -> float:
    """Return the largest sum of (G, R) qualities over all matchings of objects."""
    return quality[linear_sum_assignment(quality, maximize=True)].sum()
