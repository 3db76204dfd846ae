"""Evaluations during training, the best weights, and early stopping.

The main process, which alone has results, decides and broadcasts.
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter
from torch import nn

from ..checkpoints import TrainingCheckpointer
from ..data.datasets import classes_of, has_objects
from ..deprecated import renamed_names, warn
from ..errors import UserError
from ..weights import WeightsError, load_weights

__getattr__ = renamed_names(__name__)

# The detections of the best weights, in the folder of a data set's results.
BEST_RESULTS = "best_results.json"
# Metrics by evaluator_type.
COCO = ("AP", "AP50", "AP75", "APs", "APm", "APl")
METRICS = {"coco": COCO, "lvis": (*COCO, "APr", "APc", "APf"), "pascal_voc": COCO[:3]}
# Fields of a BestRecord that are saved with the weights.
ABOUT = ("metric", "data", "value", "iteration", "averaged")


class Evaluation(hooks.EvalHook):
    """EvalHook for runs that stop early. The checkpoint of an iteration precedes its evaluation, so
    that a signal can end it; the resumed run evaluates first.

    Args:
        period: in iterations; 0 evaluates only at the end.
        evaluate: returns the results by task.
        writer: writes the results, in the main process.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[], dict],
        writer: hooks.PeriodicWriter | None = None,
    ):
        self.results: dict = {}

        def remember() -> dict:
            self.results = evaluate()
            return self.results

        super().__init__(period, remember)
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
        # Detectron2's hook evaluates also if the last iteration failed.
        ended = self.trainer.iter >= self.trainer.max_iter and not self.trainer.preemption.left
        if ended and self.last != evaluated_iteration(self.trainer):
            self._do_eval()
        del self._func  # a reference to the trainer

    def _do_eval(self) -> None:
        start = time.perf_counter()
        super()._do_eval()
        if self._period and self.last < 0 and self.results:  # else DATASETS.TEST is empty
            seconds = timedelta(seconds=round(time.perf_counter() - start))
            logging.getLogger(__name__).info("One evaluation takes %s", seconds)
        self.last = evaluated_iteration(self.trainer)

    def _write(self) -> None:
        """Write now: PeriodicWriter keeps only the last evaluation of 20 iterations."""
        for writer in self.writer._writers if self.writer else ():
            if not isinstance(writer, CommonMetricPrinter):
                writer.write()


@dataclass(frozen=True)
class BestRecord:
    """The best weights so far.

    Attributes:
        metric: greater is better.
        data: names of the test sets.
        value: the best; -inf before the first.
        iteration: of the best weights; -1 before the first.
        averaged: whether the best weights are averages.
        evaluated: iteration of the last evaluation.
        since: evaluations since the best.
    """

    metric: str
    data: str = ""
    value: float = -math.inf
    iteration: int = -1
    averaged: bool = False
    evaluated: int = -1
    since: int = 0


