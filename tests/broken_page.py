"""The tables of docs/broken_input.md, made from the cases of the tests:

    python tests/broken_page.py   # writes them

Tables of data sets come from broken.py. Sentences about configs and weights are those that the
tests get. A row with ``...`` in place of any text is kept if it fits.
"""

import re
import sys
from pathlib import Path

import broken
import pytest

from atss.labels.findings import KINDS

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "broken_input.md"
RUN = "run python tests/broken_page.py"
# {section: {fault: sentence}} while the tables are written.
recorded: dict[str, dict[str, str]] | None = None


def read_rows(section: str) -> dict[str, str]:
    """Return {fault: sentence} of a section's table."""
    text = PAGE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| (.+?) \| `(.+?)` \|$", text, re.MULTILINE))


def check_sentence(section: str, fault: str, sentence: str) -> None:
    """Compare a sentence with its row, or record it."""
    row = read_rows(section).get(fault, "")
    fits = re.fullmatch(".*".join(map(re.escape, row.split("..."))), sentence)
    if recorded is not None:
        recorded.setdefault(section, {})[fault] = _shorten(row if fits else sentence)
    else:
        assert fits, f"{PAGE.name} has {row!r}, got {sentence!r}: {RUN}"


def check_faults(section: str, faults: list[str]) -> None:
    """Compare the faults of a section's table with those of the test."""
    assert recorded is not None or list(read_rows(section)) == faults, RUN


def _shorten(sentence: str) -> str:
    """Shorten temporary paths, and the choices of a registry, to which parts are added."""
    sentence = re.sub(r"(?<!\w)/\S*/", "...", sentence)
    return re.sub(r"choose from \[.*?\];", "choose from [...];", sentence)


def format_cases(cases: list[broken.Case]) -> str:
    """Format the table of a section of broken.py."""
    lines = ["| input | training | `check_dataset.py` |\n|---|---|---|\n"]
    for case in cases:
        training = {
            "stops": f'stops: "{case.sentence}"',
            "leaves out": "leaves it out" + (f', logged: "{case.sentence}"' * bool(case.sentence)),
            "trains": f"trains: {case.sentence}",
        }[case.training]
        report = f"{KINDS[case.kind].level} `{case.kind}`" if case.kind else "nothing"
        report = "exits with 2" if case.kind is None else report
        lines.append(f"| {case.name} | {training} | {report} |\n")
    return "".join(lines)


def replace_table(text: str, heading: str, table: str) -> str:
    """Replace the first table below a heading such as "Section: Subsection"."""
    start = 0
    for level, title in enumerate(heading.split(": "), start=2):
        start = text.index(f"\n{'#' * level} {title}\n", start)
    start = text.index("\n|", start) + 1
    return text[:start] + table + re.sub(r"\A(\|.*\n)*", "", text[start:])


def write_tables(rows: dict[str, dict[str, str]]) -> None:
    """Write all tables.

    Args:
        rows: {section: {fault: sentence}} of the other tables than those of broken.py.
    """
    text = PAGE.read_text()
    for heading, cases in broken.SECTIONS.items():
        text = replace_table(text, heading, format_cases(cases))
    for section, sentences in rows.items():
        lines = [f"| {fault} | `{sentence}` |\n" for fault, sentence in sentences.items()]
        text = replace_table(text, section, "".join(["| fault | error |\n|---|---|\n", *lines]))
    PAGE.write_text(text)


def main() -> int:
    import broken_page  # the module that the tests import

    tests = [x for x in TESTS.rglob("test_*.py") if "check_sentence(" in x.read_text()]
    broken_page.recorded = {}
    status = pytest.main(["-p", "no:cacheprovider", *map(str, sorted(tests))])
    write_tables(broken_page.recorded)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
