"""Line charts as SVG elements, which take their ink from the page that contains them."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

# Colours that colour-blind people can tell apart, on white and on black (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
# Matplotlib writes this colour; the page shows its own ink instead.
INK = "#010203"
LEGEND = 12  # lines that a legend has room for

Line = tuple[Sequence[float], Sequence[float]]


def line_chart(
    lines: Mapping[str, Line],
    x_label: str,
    y_label: str,
    x_range: tuple[float | None, float | None] = (None, None),
    y_range: tuple[float | None, float | None] = (None, None),
    markers: bool = False,
    bold: str | None = None,
    points: Mapping[str, tuple[float, float]] | None = None,
) -> str:
    """Return a chart as an svg element.

    Args:
        lines: by name, x and y. A legend names them if they are few.
        bold: name of a line to emphasise; the others are thin.
        points: by name of a line, a point to mark.
    """
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(inked, INK)
    style |= {"svg.fonttype": "none", "svg.hashsalt": "atss", "font.family": "sans-serif"}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(5.6, 3.3), layout="constrained")
        axis = figure.subplots()
        for i, (name, (x, y)) in enumerate(lines.items()):
            colour = INK if name == bold else COLOURS[i % len(COLOURS)]
            width = 2.4 if name == bold or bold is None else 1.1
            marker = "o" if markers else None
            dashes = ("-", "--", ":")[i // len(COLOURS) % 3]
            look: dict[str, Any] = {"color": colour, "lw": width, "ls": dashes, "clip_on": False}
            axis.plot(x, y, label=name, marker=marker, ms=4, **look)
            if points and name in points:
                axis.plot(*points[name], "o", ms=5, **look)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.set_xlim(*x_range)
        axis.set_ylim(*y_range)
        axis.ticklabel_format(scilimits=(-3, 6))
        axis.grid(alpha=0.25, color=INK, lw=0.5)
        if 1 < len(lines) <= LEGEND:
            axis.legend(frameon=False, fontsize=8.5)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _element(file.getvalue())


def _element(document: str) -> str:
    """Return the svg element of a document, without prolog and metadata, as wide as its place."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # equal in all charts of a page
    return svg.replace("xlink:href", "href").replace(INK, "currentColor").strip()
