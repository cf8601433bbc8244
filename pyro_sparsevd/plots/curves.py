"""Figures of error, compression and the bound."""

__all__ = ["threshold_curves", "training_curves"]

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..sparsity.threshold import SweepPoint
from .style import BLUE, ORANGE, are_wide, figure_or_new, joint_legend, line_styles, plain_numbers


def training_curves(
    history: Sequence[Mapping[str, float]],
    *,
    left: Mapping[str, str] = {"error": "error"},  # never modified
    right: Mapping[str, str] = {"compression": "compression"},
    fractions: Collection[str] = ("error", "sparsity"),
    baseline: float | None = None,
    title: str = "",
    figure: Any = None,
) -> Any:
    """Draws quantities against epochs, on two axes, each logarithmic where its quantities differ more than twentyfold.

    Args:
        history: For each epoch its quantities, such as ``error`` and ``compression``.
        left: The quantities on the left axis, with their labels.
        right: The same for the right axis.
        fractions: The quantities that are fractions of 1, and drawn in %.
        baseline: The error of a dense network, a fraction where a quantity on the left axis is.
        title: The title.
        figure: The figure or sub-figure to draw on; by default a new one.

    Returns:
        The figure.

    Example:
        >>> history = [{"nll": 9.0, "kl": 1.0, "compression": 1.0}, {"nll": 5.0, "kl": 2.0, "compression": 9.0}]
        >>> figure = training_curves(history, left={"nll": "NLL, nats", "kl": "KL, nats"})
        >>> [len(axis.get_lines()) for axis in figure.axes]
        [2, 1]
    """
    figure = figure_or_new(figure)
    axis = figure.subplots()
    other = axis.twinx() if right else axis
    styles = line_styles()
    epochs = range(1, len(history) + 1)
    for side, names in filter(lambda pair: pair[1], ((axis, left), (other, right))):
        units = {quantity: (100, ", %") if quantity in fractions else (1, "") for quantity in names}
        values = {quantity: [scale * h[quantity] for h in history] for quantity, (scale, _) in units.items()}
        for (quantity, name), style in zip(names.items(), styles, strict=False):
            side.plot(epochs, values[quantity], color=style.color, linestyle=style.line, label=name)
        side.set(ylabel=", ".join(name + units[quantity][1] for quantity, name in names.items()))
        if are_wide(value for drawn in values.values() for value in drawn):
            side.set(yscale="log")
            plain_numbers(side.yaxis)
    if baseline is not None:
        level = 100 * baseline if any(quantity in fractions for quantity in left) else baseline
        axis.axhline(level, color="gray", linestyle=":", linewidth=1, label="error of the dense network")
    axis.set(xlabel="epoch", title=title)
    joint_legend(axis, other)
    return figure


def threshold_curves(
    points: Sequence[SweepPoint], *, chosen: float | None = None, title: str = "", figure: Any = None
) -> Any:
    """Draws error and compression against the threshold.

    Args:
        points: What :func:`~.threshold.threshold_sweep` returns.
        chosen: The threshold that was chosen.
        title: The title.
        figure: The figure or sub-figure to draw on; by default a new one.

    Returns:
        The figure.

    Example:
        >>> points = [SweepPoint(0.0, 0.03, 0.1, 0.99, 100.0), SweepPoint(3.0, 0.02, 0.1, 0.98, 50.0)]
        >>> len(threshold_curves(points, chosen=3.0).axes)
        2
    """
    figure = figure_or_new(figure)
    axis = figure.subplots()
    other = axis.twinx()
    thresholds = [point.threshold for point in points]
    axis.plot(thresholds, [100 * p.error for p in points], "o-", color=ORANGE, label="error")
    other.plot(thresholds, [p.compression for p in points], "s--", color=BLUE, label="compression")
    if chosen is not None:
        axis.axvline(chosen, color="black", linestyle=":", linewidth=1, label=f"chosen: {chosen:g}")
    axis.set(xlabel="threshold on log α", ylabel="error, %", title=title)
    other.set(ylabel="compression", yscale="log")
    plain_numbers(other.yaxis)
    joint_legend(axis, other)
    return figure
