"""Detectron2's trainer, extended: training on CPUs, exact resumption, the best weights."""

import logging
import os
import weakref
from collections.abc import Iterable
from dataclasses import asdict, replace

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import CommonMetricPrinter, EventWriter, TensorboardXWriter
from detectron2.utils.logger import setup_logger
from torch import nn

from ..checkpoints.checkpointer import TrainingCheckpointer
from ..config import (
    build_tiled,
    build_tta,
    class_names,
    enter_schedule,
    one_image_at_a_time,
)
from ..config.branches import scale_phases
from ..config.inputs import values_in
from ..data.loader import TrainLoader, build_train_loader, derive_seed
from ..data.mapper import Mapper, without_augmentation
from ..errors import UserError
from .agreement import facts_of_config, facts_of_data, refuse_differences, share_weights
from .averaging import Averaging, share_statistics
from .best import Best, Evaluation, best_metric, evaluated_iteration
from .checks import scales_gradients
from .estimate import TrainingEstimate
from .evaluation import PatientEvaluator, build_evaluator, build_test_loader
from .hooks import (
    FiniteLosses,
    FiniteWeights,
    Preemption,
    build_profiler,
    refuse_broken_weights,
)
from .loggers import build_run_writers, tracked
from .solver import build_optimizer, carry_over, follow_schedule
from .steps import Float16StepTrainer, StepTrainer
from .stream import Stream, skip_batches
from .writers import StrictJSONWriter


class EndedEarly(BaseException):
    """Exit from Detectron2's loop, which logs an Exception as a failure."""


