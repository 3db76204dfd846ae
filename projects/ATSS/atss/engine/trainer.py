"""The trainer: Detectron2's, where that cannot train on CPUs or evaluate by itself."""

import logging
import os
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import torch
from detectron2.config import CfgNode
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    hooks,
)
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
    autocast_dtype,
    build_tta,
    class_names,
    enter_schedule,
    one_image_at_a_time,
)
from ..data.loader import TrainLoader, build_train_loader, derive_seed
from ..data.mapper import Mapper, without_augmentation
from ..errors import UserError
from .agreement import facts_of_config, facts_of_data, refuse_differences, share_weights
from .all_gather import ScalarAllGather
from .averaging import Averaging, share_statistics
from .best import Best, Evaluation, best_metric, evaluated_iteration
from .estimate import TrainingEstimate
from .evaluation import Awaited, build_evaluator, build_test_loader
from .hooks import FiniteLosses, FiniteWeights, Preemption, refuse_broken_weights
from .solver import build_optimizer, carry_over, follow_schedule
from .writers import StrictJSONWriter


class EndedEarly(BaseException):
    """Leaves Detectron2's loop over the iterations, which takes an Exception for a failure."""


class _Writing(SimpleTrainer):
    """Writes what the processes have told each other; Detectron2's reads the losses off the device
    again, and gathers them once more."""

    exchange: ScalarAllGather

    def _write_metrics(self, loss_dict, data_time, prefix="", iter=None):
        self.exchange.write(data_time)


class _InFloat16(_Writing, AMPTrainer):
    def load_state_dict(self, state_dict):
        """Detectron2's; a checkpoint of another precision has no scale, which begins anew."""
        super().load_state_dict({"grad_scaler": self.grad_scaler.state_dict()} | state_dict)


@dataclass(frozen=True)
class Stream:
    """Which part of the stream of images the iterations take.

    Attributes:
        batch: images of an iteration, of all processes.
        processes: that share them.
        iteration: the first of such batches.
        images: that had been seen before it.
    """

    batch: int
    processes: int
    iteration: int = 0
    images: int = 0

    def images_until(self, iteration: int) -> int:
        """Images that have been seen when an iteration begins."""
        return self.images + (iteration - self.iteration) * self.batch