class Best(HookBase):
    """Hook that keeps the best weights of all evaluations as model_best.pth, and their detections.

    Args:
        metric: such as "bbox/AP", or "name/bbox/AP" with several test sets.
        patience: evaluations without a better value that end the training; 0 for no limit.
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
        self.record = BestRecord(metric, ", ".join(test_sets))
        self.patience = patience
        self.checkpointer = checkpointer
        self.test_sets = tuple(test_sets)

    @property
    def standing(self) -> BestRecord:
        warn("Best.standing", "Best.record")
        return self.record

    @property
    def exhausted(self) -> bool:
        return 0 < self.patience <= self.record.since

    def update(self, evaluated: list[tuple[nn.Module, dict]], iteration: int) -> None:
        """Compare the results of an iteration with the best.

        Args:
            evaluated: models with their results, the averages last.

        Raises:
            UserError: in all processes, if the metric is missing.
        """
        if iteration == self.record.evaluated:  # a run that ended early is resumed
            return
        outcome = self._compare(evaluated, iteration) if comm.is_main_process() else None
        outcome = comm.all_gather(outcome)[0]
        if isinstance(outcome, str):
            raise UserError(outcome)
        self.record = outcome

    def _compare(self, evaluated: list[tuple[nn.Module, dict]], iteration: int) -> BestRecord | str:
        """Save better weights. Return the new record, or a message."""
        metric, best = self.record.metric, None
        had_one = self.record.iteration >= 0
        # After an interruption, evaluations up to the best one are repeated and do not count.
        since = self.record.since + (had_one and iteration > self.record.iteration)
        record = replace(self.record, evaluated=iteration, since=since)
        for averaged, (model, results) in enumerate(evaluated):
            values = flatten_results_dict(results)
            if metric not in values:
                # Without the metrics of single classes.
                names = [name for name in values if "-" not in name.rpartition("/")[2]]
                if not names:  # without annotations, detections are only written
                    continue
                return f"unknown TEST.BEST_METRIC {metric!r}: choose from {sorted(names)}"
            value = float(values[metric])
            if math.isfinite(value) and value > record.value:
                best = model
                record = replace(
                    record, value=value, iteration=iteration, averaged=bool(averaged), since=0
                )
        logger = logging.getLogger(__name__)
        if best is None:
            if had_one:
                logger.info("No better %s for %d evaluations", metric, record.since)
            return record
        logger.info("The best %s so far: %s", metric, _describe(record))
        self._save(best, record)
        return record

    def _save(self, model: nn.Module, record: BestRecord) -> None:
        # First: if the run is killed before the weights are saved, it will evaluate again.
        folder = Path(self.checkpointer.save_dir)
        for name in self.test_sets:
            target = folder / "inference" / name / BEST_RESULTS
            evaluated = folder / "ema" if record.averaged else folder
            source = evaluated / "inference" / name / "coco_instances_results.json"
            if source.is_file():  # not of Pascal VOC's or LVIS's evaluator
                shutil.copyfile(source, f"{target}.unfinished")
                os.replace(f"{target}.unfinished", target)
        about = {x: getattr(record, x) for x in ABOUT}
        self.checkpointer.save_weights(self.FILE, model, **about)

    def adopt(self) -> None:
        """Adopt the file's weights in a resumed run, if newer than the checkpoint."""
        self.record = comm.all_gather(self._adopt())[0]

    def _adopt(self) -> BestRecord:
        record = self.record
        if not comm.is_main_process():
            return record
        path = os.path.join(self.checkpointer.save_dir, f"{self.FILE}.pth")
        try:
            content = load_weights(path, mmap=True)
            about = {name: content[name] for name in ABOUT}
        except (WeightsError, LookupError, TypeError) as error:
            if record.iteration < 0:
                return record
            logging.getLogger(__name__).warning(
                f"Cannot use the best weights {path} ({_describe(record)}), the search for the "
                f"best starts anew: {error}"
            )
            return replace(BestRecord(record.metric, record.data), evaluated=record.evaluated)
        same = all(about[name] == getattr(record, name) for name in ("metric", "data"))
        recorded = all(about[name] == getattr(record, name) for name in ABOUT)
        # A file that is older than the checkpoint and not in it is from another run.
        resumed = self.checkpointer.resumed
        newer = resumed is not None and os.stat(path).st_mtime_ns >= resumed
        if same and newer and not recorded and about["value"] > -math.inf:
            return replace(record, **about, since=0)
        return record

    def renumber(self, done: int, now: int) -> None:
        """Count ``done`` iterations as ``now`` from here on."""

        def rescale(iteration: int) -> int:
            return max((iteration + 1) * now // done - 1, min(iteration, 0))

        best, evaluated = self.record.iteration, self.record.evaluated
        self.record = replace(self.record, iteration=rescale(best), evaluated=rescale(evaluated))

    def reason_to_stop(self) -> str:
        return (
            f"{self.record.since} evaluations gave no better {self.record.metric} than "
            f"{_describe(self.record)} (TEST.PATIENCE {self.patience})"
        )

    def after_train(self) -> None:
        ended = self.trainer.iter >= self.trainer.max_iter and not self.trainer.preemption.left
        if not ended or self.record.iteration >= 0:
            return
        logging.getLogger(__name__).warning(
            "%s was NaN in every evaluation: the last weights count as the best",
            self.record.metric,
        )
        self.record = replace(self.record, iteration=evaluated_iteration(self.trainer))
        self._save(self.checkpointer.model, self.record)

    def describe(self) -> str:
        path = os.path.join(self.checkpointer.save_dir, f"{self.FILE}.pth")
        if self.record.value == -math.inf:
            return (
                f"No evaluation gave a number for {self.record.metric} (no detections?): the "
                "training was too short, or its learning rate too low or too high; the last "
                f"weights are in {path}"
            )
        return f"The best weights are in {path} ({self.record.metric} {_describe(self.record)})"

    def state_dict(self) -> dict:
        return asdict(self.record)

    def load_state_dict(self, state: dict) -> None:
        loaded, record = BestRecord(**state), self.record
        if (loaded.metric, loaded.data) == (record.metric, record.data):
            self.record = loaded
        else:
            logging.getLogger(__name__).warning(
                f"The checkpoint has the best weights by {loaded.metric} on {loaded.data}: the "
                f"search starts anew by {record.metric} on {record.data}"
            )


def _describe(record: BestRecord) -> str:
    kind = "averaged weights (EMA)" if record.averaged else "weights"
    if record.value == -math.inf:
        return f"NaN in every evaluation, the last {kind}, of iteration {record.iteration}"
    return f"{record.value:.3f}, with the {kind} of iteration {record.iteration}"


def best_metric(cfg: CfgNode) -> str:
    """Return the metric of the best weights; with several test sets, that of the first with
    objects. "" without metric, objects, or evaluations during training."""
    metric, names = cfg.TEST.BEST_METRIC, cfg.DATASETS.TEST
    if not (metric and cfg.TEST.EVAL_PERIOD > 0):
        return ""
    if len(names) > 1 and _data_set_of(metric, names):
        return metric
    measured = next(filter(has_objects, names), "")
    return f"{measured}/{metric}" if measured and len(names) > 1 else measured and metric


def known_metrics(name: str) -> list[str]:
    kind = MetadataCatalog.get(name).get("evaluator_type")
    return [f"bbox/{x}" for x in METRICS.get(kind, ())]


def check_metric(cfg: CfgNode) -> None:
    """Check that evaluations give TEST.BEST_METRIC.

    Raises:
        UserError: naming the possible metrics.
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
        classes = ()  # no metrics of single classes
    if known and plain not in (*known, *(f"bbox/AP-{x}" for x in classes)):
        raise UserError(f"unknown TEST.BEST_METRIC {cfg.TEST.BEST_METRIC!r}: choose from {known}")


def _data_set_of(metric: str, names: Sequence[str]) -> str:
    return max((name for name in names if metric.startswith(f"{name}/")), key=len, default="")


def evaluated_iteration(trainer: TrainerBase) -> int:
    """Return the iteration that made the weights: Detectron2 increments it at the end."""
    return min(trainer.storage.iter, max(trainer.max_iter, trainer.start_iter) - 1)
