"""Loaders and evaluators of test sets."""

import json
import logging
import os
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MapDataset, MetadataCatalog
from detectron2.data.samplers import InferenceSampler
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.structures import BoxMode
from detectron2.utils import comm
from torch.utils.data import DataLoader

from ..config import images_per_test_batch
from ..data.datasets import classes_of, columns_of, open_records, provide_json
from ..data.loader import WatchedLoader, loader_options
from ..data.mapper import Mapper
from ..deprecated import renamed_names
from ..errors import UserError
from ..labels.numbering import GroundTruth
from .agreement import facts_of_data, refuse_differences
from .coco import COCO_LIMIT, class_ap, evaluate_boxes
from .watch import current, wait_for_all

__getattr__ = renamed_names(__name__)


class BoxEvaluator(COCOEvaluator):
    """COCOEvaluator of boxes, for the objects that training uses (:func:`learnable`), by hotcoco if
    it is installed. Ids are those of :class:`~atss.labels.numbering.GroundTruth`.

    Args:
        count_difficult: whether difficult objects count like others, or detections of them are
            neither right nor wrong (Pascal VOC).
        limit: TEST.DETECTIONS_PER_IMAGE. Results name it if it is not COCO's 100, and the objects
            that it excludes.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str,
        count_difficult: bool = False,
        limit: int = COCO_LIMIT,
    ):
        provide_json(dataset_name)
        # Detectron2 writes a json there for data without one, which may be outdated the next time.
        super().__init__(dataset_name, ("bbox",), output_dir=output_dir, allow_cached_coco=False)
        content: dict = {"annotations": [], **self._coco_api.dataset}
        # Contiguous number by category id; in a json that Detectron2 wrote, ids are these numbers.
        classes = {c["id"]: c["id"] for c in content["categories"]}
        classes = self._metadata.get("thing_dataset_id_to_contiguous_id", classes)
        self.category_ids = {number: category_id for category_id, number in classes.items()}
        # A data set of --register was checked when it was registered.
        is_learnable = columns_of(dataset_name) is not None
        self.truth = GroundTruth(content, classes, count_difficult, is_learnable)
        self.limit = limit
        if self.truth.dropped:
            self._logger.warning(
                f"Data set {dataset_name}: {self.truth.dropped} of {len(content['annotations'])} "
                "annotations do not count: they have no area or lie outside their image, and "
                "training drops them"
            )

    def _eval_predictions(self, predictions: list[dict], img_ids: list | None = None) -> None:
        detections = [
            {**x, "category_id": self.category_ids[x["category_id"]]}
            for prediction in predictions
            for x in prediction["instances"]
        ]
        with open(os.path.join(self._output_dir, "coco_instances_results.json"), "w") as file:
            json.dump(detections, file)
        if not self._do_evaluation:
            self._logger.info("Annotations are not available for evaluation.")
            return
        evaluation = None
        if numbered := self.truth.number(detections):
            images = None if img_ids is None else [self.truth.image_numbers[x] for x in img_ids]
            counted = (1, 10, max(self.limit, COCO_LIMIT))
            evaluation = evaluate_boxes(self.truth.dataset, numbered, images, counted)
            evaluation.summarize()
        names = self._metadata.get("thing_classes")
        results = self._derive_coco_results(evaluation, "bbox", class_names=names)
        if evaluation is not None and len(names or ()) > 1:
            results |= {
                f"AP50-{x}": ap for x, ap in zip(names, class_ap(evaluation, 0), strict=True)
            }
        self._results["bbox"] = results | self._limited()

    def _limited(self) -> dict[str, int]:
        """Return and log the limit if it is not COCO's, and the objects beyond it if there are."""
        limited, logger = {}, logging.getLogger(__name__)
        if self.limit != COCO_LIMIT:
            limited["max_detections"] = self.limit
            logger.info(
                f"TEST.DETECTIONS_PER_IMAGE {self.limit}: AP is that of at most "
                f"{max(self.limit, COCO_LIMIT)} detections of an image and class; COCO's is of 100"
            )
        counts = self.truth.objects_per_image()
        if beyond := int((counts - self.limit).clip(min=0).sum()):
            limited["objects_beyond_limit"] = beyond
            logger.warning(
                f"{beyond} of {counts.sum()} objects, in {(counts > self.limit).sum()} images, are "
                f"beyond TEST.DETECTIONS_PER_IMAGE {self.limit} and lost: set it to {counts.max()} "
                "or more"
            )
        return limited

    def _eval_box_proposals(self, predictions: list[dict]) -> None:
        """Measure the recall of a ProposalNetwork. Images without proposals count."""
        if self._do_evaluation:
            self._results["box_proposals"] = proposal_recall(self.truth, predictions)