class Trainer(DefaultTrainer):
    """DefaultTrainer that also trains on CPUs, resumes bit for bit, averages weights, keeps the
    best, and stops early.

    Attributes:
        seed: SEED, or a random seed of all processes if SEED is negative; in checkpoints, too. The
            order of images, augmentation and the model's random numbers follow from it.
        stream: the position in the stream of images.
        averaging: the hook of SOLVER.EMA_DECAY, or None.
        best: the hook of TEST.BEST_METRIC, or None.
        run_writers: of SOLVER.LOGGERS, in the main process.
    """

    def __init__(self, cfg: CfgNode):
        # DefaultTrainer's constructor gives DDP a GPU's number even if the model is on a CPU, which
        # DDP refuses. The steps and their order are the same.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        evaluates = cfg.TEST.EVAL_PERIOD > 0
        length = cfg.SOLVER.MAX_ITER
        cfg = self.auto_scale_workers(cfg, comm.get_world_size()).clone()
        self.given_seed = cfg.SEED
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        cfg.defrost()
        cfg.SEED = self.seed
        scale_phases(cfg, cfg.SOLVER.MAX_ITER / length)
        # Scaled to the number of processes, short periods become 0.
        cfg.SOLVER.CHECKPOINT_PERIOD = max(cfg.SOLVER.CHECKPOINT_PERIOD, 1)
        cfg.TEST.EVAL_PERIOD = max(cfg.TEST.EVAL_PERIOD, int(evaluates))
        cfg.freeze()
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        facts = facts_of_config(cfg)
        if hasattr(data_loader, "records"):  # a user's own loader may have none
            facts |= facts_of_data(cfg.DATASETS.TRAIN, data_loader.records)
        refuse_differences(facts)
        # Before other hooks see the model: the averages are a copy of it.
        decay = cfg.SOLVER.EMA_DECAY
        self.averaging = Averaging(model, decay) if decay else None

        on_gpu = model.device.type == "cuda"
        device_ids = [torch.cuda.current_device()] if on_gpu else None
        model = create_ddp_model(
            model,
            broadcast_buffers=False,
            device_ids=device_ids,
            # With False, DDP changes the order in which it sums gradients after the first
            # iteration, also that of a resumed run: the last bits would differ.
            find_unused_parameters=not on_gpu,
        )
        kind = Float16StepTrainer if scales_gradients(cfg) else StepTrainer
        self._trainer = kind(model, data_loader, optimizer)
        self.preemption = Preemption()
        self._trainer.exchange = self.preemption.exchange

        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = TrainingCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            keep=cfg.SOLVER.CHECKPOINTS_TO_KEEP,
            class_names=class_names(cfg),
            trained_with=values_in(cfg),
            trainer=weakref.proxy(self),
        )
        self._trainer.register_hooks(
            [FiniteLosses(model, self.preemption.exchange, self.checkpointer)]
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.stream = Stream(cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size())
        self.cfg = cfg
        self.run_writers = build_run_writers(cfg) if comm.is_main_process() else []
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """Return Detectron2's hooks and ours in a working order."""
        built, test = super().build_hooks(), self.cfg.TEST

        def select(kind: type[HookBase]) -> list[HookBase]:
            return [x for x in built if isinstance(x, kind)]

        # Only the main process has them.
        checkpointer, writer = select(hooks.PeriodicCheckpointer), select(hooks.PeriodicWriter)
        placed = (hooks.PeriodicCheckpointer, hooks.EvalHook, hooks.PeriodicWriter)
        first = [x for x in built if not isinstance(x, placed)]
        self.best = None
        if metric := best_metric(self.cfg):
            self.best = Best(metric, test.PATIENCE, self.checkpointer, self.cfg.DATASETS.TEST)
        with_tta = None
        if test.AUG.ENABLED:
            with_tta = Evaluation(0, lambda: self.test_with_tta(self.cfg, self.model))
        return [
            FiniteWeights(),
            build_profiler(self.cfg),
            *first,
            self.averaging,
            TrainingEstimate() if comm.is_main_process() else None,
            *checkpointer,
            self.preemption,
            Evaluation(test.EVAL_PERIOD, self.evaluate, next(iter(writer), None)),
            self.best,
            with_tta,
            *writer,
        ]

    def resume_or_load(self, resume: bool = True) -> None:
        """Load weights or a checkpoint in the first process, and broadcast the weights."""
        super().resume_or_load(resume)
        share_weights(self.checkpointer.model)
        if self.averaging:
            share_weights(self.averaging.model)

    def build_writers(self) -> list[EventWriter]:
        """Build Detectron2's writers, but metrics.json has null for NaN, and those of
        SOLVER.LOGGERS."""
        folder = self.cfg.OUTPUT_DIR
        return [
            CommonMetricPrinter(self.max_iter),
            StrictJSONWriter(os.path.join(folder, "metrics.json")),
            TensorboardXWriter(folder),
            *self.run_writers,
        ]

    def train(self) -> dict | None:
        """Train until the end or a signal. Return the results of the last evaluation by task."""
        if self.start_iter >= self.max_iter:
            self.checkpointer.save("model_final", iteration=self.iter)
        with self.preemption.watch, tracked(self.run_writers, resumed=self.start_iter > 0):
            try:
                super().train()
            except EndedEarly:
                if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
                    verify_results(self.cfg, self._last_eval_results)
            finally:
                self.preemption.watch.unsaved = False
        if comm.is_main_process():
            weights = os.path.join(self.cfg.OUTPUT_DIR, "model_final.pth")
            which = self.best.describe() if self.best else f"The last weights are in {weights}"
            logging.getLogger(__name__).info("%s: pass this file as MODEL.WEIGHTS", which)
        return getattr(self, "_last_eval_results", None)

    def before_train(self) -> None:
        """End if a resumed run had ended early, or exhausts patience now."""
        if self.best and self.start_iter > 0:
            self.best.adopt()
        super().before_train()
        if self.best and self.best.exhausted and self.start_iter < self.max_iter:
            self.iter -= 1
            self._end_early(self.best)

    def after_step(self) -> None:
        super().after_step()
        if self.best and self.best.exhausted:
            self._end_early(self.best)

    def _end_early(self, best: Best) -> None:
        logging.getLogger(__name__).info(
            "Training ends early, with iteration %d: %s", self.iter, best.reason_to_stop()
        )
        self.checkpointer.save("model_final", iteration=self.iter)
        self.preemption.after_last_checkpoint(self.iter)
        self.iter += 1
        self.max_iter = self.iter
        raise EndedEarly

    def evaluate(self) -> dict:
        """Evaluate the weights and the averages (suffix _EMA); keep the best."""
        if self.best:
            refuse_broken_weights(self)  # they could count as the best
        # All processes evaluate the statistics that the first one saves.
        share_statistics(self.checkpointer.model)
        if self.averaging:
            share_statistics(self.averaging.model)
        results = self.test(self.cfg, self.model)
        evaluated = [(self.checkpointer.model, results)]
        self._last_eval_results = dict(results)
        if self.averaging:
            averaged = self.test_averages(self.cfg, self.averaging.model)
            evaluated.append((self.averaging.model, averaged))
            self._last_eval_results |= {f"{name}_EMA": x for name, x in averaged.items()}
        if self.best:
            self.best.update(evaluated, evaluated_iteration(self))
        return self._last_eval_results

    def run_step(self) -> None:
        """Make a step whose random numbers follow from seed, iteration and process."""
        seed_all_rng(derive_seed(self.seed, self.iter, comm.get_rank()))
        super().run_step()

    def state_dict(self) -> dict:
        return super().state_dict() | {
            "seed": self.seed,
            "images_seen": self.stream.images_until(self.iter + 1),
            "stream": asdict(self.stream),
            "parameters": self._parameters(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a checkpoint, but keep the config's settings of optimizer and schedule. Loaders with
        ``skip`` continue in their stream.

        Raises:
            UserError: if the optimizer or the seed is another one.
        """
        seed = state_dict.get("seed", self.seed)  # a DefaultTrainer's state has none
        if self.given_seed >= 0 and seed != self.given_seed:
            raise UserError(
                f"SEED is {self.given_seed}, but the checkpoint of --resume has {seed}, which "
                f"determines the order of images: leave SEED out, or set it to {seed}"
            )
        self.seed = seed
        inner = state_dict["_trainer"]
        optimizer = carry_over(
            self.optimizer, self._parameters(), inner["optimizer"], state_dict.get("parameters")
        )
        super().load_state_dict(state_dict | {"_trainer": inner | {"optimizer": optimizer}})
        if "stream" in state_dict:  # not in a DefaultTrainer's state either
            self._enter_stream(Stream(**state_dict["stream"]))
        done = self.iter + 1
        if isinstance(self.scheduler, LRMultiplier):  # not a user's own scheduler
            follow_schedule(self.scheduler, done, self.max_iter)
        skip_batches(self.data_loader, done, self.seed, (self.stream.iteration, self.stream.images))
        for hook in self._hooks:
            if isinstance(hook, hooks.PreciseBN):
                times = done // self.cfg.TEST.EVAL_PERIOD if self.cfg.TEST.EVAL_PERIOD else 0
                batches = times * self.cfg.TEST.PRECISE_BN.NUM_ITER
                skip_batches(hook._data_loader, batches, self.seed)

    def _enter_stream(self, stream: Stream) -> None:
        now, done = self.stream, self.iter + 1
        if stream.batch != now.batch or stream.processes != now.processes:
            images = stream.images_until(done)
            if stream.batch != now.batch:
                self.iter += enter_schedule(self.cfg, done, images) - done
                if self.best:
                    self.best.renumber(done, self.iter + 1)
                logging.getLogger(__name__).info(
                    f"After {images} images in {done} iterations, training continues with batches "
                    f"of {now.batch} instead of {stream.batch}, at iteration {self.iter + 1} of "
                    f"{self.max_iter}"
                )
            stream = replace(now, iteration=self.iter + 1, images=images)
        self.stream = stream

    def _parameters(self) -> list[str]:
        names = {x: name for name, x in self.checkpointer.model.named_parameters()}
        trained = [x for group in self.optimizer.param_groups for x in group["params"]]
        return [names.get(x, f"parameter {i}") for i, x in enumerate(trained)]

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        late = None
        if cfg.INPUT.AUGMENT_UNTIL < 1:
            late = Mapper(without_augmentation(cfg), is_train=True)
        return build_train_loader(cfg, Mapper(cfg, is_train=True), late)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return PatientEvaluator(build_evaluator(cfg, dataset_name))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list | None = None) -> dict:
        """Test on all test sets, with TEST.TILES on tiles."""
        if cfg.TEST.TILES.ENABLED:
            model = build_tiled(cfg, getattr(model, "module", model))  # as in test_with_tta
            logging.getLogger(__name__).info("Testing on %s", model.tiles)
            cfg = cfg.clone()
            cfg.defrost()
            cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.RESIZE = 0, "shortest"  # the loader does not resize
        return super().test(cfg, model, evaluators)

    @classmethod
    def test_averages(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """Test averaged weights; results go to the folder ema."""
        if cfg.DATASETS.TEST:
            logging.getLogger(__name__).info("Evaluating the averaged weights")
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "ema")
        return cls.test(cfg, model)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """Test at several scales (TEST.AUG); results have the suffix _TTA."""
        logging.getLogger(__name__).info("Testing with %d sizes", len(cfg.TEST.AUG.MIN_SIZES) + 1)
        model = getattr(model, "module", model)  # out of DistributedDataParallel
        one_by_one = one_image_at_a_time(cfg)
        one_by_one.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "tta")
        one_by_one.INPUT.MIN_SIZE_TEST = 0  # the loader does not resize
        results = cls.test(one_by_one, build_tta(cfg, model))
        return {f"{name}_TTA": result for name, result in results.items()}
