"""What evaluation needs of a data set: its loader and its evaluator."""

import json
import os
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MapDataset, MetadataCatalog
from detectron2.data.samplers import InferenceSampler
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.evaluation.coco_evaluation import COCOeval_opt as COCOeval
from detectron2.utils import comm
from pycocotools.coco import COCO
from torch.utils.data import DataLoader

from ..config import images_per_test_batch
from ..data.datasets import classes_of, columns_of, open_records, provide_json
from ..data.loader import WatchedLoader, loader_options
from ..data.mapper import Mapper
from ..errors import UserError
from ..labels.coco import SHORTEST, find_in_json, is_difficult, learnable
from .agreement import facts_of_data, refuse_differences
from .watch import current, wait_for_all


class BoxEvaluator(COCOEvaluator):
    """Detectron2's evaluator of boxes, for the objects that training learns (:func:`learnable`).

    It numbers images, classes and objects itself: pycocotools takes an object with id 0 for "not
    found", and compares ids above 2^63 as float64. On an image of which objects were clipped or
    left out, detections are clipped, and left out if nothing remains.

    Args:
        count_difficult: False: Pascal VOC's rule for objects marked difficult, to which detections
            are neither right nor wrong. True: they count as others do.

    Raises:
        ValueError: as :func:`check_metadata`.
    """

    def __init__(self, dataset_name: str, output_dir: str, count_difficult: bool = False):
        provide_json(dataset_name)
        # Of data that came in no json Detectron2 writes one there: not to be trusted the next time.
        super().__init__(dataset_name, ("bbox",), output_dir=output_dir, allow_cached_coco=False)
        content: dict = {"annotations": [], **self._coco_api.dataset}
        # A data set of --register was checked when it was registered.
        objects = None if columns_of(dataset_name) is not None else find_in_json(content)[1]
        if objects is not None:  # None also for malformed fields: all annotations count
            count = len(content["annotations"])
            content = learnable(content, objects)
            if left_out := count - len(content["annotations"]):
                self._logger.warning(
                    "Data set %s: %d of %d annotations do not count: they have no area, or lie "
                    "outside their image, and training does not learn them",
                    *(dataset_name, left_out, count),
                )
        images = content["images"]
        # Contiguous number of each id of a class; a json that Detectron2 wrote has these for ids.
        numbers = {c["id"]: c["id"] for c in content["categories"]}
        numbers = self._metadata.get("thing_dataset_id_to_contiguous_id", numbers)
        classes = [c for c in content["categories"] if c["id"] in numbers]  # that the model knows
        self.category_ids = {number: category_id for category_id, number in numbers.items()}
        self.image_numbers = {x["id"]: i for i, x in enumerate(images, start=1)}
        self.trimmed = {x["id"]: (x["width"], x["height"]) for x in images if "trimmed" in x}
        self._coco_api: COCO = COCO()
        self._coco_api.dataset = {
            "images": [{**x, "id": self.image_numbers[x["id"]]} for x in images],
            "categories": [{**c, "id": numbers[c["id"]] + 1} for c in classes],
            "annotations": [
                {
                    **x,
                    "id": i,
                    "image_id": self.image_numbers[x["image_id"]],
                    "category_id": numbers[x["category_id"]] + 1,
                    "difficult": is_difficult(x) and not count_difficult,
                }
                for i, x in enumerate(content["annotations"], start=1)
                if x["category_id"] in numbers and x["image_id"] in self.image_numbers
            ],
        }
        with redirect_stdout(StringIO()):
            self._coco_api.createIndex()

    def _eval_predictions(self, predictions: list[dict], img_ids: list | None = None) -> None:
        detections = [x for prediction in predictions for x in prediction["instances"]]
        with open(os.path.join(self._output_dir, "coco_instances_results.json"), "w") as file:
            json.dump([self._for_people(x) for x in detections], file)
        if not self._do_evaluation:
            self._logger.info("Annotations are not available for evaluation.")
            return
        evaluation = None
        if numbered := list(filter(None, map(self._numbered, detections))):
            found = self._coco_api.loadRes(numbered)
            evaluation = _DifficultIgnored(self._coco_api, found, "bbox")
            if img_ids is not None:
                evaluation.params.imgIds = [self.image_numbers[x] for x in img_ids]
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        names = self._metadata.get("thing_classes")
        self._results["bbox"] = self._derive_coco_results(evaluation, "bbox", class_names=names)

    def _for_people(self, detection: dict) -> dict:
        """With the ids of the data set's file."""
        return {**detection, "category_id": self.category_ids[detection["category_id"]]}

    def _numbered(self, detection: dict) -> dict | None:
        image_id, box = detection["image_id"], detection["bbox"]
        if image_id in self.trimmed:
            x, y, w, h = box
            width, height = self.trimmed[image_id]
            left, right = (min(max(v, 0), width) for v in (x, x + w))
            top, bottom = (min(max(v, 0), height) for v in (y, y + h))
            box = [left, top, right - left, bottom - top]
            if min(box[2:]) < SHORTEST:
                return None
        number = {"image_id": self.image_numbers[image_id], "bbox": box}
        return {**detection, **number, "category_id": detection["category_id"] + 1}


