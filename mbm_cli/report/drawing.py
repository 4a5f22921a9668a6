"""How pictures look: the width of a paper's column, colours and lines that differ in greyscale, names that fit."""

import io
import re
from collections.abc import Sequence
from textwrap import TextWrapper
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLUMN = 8 / 2.54  # inches: the width of a paper's column
# For pictures of that width.
small = rc_context({"font.size": 6.7, **dict.fromkeys(("axes.titlesize", "figure.titlesize", "figure.labelsize"), 7)})
# From the palette of Okabe and Ito, with line styles that differ too.
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
TRUNCATED = "truncated bits"
LEGEND_INSIDE = 14  # characters of a name, above which a legend has no room between the lines


def plain(text: str) -> str:
    """Escape what Matplotlib would interpret: a file's name may have a $, or bytes that are not text."""
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")


def wrapped(name: str, width: int) -> str:
    """Wrap the name of a multiplier or a combination; drop the folders of files."""
    name = re.sub(r"\b(lut|python|c|u?int\d+):(?! )[^,}]*/", r"\1:", name)
    wrapper = TextWrapper(width, max_lines=3, placeholder=" ...")
    wrapper.wordsep_re = re.compile(r"(\s+|(?<=[_:])(?=\w))")  # a long name goes on in the next line after these
    return plain(wrapper.fill(name))


def style_of(i: int) -> dict[str, Any]:
    """Return color, line and marker of the i-th of several lines."""
    color, line, marker = COLORS[i % len(COLORS)], LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]
    return {"color": color, "linestyle": line, "marker": marker, "markersize": 4}


def draw_means(axes: Axes, x: Sequence[float], seeds: Sequence[Any], i: int, label: str) -> None:
    """Draw the i-th line: means over the seeds of each point, and a band from the lowest to the highest."""
    low, mean, high = ([float(f(values)) for values in seeds] for f in (np.min, np.mean, np.max))
    axes.fill_between(x, low, high, color=style_of(i)["color"], alpha=0.2, linewidth=0)
    axes.plot(x, mean, label=label, **style_of(i))
    if len(x) == 1:
        axes.vlines(x, low, high, color=style_of(i)["color"], linewidth=1)


def legend(figure: Figure, axes: Axes, place: str, **more: Any) -> None:
    """Put a legend outside the axes, in two columns where names are short."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if len(labels) > 1 and max(map(len, labels)) <= 20 else 1
    figure.legend(handles, labels, loc=place, ncols=columns, handlelength=3, **more)  # type: ignore[call-overload]


def png_of(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()
