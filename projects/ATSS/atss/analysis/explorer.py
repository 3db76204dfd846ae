"""Rules on the images of a data set, as values for pictures and pages."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from atss_runner.images import resized

from ..anchors import Anchors
from ..config import (
    build_assigner,
    build_sampling,
    input_size,
    load_config,
    rule_arguments,
    with_rule,
)
from ..data.images import read_image
from ..errors import UserError, check_range
from ..predictor import Predictor
from ..structures import Assigner, GroundTruth, Predictions
from .explain import Explanation, explain

NEEDS_WEIGHTS = (
    "{} needs predictions: pass weights= (--weights) of a trained detector, and config= "
    "(--config-file), its config"
)
LONGEST_RULE = 300  # characters
QUALITY = 85
DECIMALS = 4


@dataclass(frozen=True)
class ResizedImage:
    """An image of the data set as rules get it.

    Attributes:
        pixels: (H, W, 3) uint8 BGR of the file.
        size: (height, width) after the resize of tests.
        gt: objects in pixels of the resized image.
        anchors: of its canvas.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    gt: GroundTruth
    anchors: Anchors


class Explorer:
    """Rules on the images of a registered data set.

    Args:
        config: file or name; sets the anchors and the size of images.
        weights: checkpoints of a detector with this config, for rules that need predictions.

    Raises:
        UserError: if the data set is not registered, or the config is wrong.
    """

    def __init__(
        self, dataset: str, config: str, opts: Sequence[Any] = (), weights: Sequence[str] = ()
    ):
        if dataset not in DatasetCatalog:
            raise UserError(
                f"unknown data set {dataset!r}: register it first, as in "
                "atss.data.datasets.register('mine=data.yaml:train'), and pass its name 'mine'"
            )
        self.dataset, self.weights = dataset, list(weights)
        self.records = DatasetCatalog.get(dataset)
        self.classes = list(MetadataCatalog.get(dataset).get("thing_classes", []))
        self.cfg = load_config(config, opts=opts)
        self.sampling = build_sampling(self.cfg)
        self.arguments = rule_arguments(self.cfg)
        self.image = lru_cache(2)(self._image)
        self.explain = lru_cache(16)(self._explain)
        self.predictions = lru_cache(16)(self._predict)
        self.predictor = lru_cache(2)(lambda number: Predictor(self.cfg, self.weights[number]))

    def find(self, image: str) -> int:
        """Find an image by the end of its path.

        Raises:
            UserError: if no image, or more than one, has this end.
        """
        wanted = Path(image).parts
        ends = (Path(x["file_name"]).parts[-len(wanted) :] for x in self.records)
        numbers = [i for i, parts in enumerate(ends) if parts == wanted]
        if len(numbers) != 1:
            count = f"{len(numbers)} images" if numbers else "no image"
            raise UserError(f"{self.dataset} has {count} called {image}")
        return numbers[0]

    def rule(self, text: str) -> Assigner:
        """Build a rule: its name, or name and arguments as in "ATSS TOP_K=3".

        Raises:
            UserError: naming the key.
        """
        return build_assigner(with_rule(self.cfg, text))

    def check_limits(self, rule: str) -> None:
        """Check the length of a rule's text, and the numbers that set its time and memory.

        Raises:
            UserError: naming the argument and the largest value.
        """
        if len(rule) > LONGEST_RULE:
            raise UserError(f"the rule has {len(rule)} characters, at most {LONGEST_RULE} are read")
        changed = rule_arguments(with_rule(self.cfg, rule))
        name = rule.split()[0] if rule.strip() else ""
        if name not in changed:
            return  # the message of `rule` has the names
        for x, now in zip(
            self.arguments[name]["arguments"], changed[name]["arguments"], strict=True
        ):
            if x["kind"] == "int" and now["value"] > x["high"]:
                where = f"{name} {x['key']}"
                raise UserError(f"{where} must be at most {x['high']} here, got {now['value']}")

    def _image(self, number: int) -> ResizedImage:
        """Read an image.

        Raises:
            UserError, OSError: if there is none of this number, or it is damaged.
        """
        check_range("image", number, 0, len(self.records) - 1)
        record = self.records[number]
        size = input_size(self.cfg)
        pixels = read_image(record["file_name"], [size])
        height, width = resized(*pixels.shape[:2], *size)
        zoom = np.array([width / pixels.shape[1], height / pixels.shape[0]])
        divisor = self.sampling.divisibility
        canvas = (-(-height // divisor) * divisor, -(-width // divisor) * divisor)
        gt = _ground_truth(record, zoom)
        return ResizedImage(pixels, (height, width), gt, self.sampling.anchors(canvas))

    def _explain(self, number: int, rule: str, weights: int = 0) -> Explanation:
        """Assign the objects of an image.

        Raises:
            UserError: for a wrong rule or number, or missing weights.
        """
        image, assigner = self.image(number), self.rule(rule)
        predictions = None
        if getattr(assigner, "looks_at_predictions", False):
            if not self.weights:
                raise UserError(NEEDS_WEIGHTS.format(rule))
            predictions = self.predictions(number, weights)
        return explain(assigner, image.anchors, image.gt, predictions)

    def _predict(self, number: int, weights: int) -> Predictions:
        check_range("weights", weights, 0, len(self.weights) - 1)
        return self.predictor(weights).at_anchors(self.image(number).pixels)

    # Below: lists and numbers for pages.

    def about_image(self, number: int) -> dict[str, Any]:
        """Return size, objects and grids of an image."""
        image = self.image(number)
        anchors, (height, width) = image.anchors, image.size
        first = np.cumsum([0, *anchors.per_level])[:-1]
        cells = [anchors.boxes[i : i + anchors.num_anchors] for i in first.tolist()]
        return {
            "width": width,
            "height": height,
            "boxes": _round(image.gt.boxes.numpy(), 2),
            "classes": image.gt.classes.tolist(),
            "strides": list(anchors.strides),
            "sizes": [list(x) for x in anchors.sizes],
            "offset": anchors.offset,
            "shapes": [_round((x[:, 2:] - x[:, :2]).numpy(), 1) for x in cells],
        }

    def about_rule(self, number: int, rule: str, weights: int = 0) -> dict[str, Any]:
        """Return the positive anchors of an image, the pairs that were lost, and values of each
        object."""
        found = self.explain(number, rule, weights)
        count = len(self.image(number).gt)
        owner, similarity = found.pairs["owner"], found.pairs["similarity"]
        anchors = np.flatnonzero(found.gt_index >= 0)
        best = np.zeros(count)
        np.fmax.at(best, owner, similarity)
        return {
            "anchors": anchors.tolist(),
            "owners": found.gt_index[anchors].tolist(),
            "scores": None if found.score is None else _round(found.score[anchors]),
            "lost": [found.pairs[x][found.is_lost].tolist() for x in ("owner", "index")],
            "objects": {
                "candidates": np.bincount(owner, minlength=count).tolist(),
                "best": _round(best),
                **{name: _round(values) for name, values in found.objects.items()},
            },
        }

    def about_object(self, number: int, rule: str, weights: int, object_id: int) -> dict[str, Any]:
        """Return the candidates of an object, with predicted boxes if the rule looks at them."""
        found = self.explain(number, rule, weights)
        check_range("object", object_id, 0, len(self.image(number).gt) - 1)
        pairs = found.of_object(object_id)
        names = [x for x in ("similarity", "probability", "cost") if x in pairs]
        values: dict[str, Any] = {name: _round(pairs[name]) for name in names}
        values |= {"anchors": pairs["index"].tolist(), "chosen": pairs["chosen"].tolist()}
        if "cost" in pairs:
            boxes = self.predictions(number, weights).boxes[0][pairs["index"]]
            values["boxes"] = _round(boxes.numpy(), 1)
        return values

    def detections(self, number: int, weights: int) -> dict[str, Any]:
        """Return the detections on an image, in pixels of the resized image.

        Raises:
            UserError: without weights.
        """
        if not self.weights:
            raise UserError(NEEDS_WEIGHTS.format("the list of detections"))
        check_range("weights", weights, 0, len(self.weights) - 1)
        image = self.image(number)
        found = self.predictor(weights)(image.pixels)
        zoom = np.array(image.size[::-1]) / image.pixels.shape[1::-1]
        boxes = found.boxes * np.tile(zoom, 2)
        lists = {"boxes": _round(boxes, 1), "classes": found.classes.tolist()}
        return lists | {"scores": _round(found.scores)}

    def picture(self, number: int, longest: int) -> bytes:
        """Return a jpeg whose longest side is at most ``longest`` pixels."""
        pixels = self.image(number).pixels
        scale = min(1.0, longest / max(pixels.shape[:2]))
        size = tuple(max(round(side * scale), 1) for side in pixels.shape[1::-1])
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) if scale < 1 else pixels
        return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()


def _ground_truth(record: dict, zoom: np.ndarray) -> GroundTruth:
    objects = [x for x in record["annotations"] if not x.get("iscrowd")]
    boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in objects]
    scaled = np.array(boxes, dtype=np.float64).reshape(-1, 4) * np.tile(zoom, 2)
    classes = torch.tensor([x["category_id"] for x in objects], dtype=torch.long)
    index = torch.zeros(len(objects), dtype=torch.long)
    return GroundTruth(torch.from_numpy(scaled), classes, index, 1)


def _round(values: np.ndarray, decimals: int = DECIMALS) -> list:
    """Return lists of rounded numbers, None for NaN and infinity."""
    numbers = np.round(values.astype(np.float64), decimals)
    if np.isfinite(numbers).all():
        return numbers.tolist()
    objects = numbers.astype(object)
    objects[~np.isfinite(numbers)] = None
    return objects.tolist()
