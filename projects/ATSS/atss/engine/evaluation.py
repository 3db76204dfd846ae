"""What evaluation needs of a data set: its loader and its evaluator."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.utils import comm

from ..config import images_per_test_batch
from ..data.datasets import classes_of
from ..data.mapper import Mapper


class ByName(COCOEvaluator):
    """Detectron2's, for classes that are not numbered in the order of their ids in the data: it
    would give the APs of classes to each other's names."""

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict:
        number = getattr(self._metadata, "thing_dataset_id_to_contiguous_id", None)
        if class_names and number:
            class_names = [class_names[number[category_id]] for category_id in sorted(number)]
        return super()._derive_coco_results(coco_eval, iou_type, class_names)


def build_test_loader(cfg: CfgNode, dataset_name: str) -> Iterable:
    """Detectron2's loader with our mapper, in batches of MODEL.ATSS.IMS_PER_BATCH_TEST. Images of
    one size follow one another, because only those make a batch."""
    records = get_detection_dataset_dicts(dataset_name, filter_empty=False)
    records.sort(key=lambda x: (x.get("height", 0), x.get("width", 0)))
    # Detectron2 gives each process a contiguous part: each gets images of all sizes.
    world_size = comm.get_world_size()
    records = [x for rank in range(world_size) for x in records[rank::world_size]]
    return build_detection_test_loader(
        records,
        mapper=Mapper(cfg, is_train=False),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        batch_size=images_per_test_batch(cfg),
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
        # Of data that came in no json Detectron2 writes one there: not to be trusted the next time.
        return ByName(dataset_name, ("bbox",), output_dir=output_dir, allow_cached_coco=False)
    if kind == "lvis":
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
        raise ValueError(
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
        raise ValueError(
            f"data set {dataset_name} of DATASETS.TEST has evaluator_type {kind!r} in its "
            "metadata; coco, lvis and pascal_voc are known"
        )
    if classes_of(dataset_name) is None:
        raise ValueError(
            f"data set {dataset_name} of DATASETS.TEST has no thing_classes in its metadata, "
            "without which it cannot be evaluated"
        )
