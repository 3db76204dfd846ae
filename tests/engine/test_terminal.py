"""The terminal's share of the logs."""

import io
import logging
import sys

import pytest
from detectron2.utils.logger import _ColorfulFormatter

from atss.engine.terminal import abridge_terminal, hide_explained_tracebacks
from atss.errors import UserError


def test_terminal_has_tracebacks_of_bugs_only(tmp_path, capsys):
    log, handler = logging.getLogger("detectron2"), logging.StreamHandler(sys.stdout)
    log.addHandler(handler)
    hide_explained_tracebacks(str(tmp_path))

    def logged(error) -> str:
        log.error("Exception during training:", exc_info=error)
        return capsys.readouterr().out

    try:
        assert "too many values" in logged(ValueError("too many values to unpack"))
        assert logged(UserError("SOLVER.MAX_ITER must be >= 1, got 0")) == ""
    finally:
        log.removeHandler(handler)


@pytest.fixture
def both(monkeypatch):
    """Return a log, the text that it writes to the terminal, and the text in its file."""
    log, out, kept = logging.getLogger("detectron2.evaluation"), io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    root = logging.getLogger("detectron2")
    terminal, file = logging.StreamHandler(out), logging.StreamHandler(kept)
    terminal.setFormatter(_ColorfulFormatter("%(message)s", root_name="detectron2"))
    for handler in (terminal, file):
        root.addHandler(handler)
    abridge_terminal()
    level = root.level
    root.setLevel(logging.INFO)
    yield log, out, kept
    root.setLevel(level)
    for handler in (terminal, file):
        root.removeHandler(handler)


def test_terminal_shows_results_in_full(both):
    log, out, kept = both
    results = "\n".join(map(str, range(30)))
    log.info(results)
    assert out.getvalue() == kept.getvalue() == f"{results}\n"


def test_terminal_shows_a_line_of_each_setup_record(both):
    log, out, kept = both

    def default_setup():
        log.info("short")
        log.info("config:\na: 1")
        log.info("x" * 300)

    default_setup()
    rest = " ... (in full: log.txt)\n"
    assert out.getvalue() == f"short\nconfig:{rest}{'x' * 100}{rest}"
    assert kept.getvalue() == f"short\nconfig:\na: 1\n{'x' * 300}\n"


def test_terminal_shortens_long_records(monkeypatch):
    log, out = logging.getLogger("atss"), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    terminal, file = logging.StreamHandler(out), logging.StreamHandler(io.StringIO())
    for handler in (terminal, file):
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    whole = "\n".join(map(str, range(30)))
    try:
        for _ in range(2):
            abridge_terminal()
        log.setLevel(logging.INFO)
        log.info(whole)
        log.warning(whole)
        log.error(whole)
        log.info("short\nenough")
    finally:
        for handler in (terminal, file):
            log.removeHandler(handler)
    first = "\n".join(map(str, range(10)))
    of_info, of_warning = "0\n(29 more lines: log.txt)", f"{first}\n(20 more lines: log.txt)"
    assert out.getvalue() == f"{of_info}\n{of_warning}\n{whole}\nshort\nenough\n"
    assert file.stream.getvalue() == f"{whole}\n" * 3 + "short\nenough\n"
