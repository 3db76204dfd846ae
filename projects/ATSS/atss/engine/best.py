"""Evaluations during training, and what follows from them: the best weights, an early end.

Results exist in the main process alone; what follows is decided there and told to all.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter
from torch import nn

from ..checkpoints import TrainingCheckpointer
from ..data.datasets import classes_of, has_objects
from ..deprecated import renamed_names
from ..errors import UserError
from ..weights import WeightsError, load_weights

__getattr__ = renamed_names(__name__)

# By evaluator_type.
COCO = ("AP", "AP50", "AP75", "APs", "APm", "APl")
METRICS = {"coco": COCO, "lvis": (*COCO, "APr", "APc", "APf"), "pascal_voc": COCO[:3]}
# Of a standing, what stands beside the weights.
ABOUT = ("metric", "data", "value", "iteration", "averaged")


class Evaluation(hooks.EvalHook):
    """Detectron2's, in a run that may have been interrupted or end early.

    A checkpoint is written before the evaluation of its iteration, so that a run that is to stop
    has saved early. Resumed from there, the evaluation is made up for before the first step.

    Args:
        period: in iterations; 0 for at the end alone.
        evaluate: gives the results by task.
        writer: what writes them, in the main process.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], dict],
        writer: hooks.PeriodicWriter | None = None,
    ):
        super().__init__(period, evaluate)
        self.writer = writer
        self.last = -1

    def before_train(self) -> None:
        start = self.trainer.start_iter
        if self._period and 0 < start < self.trainer.max_iter and start % self._period == 0:
            logging.getLogger(__name__).info(
                "Evaluating iteration %d, whose checkpoint was written before that", start - 1
            )
            self.trainer.storage.iter = start - 1
            self._do_eval()
            self._write()
            self.trainer.storage.iter = start

    def after_step(self) -> None:
        super().after_step()
        iteration = self.trainer.iter
        if self.last == iteration and self.writer and (iteration + 1) % self.writer._period:
            self._write()

    def after_train(self) -> None:
        # Detectron2's evaluates also where the last iteration failed.
        ended = self.trainer.iter >= self.trainer.max_iter and not self.trainer.preemption.left
        if ended and self.last != evaluated_iteration(self.trainer):
            self._do_eval()
        del self._func  # which holds the trainer

    def _do_eval(self) -> None:
        start = time.perf_counter()
        super()._do_eval()
        if self._period and self.last < 0:
            seconds = timedelta(seconds=round(time.perf_counter() - start))
            logging.getLogger(__name__).info("One evaluation takes %s", seconds)
        self.last = evaluated_iteration(self.trainer)

    def _write(self) -> None:
        """PeriodicWriter alone would lose all but the last evaluation of 20 iterations."""
        for writer in self.writer._writers if self.writer else ():
            if not isinstance(writer, CommonMetricPrinter):
                writer.write()


@dataclass(frozen=True)
class BestRecord:
    """What is known of the best weights after some evaluations.

    Attributes:
        metric: that decides; greater is better.
        data: the test sets, by name.
        value: the best, of the weights of ``iteration``; -inf, and -1, where there are none.
        averaged: whether it is that of the averaged weights.
        evaluated: iteration of the last evaluation.
        since: evaluations that did not have a better one, since the first best.
    """

    metric: str
    data: str = ""
    value: float = -math.inf
    iteration: int = -1
    averaged: bool = False
    evaluated: int = -1
    since: int = 0


