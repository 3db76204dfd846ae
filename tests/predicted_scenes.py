"""Predictions for tests of the rules that need them: golden, random and written by hand."""

import numpy as np
import oracle
import torch
from conftest import GOLDEN, make_gt

from atss import Anchors, HeadOutput
from atss.structures import Predictions

VECTORS = {
    **np.load(GOLDEN / "dynamic_assignment.npz"),
    **np.load(GOLDEN / "dynamic_soft_assignment.npz"),
}
# Canvas, layout of anchors, and step of coordinates in pixels, with which distances and IoUs tie.
PLACES = {
    "plain": ((160, 350), {}, None),
    "other": ((160, 350), {"offset": 0.0, "strides": (7, 12, 30)}, 4),
    "nine anchors": ((96, 160), {"scales": (8.0, 10.08, 12.7), "ratios": (0.5, 1.0, 2.0)}, 4),
    "one level": ((64, 96), {"strides": (8,), "scales": (3.0,)}, 4),
}


def predict(classes, boxes, probabilities=False) -> Predictions:
    """Make predictions of (N, R, K) classes and (N, R, 4) boxes."""
    classes, boxes = (torch.as_tensor(x).float() for x in (classes, boxes))
    return Predictions(HeadOutput(classes, torch.zeros_like(boxes), None, probabilities), boxes)


def load_case(case):
    anchors = Anchors.grid(tuple(VECTORS[f"{case}/image_size"].tolist()))
    gt = make_gt(VECTORS[f"{case}/gt"], classes=VECTORS[f"{case}/labels"])
    return anchors, gt, VECTORS[f"{case}/scores"][None], VECTORS[f"{case}/decoded"][None]


def crowd(rng, hw, count, step=None):
    """Make objects of all sizes, some smaller than a cell, outside the canvas or without area."""
    boxes = oracle.random_boxes(rng, count, hw, step)
    tiny = rng.uniform(0, min(hw), (count // 4, 2))
    boxes[: len(tiny)] = np.concatenate([tiny, tiny + rng.uniform(0.5, 6, tiny.shape)], axis=1)
    if step is not None:
        boxes = (np.round(boxes / step) * step).astype(np.float32)
    if count > 3:
        boxes[0, 2] = boxes[0, 0]
        boxes[-1] = np.array([hw[1] + 300, 10, hw[1] + 340, 60])
        boxes[-2] = boxes[-3]  # duplicates
    return boxes


def make_predictions(rng, anchors, objects, classes, num_classes):
    """Make logits and boxes: near an object around the anchor, and random elsewhere."""
    boxes = anchors.boxes.double().numpy().copy()
    logits = rng.normal(-3, 2, (len(boxes), num_classes))
    if len(objects):
        inside = oracle.inside_distance(oracle.locations(anchors), objects)
        pick = (inside + rng.normal(0, 20, inside.shape)).argmax(axis=0)
        near = rng.random(len(boxes)) < 0.7
        boxes[near] = objects[pick[near]]
        logits[np.arange(len(boxes)), classes[pick]] += near * rng.uniform(0, 4, len(boxes))
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    boxes = boxes + rng.normal(0, 0.15, boxes.shape) * sides
    return logits.astype(np.float32), boxes.astype(np.float32)


def make_batch(place, seed, num_classes=5):
    """Make a batch of a crowded, an empty and two other images, with shuffled objects."""
    rng = np.random.default_rng(seed)
    hw, layout, step = PLACES[place]
    anchors = Anchors.grid(hw, **layout)
    images = [crowd(rng, hw, count, step) for count in (40, 0, 3, 9)]
    labels = [rng.integers(num_classes, size=len(x)) for x in images]
    predicted = [
        make_predictions(rng, anchors, *x, num_classes) for x in zip(images, labels, strict=True)
    ]
    image_index = np.repeat(np.arange(4), [len(x) for x in images])
    order = rng.permutation(len(image_index)) if seed else np.arange(len(image_index))
    gt = make_gt(
        np.concatenate(images)[order], image_index[order], 4, np.concatenate(labels)[order]
    )
    area = (gt.boxes[:, 2:] - gt.boxes[:, :2]).prod(dim=1).numpy()
    owned = [np.flatnonzero((image_index[order] == i) & (area > 0)) for i in range(4)]
    return (
        anchors,
        gt,
        predict(*(np.stack(x) for x in zip(*predicted, strict=True))),
        predicted,
        owned,
    )


def scene_of(boxes, classes, logits, predicted, hw=(64, 64), strides=(8,), scales=(2.0,)):
    """Make a scene of one image and one level."""
    anchors = Anchors.grid(hw, strides=strides, scales=scales)
    return anchors, make_gt(boxes, classes=classes), predict(logits[None], predicted[None])


def by_hand():
    """8 x 8 locations of 8 pixels, all with a probability of 0.5; an object of 32 pixels around the
    four in the middle. The k-th predicts it moved by k mod 16 pixels."""
    boxes = torch.tensor([[16.0, 16, 48, 48]])
    moved = torch.arange(64.0).view(64, 1) % 16
    predicted = boxes + torch.cat([moved, 0 * moved, moved, 0 * moved], dim=1)
    logits = torch.zeros(64, 2)
    return scene_of(boxes, [1], logits, predicted)


def overlaps(moved):
    return (32 - moved) / (32 + moved)
