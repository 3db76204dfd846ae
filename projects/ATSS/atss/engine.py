"""The trainer: Detectron2's, where that cannot train on CPUs or evaluate by itself."""

import logging
import os
import weakref
from collections.abc import Iterable

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    hooks,
)
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from .config import autocast_dtype
from .data.mapper import Mapper
from .hooks import FiniteLosses, FiniteWeights, Preemption
from .test_time_augmentation import build_tta


class Trainer(DefaultTrainer):
    """DefaultTrainer that also runs several processes on CPUs, knows the precision of
    MODEL.ATSS.PRECISION, and chooses the evaluator by the data set's metadata."""

    def __init__(self, cfg: CfgNode):
        # DefaultTrainer's own constructor hands DDP a GPU's number even where the model is on a
        # CPU, which DDP refuses. The steps and their order are its.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)

        on_gpu = model.device.type == "cuda"
        device_ids = [comm.get_local_rank()] if on_gpu else None
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)
        scaled = cfg.SOLVER.AMP.ENABLED or autocast_dtype(cfg) == torch.float16
        if scaled and not on_gpu:
            raise ValueError("SOLVER.AMP.ENABLED needs a GPU; on a CPU set MODEL.ATSS.PRECISION")
        self._trainer = (AMPTrainer if scaled else SimpleTrainer)(model, data_loader, optimizer)

        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DetectionCheckpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self._trainer.register_hooks([FiniteLosses(model, self.checkpointer)])
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's, those that stop a training, and multi-scale testing at the end, before the
        last numbers are written."""
        self.preemption = Preemption()
        built = [FiniteWeights(), *super().build_hooks()]
        evaluation = next(i for i, x in enumerate(built) if isinstance(x, hooks.EvalHook))
        built.insert(evaluation, self.preemption)
        if self.cfg.TEST.AUG.ENABLED:
            writers = [i for i, x in enumerate(built) if isinstance(x, hooks.PeriodicWriter)]
            test = hooks.EvalHook(0, lambda: self.test_with_tta(self.cfg, self.model))
            built.insert(writers[0] if writers else len(built), test)
        return built

    def train(self) -> dict | None:
        """Detectron2's, and SIGTERM stops it after a checkpoint."""
        with self.preemption:
            return super().train()

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable:
        """Detectron2's loader with our mapper."""
        return build_detection_train_loader(cfg, mapper=Mapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        """Detectron2's loader with our mapper, in batches of MODEL.ATSS.IMS_PER_BATCH_TEST."""
        return build_detection_test_loader(
            cfg,
            dataset_name,
            mapper=Mapper(cfg, is_train=False),
            batch_size=cfg.MODEL.ATSS.IMS_PER_BATCH_TEST,
        )

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """Multi-scale testing (TEST.AUG); results bear the suffix _TTA."""
        logging.getLogger(__name__).info("Testing with %d sizes", len(cfg.TEST.AUG.MIN_SIZES) + 1)
        model = getattr(model, "module", model)  # out of DistributedDataParallel
        plain = cfg.clone()
        plain.defrost()
        plain.MODEL.ATSS.IMS_PER_BATCH_TEST = 1  # a view at a time
        plain.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "tta")
        results = cls.test(plain, build_tta(cfg, model))
        return {f"{name}_TTA": result for name, result in results.items()}

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """By the evaluator_type in the data set's metadata. A data set without annotations gets
        its results written in COCO's format, for a server to evaluate."""
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if kind == "coco":
            return COCOEvaluator(dataset_name, ("bbox",), output_dir=output_dir)
        if kind == "lvis":
            return LVISEvaluator(dataset_name, ("bbox",), output_dir=output_dir)
        if kind == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        raise ValueError(
            f"data set {dataset_name} has evaluator_type {kind!r} in its metadata; "
            "coco, lvis and pascal_voc are known"
        )