class Best(HookBase):
    """Keeps the best weights of all evaluations as model_best.pth.

    Args:
        metric: such as "bbox/AP", or "name/bbox/AP" where there are several test sets.
        patience: training is to end after so many evaluations without a better one; 0 for never.
        checkpointer: writes the file.
        test_sets: their names.
    """

    FILE = "model_best"

    def __init__(
        self,
        metric: str,
        patience: int,
        checkpointer: TrainingCheckpointer,
        test_sets: Sequence[str] = (),
    ):
        self.standing = BestRecord(metric, ", ".join(test_sets))
        self.patience = patience
        self.checkpointer = checkpointer

    @property
    def exhausted(self) -> bool:
        return 0 < self.patience <= self.standing.since

    def update(self, evaluated: list[tuple[nn.Module, dict]], iteration: int) -> None:
        """
        Args:
            evaluated: models of an iteration with their results, the averaged one last.

        Raises:
            ValueError: in all processes, where the results do not have the metric.
        """
        if iteration == self.standing.evaluated:  # at the end of a run that ended early, resumed
            return
        found = self._compare(evaluated, iteration) if comm.is_main_process() else None
        found = comm.all_gather(found)[0]
        if isinstance(found, str):
            raise UserError(found)
        self.standing = found

    def _compare(self, evaluated: list[tuple[nn.Module, dict]], iteration: int) -> BestRecord | str:
        """Where the best stand now, or what is wrong. Writes the file."""
        metric, best = self.standing.metric, None
        had_one = self.standing.iteration >= 0
        # An evaluation up to that of the best is made again, after an interruption.
        since = self.standing.since + (had_one and iteration > self.standing.iteration)
        standing = replace(self.standing, evaluated=iteration, since=since)
        for averaged, (model, results) in enumerate(evaluated):
            values = flatten_results_dict(results)
            if metric not in values:
                # Those of single classes are left out.
                known = [name for name in values if "-" not in name.rpartition("/")[2]]
                if not known:  # without annotations, detections are written and nothing is measured
                    continue
                return (
                    f"TEST.BEST_METRIC is {metric!r}, which the evaluation does not give; known "
                    f"are {sorted(known)}"
                )
            value = float(values[metric])
            if math.isfinite(value) and value > standing.value:
                best = model
                standing = replace(
                    standing, value=value, iteration=iteration, averaged=bool(averaged), since=0
                )
        logger = logging.getLogger(__name__)
        if best is None:
            if had_one:
                logger.info("No better %s for %d evaluations", metric, standing.since)
            return standing
        logger.info("The best %s so far: %s", metric, _describe(standing))
        self._save(best, standing)
        return standing

    def _save(self, model: nn.Module, standing: BestRecord) -> None:
        about = {x: getattr(standing, x) for x in ABOUT}
        self.checkpointer.save_weights(self.FILE, model, **about)

    def adopt(self) -> None:
        """Of a run that goes on: takes over weights of the file that the checkpoint does not know,
        as those of an evaluation after it."""
        self.standing = comm.all_gather(self._adopt())[0]

    def _adopt(self) -> BestRecord:
        standing = self.standing
        if not comm.is_main_process():
            return standing
        path = os.path.join(self.checkpointer.save_dir, f"{self.FILE}.pth")
        try:
            content = load_weights(path, mmap=True)
            about = {name: content[name] for name in ABOUT}
        except (WeightsError, LookupError, TypeError) as error:
            if standing.iteration < 0:
                return standing
            logging.getLogger(__name__).warning(
                "%s was the best (%s): the best weights are sought anew: %s",
                *(path, _describe(standing), error),
            )
            return replace(BestRecord(standing.metric, standing.data), evaluated=standing.evaluated)
        same = all(about[name] == getattr(standing, name) for name in ("metric", "data"))
        known = all(about[name] == getattr(standing, name) for name in ABOUT)
        # One that is older and not the checkpoint's is of another run.
        resumed = self.checkpointer.resumed
        newer = resumed is not None and os.stat(path).st_mtime_ns >= resumed
        if same and newer and not known and about["value"] > -math.inf:
            return replace(standing, **about, since=0)
        return standing

    def renumber(self, done: int, now: int) -> None:
        """Of a run that has counted ``done`` iterations, which from here on count as ``now``."""

        def other(iteration: int) -> int:
            return max((iteration + 1) * now // done - 1, min(iteration, 0))

        best, evaluated = self.standing.iteration, self.standing.evaluated
        self.standing = replace(self.standing, iteration=other(best), evaluated=other(evaluated))

    def reason_to_stop(self) -> str:
        return (
            f"{self.standing.since} evaluations gave no better {self.standing.metric} than "
            f"{_describe(self.standing)} (TEST.PATIENCE {self.patience})"
        )

    def after_train(self) -> None:
        """After evaluations that gave no number, as if nothing is detected yet: the last weights
        are kept, which any number will replace."""
        ended = self.trainer.iter >= self.trainer.max_iter and not self.trainer.preemption.left
        if not ended or self.standing.iteration >= 0:
            return
        logging.getLogger(__name__).warning(
            "%s was a number in no evaluation: the last weights count as the best",
            self.standing.metric,
        )
        self.standing = replace(self.standing, iteration=evaluated_iteration(self.trainer))
        self._save(self.checkpointer.model, self.standing)

    def describe(self) -> str:
        """Names the file of the best weights, and their value."""
        path = os.path.join(self.checkpointer.save_dir, f"{self.FILE}.pth")
        return f"The best weights are in {path} ({self.standing.metric} {_describe(self.standing)})"

    def state_dict(self) -> dict:
        return asdict(self.standing)

    def load_state_dict(self, state: dict) -> None:
        loaded, standing = BestRecord(**state), self.standing
        if (loaded.metric, loaded.data) == (standing.metric, standing.data):
            self.standing = loaded
        else:
            logging.getLogger(__name__).warning(
                "Until now the best weights were by %s on %s: those by %s on %s are from here on",
                *(loaded.metric, loaded.data, standing.metric, standing.data),
            )


def _describe(standing: BestRecord) -> str:
    kind = "averaged weights (EMA)" if standing.averaged else "weights"
    if standing.value == -math.inf:
        return f"in no evaluation a number, the last {kind}, of iteration {standing.iteration}"
    return f"{standing.value:.3f}, with the {kind} of iteration {standing.iteration}"


def best_metric(cfg: CfgNode) -> str:
    """The metric of the best weights, under its whole name: of several test sets that of the first
    with objects. "" if the config does not ask for them, evaluates only at the end, or no test set
    has objects."""
    metric, names = cfg.TEST.BEST_METRIC, cfg.DATASETS.TEST
    if not (metric and cfg.TEST.EVAL_PERIOD > 0):
        return ""
    if len(names) > 1 and _data_set_of(metric, names):
        return metric
    measured = next(filter(has_objects, names), "")
    return f"{measured}/{metric}" if measured and len(names) > 1 else measured and metric


def known_metrics(name: str) -> list[str]:
    """What an evaluation on a data set gives, but for single classes."""
    kind = MetadataCatalog.get(name).get("evaluator_type")
    return [f"bbox/{x}" for x in METRICS.get(kind, ())]


def check_metric(cfg: CfgNode) -> None:
    """Check that evaluations will give the metric of the best weights.

    Raises:
        ValueError: naming what there is.
    """
    metric, names = best_metric(cfg), cfg.DATASETS.TEST
    if not metric:
        return
    name, plain = names[0], metric
    if len(names) > 1:
        name = _data_set_of(metric, names)
        plain = metric.removeprefix(f"{name}/")
    if not has_objects(name):
        raise UserError(f"TEST.BEST_METRIC is {metric!r}, but data set {name} has no objects")
    known, classes = known_metrics(name), classes_of(name) or ()
    if MetadataCatalog.get(name).get("evaluator_type") != "coco" or len(classes) == 1:
        classes = ()  # are not evaluated apart
    if known and plain not in (*known, *(f"bbox/AP-{x}" for x in classes)):
        raise UserError(f"unknown TEST.BEST_METRIC {cfg.TEST.BEST_METRIC!r}: choose from {known}")


def _data_set_of(metric: str, names: Sequence[str]) -> str:
    """The test set that a whole name of a metric begins with, "" for none."""
    return max((name for name in names if metric.startswith(f"{name}/")), key=len, default="")


def evaluated_iteration(trainer: TrainerBase) -> int:
    """That which made the weights, numbered as checkpoints are. After the last one Detectron2 has
    counted on, also where there was none to make."""
    return min(trainer.storage.iter, max(trainer.max_iter, trainer.start_iter) - 1)
