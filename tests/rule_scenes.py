"""Random scenes and arguments of every rule, for ``tests/equality.py --rules``.

Two commits must build the same scenes, so only stable parts of the package are used: anchors, the
structures of a rule's arguments, and the names of rules.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from atss import Anchors, GroundTruth, HeadOutput, assigners
from atss.structures import Predictions

NUM_CLASSES = 4
# Scene n has trait n modulo their number, and each other trait with a probability of CHANCE.
TRAITS = (
    "plain",
    "crowded",
    "several images",
    "empty images",
    "empty batch",
    "tiny",
    "beyond the canvas",
    "without area",
    "duplicates",
    "ties",
    "not finite",
    "far predictions",
    "constant predictions",
    "probabilities",
    "nine anchors",
    "one level",
    "odd strides",
    "large canvas",
)
CHANCE = 0.1
RANGES = (64, 128, 256, 512)


class Scene(NamedTuple):
    """Arguments of a rule, and the traits of the scene."""

    traits: tuple[str, ...]
    anchors: Anchors
    gt: GroundTruth
    predictions: Predictions


def closeness(a: Tensor, b: Tensor) -> Tensor:
    """Return a similarity of the distance between centres; a plain function."""
    return 1 / (1 + (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]).norm(dim=-1) / 32)


NWD, SIMD = {"similarity": "nwd"}, {"similarity": "simd"}
ARGUMENTS: dict[str, list[dict]] = {
    "ATSS": [
        {},
        {"top_k": 1},
        {"top_k": 15},
        {"count": "locations"},
        {"count": "locations", "top_k": 3},
        {"similarity": "function"},
        NWD,
        SIMD,
    ],
    "DDOD": [
        {"alpha": 0.8},
        {"alpha": 0.5, "top_k": 4},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"alpha": 0.8, "count": "locations"},
        {"alpha": 0.8, "similarity": "function"},
        {"alpha": 0.8, **NWD},
        {"alpha": 0.8, **SIMD},
    ],
    "Matcher": [{}, {"low_quality_matches": False}],
    "Sampled": [{"num": 100_000, "positive_fraction": 1.0}],  # all, because others are random
    "MaxIoU": [
        {},
        {"low_quality_matches": False},
        {"low_quality_matches": False, "in_box": True},
        {"in_box": True},
        {"claims_go_to": "claimant"},
        {"claims_go_to": "claimant", "in_box": True},
        {"background_below": 0.1, "positive_from": 0.1},
        {"background_below": 0.1, "positive_from": 0.7},
        NWD,
        SIMD,
        {"claims_go_to": "claimant", **NWD},
    ],
    "SpatialScale": [
        {},
        {"radius": 1.5},
        {"top_k": 9},
        {"margin": 0.0},
        {"margin": 0.0, "radius": 0.5},
        {"top_k": 3, "radius": 1.5},
        {"ranges": (16, 32, 64, 128)},
        {"ranges": (16, 32, 64, 128), "radius": 2.5},
    ],
    "TAL": [
        {},
        {"inside": "before"},
        {"top_k": 1},
        {"top_k": 1, "inside": "before"},
        {"alpha": 0.5, "beta": 2.0, "top_k": 3},
        {"alpha": 0.0},
        {"beta": 0.1},
        NWD,
        SIMD,
        {"inside": "before", **NWD},
    ],
    "SimOTA": [
        {},
        {"top_k": 3, "radius": 1.0},
        {"radius": 0.0},
        {"iou_weight": 0.0},
        {"cls_weight": 0.0},
        {"top_k": 50},
        NWD,
        SIMD,
    ],
    "SoftLabel": [
        {},
        {"top_k": 3, "radius": 1.0},
        {"radius": 0.0},
        {"iou_weight": 0.0},
        {"top_k": 50},
        NWD,
        SIMD,
    ],
    "OTA": [
        {},
        {"top_k": 3, "radius": 1.0},
        {"iterations": 5},
        {"regularisation": 0.5},
        {"iou_weight": 0.0},
        NWD,
        SIMD,
    ],
    "PAA": [
        {},
        {"take": "all"},
        {"claims_go_to": "best"},
        {"take": "all", "claims_go_to": "best", "box_weight": 1.0},
        {"top_k": 3, "box_weight": 0.0},
        {"iou_threshold": 0.4},
        NWD,
        SIMD,
    ],
    "POTO": [
        {},
        {"alpha": 0.5, "radius": 4.0},
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"radius": 0.5},
        NWD,
        SIMD,
    ],
}


def make_rule(name: str, arguments: dict, num_levels: int = 5):
    """Make a rule of the imported package. In older commits DDOD is ATSS with an alpha."""
    arguments = dict(arguments)
    similarities = {"nwd": assigners.NWD(), "simd": assigners.SimD(), "function": closeness}
    if "similarity" in arguments:
        arguments["similarity"] = similarities[arguments["similarity"]]
    if name == "SpatialScale":
        arguments["ranges"] = arguments.get("ranges", RANGES)[: num_levels - 1]
    if name == "DDOD" and not hasattr(assigners, "DDOD"):
        name = "ATSS"
    return getattr(assigners, name)(**arguments)


def make_scene(number: int) -> Scene:
    """Make the scene of a number, the same on every machine with the same torch."""
    generator = torch.Generator().manual_seed(number)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    chosen = (rand(len(TRAITS)) < CHANCE).tolist()
    traits = {x for x, yes in zip(TRAITS, chosen, strict=True) if yes and x != "empty batch"}
    traits = traits - {"plain"} | {TRAITS[number % len(TRAITS)]}
    canvas = (64 + 136 * rand(2)).long() * (3 if "large canvas" in traits else 1)
    anchors = _anchors(traits, tuple(canvas.tolist()), float(2 ** (1 + 3 * rand(1)).floor()))
    gt = _objects(traits, anchors, canvas.flip(0), rand)
    predictions = _predictions(traits, anchors, gt, rand)
    return Scene(tuple(x for x in TRAITS if x in traits), anchors, gt, predictions)


def _anchors(traits: set[str], canvas_hw: tuple[int, int], scale: float) -> Anchors:
    scales, ratios, strides, offset = (scale,), (1.0,), (8, 16, 32, 64, 128), 0.5
    if "nine anchors" in traits:
        canvas_hw = canvas_hw[0] // 2, canvas_hw[1] // 2
        scales, ratios = (scale, scale * 2 ** (1 / 3), scale * 2 ** (2 / 3)), (0.5, 1.0, 2.0)
    if "odd strides" in traits:
        strides, offset = (7, 12, 30), 0.0
    if "one level" in traits:
        strides = strides[:1]
    return Anchors.grid(canvas_hw, strides, scales, ratios, offset)


def _objects(traits: set[str], anchors: Anchors, canvas: Tensor, rand) -> GroundTruth:
    """Make objects on a canvas of (width, height)."""
    num_images = 3 if traits & {"several images", "empty images"} else 1
    most = 60 if "crowded" in traits else 6
    largest = 400 if "large canvas" in traits else 160
    count = 0 if "empty batch" in traits else num_images * int(1 + most * rand(1))
    centre, size = rand(count, 2), 4 * (largest / 4) ** rand(count, 2)
    if "tiny" in traits:
        tiny = rand(count, 1) < 0.7
        size = torch.where(tiny, 0.5 + 6 * rand(count, 2), size)
    if "beyond the canvas" in traits:
        centre, size = 2 * centre - 0.5, 3 * size
    boxes = torch.cat([centre * canvas - size / 2, centre * canvas + size / 2], dim=1)
    if "beyond the canvas" not in traits:
        boxes = boxes.clamp(min=0).minimum(canvas.repeat(2))
    if "ties" in traits:
        boxes = (boxes / 4).round() * 4
        for i in range(0, count, 2):  # IoUs with an anchor of exactly 1 and 1 / 2
            boxes[i] = anchors.boxes[int(len(anchors.boxes) * rand(1))]
            boxes[i, 2] -= (boxes[i, 2] - boxes[i, 0]) * (rand(1) < 0.7).squeeze() / 2
    if "without area" in traits:
        flat = rand(count, 2) < 0.3
        boxes[:, 2:] = torch.where(flat, boxes[:, :2], boxes[:, 2:])
    classes = (NUM_CLASSES * rand(count)).long()
    image = (num_images * rand(count)).long()
    if "several images" not in traits:
        image = image.sort().values
    if "empty images" in traits:
        image[image == int(num_images * rand(1))] = int(num_images * rand(1))
    if "duplicates" in traits:
        for i in range(1, count):
            other = int(i * rand(1))
            if rand(1) < 0.4:
                boxes[i], image[i] = boxes[other], image[other]
                classes[i] = classes[other] if rand(1) < 0.7 else classes[i]
    return GroundTruth(boxes, classes, image, num_images)


def _predictions(traits: set[str], anchors: Anchors, gt: GroundTruth, rand) -> Predictions:
    """Predict for most anchors an object that contains it, else the anchor itself."""
    shape = gt.num_images, len(anchors.boxes)
    points = (anchors.boxes[:, :2] + anchors.boxes[:, 2:]) / 2
    # Almost normal: the sum of six uniform numbers.
    logits = 2 * (rand(*shape, NUM_CLASSES, 6).sum(dim=-1) - 3) / 0.7 - 2
    boxes = anchors.boxes.repeat(gt.num_images, 1, 1)
    for image in range(gt.num_images):
        ids = (gt.image_index == image).nonzero().squeeze(1)
        if not len(ids):
            continue
        held = (points[:, None] > gt.boxes[ids, :2]) & (points[:, None] < gt.boxes[ids, 2:])
        preference = rand(shape[1], len(ids)) + held.all(dim=-1)
        owner = ids[preference.argmax(dim=1)]
        near = rand(shape[1], 1) < 0.7
        boxes[image] = torch.where(near, gt.boxes[owner], boxes[image])
        index = torch.arange(shape[1])
        logits[image, index, gt.classes[owner]] += 4 * rand(shape[1]) * near.squeeze(1)
    sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    boxes = boxes + 0.5 * (rand(*shape, 4) - 0.5) * sides
    if "ties" in traits:
        logits, boxes = logits.round(), (boxes / 4).round() * 4
    if "constant predictions" in traits:
        logits, boxes = logits[:, :1].expand_as(logits), boxes[:, -1:].expand_as(boxes)
    if "far predictions" in traits:
        boxes = boxes + 1e5 * (rand(*shape, 1) < 0.1) * rand(*shape, 1)
    if "not finite" in traits:
        wrong = torch.tensor([torch.nan, torch.inf, -torch.inf])
        boxes = torch.where(rand(*shape, 4) < 0.03, wrong[(3 * rand(*shape, 4)).long()], boxes)
        odd = wrong[(3 * rand(*logits.shape)).long()]
        logits = torch.where(rand(*logits.shape) < 0.03, odd, logits)
    probabilities = "probabilities" in traits
    if probabilities:  # some are 0 and 1
        logits = ((3 * logits).sigmoid() * 100).round() / 100
    return Predictions(HeadOutput(logits, boxes, None, probabilities), boxes)
