"""docs/broken_input.md, whose tables say what broken input gives; tests make the input."""

import re

from conftest import ROOT

PAGE = ROOT / "docs" / "broken_input.md"


def table(section: str) -> dict[str, str]:
    """{what is broken: what is said}, the rows of a section's table."""
    text = PAGE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| `(.+?)` \|$", text, re.MULTILINE)
    return dict(rows)


def is_said(sentence: str, said: str) -> bool:
    """Whether it is all that is said; "..." in the page stands for paths and the like."""
    pattern = ".*".join(map(re.escape, sentence.split("...")))
    return re.fullmatch(pattern, said) is not None
