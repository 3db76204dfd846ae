"""Services that track runs, which SOLVER.LOGGERS names: Weights & Biases, MLflow, or your own.

A service is a class without arguments and with three methods; ``package`` names the package that it
needs, if any::

    @LOGGERS.register(name="mine")
    class Mine:
        package = "mine"

        def start(self, cfg, name, run_id): ...  # returns the id of the new or continued run
        def log(self, values, iteration): ...  # values by name
        def end(self, state): ...  # "finished", "failed" or "interrupted"
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from posixpath import normpath
from re import sub
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter

from ..config.checks import flatten, lookup
from ..errors import UserError, with_message
from ..registry import Registry, is_own
from .watch import current
from .writers import new_scalars, strict

LOGGERS = Registry("SOLVER.LOGGERS")
MLFLOW_STATES = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


@LOGGERS.register(name="wandb")
class WeightsAndBiases:
    """Service of wandb.ai. Variables WANDB_* set project, entity and mode."""

    package = "wandb"

    def start(self, cfg: CfgNode, name: str, run_id: str) -> str:
        import wandb

        self.run = wandb.init(
            name=name,
            id=run_id or None,
            resume="allow",
            dir=cfg.OUTPUT_DIR,
            config=strict(cfg),
            allow_val_change=True,  # a resumed run may have another config
            reinit="create_new",  # a run of the calling program goes on
        )
        # As wandb's own step, a resumed run could not repeat iterations.
        self.run.define_metric("*", step_metric="iteration")
        return self.run.id

    def log(self, values: dict[str, float], iteration: int) -> None:
        self.run.log({**values, "iteration": iteration})

    def end(self, state: str) -> None:
        if state == "interrupted":
            self.run.mark_preempting()
        self.run.finish(exit_code=0 if state == "finished" else 1)


@LOGGERS.register(name="mlflow")
class MLflow:
    """Tracking server or folder of MLflow. Variables MLFLOW_* set address and experiment."""

    package = "mlflow"
    BATCH = 100  # entries of a request, at most

    def start(self, cfg: CfgNode, name: str, run_id: str) -> str:
        import mlflow

        self.api = mlflow
        run = mlflow.start_run(run_id=run_id or None, run_name=name)
        mlflow.log_text(cfg.dump(), "config.yaml")
        if not run_id:  # parameters cannot change
            values = {x: value for x, value in flatten(cfg) if not isinstance(value, CfgNode)}
            self._send(mlflow.log_params, values)
        return run.info.run_id

    def log(self, values: dict[str, float], iteration: int) -> None:
        def send(batch: dict) -> None:
            self.api.log_metrics(batch, step=iteration)

        self._send(send, {_metric_name(x): value for x, value in values.items()})

    def end(self, state: str) -> None:
        self.api.end_run(MLFLOW_STATES[state])

    def _send(self, send: Callable[[dict], object], values: dict) -> None:
        entries = [*values.items()]
        for i in range(0, len(entries), self.BATCH):
            send(dict(entries[i : i + self.BATCH]))


def _metric_name(name: str) -> str:
    """Return a name that MLflow accepts, of a name with any name of a class."""
    name = sub(r"[^\w.\- /]", "_", name)[:250]
    return name if normpath(name) == name else name.replace("/", "_")


class RunWriter(EventWriter):
    """Writer of finite scalars to a service. If the service fails after its start, the log has a
    warning, and the training continues without it.

    Args:
        name: in SOLVER.LOGGERS.
        service: as in :mod:`atss.engine.loggers`.
    """

    WINDOW = 20  # iterations of a median, as in Detectron2's writers

    def __init__(self, name: str, service: Any, cfg: CfgNode):
        self.name, self.service, self.cfg = name, service, cfg
        self.file = Path(cfg.OUTPUT_DIR, f"{name}_run_id")
        self.active, self.last = False, -1

    def start(self, resumed: bool) -> None:
        """Start a run, or continue the run of a resumed training.

        Raises:
            UserError: if the service cannot start.
        """
        run_id = self.file.read_text().strip() if resumed and self.file.is_file() else ""
        title = os.path.basename(os.path.abspath(self.cfg.OUTPUT_DIR))
        try:
            run_id = self.service.start(self.cfg, title, run_id)
        except Exception as error:
            which = f" with the run id in {self.file}" if run_id else ""
            raise with_message(
                error,
                f"SOLVER.LOGGERS {self.name!r} cannot start{which}: {_first_line(error)}",
                is_own(type(self.service)),
            ) from error
        self.file.write_text(f"{run_id}\n")
        self.active = True

    def write(self) -> None:
        new = new_scalars(self.WINDOW, self.last)
        self.last = max([self.last, *new])
        for iteration, values in new.items():
            if finite := {x: value for x, value in values.items() if math.isfinite(value)}:
                self._call(self.service.log, finite, iteration)

    def end(self, state: str) -> None:
        self._call(self.service.end, state)
        self.active = False

    def _call(self, method: Callable[..., object], *arguments: object) -> None:
        if not self.active:
            return
        try:
            method(*arguments)
        except Exception as error:
            self.active = False
            logging.getLogger(__name__).warning(
                "SOLVER.LOGGERS %r failed and gets nothing more from this run: %s",
                self.name,
                _first_line(error),
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


@contextmanager
def tracked(writers: Sequence[RunWriter], resumed: bool) -> Iterator[None]:
    """Start services, and end them with the state of the training."""
    state = "failed"
    try:
        for writer in writers:
            writer.start(resumed)
        yield
        state = "finished"
    except BaseException as error:
        if current().left or isinstance(error, KeyboardInterrupt):
            state = "interrupted"
        raise
    finally:
        for writer in writers:
            writer.end(state)


def build_run_writers(cfg: CfgNode) -> list[RunWriter]:
    """Build the writers that SOLVER.LOGGERS names.

    Raises:
        UserError: if a name is unknown or given twice, or its package is not installed.
    """
    names = [str(x) for x in cfg.SOLVER.LOGGERS]
    writers = []
    for name in names:
        service = lookup(LOGGERS, name, "SOLVER.LOGGERS")
        if names.count(name) > 1:
            raise UserError(f"SOLVER.LOGGERS {cfg.SOLVER.LOGGERS} names {name} twice")
        package = getattr(service, "package", "")
        found = find_spec(package) if package else None
        # Its own folder of results, in the current folder, is a package without origin.
        if package and (found is None or found.origin is None):
            raise UserError(
                f"SOLVER.LOGGERS {name!r} needs the package {package}, which is not installed: "
                f"pip install {package}"
            )
        writers.append(RunWriter(name, service(), cfg))
    return writers
