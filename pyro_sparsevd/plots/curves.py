"""Figures of error, compression and the bound."""

__all__ = ["threshold_curves", "training_curves"]

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .style import BLUE, ORANGE, are_wide, figure_or_new, line_styles, plain_numbers

_LABELS = {"nll": "NLL, nats", "kl": "KL, nats", "validation_nll": "validation NLL, nats"}


def training_curves(
    history: Sequence[Mapping[str, float]],
    quantities: Sequence[str | Sequence[str]] | None = None,
    *,
    labels: Mapping[str, str] = _LABELS,  # never modified
    fractions: Collection[str] = ("error", "train_error", "sparsity"),
    baseline: float | None = None,
    title: str = "",
    figure: Any = None,
) -> Any:
    """Draws quantities against epochs in panels one above the other, logarithmic where they differ twentyfold.

    Args:
        history: For each epoch its quantities, such as those that :func:`~.fit.fit` returns.
        quantities: The quantity of each panel, or several that share one; by default all of the history.
        labels: What to call quantities, with their units; others are called by their names.
        fractions: The quantities that are fractions of 1, and drawn in %.
        baseline: The error of a dense network, a fraction, drawn in the panel that has the quantity ``error``.
        title: The title.
        figure: The figure or sub-figure to draw on; by default a new one.

    Returns:
        The figure.

    Example:
        >>> history = [{"nll": 9.0, "kl": 1.0, "compression": 1.0}, {"nll": 5.0, "kl": 2.0, "compression": 9.0}]
        >>> figure = training_curves(history, [("nll", "kl"), "compression"])
        >>> [len(axis.get_lines()) for axis in figure.axes]
        [2, 1]
    """
    quantities = quantities or list(dict.fromkeys(name for numbers in history for name in numbers))
    panels = [[names] if isinstance(names, str) else list(names) for names in quantities]
    figure = figure_or_new(figure, size=(6, 1 + 1.5 * len(panels)))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    epochs = range(1, len(history) + 1)
    for axis, names in zip(axes, panels, strict=True):
        drawn = {name: [(100 if name in fractions else 1) * h[name] for h in history] for name in names}
        texts = [labels.get(n, n.replace("_", " ")) + (", %" if n in fractions else "") for n in names]
        for values, text, style in zip(drawn.values(), texts, line_styles(), strict=False):
            axis.plot(epochs, values, color=style.color, linestyle=style.line, label=text)
        if "error" in names and baseline is not None:
            level = 100 * baseline if "error" in fractions else baseline
            axis.axhline(level, color="gray", linestyle=":", label="dense network")
        if len(axis.get_lines()) > 1:
            axis.legend(fontsize="small")
        axis.set(ylabel=texts[0] if len(names) == 1 else "")
        if are_wide(value for values in drawn.values() for value in values):
            axis.set(yscale="log")
            plain_numbers(axis.yaxis)
    axes[-1].set(xlabel="epoch")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    axes[0].set(title=title)
    return figure


def threshold_curves(
    points: Sequence[Any],
    *,
    chosen: float | None = None,
    baseline: float | None = None,
    count: int | None = None,
    title: str = "",
    figure: Any = None,
) -> Any:
    """Draws the error against the compression, with the thresholds beside the points.

    Args:
        points: What :func:`~.threshold.threshold_sweep` returns.
        chosen: The threshold that was chosen.
        baseline: The error of a dense network.
        count: The number of held-out data; with it, a band shows one binomial standard error on either side of an error
            that is a fraction.
        title: The title.
        figure: The figure or sub-figure to draw on; by default a new one.

    Returns:
        The figure.

    Raises:
        ValueError: If ``count`` is given for squared errors.

    Example:
        >>> point = sparsevd.sparsity.SweepPoint
        >>> points = [point(0.0, 0.03, 0.1, 0.99, 100.0), point(3.0, 0.02, 0.1, 0.98, 50.0)]
        >>> axis = threshold_curves(points, chosen=3.0).axes[0]
        >>> [text.get_text() for text in axis.texts]
        ['3', '0']
    """
    names = {getattr(point, "error_name", "error") for point in points}
    is_fraction = names <= {"error"}
    if count is not None and not is_fraction:
        raise ValueError(f"count: expected it for errors that are fractions, but got {', '.join(sorted(names))}")
    figure = figure_or_new(figure)
    axis = figure.subplots()
    points = sorted(points, key=lambda point: point.compression)
    unit = 100 if is_fraction else 1
    compressions, errors = [p.compression for p in points], [unit * p.error for p in points]
    axis.plot(compressions, errors, "o-", color=ORANGE, label="at the threshold beside the point")
    if count is not None:
        sds = [(error * (100 - error) / count) ** 0.5 for error in errors]
        bounds = [[e + sign * sd for e, sd in zip(errors, sds, strict=True)] for sign in (-1, 1)]
        axis.fill_between(compressions, *bounds, color=ORANGE, alpha=0.2, linewidth=0, label="± a standard error")
    for point, error in zip(points, errors, strict=True):
        text = f"{point.threshold:g}" if isinstance(point.threshold, float | int) else ""
        axis.annotate(text, (point.compression, error), xytext=(4, 5), textcoords="offset points", fontsize="small")
        if point.threshold == chosen:
            axis.plot(point.compression, error, "o", color=BLUE, markersize=11, fillstyle="none", label="chosen")
    if baseline is not None:
        axis.axhline(unit * baseline, color="gray", linestyle=":", label="dense network")
    axis.set(xlabel="compression", ylabel="error, %" if is_fraction else names.pop(), xscale="log", title=title)
    plain_numbers(axis.xaxis)
    axis.legend(fontsize="small")
    return figure
