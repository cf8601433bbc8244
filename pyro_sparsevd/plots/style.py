"""Colours, line styles, axes and figures that the pictures share."""

__all__ = [
    "BLUE",
    "ORANGE",
    "SIGNED",
    "Style",
    "are_wide",
    "as_numpy",
    "figure_or_new",
    "joint_legend",
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

# Of the colours of Okabe and Ito, which readers of any colour vision tell apart; their yellow is too pale for lines.
BLUE, ORANGE = "#0072B2", "#D55E00"
_COLORS = (ORANGE, BLUE, "#009E73", "#CC79A7", "black", "#56B4E9", "#E69F00")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (8, 2, 1, 2, 1, 2)))
_MARKERS = "os^DvP*X<>h"

# Cividis grows lighter from end to end, so that signs are seen in print too. A gap in the middle sets the smallest
# weight of either sign apart from the gray of those that are exactly 0, which are to be masked.
_CIVIDIS = matplotlib.colormaps["cividis"]
_SIGNS = _CIVIDIS(np.r_[np.linspace(0, 0.45, 115), np.linspace(0.55, 1, 115)])
SIGNED = ListedColormap(_SIGNS, name="signed").with_extremes(bad=_CIVIDIS(0.5))


class Style(NamedTuple):
    """How to draw one of several lines.

    Args:
        color: A colour.
        line: A line style.
        marker: A marker.

    Example:
        >>> Style("black", "-", "o").marker
        'o'
    """

    color: str
    line: Any
    marker: str


def figure_or_new(figure: Any, size: tuple[float, float] = (6, 4)) -> Figure | SubFigure:
    """Returns the figure that was given, or a new one.

    Args:
        figure: A figure, a sub-figure or None.
        size: Width and height of a new one, in inches.

    Returns:
        The figure.

    Example:
        >>> figure_or_new(None).get_size_inches()
        array([6., 4.])
    """
    return Figure(figsize=size, layout="constrained") if figure is None else figure


def as_numpy(values: Tensor) -> np.ndarray:
    """Returns the numbers of a tensor of any device and floating-point type.

    Args:
        values: The tensor.

    Returns:
        An array of float32.

    Example:
        >>> as_numpy(torch.ones(2, dtype=torch.bfloat16))
        array([1., 1.], dtype=float32)
    """
    return values.detach().cpu().float().numpy()


def line_styles(skip: str = "") -> Iterator[Style]:
    """Returns colours, lines and markers to be used in turn.

    Args:
        skip: A colour to leave out.

    Returns:
        As many as are asked for. The first 30 differ in colour or line, and in colour or marker; any five that follow
        each other differ in line, for print without colours.

    Example:
        >>> styles = line_styles(skip=BLUE)
        >>> next(styles), next(styles)
        (Style(color='#D55E00', line='-', marker='o'), Style(color='#009E73', line='--', marker='s'))
    """
    colors = [color for color in _COLORS if color != skip]
    return map(Style, cycle(colors), cycle(_LINES), cycle(_MARKERS))


def are_wide(values: Iterable[float], ratio: float = 20.0) -> bool:
    """Returns whether values are better drawn on a logarithmic axis.

    Args:
        values: The values. Those that are not finite are not drawn, and do not count.
        ratio: How much larger than the smallest the largest must be.

    Returns:
        Whether all are positive and they differ so much.

    Example:
        >>> are_wide([1.0, 30.0, float("inf")]), are_wide([0.0, 30.0])
        (True, False)
    """
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > ratio * min(finite)


class _PlainLogFormatter(Formatter):
    """Labels as many of the ticks at 1, 2, ..., 9 times a power of ten as there is room for."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        assert self.axis is not None  # it is set with the formatter
        low, high = self.axis.get_view_interval()
        rooms = {3.0: "1", 1.3: "125", 0.6: "12357"}  # digits by the number of powers of ten that the axis exceeds
        digits = next((digits for room, digits in rooms.items() if high > low * 10**room), "123456789")
        return f"{x:g}" if f"{x:.0e}"[0] in digits else ""


def plain_numbers(axis: Any) -> None:
    """Has a logarithmic axis say 0.5, 20 and 300, not powers of ten.

    Ticks between the powers of ten have labels too where there is room.

    Args:
        axis: The ``xaxis`` or ``yaxis``.

    Example:
        >>> plain_numbers(Figure().subplots().yaxis)
    """
    axis.set_major_formatter(_PlainLogFormatter())
    axis.set_minor_formatter(_PlainLogFormatter())


def joint_legend(axis: Any, other: Any) -> None:
    """Names the lines of two axes below both, where it hides no line.

    Args:
        axis: The left axis.
        other: The right axis, or the left one again.

    Example:
        >>> axis = Figure().subplots()
        >>> line = axis.plot([1, 2], label="error")
        >>> joint_legend(axis, axis)
    """
    lines = axis.get_lines() + (other.get_lines() if other is not axis else [])
    labels = [str(line.get_label()) for line in lines]
    axis.legend(lines, labels, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=len(lines))
