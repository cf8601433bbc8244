"""Colours, line styles, axes and figures that the pictures share."""

__all__ = ["BLUE", "ORANGE", "as_numpy", "figure_or_new", "joint_legend", "line_styles", "plain_numbers"]

from typing import Any

import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogFormatter
from torch import Tensor

# Of the colours of Okabe and Ito, which readers of any colour vision tell apart.
BLUE, ORANGE = "#0072B2", "#D55E00"
_STYLES = [(ORANGE, "-"), (BLUE, "--"), ("#009E73", "-."), ("#CC79A7", ":"), ("black", "-")]


def figure_or_new(figure: Any) -> Figure | SubFigure:
    """Returns the figure that was given, or a new one.

    Args:
        figure: A figure, a sub-figure or None.

    Returns:
        The figure.

    Example:
        >>> figure_or_new(None).get_size_inches()
        array([6., 4.])
    """
    return Figure(figsize=(6, 4), layout="constrained") if figure is None else figure


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


def line_styles(skip: str = "") -> list[tuple[str, str]]:
    """Returns colours and line styles to be used in turn.

    Args:
        skip: A colour to leave out.

    Returns:
        Enough of them, again and again.

    Example:
        >>> line_styles(skip=BLUE)[:2]
        [('#D55E00', '-'), ('#009E73', '-.')]
    """
    return [style for style in _STYLES if style[0] != skip] * 20


def plain_numbers(axis: Any) -> None:
    """Has a logarithmic axis say 20 and 300, not powers of ten.

    Args:
        axis: The ``xaxis`` or ``yaxis``.

    Example:
        >>> plain_numbers(Figure().subplots().yaxis)
    """
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


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
