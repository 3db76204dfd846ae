"""Detections of a data set, matched with its objects, read from files or the folder of a run."""

import argparse
import json
import math
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from reprlib import repr as shown
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import load_config
from ..data import datasets
from ..engine.best import BEST_RESULTS
from ..engine.coco import COCO_LIMIT, evaluate_boxes, hotcoco
from ..engine.sources import recall
from ..errors import UserError
from ..labels.coco import category_names, find_in_json, read_coco
from ..labels.findings import ERROR
from ..labels.formats import reading_of
from ..labels.numbering import GroundTruth
from ..labels.values import is_number

FIELDS = ("image_id", "category_id", "bbox", "score")
# A detection is WRONG also if it is IGNORED by AP: in a crowd, or beyond the limit of its class.
RIGHT, WRONG, IGNORED = 1, 0, -1


class Files(NamedTuple):
    """The files of evaluated results.

    Attributes:
        image_dir: folder in which the names of images begin, or "".
        count_difficult, limit: as in :class:`Results`.
        source: of the annotations, as in DATASETS.REGISTER, or "".
    """

    annotations: str
    detections: str
    image_dir: str = ""
    count_difficult: bool = False
    limit: int = COCO_LIMIT
    source: str = ""


class Results:
    """N detections matched with M objects as AP at IoU 0.5 does. Difficult objects are crowds but
    for AP.

    Args:
        content: annotations in COCO's format.
        detections: in COCO's format of results, as from :func:`read_detections`.
        count_difficult: whether difficult objects count like others.
        limit: detections of an image and class that count, at least COCO's 100.

    Attributes:
        names: of the K classes, by id.
        image_ids: of the images, in the order of the numbers of ``truth``.
        truth: annotations and images numbered from 1.
        dataset: the same with difficult objects as crowds.
        detections: numbered like ``truth``.
        evaluation: AP, as from :func:`~atss.engine.coco.evaluate_boxes`.
        matching: hotcoco's evaluation for everything else.
        labels: hotcoco's suspected errors of labels, by falling score.
        image, category, score: (N,) of the detections, numbered from 0.
        status: (N,) int64 RIGHT, WRONG or IGNORED.
        match: (N,) int64 index of the object of a right detection, or -1.
        gt_image, gt_category, gt_boxes: (M,), (M,), (M, 4) of the objects.
        crowd: (M,) bool.

    Raises:
        UserError: if hotcoco is not installed.
    """

    def __init__(
        self,
        content: dict,
        detections: list[dict],
        count_difficult: bool = False,
        limit: int = COCO_LIMIT,
    ):
        if hotcoco is None:
            raise UserError("the report needs hotcoco, which is not installed: pip install hotcoco")
        self.limit = max(limit, COCO_LIMIT)
        ids = sorted(c["id"] for c in content["categories"])
        self.names = category_names(content)
        self.truth = GroundTruth(content, {x: i for i, x in enumerate(ids)}, count_difficult)
        self.image_ids = list(self.truth.image_numbers)
        self.detections = self.truth.number(detections)
        self._evaluate()
        number = {key: _column(self.detections, key) for key in ("image_id", "category_id")}
        self.image, self.category = number["image_id"] - 1, number["category_id"] - 1
        self.score = np.array([x["score"] for x in self.detections], dtype=np.float64)
        objects = self.dataset["annotations"]
        self.gt_image = _column(objects, "image_id") - 1
        self.gt_category = _column(objects, "category_id") - 1
        self.gt_boxes = np.array([x["bbox"] for x in objects], dtype=np.float64).reshape(-1, 4)
        self.crowd = _column(objects, "iscrowd").astype(bool)

    def _evaluate(self) -> None:
        dataset = self.truth.dataset
        annotations = [
            {**x, "iscrowd": x["iscrowd"] or x["difficult"]} for x in dataset["annotations"]
        ]
        self.dataset = {**dataset, "annotations": [{**x, "difficult": False} for x in annotations]}
        # Without the recalls at 1 and 10 detections, comparisons take half the time.
        self.matching = evaluate_boxes(self.dataset, self.detections, max_detections=[self.limit])
        self.matching.summary_lines()
        self.evaluation = self.matching
        if any(x["difficult"] for x in dataset["annotations"]) and self.detections:
            with redirect_stdout(StringIO()):
                self.evaluation = evaluate_boxes(
                    dataset, self.detections, max_detections=(1, 10, self.limit)
                )
                self.evaluation.summarize()
        found = self.matching.image_diagnostics(0.5, 0.5)
        self.labels = found["label_errors"]
        self.status = np.full(len(self.detections), IGNORED)
        self.match = np.full(len(self.detections), -1)
        for number, status in found["dt_status"].items():
            self.status[number - 1] = RIGHT if status == "tp" else WRONG
        for number, gt_number in found["dt_match"].items():
            if self.status[number - 1] == RIGHT:
                self.match[number - 1] = gt_number - 1


def _column(entries: list[dict], key: str) -> np.ndarray:
    return np.array([x[key] for x in entries], dtype=np.int64)


def read_annotations(file: str) -> dict:
    """Read COCO's json of ground truth.

    Raises:
        UserError: if it has errors, or no category.
    """
    content = read_coco(file)
    for finding in find_in_json(content)[0]:
        if finding.level == ERROR:
            raise UserError(f"{file} has {finding.sentence()}")
    return content


