"""The rules that look at predictions: reference vectors, brute force in float64, and by hand."""

import numpy as np
import oracle
import pytest
import torch
from conftest import GOLDEN, make_gt

from atss import BACKGROUND, Anchors, HeadOutput
from atss.assigners import ATSS, NWD, OTA, PAA, TAL, SimD, SimOTA, SoftLabel
from atss.structures import Predictions

VECTORS = {
    **np.load(GOLDEN / "dynamic_assignment.npz"),
    **np.load(GOLDEN / "dynamic_soft_assignment.npz"),
}
SLOW = pytest.mark.slow
CASES = ("typical", "crowded", "empty")


def predict(classes, boxes, probabilities=False) -> Predictions:
    """Of (N, R, K) and (N, R, 4)."""
    classes, boxes = (torch.as_tensor(x).float() for x in (classes, boxes))
    return Predictions(HeadOutput(classes, torch.zeros_like(boxes), None, probabilities), boxes)


def of_case(case):
    anchors = Anchors.grid(tuple(VECTORS[f"{case}/image_size"].tolist()))
    gt = make_gt(VECTORS[f"{case}/gt"], classes=VECTORS[f"{case}/labels"])
    return anchors, gt, VECTORS[f"{case}/scores"][None], VECTORS[f"{case}/decoded"][None]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "rule"), [("tal", TAL()), ("simota", SimOTA())])
def test_reference_vectors(case, name, rule):
    """mmdet's, of scores as they are."""
    anchors, gt, scores, boxes = of_case(case)
    found = rule(anchors, gt, predict(scores, boxes, probabilities=True))
    np.testing.assert_array_equal(found.gt_index[0], VECTORS[f"{case}/{name}_matched"])