class _DifficultIgnored(COCOeval):
    """pycocotools', with Pascal VOC's rule for objects marked difficult: by their IoU like others,
    but any number of detections may match one, and these count neither way."""

    def _prepare(self) -> None:
        super()._prepare()
        for objects in self._gts.values():
            for x in objects:
                if x["difficult"]:
                    x["ignore"], x["iscrowd"] = 1, 0

    def computeIoU(self, imgId: int, catId: int) -> Any:
        overlaps = super().computeIoU(imgId, catId)
        for x in self._gts[imgId, catId]:
            if x["difficult"]:  # what pycocotools lets any number of detections match
                x["iscrowd"] = 1
        return overlaps


class Awaited(DatasetEvaluator):
    """An evaluator of several processes. The first evaluates while the others wait, however long
    that takes.

    Args:
        evaluator: of the same data set in each process.
    """

    def __init__(self, evaluator: DatasetEvaluator):
        self.evaluator = evaluator

    def reset(self) -> None:
        self.evaluator.reset()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        self.evaluator.process(inputs, outputs)

    def evaluate(self) -> Any:
        wait_for_all()  # Detectron2 gathers the detections in a collective
        with current().busy():
            results = self.evaluator.evaluate()
        wait_for_all()
        return results


# By data set, what the loader of its last evaluation was made of, and the loader.
_kept: dict[str, tuple[tuple, DataLoader]] = {}


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """That of the evaluation before, with DATALOADER.PERSISTENT_WORKERS, or a new one."""
    if not cfg.DATALOADER.PERSISTENT_WORKERS:
        return _new_test_loader(cfg, dataset_name)
    # Averaged weights are evaluated into a folder of their own.
    parts = DatasetCatalog.data.get(dataset_name), str({**cfg, "OUTPUT_DIR": ""})
    if dataset_name not in _kept or _kept[dataset_name][0] != parts:
        _kept[dataset_name] = parts, _new_test_loader(cfg, dataset_name)
    return _kept[dataset_name][1]


def _new_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Images for this process with our mapper, in batches of MODEL.ATSS.IMS_PER_BATCH_TEST. Images
    of one size follow one another, because only those make a batch. All processes call this.

    Raises:
        ValueError: if they have other images.
    """
    records = open_records([dataset_name])
    refuse_differences(facts_of_data((dataset_name,), records))
    width, height = records.sizes.T
    order = np.lexsort((width, height))
    # Detectron2 gives each process a contiguous part: each gets images of all sizes.
    world_size = comm.get_world_size()
    order = np.concatenate([order[rank::world_size] for rank in range(world_size)])
    return WatchedLoader(
        MapDataset(records.choose(order), Mapper(cfg, is_train=False)),
        sampler=InferenceSampler(len(records)),
        batch_size=images_per_test_batch(cfg),
        collate_fn=list,
        **loader_options(cfg),
    )


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """By the evaluator_type in the data set's metadata. A data set without annotations gets its
    results written in COCO's format, for a server to evaluate.

    Raises:
        ValueError: as :func:`check_metadata`.
    """
    check_metadata(dataset_name)
    output_dir = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    if kind == "coco":
        return BoxEvaluator(dataset_name, output_dir, cfg.TEST.COUNT_DIFFICULT)
    if kind == "lvis":
        provide_json(dataset_name)
        return LVISEvaluator(dataset_name, ("bbox",), output_dir=output_dir)
    return PascalVOCDetectionEvaluator(dataset_name)


def provide_lvis() -> None:
    """Has Detectron2 evaluate by LVIS's rules with hotcoco: the package ``lvis``, of 2020, fails on
    NumPy 2.

    Raises:
        ValueError: where it is not installed.
    """
    try:
        import hotcoco
    except ImportError as error:
        raise UserError(
            f"evaluation by LVIS's rules needs hotcoco ({error}): pip install hotcoco"
        ) from error
    hotcoco.init_as_lvis()


def check_metadata(dataset_name: str) -> None:
    """Whether a data set can be evaluated.

    Raises:
        ValueError: where its metadata have no names of classes, or no evaluator_type that is known,
            or what evaluates it is not installed.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind == "lvis":
        provide_lvis()
    if kind not in ("coco", "lvis", "pascal_voc"):
        raise UserError(
            f"data set {dataset_name} of DATASETS.TEST has evaluator_type {kind!r} in its "
            "metadata; coco, lvis and pascal_voc are known"
        )
    if classes_of(dataset_name) is None:
        raise UserError(
            f"data set {dataset_name} of DATASETS.TEST has no thing_classes in its metadata, "
            "without which it cannot be evaluated"
        )