def read_detections(file: str, content: dict) -> tuple[list[dict], int]:
    """Read COCO's json of results.

    Args:
        content: the annotations.

    Returns:
        the detections of its images, and the number of others.

    Raises:
        UserError: naming the first detection that is malformed or of an unknown class; if all
            detections are of other images.
    """
    try:
        with open(file, encoding="utf-8-sig") as opened:
            found = json.load(opened)
    except OSError as error:
        raise UserError(f"cannot read the detections {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid json: {error}") from error
    if not isinstance(found, list):
        raise UserError(
            f"{file} is not in COCO's format of results: expected a list of detections, got a "
            f"{type(found).__name__}"
        )
    categories = {c["id"] for c in content["categories"]}
    for i, x in enumerate(found):
        for problem in _problems(x, categories):
            raise UserError(f"{file}: detection {i} {problem}")
    found = _with_ids_of_names(found, content["images"], file)
    images = {x["id"] for x in content["images"]}
    of_images = [x for x in found if x["image_id"] in images]
    if found and not of_images:
        raise UserError(
            f"{file}: none of the {len(found)} detections is of an image of the annotations: the "
            f"first has image_id {shown(found[0]['image_id'])}"
        )
    return of_images, len(found) - len(of_images)


def _with_ids_of_names(found: list[dict], images: list[dict], file: str) -> list[dict]:
    """Return detections with the ids of the images that their file names name: those of `atss
    predict` are guessed, and may be of other images.

    Raises:
        UserError: if an image has the id of a detection but another name.
    """
    name_of = {x["id"]: _last(x.get("file_name")) for x in images}
    ids: dict[str | None, list] = {}
    for number, name in name_of.items():
        ids.setdefault(name, []).append(number)
    renumbered = []
    for i, x in enumerate(found):
        name, own = _last(x.get("file_name")), name_of.get(x["image_id"])
        if name is not None and name != own:
            if len(same := ids.get(name, [])) == 1:
                x = {**x, "image_id": same[0]}
            elif own is not None:
                raise UserError(
                    f"{file}: detection {i} is of {name}, but the annotations name its image_id "
                    f"{shown(x['image_id'])} {own}: remove file_name if the ids are right"
                )
        renumbered.append(x)
    return renumbered


def _last(path: Any) -> str | None:
    """Return the file's name in a path, of Windows too; None if there is no text."""
    return re.split(r"[\\/]", path)[-1] if isinstance(path, str) and path else None


def _problems(x: Any, categories: set) -> Iterator[str]:
    if not isinstance(x, dict):
        yield f"is {shown(x)}: expected a dict with {', '.join(FIELDS)}"
        return
    for field in FIELDS:
        if field not in x:
            yield f"has no {field!r}"
    for field in ("image_id", "category_id"):
        if not isinstance(x[field], int | str):
            yield f"has {field} {shown(x[field])}: expected a number or a text"
    if x["category_id"] not in categories:
        known = sorted(categories)
        yield (
            f"has category_id {shown(x['category_id'])}, which the annotations do not have: they "
            f"have {', '.join(map(repr, known[:5]))}{', ...' if len(known) > 5 else ''}"
        )
    if not _is_finite(x["score"]):
        yield f"has score {shown(x['score'])}: expected a finite number"
    box = x["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box))):
        yield f"has bbox {shown(box)}: expected 4 finite numbers (x, y, width, height)"
    if box[2] < 0 or box[3] < 0:
        yield f"has bbox {shown(box)} of negative size"


def _is_finite(x: Any) -> bool:
    # Squares of larger numbers would overflow.
    return is_number(x) and math.isfinite(x) and abs(x) < 1e100


def find_results(folder: str) -> Files:
    """Find the results of a run's best weights, or else of its last evaluation, and their
    annotations.

    Raises:
        UserError: if ``folder`` has no config.yaml or no results, or the annotations are unknown.
    """
    config = Path(folder, "config.yaml")
    if not config.is_file():
        raise UserError(f"{folder} is not the folder of a training: it has no config.yaml")
    cfg = load_config(config)
    candidates = [
        (name, Path(folder, "inference", name, file))
        for name in cfg.DATASETS.TEST
        for file in (BEST_RESULTS, "coco_instances_results.json")
    ]
    name, detections = next((x for x in candidates if x[1].is_file()), ("", None))
    if detections is None:
        looked = ", ".join(str(file) for _, file in candidates) or "DATASETS.TEST is empty"
        raise UserError(f"{folder} has no results of an evaluation by COCO's rules: {looked}")
    cfg.DATASETS.TEST = (name,)
    args = argparse.Namespace(config_file=str(config), opts=[], register=[], eval_only=True)
    args.classes = args.first_pixel = None
    recall(args, cfg)
    for spec in args.register:
        datasets.register(spec, reading_of(args))
    if name not in DatasetCatalog:
        raise UserError(
            f"the annotations of data set {name} are unknown: pass them by --annotations, and "
            f"--detections {detections}"
        )
    datasets.provide_json(name)
    metadata = MetadataCatalog.get(name)
    image_dir = metadata.get("image_root", "")
    source = next((x for x in args.register if x.startswith(f"{name}=")), "")
    return Files(
        metadata.json_file,
        str(detections),
        image_dir,
        cfg.TEST.COUNT_DIFFICULT,
        max(cfg.TEST.DETECTIONS_PER_IMAGE, COCO_LIMIT),
        source,
    )
