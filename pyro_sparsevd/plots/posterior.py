"""Pictures of priors, posteriors and divergences."""

__all__ = ["divergences", "log_alpha_histogram", "mean_and_scale", "prior_and_posteriors"]

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributions.log_uniform import LogUniform
from ..distributions.sparse_normal import SparseNormal
from ..ops.divergence import kl_log_uniform, log_alpha
from .style import BLUE, ORANGE, as_numpy, figure_or_new, line_styles


def prior_and_posteriors(
    posteriors: Mapping[str, tuple[float, float]], *, limit: float = 3.0, title: str = "", figure: Any = None
) -> Any:
    """Draws the log-uniform prior, in blue, and Gaussian posteriors of single weights.

    Args:
        posteriors: Mean and log variance of each weight, by what to call it.
        limit: The largest magnitude of a weight to draw.
        title: What to write above.
        figure: Where to draw.

    Returns:
        The figure.

    Example:
        >>> figure = prior_and_posteriors({"kept": (1.0, -3.0), "dropped": (0.01, 0.0)})
        >>> [line.get_label() for line in figure.axes[0].get_lines()]
        ['log-uniform prior, p(w) ∝ 1/|w|', 'kept: log α = -3.0', 'dropped: log α = 9.2']
    """
    figure = figure_or_new(figure)
    axis = figure.subplots()
    w = torch.linspace(-limit, limit, 2001, dtype=torch.float64)
    prior = LogUniform().log_prob(w).exp() / 4
    axis.plot(w, prior, color=BLUE, linewidth=2, label="log-uniform prior, p(w) ∝ 1/|w|")
    for (name, (loc, log_variance)), style in zip(posteriors.items(), line_styles(skip=BLUE), strict=False):
        q = SparseNormal(torch.tensor(loc).double(), torch.tensor(log_variance).double())
        label = f"{name}: log α = {q.log_alpha:.1f}"
        axis.plot(w, q.log_prob(w).exp(), color=style.color, linestyle=style.line, label=label)
    axis.set(xlabel="weight w", ylabel="density", ylim=(0, 2.5), xlim=(-limit, limit), title=title)
    axis.legend(fontsize="small")
    return figure


def divergences(
    *, samples: Mapping[float, float] | None = None, limit: float = 8.0, title: str = "", figure: Any = None
) -> Any:
    """Draws the KL divergence against log α, exact and approximate, and below the difference from the exact one.

    Args:
        samples: Monte Carlo estimates of the divergence by log α.
        limit: The largest magnitude of log α to draw.
        title: What to write above.
        figure: Where to draw.

    Returns:
        The figure.

    Example:
        >>> len(divergences(samples={0.0: 0.43}).axes)
        2
    """
    figure = figure_or_new(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    log_alpha = torch.linspace(-limit, limit, 801, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    exact, approximate = (kl_log_uniform(one, log_alpha, form) for form in ("exact", "approximate"))
    above.plot(log_alpha, exact, color=ORANGE, label="exact")
    above.plot(log_alpha, approximate, color=BLUE, linestyle="--", label="approximate (equation 14)")
    below.plot(log_alpha, approximate - exact, color=BLUE, linestyle="--")
    if samples:
        at, values = (torch.tensor(list(v), dtype=torch.float64) for v in (samples.keys(), samples.values()))
        above.plot(at, values, "x", color="black", label="Monte Carlo")
        below.plot(at, values - kl_log_uniform(one, at, "exact"), "x", color="black")
    below.axhline(0, color="gray", linewidth=0.5)
    above.set(ylabel="KL, nats", title=title)
    below.set(xlabel="log α", ylabel="difference from\nthe exact KL, nats", xlim=(-limit, limit))
    above.legend(fontsize="small")
    return figure


def log_alpha_histogram(
    log_alphas: Mapping[str, Tensor], *, threshold: float | None = None, title: str = "", figure: Any = None
) -> Any:
    """Draws the histogram of log α of each site, with the threshold.

    Args:
        log_alphas: log α of each site's weights, by the site's name.
        threshold: The log α above which weights are dropped.
        title: What to write above.
        figure: Where to draw.

    Returns:
        The figure.

    Example:
        >>> len(log_alpha_histogram({"w": torch.randn(100)}, threshold=3.0).axes)
        1
    """
    figure = figure_or_new(figure)
    axis = figure.subplots()
    for (name, values), (color, line, _) in zip(log_alphas.items(), line_styles(), strict=False):
        clipped = as_numpy(values).ravel().clip(-15, 15)
        bins = {"bins": 90, "range": (-15, 15), "density": True}
        _, _, (outline,) = axis.hist(clipped, histtype="step", label=name, color=color, **bins)
        outline.set_linestyle(line)  # matplotlib 3.10 takes no dashes in hist
    if threshold is not None:
        axis.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
    axis.set(xlabel="log α (clipped to ±15)", ylabel="density", yscale="log", title=title)
    axis.legend(fontsize="small")
    return figure


def mean_and_scale(
    loc: Tensor, log_variance: Tensor, *, threshold: float | None = None, title: str = "", figure: Any = None
) -> Any:
    """Draws the posterior scale of each weight against the magnitude of its mean, on logarithmic axes.

    There log α is the threshold on a straight line of slope 1: ``2 log σ = 2 log |θ| + threshold``.

    Args:
        loc: The mean of each weight.
        log_variance: log σ² of each weight.
        threshold: The log α above which weights are dropped: those above the line.
        title: What to write above.
        figure: Where to draw.

    Returns:
        The figure. A mean or a scale of exactly 0, which a logarithmic axis has no place for, is at its lower end, and
        the legend says how many there are.

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
        ends = np.array(
            axis.get_xlim()
        )  # fixes the limits before the line is there, which may go far below the weights
        line = ends * np.exp(threshold / 2)
        axis.plot(ends, line, "k--", linewidth=1, label=f"log α = {threshold:g}", scalex=False, scaley=False)
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    return figure


def _above_zero(values: np.ndarray) -> np.ndarray:
    """Returns the values with half the smallest positive one in the place of zeros."""
    positive = values[values > 0]
    return np.where(values == 0, positive.min() / 2 if len(positive) else 1.0, values)


def _scatter(axis: Any, x: np.ndarray, y: np.ndarray, color: str, marker: str, label: str, **look: Any) -> None:
    look = {"markersize": 4, "alpha": 0.5, "rasterized": True} | look
    axis.plot(x, y, marker, color=color, label=f"{label}: {len(x)}", **look)