@pytest.mark.parametrize("case", CASES)
def test_reference_vectors_of_soft_labels(case):
    """mmdet's, of the scores' logits."""
    anchors, gt, scores, boxes = of_case(case)
    p = torch.from_numpy(scores).clamp(1e-6, 1 - 1e-6)
    found = SoftLabel()(anchors, gt, predict((p / (1 - p)).log(), boxes))
    matched = VECTORS[f"{case}/soft_matched"]
    np.testing.assert_array_equal(found.gt_index[0], matched)
    overlap = np.where(matched >= 0, VECTORS[f"{case}/soft_overlap"], 0)
    np.testing.assert_allclose(found.score[0], overlap, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_scores_of_tal_are_the_reference_metric_scaled(case):
    anchors, gt, scores, boxes = of_case(case)
    found = TAL()(anchors, gt, predict(scores, boxes, probabilities=True))
    overlap = oracle.pairwise_iou(gt.boxes.double().numpy(), boxes[0].astype(np.float64))
    for g in range(len(gt)):
        own = (found.gt_index[0] == g).numpy()
        if own.any():
            metric = VECTORS[f"{case}/tal_metric"][own].astype(np.float64)
            expected = metric / (metric.max() + 1e-7) * overlap[g, own].max()
            np.testing.assert_allclose(found.score[0, own], expected, rtol=1e-4, atol=1e-6)


def crowd(rng, hw, count):
    """Objects of all sizes, some smaller than a cell, some beyond the canvas."""
    boxes = oracle.random_boxes(rng, count, hw)
    tiny = rng.uniform(0, min(hw), (count // 4, 2))
    boxes[: len(tiny)] = np.concatenate([tiny, tiny + rng.uniform(0.5, 6, tiny.shape)], axis=1)
    if count > 3:
        boxes[-1] = np.array([hw[1] + 300, 10, hw[1] + 340, 60])
        boxes[-2] = boxes[-3]  # one place, twice
    return boxes


def guesses(rng, anchors, objects, classes, num_classes):
    """What a model might say: near objects that hold the anchor, and elsewhere anything."""
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


# name -> rule, brute force, what both take.
BRUTE = {
    "TAL": (TAL(), oracle.tal, {}),
    "TAL of 3": (TAL(3, 0.5, 2.0), oracle.tal, {"k": 3, "alpha": 0.5, "beta": 2.0}),
    "TAL before": (TAL(inside="before"), oracle.tal, {"before": True}),
    "TAL by class": (TAL(beta=0.1), oracle.tal, {"beta": 0.1}),
    "SimOTA": (SimOTA(), oracle.simota, {}),
    "SimOTA of 3": (SimOTA(3, 1.5), oracle.simota, {"top_k": 3, "radius": 1.5}),
    "SoftLabel": (SoftLabel(), oracle.soft_label, {}),
    "SoftLabel of 3": (SoftLabel(3, 1.0), oracle.soft_label, {"top_k": 3, "radius": 1.0}),
    "OTA": (OTA(), oracle.ota, {}),
    "OTA of 3": (OTA(3, 1.5), oracle.ota, {"top_k": 3, "radius": 1.5}),
    "PAA": (PAA(), oracle.paa, {}),
    "PAA of all": (PAA(take="all"), oracle.paa, {"take": "all"}),
    "PAA of 3": (PAA(3, box_weight=1.0), oracle.paa, {"k": 3, "box_weight": 1.0}),
    "ATSS of predictions": (ATSS(alpha=0.8), oracle.ddod, {}),
    "ATSS of boxes": (ATSS(4, alpha=0.5), oracle.ddod, {"k": 4, "alpha": 0.5}),
}
for rule, brute in {
    **{TAL: oracle.tal, SimOTA: oracle.simota, SoftLabel: oracle.soft_label},
    **{OTA: oracle.ota, PAA: oracle.paa},
}.items():
    for like, similarity in (("nwd", NWD()), ("simd", SimD())):
        BRUTE[f"{rule.__name__} by {like}"] = rule(similarity=similarity), brute, {"like": like}


def expected(brute, arguments, anchors, objects, classes, logits, boxes):
    if not len(objects):
        return np.full(len(boxes), BACKGROUND), np.zeros(len(boxes))
    boxes, objects = boxes.astype(np.float64), objects.astype(np.float64)
    return brute(anchors, objects, classes, logits.astype(np.float64), boxes, **arguments)


@pytest.mark.parametrize("name", BRUTE)
@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 12))]
)
def test_equals_brute_force(name, seed):
    """A batch of unlike images: crowded, empty, with few objects; whose objects come mixed up."""
    rule, brute, arguments = BRUTE[name]
    rng = np.random.default_rng(seed)
    hw, num_classes = (160, 350), 5
    anchors = Anchors.grid(hw)
    images = [crowd(rng, hw, count) for count in (40, 0, 3, 9)]
    labels = [rng.integers(num_classes, size=len(x)) for x in images]
    said = [guesses(rng, anchors, *x, num_classes) for x in zip(images, labels, strict=True)]
    image_index = np.repeat(np.arange(4), [len(x) for x in images])
    order = rng.permutation(len(image_index)) if seed else np.arange(len(image_index))
    gt = make_gt(
        np.concatenate(images)[order], image_index[order], 4, np.concatenate(labels)[order]
    )
    found = rule(anchors, gt, predict(*(np.stack(x) for x in zip(*said, strict=True))))
    for i, (logits, boxes) in enumerate(said):
        own = np.flatnonzero(image_index[order] == i)
        owner, score = expected(
            *(brute, arguments, anchors, gt.boxes.numpy()[own], gt.classes.numpy()[own]),
            *(logits, boxes),
        )
        owner = np.where(owner >= 0, own[owner] if len(own) else 0, BACKGROUND)
        np.testing.assert_array_equal(found.gt_index[i], owner)
        assert (found.score is None) == (brute in (oracle.paa, oracle.ddod))
        if found.score is not None:
            np.testing.assert_allclose(found.score[i], score, rtol=1e-5, atol=1e-6)
