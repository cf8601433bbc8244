"""Figures of numbers that were found several times, such as with several seeds."""

__all__ = ["intervals"]

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .style import BLUE, are_wide, figure_or_new, plain_numbers


def intervals(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    linear: Collection[str] = (),
    title: str = "",
    figure: Any = None,
) -> Any:
    """Draws for each of several things, a row each, and each quantity, a panel each, the range of its values.

    A dot is a value, the mark their median and the line goes from the smallest to the largest. Values that are not
    finite have no dot; within a row that lacks some stands how many of all it has. A panel whose values differ much is
    logarithmic, unless it is ``linear``.

    Args:
        panels: By the label of a panel, and by the name of a row, the values. All panels have the same rows.
        linear: The labels of panels whose zero means nothing, such as those of densities.
        title: The title.
        figure: The figure or sub-figure to draw on; by default a new one.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no panel or no row, or the rows differ.

    Example:
        >>> errors = {"normal": [0.10, 0.12], "log-uniform": [0.09, 0.09]}
        >>> len(intervals({"error": errors, "NLL": errors}).axes)
        2
    """
    rows = [list(values) for values in panels.values()]
    if not rows or not rows[0] or any(names != rows[0] for names in rows):
        raise ValueError(f"panels: expected the same rows, one or more, in each panel, but got {rows}")
    figure = figure_or_new(figure, size=(3.2 * len(rows) + 1, 1.3 + 0.3 * len(rows[0])))
    axes = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    for axis, (label, values) in zip(axes, panels.items(), strict=True):
        finite = {name: [v for v in found if math.isfinite(v)] for name, found in values.items()}
        axis.set(xlabel=label)
        if label not in linear and are_wide((v for found in finite.values() for v in found), ratio=5):
            axis.set(xscale="log")
            plain_numbers(axis.xaxis)
        for row, (name, known) in enumerate(finite.items()):
            _interval(axis, row, known, len(values[name]))
        axis.grid(axis="y", linewidth=0.4, alpha=0.5)
        axis.margins(x=0.12)
    axes[0].set_yticks(range(len(rows[0])), rows[0])
    axes[0].set(ylim=(len(rows[0]) - 0.5, -0.5))
    figure.suptitle(title)
    return figure


def _interval(axis: Any, row: int, known: list[float], total: int) -> None:
    if known:
        axis.plot([min(known), max(known)], [row, row], color=BLUE, linewidth=1.5)
        axis.plot(known, [row] * len(known), ".", color=BLUE, markersize=4)
        axis.plot(statistics.median(known), row, "o", color=BLUE, markersize=6)
    if len(known) < total:
        text = f"{len(known)} of {total}"
        place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "fontsize": "x-small"}
        axis.annotate(text, (0.99, row), **place)
