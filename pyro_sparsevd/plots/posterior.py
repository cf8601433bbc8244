"""Figures of posteriors."""

__all__ = ["kept_weights", "log_alpha_histogram", "mean_and_scale"]

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ..ops.divergence import log_alpha
from .style import BLUE, ORANGE, as_numpy, figure_or_new, line_styles, plain_numbers


def kept_weights(counts: Mapping[str, tuple[int, int]], *, title: str = "", figure: Any = None) -> Any:
    """Draws how many weights each layer keeps, and how many it has, as bars on a logarithmic axis.

    Args:
        counts: The number of weights kept and of all, by the name of the layer.
        title: The title.
        figure: The figure or sub-figure to draw on; by default a new one.

    Returns:
        The figure.

    Example:
        >>> axis = kept_weights({"0.weight": (20, 1000), "2.weight": (0, 100)}).axes[0]
        >>> [text.get_text() for text in axis.texts]
        ['20 of 1,000, 50 times fewer', '0 of 100']
    """
    figure = figure_or_new(figure, size=(6, 1.2 + 0.4 * len(counts)))
    axis = figure.subplots()
    names = list(counts)
    axis.barh(names, [total for _, total in counts.values()], color="lightgray", label="all")
    axis.barh(names, [kept for kept, _ in counts.values()], color=ORANGE, label="kept")
    for name, (kept, total) in counts.items():
        text = f"{kept:,} of {total:,}" + (f", {total / kept:.3g} times fewer" if kept else "")
        axis.annotate(text, (1, name), xytext=(4, 0), textcoords="offset points", va="center", fontsize="small")
    largest = max((total for _, total in counts.values()), default=1)
    axis.set(xscale="log", xlim=(0.8, 2 * largest), xlabel="weights", title=title)
    axis.invert_yaxis()
    plain_numbers(axis.xaxis)
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=2)
    return figure


def log_alpha_histogram(
    log_alphas: Mapping[str, Tensor], *, threshold: float | None = None, title: str = "", figure: Any = None
) -> Any:
    """Draws the histogram of log α of each site, and which part of it is dropped.

    Values beyond the axis, such as infinite ones, are counted at its ends.

    Args:
        log_alphas: log α of each site's weights, by the site's name, in the shape of the weights, which the legend has.
        threshold: The log α above which weights are dropped.
        title: The title.
        figure: The figure or sub-figure to draw on; by default a new one.

    Returns:
        The figure.

    Example:
        >>> len(log_alpha_histogram({"w": torch.randn(100)}, threshold=3.0).axes)
        1
    """
    figure = figure_or_new(figure)
    axis = figure.subplots()
    found = {_layer_name(name, values): as_numpy(values).ravel() for name, values in log_alphas.items()}
    low, high = _range(np.concatenate(list(found.values())), threshold)
    for (name, values), (color, line, _) in zip(found.items(), line_styles(), strict=False):
        bins: dict[str, Any] = {"bins": 90, "range": (low, high), "density": True}
        _, _, (outline,) = axis.hist(values.clip(low, high), histtype="step", label=name, color=color, **bins)
        outline.set_linestyle(line)  # matplotlib 3.10 takes no dashes in hist
    if threshold is not None:
        axis.axvspan(threshold, high, color="lightgray", alpha=0.4, zorder=0, label=f"dropped: log α > {threshold:g}")
    axis.set(xlabel="log α", ylabel="density", yscale="log", xlim=(low, high), title=title)
    axis.legend(fontsize="small")
    return figure


def _layer_name(name: str, values: Tensor) -> str:
    """Returns the name of a site with the sizes of its layer: inputs, outputs, and the kernel of a convolution."""
    if values.dim() < 2:
        return name
    outputs, inputs, *kernel = values.shape
    return f"{name} ({inputs} → {outputs}{', ' + '×'.join(map(str, kernel)) if kernel else ''})"


def _range(values: np.ndarray, threshold: float | None) -> tuple[float, float]:
    """Returns limits that all but a thousandth of the finite values lie within, at most 20 from the threshold."""
    finite = values[np.isfinite(values)]
    low, high = np.quantile(finite, [0.0005, 0.9995]) if len(finite) else (-1.0, 1.0)
    if threshold is not None:
        low, high = np.clip([low, high], [threshold - 20, threshold], [threshold, threshold + 20])
    return float(low) - 0.5, float(high) + 0.5


def mean_and_scale(
    loc: Tensor, log_variance: Tensor, *, threshold: float | None = None, title: str = "", figure: Any = None
) -> Any:
    """Draws the posterior scale of each weight against the magnitude of its mean, on logarithmic axes.

    There the threshold on log α is a straight line, ``2 log σ = 2 log |θ| + threshold``.

    Args:
        loc: The mean of each weight.
        log_variance: log σ² of each weight.
        threshold: The log α above which weights are dropped: those above the line.
        title: The title.
        figure: The figure or sub-figure to draw on; by default a new one.

    Returns:
        The figure. A mean or a scale of exactly 0 is drawn at the lower end of its axis; the legend counts them.

    Example:
        >>> figure = mean_and_scale(torch.tensor([0.0, 1.0, 0.1]), torch.tensor([0.0, -4.0, 1.0]), threshold=3.0)
        >>> [line.get_label() for line in figure.axes[0].get_lines()]
        ['dropped: 2', 'kept: 1', 'of them θ = 0 or σ = 0, drawn at the end: 1', 'log α = 3']
    """
    figure = figure_or_new(figure)
    axis = figure.subplots()
    axis.set(xlabel="magnitude of the mean |θ|", ylabel="standard deviation σ", title=title, xscale="log", yscale="log")
    means, scales = (as_numpy(v).ravel() for v in (loc.abs(), (0.5 * log_variance).exp()))
    x, y = _above_zero(means), _above_zero(scales)
    if threshold is None:
        _scatter(axis, x, y, BLUE, ".", "weights")
    else:
        dropped = (log_alpha(loc, log_variance) > threshold).cpu().numpy().ravel()
        _scatter(axis, x[dropped], y[dropped], BLUE, ".", "dropped")
        _scatter(axis, x[~dropped], y[~dropped], ORANGE, "^", "kept")
    at_end = (means == 0) | (scales == 0)
    if at_end.any():
        label = "of them θ = 0 or σ = 0, drawn at the end"
        _scatter(axis, x[at_end], y[at_end], "black", "o", label, markersize=8, fillstyle="none")
    if threshold is not None:
        low, high = axis.get_xlim()  # before the line is drawn, which may go far below the weights
        ends = np.array([low / 1e6, high * 1e6])  # for axes that are widened afterwards
        line = ends * np.exp(threshold / 2)
        axis.plot(ends, line, "k--", linewidth=1, label=f"log α = {threshold:g}", scalex=False, scaley=False)
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    return figure


def _above_zero(values: np.ndarray) -> np.ndarray:
    """Replaces zeros by half the smallest positive value."""
    positive = values[values > 0]
    return np.where(values == 0, positive.min() / 2 if len(positive) else 1.0, values)


def _scatter(axis: Any, x: np.ndarray, y: np.ndarray, color: str, marker: str, label: str, **look: Any) -> None:
    look = {"markersize": 4, "alpha": 0.5, "rasterized": True} | look
    axis.plot(x, y, marker, color=color, label=f"{label}: {len(x)}", **look)
