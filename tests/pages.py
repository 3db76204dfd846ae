"""The code of pages, run as it stands there."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from conftest import ROOT

from atss.config.branches import kinds


@contextmanager
def run_page(page: str) -> Iterator[tuple[dict, list[str]]]:
    """Run the Python of a page: its names and its yamls. What it registers goes afterwards."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    before = [(kind, dict(kind.entries)) for kind in kinds()]
    names: dict = {"__name__": page}
    try:
        for language, code in blocks:
            if language == "python":
                exec(compile(code, page, "exec"), names)
        yield names, [code for language, code in blocks if language == "yaml"]
    finally:
        for kind, entries in before:
            kind.entries = entries
