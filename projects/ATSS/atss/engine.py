"""The trainer: Detectron2's, where that cannot train on CPUs or evaluate by itself."""

import logging
import os
import weakref
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
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
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch import nn

from .assigners import ASSIGNER_REGISTRY
from .checkpointer import TrainingCheckpointer
from .config import autocast_dtype
from .config_checks import TRAINING_LIMITS, check_values
from .data.loader import TrainLoader, build_train_loader, derive_seed
from .data.mapper import Mapper
from .detector import LEGACY_PIXELS_IN_TRAINING
from .hooks import FiniteLosses, FiniteWeights, Preemption
from .test_time_augmentation import build_tta
from .weights import WeightsError, read, require_tensors, verify_download


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, but nothing that a file asks for is executed (its own opens every
    .pkl with a bare pickle), downloads are checked, and what is wrong is said in a sentence."""

    # Weights of other projects, whose names have to be matched with ours, by the end of the file's
    # name: the key that they stand under, the end of the names that are left out, whose they are.
    FOREIGN: ClassVar = {
        ".pkl": ("blobs", "_momentum", "Caffe2"),
        ".pyth": ("model_state", "num_batches_tracked", "pycls"),
    }

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict:
        """As there.

        Raises:
            WeightsError: where there is no such file, it holds no weights, or none that fit.
        """
        if path:
            address = path.partition("?")[0]
            try:
                local = self.path_manager.get_local_path(address)
            except OSError as error:
                raise WeightsError(f"cannot fetch the weights {path}: {error}") from error
            if not os.path.isfile(local):
                raise WeightsError(f"the weights {path} do not exist")
            if local != address:
                verify_download(address, local)
        self._loading = path
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict:
        suffix = os.path.splitext(filename)[1]
        if suffix not in self.FOREIGN:
            loaded = super()._load_file(filename)
        else:
            loaded = read(filename)
            if not isinstance(loaded, dict):
                raise WeightsError(f"{filename} holds no weights")
            if not {"model", "__author__"} <= loaded.keys():
                key, left_out, author = self.FOREIGN[suffix]
                content = loaded.get(key, loaded)
                require_tensors(content, filename)
                model = {k: v for k, v in content.items() if not k.endswith(left_out)}
                loaded = {"model": model, "__author__": author, "matching_heuristics": True}
        require_tensors(loaded["model"], filename)
        return loaded

    def _torch_load(self, filename: str) -> dict:
        content = read(filename)
        return content if isinstance(content, dict) else {"model": content}

    def _load_model(self, checkpoint: dict) -> Any:
        left = super()._load_model(checkpoint)
        if {name for name, _ in self.model.named_parameters()} <= set(left.missing_keys):
            raise WeightsError(
                f"nothing in {self._loading} fits the model; weights of the authors' code or of "
                "mmdet have to be converted by tools/convert_checkpoint.py"
            )
        return left


class _SafeTrainingCheckpointer(TrainingCheckpointer, SafeCheckpointer):
    """Survives kills, and executes nothing."""


class Trainer(DefaultTrainer):
    """DefaultTrainer that also runs several processes on CPUs, knows the precision of
    MODEL.ATSS.PRECISION, resumes bit for bit, and chooses the evaluator by the data set's metadata.

    Attributes:
        seed: SEED, or one drawn for all processes where that is negative. The order of images,
            their augmentation and what the model draws in an iteration follow from it; a
            checkpoint holds it.
    """

    def __init__(self, cfg: CfgNode):
        # DefaultTrainer's own constructor hands DDP a GPU's number even where the model is on a
        # CPU, which DDP refuses. The steps and their order are its.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size()).clone()
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        cfg.defrost()
        cfg.SEED = self.seed
        cfg.freeze()
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)

        on_gpu = model.device.type == "cuda"
        device_ids = [comm.get_local_rank()] if on_gpu else None
        model = create_ddp_model(
            model,
            broadcast_buffers=False,
            device_ids=device_ids,
            # Where it does not look for them, DDP changes the order in which it adds up gradients
            # after the first iteration, of a resumed run too: last bits would differ.
            find_unused_parameters=not on_gpu,
        )
        scaled = cfg.SOLVER.AMP.ENABLED or autocast_dtype(cfg) == torch.float16
        if scaled and not on_gpu:
            raise ValueError("SOLVER.AMP.ENABLED needs a GPU; on a CPU set MODEL.ATSS.PRECISION")
        self._trainer = (AMPTrainer if scaled else SimpleTrainer)(model, data_loader, optimizer)

        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = _SafeTrainingCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            keep=cfg.SOLVER.CHECKPOINTS_TO_KEEP,
            trainer=weakref.proxy(self),
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
        """DefaultTrainer's, which also ends a run that was killed between its last iteration and
        its last file; SIGTERM stops it after a checkpoint."""
        if self.start_iter >= self.max_iter:
            self.checkpointer.save("model_final", iteration=self.iter)
        with self.preemption:
            return super().train()

    def run_step(self) -> None:
        """DefaultTrainer's, with generators that depend on nothing drawn before."""
        seed_all_rng(derive_seed(self.seed, self.iter, comm.get_rank()))
        super().run_step()

    def state_dict(self) -> dict:
        """DefaultTrainer's, and the seed."""
        return super().state_dict() | {"seed": self.seed}

    def load_state_dict(self, state_dict: dict) -> None:
        """DefaultTrainer's; loaders will go on where they stopped."""
        super().load_state_dict(state_dict)
        self.seed = state_dict.get("seed", self.seed)  # DefaultTrainer's own have none
        done = self.iter + 1
        self.data_loader.skip(done, self.seed)
        for hook in self._hooks:
            if isinstance(hook, hooks.PreciseBN):
                times = done // self.cfg.TEST.EVAL_PERIOD if self.cfg.TEST.EVAL_PERIOD else 0
                hook._data_loader.skip(times * self.cfg.TEST.PRECISE_BN.NUM_ITER, self.seed)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """Ours, which knows positions, with our mapper."""
        return build_train_loader(cfg, Mapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        """Detectron2's loader with our mapper, in batches of MODEL.ATSS.IMS_PER_BATCH_TEST. Images
        of one size follow one another, because only those make a batch."""
        records = get_detection_dataset_dicts(dataset_name, filter_empty=False)
        records.sort(key=lambda x: (x.get("height", 0), x.get("width", 0)))
        # Detectron2 gives each process a contiguous part: each gets images of all sizes.
        world_size = comm.get_world_size()
        records = [x for rank in range(world_size) for x in records[rank::world_size]]
        return build_detection_test_loader(
            records,
            mapper=Mapper(cfg, is_train=False),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
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


def check_run(cfg: CfgNode, training: bool) -> None:
    """What would stop a run only after a while, or be passed over silently.

    Args:
        training: or evaluation alone.

    Raises:
        ValueError: naming the key.
    """
    used = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if training else cfg.DATASETS.TEST
    for name in used:
        if name not in DatasetCatalog:
            raise ValueError(
                f"DATASETS names {name!r}, which neither Detectron2 nor --register knows"
            )
    rules = sorted(name for name, _ in ASSIGNER_REGISTRY)
    for name in cfg.MODEL.ATSS.ASSIGNERS:
        if name not in rules:
            raise ValueError(f"MODEL.ATSS.ASSIGNERS.{name} is of no rule; known are {rules}")
    if cfg.TEST.AUG.ENABLED:
        build_tta(cfg, None)
    if not training:
        return
    check_values(cfg, TRAINING_LIMITS)
    if cfg.MODEL.ATSS.LEGACY_PIXELS:
        raise ValueError(LEGACY_PIXELS_IN_TRAINING)
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN names no data set")
