"""Tables of messages in docs/broken_input.md; tests make the broken input."""

import re

from conftest import ROOT

PAGE = ROOT / "docs" / "broken_input.md"


def table(section: str) -> dict[str, str]:
    """Return {name of a broken input: message}, the rows of a section's table."""
    text = PAGE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| `(.+?)` \|$", text, re.MULTILINE)
    return dict(rows)


def matches(row: str, message: str) -> bool:
    """Return whether a row of the page is the whole message; "..." in the row is any text."""
    pattern = ".*".join(map(re.escape, row.split("...")))
    return re.fullmatch(pattern, message) is not None
