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
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("atss.analysis", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    values |= {"now": f"{datetime.now():%Y-%m-%d %H:%M}", "version": __version__}
    page = environment.get_template(template).render(values)
    target.write_text(page, encoding="utf-8")
