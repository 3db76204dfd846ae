"""Html pages without outside addresses, of the templates in this folder."""

from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from .. import __version__


def write(template: str, target: Path, **values: Any) -> None:
    """Write a page, with the date and the version of this project.

    Args:
        template: file that extends base.html, whose names it needs too: title, subtitle, sections
            (anchors and headings), messages.

    Raises:
        OSError: if ``target`` cannot be written.
    """
    values |= {"now": f"{datetime.now():%Y-%m-%d %H:%M}", "version": __version__}
    target.write_text(render(template, **values), encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """Return the text of a page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("atss.analysis", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(template).render(values)
