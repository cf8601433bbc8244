"""Colours, line styles, axes and legends that the figures share."""

__all__ = [
    "BLUE",
    "ORANGE",
    "SIGNED",
    "Style",
    "are_wide",
    "as_numpy",
    "figure_or_new",
    "line_styles",
    "plain_numbers",
]

import math
from collections.abc import Iterable, Iterator
from itertools import cycle
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import Formatter
from torch import Tensor

# The palette of Okabe and Ito, safe for colour-blind readers, without its yellow, which is too pale for lines.
BLUE, ORANGE = "#0072B2", "#D55E00"
_COLORS = (ORANGE, BLUE, "#009E73", "#CC79A7", "black", "#56B4E9", "#E69F00")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (8, 2, 1, 2, 1, 2)))
_MARKERS = "os^DvP*X<>h"

# White in the middle, and a gap there, so that the smallest weights of either sign differ from zeros, which are masked.
_RED_BLUE = matplotlib.colormaps["RdBu_r"]
_SIGNS = _RED_BLUE(np.r_[np.linspace(0, 0.42, 115), np.linspace(0.58, 1, 115)])
SIGNED = ListedColormap(_SIGNS, name="signed").with_extremes(bad="white")


class Style(NamedTuple):
    """Colour, line style and marker of one of several lines."""

    color: str
    line: Any
    marker: str


def figure_or_new(figure: Any, size: tuple[float, float] = (6, 4)) -> Figure | SubFigure:
    """Returns the figure or sub-figure that was given, or a new one of a width and height in inches."""
    return Figure(figsize=size, layout="constrained") if figure is None else figure


def as_numpy(values: Tensor) -> np.ndarray:
    """Returns a tensor of any device and floating-point type as an array of float32.

    >>> as_numpy(torch.ones(2, dtype=torch.bfloat16))
    array([1., 1.], dtype=float32)
    """
    return values.detach().cpu().float().numpy()


def line_styles(skip: str = "") -> Iterator[Style]:
    """Cycles through styles of lines, without the colour ``skip``.

    The first 30 differ in colour or line, and in colour or marker; any five in a row differ in line.
    """
    colors = [color for color in _COLORS if color != skip]
    return map(Style, cycle(colors), cycle(_LINES), cycle(_MARKERS))


def are_wide(values: Iterable[float], ratio: float = 20.0) -> bool:
    """Tells whether the finite values are positive and span more than a ratio, so that they need a logarithmic axis.

    >>> are_wide([1.0, 30.0, float("inf")]), are_wide([0.0, 30.0]), are_wide([1.0, 2.0, float("inf")])
    (True, False, False)
    """
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > ratio * min(finite)


class _PlainLogFormatter(Formatter):
    """Labels as many of the ticks at 1, 2, ..., 9 times a power of ten as there is room for."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        assert self.axis is not None  # it is set with the formatter
        low, high = self.axis.get_view_interval()
        by_decades = {3.0: "1", 1.3: "125", 0.6: "12357"}  # the digits that are labelled, by the length of the axis
        digits = next((digits for decades, digits in by_decades.items() if high > low * 10**decades), "123456789")
        return f"{x:g}" if f"{x:.0e}"[0] in digits else ""


def plain_numbers(axis: Any) -> None:
    """Labels a logarithmic axis with 0.5, 20 and 300 instead of powers of ten."""
    axis.set_major_formatter(_PlainLogFormatter())
    axis.set_minor_formatter(_PlainLogFormatter())