def proposal_recall(
    truth: GroundTruth, predictions: list[dict], limits: tuple[int, ...] = (100, 300, 1000)
) -> dict[str, float]:
    """Return {"AR@<limit>": average recall} of COCO, of objects of any class and size.

    Args:
        predictions: "image_id" and "proposals" of images.
        limits: proposals of each image, best first.
    """
    some_class = next(iter(truth.classes), None)
    detections = [
        {"image_id": x["image_id"], "category_id": some_class, "bbox": box, "score": score}
        for x in predictions
        for box, score in zip(
            BoxMode.convert(
                x["proposals"].proposal_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS
            ).tolist(),
            x["proposals"].objectness_logits.tolist(),
            strict=True,
        )
    ]
    if not (numbered := truth.number(detections)):  # as pycocotools does not accept it
        return dict.fromkeys((f"AR@{x}" for x in limits), 0.0 if truth.ids else float("nan"))
    evaluation = evaluate_boxes(truth.dataset, numbered, max_detections=limits, by_class=False)
    recall = evaluation.eval["recall"][:, 0, 0]  # (IoUs, limits), -1 without objects
    means = np.where(recall.min(axis=0) > -1, 100 * recall.mean(axis=0), np.nan)
    return {f"AR@{x}": mean for x, mean in zip(limits, means.tolist(), strict=True)}


class PatientEvaluator(DatasetEvaluator):
    """Evaluator in the first process, for which the others wait without a limit."""

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


# By data set: the arguments of the loader of its last evaluation, and the loader.
_persistent: dict[str, tuple[tuple, DataLoader]] = {}


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Build a loader, or reuse the last (DATALOADER.PERSISTENT_WORKERS)."""
    if not cfg.DATALOADER.PERSISTENT_WORKERS:
        return _new_test_loader(cfg, dataset_name)
    # Averaged weights are evaluated with the same loader and another OUTPUT_DIR.
    arguments = DatasetCatalog.data.get(dataset_name), str({**cfg, "OUTPUT_DIR": ""})
    if dataset_name not in _persistent or _persistent[dataset_name][0] != arguments:
        _persistent[dataset_name] = arguments, _new_test_loader(cfg, dataset_name)
    return _persistent[dataset_name][1]


def _new_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Build a loader of this process's images, sorted by size for equal batches. All processes call
    this.

    Raises:
        UserError: if processes have different images.
    """
    records = open_records([dataset_name])
    refuse_differences(facts_of_data((dataset_name,), records))
    width, height = records.sizes.T
    order = np.lexsort((width, height))
    # Detectron2 gives each process a contiguous part: deal, so that each has images of all sizes.
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
    """Build an evaluator by the metadata's evaluator_type. Without annotations, results are only
    written."""
    check_metadata(dataset_name)
    output_dir = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    kind = MetadataCatalog.get(dataset_name).evaluator_type
    if kind == "coco":
        boxes = BoxEvaluator(dataset_name, output_dir, cfg.TEST.COUNT_DIFFICULT, limit)
        shapes = {"segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
        tasks = [task for task, is_on in shapes.items() if is_on]
        if not tasks or cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
            return boxes
        sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
        folder = os.path.join(output_dir, "shapes")
        of_shapes = COCOEvaluator(dataset_name, tasks, output_dir=folder, kpt_oks_sigmas=sigmas)
        return DatasetEvaluators([boxes, of_shapes])
    if kind == "lvis":
        provide_json(dataset_name)
        return LVISEvaluator(
            dataset_name, ("bbox",), output_dir=output_dir, max_dets_per_image=max(limit, 300)
        )
    return PascalVOCDetectionEvaluator(dataset_name)


def provide_lvis() -> None:
    """Replace the package ``lvis`` (2020), which fails on NumPy 2, by hotcoco.

    Raises:
        UserError: if hotcoco is not installed.
    """
    try:
        import hotcoco
    except ImportError as error:
        raise UserError(
            f"evaluation by LVIS's rules needs hotcoco ({error}): pip install hotcoco"
        ) from error
    hotcoco.init_as_lvis()


def check_metadata(dataset_name: str) -> None:
    """Check that a data set can be evaluated.

    Raises:
        UserError: if class names, a known evaluator_type or a package are missing.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind == "lvis":
        provide_lvis()
    if kind not in ("coco", "lvis", "pascal_voc"):
        raise UserError(
            f"data set {dataset_name} of DATASETS.TEST has evaluator_type {kind!r} in its "
            "metadata: choose from ['coco', 'lvis', 'pascal_voc']"
        )
    if classes_of(dataset_name) is None:
        raise UserError(
            f"data set {dataset_name} of DATASETS.TEST has no thing_classes in its metadata: "
            "evaluation needs class names"
        )
