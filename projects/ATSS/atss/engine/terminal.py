"""The terminal's share of the logs; log.txt has all."""

import atexit
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.utils import logger as detectron2_logger

from .explain import explain

LOGS = ("detectron2", "fvcore", "atss")


@contextmanager
def release_logs() -> Iterator[None]:
    """Remove and close the handlers that a run adds, and empty Detectron2's caches of them, so that
    the next run of this process has its own log.txt and prints each line once."""
    before = {name: [*logging.getLogger(name).handlers] for name in LOGS}
    consoles = sys.stdout, sys.stderr
    try:
        yield
    finally:
        for name in LOGS:
            log = logging.getLogger(name)
            for handler in [x for x in log.handlers if x not in before[name]]:
                log.removeHandler(handler)
                stream = getattr(handler, "stream", None)
                if stream and stream not in consoles:  # log.txt, which the logs share
                    stream.close()
                    atexit.unregister(stream.close)
        detectron2_logger.setup_logger.cache_clear()
        detectron2_logger._cached_log_stream.cache_clear()


def hide_explained_tracebacks(output_dir: str) -> None:
    """Hide tracebacks that :func:`explain` replaces, after the logs are set up."""

    def is_printed(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return error is None or explain(error, output_dir) is None

    for name in LOGS:
        for handler in logging.getLogger(name).handlers:
            if _is_terminal(handler):
                handler.addFilter(is_printed)


class _Abridged(logging.Formatter):
    """Formatter that shortens records of more than PAGE lines, except results and errors, and those
    of Detectron2's setup (environment, arguments, config) to one line."""

    PAGE, WIDTH = 20, 100

    def __init__(self, whole: logging.Formatter):
        super().__init__()
        self.whole = whole

    def format(self, record: logging.LogRecord) -> str:
        # Before Detectron2's formatter abbreviates the name of the record, and after another has.
        is_result = record.name.startswith(("detectron2.evaluation", "d2.evaluation"))
        lines = self.whole.format(record).splitlines()
        is_short = len(lines) == 1 and len(lines[0]) <= self.WIDTH
        if record.funcName == "default_setup" and not is_short:
            return f"{lines[0][: self.WIDTH]} ... (in full: log.txt)"
        if len(lines) <= self.PAGE or is_result or record.levelno >= logging.ERROR:
            return "\n".join(lines)
        shown = 10 if record.levelno >= logging.WARNING else 1
        return "\n".join([*lines[:shown], f"({len(lines) - shown} more lines: log.txt)"])


def abridge_terminal() -> None:
    """Shorten long records (environment, config, model), after the logs are set up."""
    for name in LOGS:
        for handler in logging.getLogger(name).handlers:
            formatter = handler.formatter
            if _is_terminal(handler) and formatter and not isinstance(formatter, _Abridged):
                handler.setFormatter(_Abridged(formatter))


def _is_terminal(handler: logging.Handler) -> bool:
    return getattr(handler, "stream", None) is sys.stdout