class Trainer(DefaultTrainer):
    """DefaultTrainer that also runs several processes on CPUs, knows the precision of
    MODEL.ATSS.PRECISION, resumes bit for bit, chooses the evaluator by the data set's metadata,
    averages weights, keeps the best, and ends where they do not become better.

    Attributes:
        seed: SEED, or one drawn for all processes where that is negative. The order of images,
            their augmentation and what the model draws in an iteration follow from it; a
            checkpoint holds it.
        stream: the place in it, in images.
        averaging: with SOLVER.EMA_DECAY.
        best: with TEST.BEST_METRIC and evaluations during training.
    """

    def __init__(self, cfg: CfgNode):
        # DefaultTrainer's own constructor hands DDP a GPU's number even where the model is on a
        # CPU, which DDP refuses. The steps and their order are its.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        evaluates = cfg.TEST.EVAL_PERIOD > 0
        cfg = self.auto_scale_workers(cfg, comm.get_world_size()).clone()
        self.given_seed = cfg.SEED
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        cfg.defrost()
        cfg.SEED = self.seed
        # Scaled to the number of processes, short ones become none.
        cfg.SOLVER.CHECKPOINT_PERIOD = max(cfg.SOLVER.CHECKPOINT_PERIOD, 1)
        cfg.TEST.EVAL_PERIOD = max(cfg.TEST.EVAL_PERIOD, int(evaluates))
        cfg.freeze()
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        facts = facts_of_config(cfg)
        if hasattr(data_loader, "records"):  # not of a user's own loader
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
            # Where it does not look for them, DDP changes the order in which it adds up gradients
            # after the first iteration, of a resumed run too: last bits would differ.
            find_unused_parameters=not on_gpu,
        )
        scaled = cfg.SOLVER.AMP.ENABLED or autocast_dtype(cfg) == torch.float16
        if scaled and not on_gpu:
            raise UserError("SOLVER.AMP.ENABLED needs a GPU; on a CPU set MODEL.ATSS.PRECISION")
        self._trainer = (_InFloat16 if scaled else _Writing)(model, data_loader, optimizer)
        self.preemption = Preemption()
        self._trainer.exchange = self.preemption.exchange

        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = TrainingCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            keep=cfg.SOLVER.CHECKPOINTS_TO_KEEP,
            class_names=class_names(cfg),
            trainer=weakref.proxy(self),
        )
        self._trainer.register_hooks(
            [FiniteLosses(model, self.preemption.exchange, self.checkpointer)]
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.stream = Stream(cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size())
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's, those that stop a training, averages, the best weights, and multi-scale
        testing at the end, before the last numbers are written."""
        built, test = super().build_hooks(), self.cfg.TEST

        def found(kind: type[HookBase]) -> list[HookBase]:
            return [x for x in built if isinstance(x, kind)]

        # The main process alone saves and writes.
        checkpointer, writer = found(hooks.PeriodicCheckpointer), found(hooks.PeriodicWriter)
        own = (hooks.PeriodicCheckpointer, hooks.EvalHook, hooks.PeriodicWriter)
        first = [x for x in built if not isinstance(x, own)]
        self.best = None
        if metric := best_metric(self.cfg):
            self.best = Best(metric, test.PATIENCE, self.checkpointer, self.cfg.DATASETS.TEST)
        with_tta = None
        if test.AUG.ENABLED:
            with_tta = Evaluation(0, lambda: self.test_with_tta(self.cfg, self.model))
        return [
            FiniteWeights(),
            _profiler(self.cfg),
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
        """Detectron2's; all processes begin with the weights that the first has read."""
        super().resume_or_load(resume)
        share_weights(self.checkpointer.model)
        if self.averaging:
            share_weights(self.averaging.model)

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's, but metrics.json has null for what is not finite."""
        folder = self.cfg.OUTPUT_DIR
        return [
            CommonMetricPrinter(self.max_iter),
            StrictJSONWriter(os.path.join(folder, "metrics.json")),
            TensorboardXWriter(folder),
        ]

    def train(self) -> dict | None:
        """DefaultTrainer's, which also ends a run that was killed between its last iteration and
        its last file; SIGTERM stops it after a checkpoint. The log ends with the weights' file."""
        if self.start_iter >= self.max_iter:
            self.checkpointer.save("model_final", iteration=self.iter)
        with self.preemption.watch:
            try:
                results = super().train()
            except EndedEarly:
                results = self._last_eval_results
                if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
                    verify_results(self.cfg, results)
            finally:
                self.preemption.watch.unsaved = False
        if comm.is_main_process():
            weights = os.path.join(self.cfg.OUTPUT_DIR, "model_final.pth")
            which = self.best.describe() if self.best else f"The last weights are in {weights}"
            logging.getLogger(__name__).info("%s, to be given as MODEL.WEIGHTS", which)
        return results

    def before_train(self) -> None:
        """Detectron2's; a run that ended early stays ended, and an evaluation that is made up for
        may be the one that ends it."""
        if self.best and self.start_iter > 0:
            self.best.adopt()
        super().before_train()
        if self.best and self.best.exhausted and self.start_iter < self.max_iter:
            self.iter -= 1
            self._end_early(self.best)

    def after_step(self) -> None:
        """Detectron2's; ends the run where evaluations have not become better for long."""
        super().after_step()
        if self.best and self.best.exhausted:
            self._end_early(self.best)

    def _end_early(self, best: Best) -> None:
        """Makes this iteration the last one."""
        logging.getLogger(__name__).info(
            "Training ends early, with iteration %d: %s", self.iter, best.reason_to_stop()
        )
        self.checkpointer.save("model_final", iteration=self.iter)
        self.preemption.after_last_checkpoint(self.iter)
        self.iter += 1
        self.max_iter = self.iter
        raise EndedEarly

    def evaluate(self) -> dict:
        """Results of the weights as they are now and, with SOLVER.EMA_DECAY, of the averaged ones,
        which bear the suffix _EMA. The best weights are kept."""
        if self.best:
            refuse_broken_weights(self)  # which could count as the best
        # What the first process saves is what all evaluate.
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
        """DefaultTrainer's, with generators that depend on nothing drawn before."""
        seed_all_rng(derive_seed(self.seed, self.iter, comm.get_rank()))
        super().run_step()

    def state_dict(self) -> dict:
        """DefaultTrainer's, and the seed, the place in the stream of images, and the names of the
        optimizer's parameters."""
        return super().state_dict() | {
            "seed": self.seed,
            "images_seen": self.stream.images_until(self.iter + 1),
            "stream": asdict(self.stream),
            "parameters": self._parameters(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """DefaultTrainer's; the settings of the optimizer and of its schedule are the config's.
        Loaders will go on where they stopped, if they have the method ``skip`` of
        :class:`~atss.data.loader.TrainLoader`.

        Raises:
            ValueError: for the state of another optimizer, or of another seed than the config's.
        """
        seed = state_dict.get("seed", self.seed)  # DefaultTrainer's own have none
        if self.given_seed >= 0 and seed != self.given_seed:
            raise UserError(
                f"SEED is {self.given_seed}, but the run that --resume goes on with has {seed}, on "
                "which its order of images depends: leave SEED out, or give that"
            )
        self.seed = seed
        inner = state_dict["_trainer"]
        names = self._parameters()
        carried = carry_over(
            self.optimizer, names, inner["optimizer"], state_dict.get("parameters")
        )
        super().load_state_dict(state_dict | {"_trainer": inner | {"optimizer": carried}})
        if "stream" in state_dict:  # neither have they this
            self._go_on_in(Stream(**state_dict["stream"]))
        done = self.iter + 1
        if isinstance(self.scheduler, LRMultiplier):  # not one of somebody's own
            follow_schedule(self.scheduler, done, self.max_iter)
        _go_on(self.data_loader, done, self.seed, (self.stream.iteration, self.stream.images))
        for hook in self._hooks:
            if isinstance(hook, hooks.PreciseBN):
                times = done // self.cfg.TEST.EVAL_PERIOD if self.cfg.TEST.EVAL_PERIOD else 0
                batches = times * self.cfg.TEST.PRECISE_BN.NUM_ITER
                _go_on(hook._data_loader, batches, self.seed)

    def _go_on_in(self, stream: Stream) -> None:
        """Takes the place of a checkpoint in its stream of images."""
        now, done = self.stream, self.iter + 1
        if stream.batch != now.batch or stream.processes != now.processes:
            seen = stream.images_until(done)
            if stream.batch != now.batch:
                self.iter += enter_schedule(self.cfg, done, seen) - done
                if self.best:
                    self.best.renumber(done, self.iter + 1)
                logging.getLogger(__name__).info(
                    "After %d images in %d iterations, training goes on in batches of %d, not %d, "
                    "at iteration %d of %d",
                    *(seen, done, now.batch, stream.batch, self.iter + 1, self.max_iter),
                )
            stream = replace(now, iteration=self.iter + 1, images=seen)
        self.stream = stream

    def _parameters(self) -> list[str]:
        """Names of what the optimizer trains, in the order of its groups."""
        names = {x: name for name, x in self.checkpointer.model.named_parameters()}
        trained = [x for group in self.optimizer.param_groups for x in group["params"]]
        return [names.get(x, f"parameter {i}") for i, x in enumerate(trained)]

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """Ours, which knows positions, with our mapper."""
        late = None
        if cfg.INPUT.AUGMENT_UNTIL < 1:
            late = Mapper(without_augmentation(cfg), is_train=True)
        return build_train_loader(cfg, Mapper(cfg, is_train=True), late)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Ours, which knows AdamW and rates of backbones."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        """Ours, in which images of one size follow one another."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """By the data set's metadata."""
        return Awaited(build_evaluator(cfg, dataset_name))

    @classmethod
    def test_averages(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """As test does, with files of results in a folder of their own."""
        logging.getLogger(__name__).info("Evaluating the averaged weights")
        elsewhere = cfg.clone()
        elsewhere.defrost()
        elsewhere.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "ema")
        return cls.test(elsewhere, model)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """Multi-scale testing (TEST.AUG); results bear the suffix _TTA."""
        logging.getLogger(__name__).info("Testing with %d sizes", len(cfg.TEST.AUG.MIN_SIZES) + 1)
        model = getattr(model, "module", model)  # out of DistributedDataParallel
        one_by_one = one_image_at_a_time(cfg)
        one_by_one.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "tta")
        results = cls.test(one_by_one, build_tta(cfg, model))
        return {f"{name}_TTA": result for name, result in results.items()}


def _profiler(cfg: CfgNode) -> HookBase | None:
    """Detectron2's hook, which records each iteration of SOLVER.PROFILE for TensorBoard."""
    if not cfg.SOLVER.PROFILE or not comm.is_main_process():
        return None
    first, last = cfg.SOLVER.PROFILE
    return hooks.TorchProfiler(lambda trainer: first <= trainer.iter <= last, cfg.OUTPUT_DIR)


def _go_on(loader: Iterable, batches: int, seed: int, origin: tuple[int, int] = (0, 0)) -> None:
    """After so many batches of the stream of a seed."""
    if hasattr(loader, "skip"):
        loader.skip(batches, seed, *([origin] if any(origin) else []))
    elif batches:
        logging.getLogger(__name__).warning(
            "%s does not know how to go on after %d batches: its stream of images begins anew",
            type(loader).__name__,
            batches,
        )
