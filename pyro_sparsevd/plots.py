"""Pictures from plain data.

Each function draws into the figure, or sub-figure, that it is given, or into a new one, and returns it; nothing is
shown. Colours are those of Okabe and Ito, and where lines must be told apart, so do their styles, for readers who
see no colours and for print. This module is not imported with the package: ``from pyro_sparsevd import plots``.
"""

__all__ = [
    "animate_weight_images",
    "compression_curves",
    "connections",
    "divergences",
    "log_alpha_histogram",
    "mean_and_scale",
    "prior_and_posteriors",
    "prior_comparison",
    "threshold_curves",
    "training_curves",
    "weight_images",
]

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .comparison import PriorComparison
from .curve_plots import compression_curves, threshold_curves, training_curves
from .distributions import LogUniform, SparseNormal
from .divergence import kl_log_uniform
from .drawing import BLUE, ORANGE, as_numpy, figure_or_new, line_styles
from .weight_plots import animate_weight_images, connections, weight_images


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
    for (name, (loc, log_variance)), (color, style) in zip(posteriors.items(), line_styles(skip=BLUE), strict=False):
        q = SparseNormal(torch.tensor(loc).double(), torch.tensor(log_variance).double())
        label = f"{name}: log α = {q.log_alpha:.1f}"
        axis.plot(w, q.log_prob(w).exp(), color=color, linestyle=style, label=label)
    axis.set(xlabel="weight w", ylabel="density", ylim=(0, 2.5), xlim=(-limit, limit), title=title)
    axis.legend(fontsize="small")
    return figure


def divergences(
    *, samples: Mapping[float, float] | None = None, limit: float = 8.0, title: str = "", figure: Any = None
) -> Any:
    """Draws the KL divergence against log α, exact and approximate, and their difference below.

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
    below.set(xlabel="log α", ylabel="minus exact, nats", xlim=(-limit, limit))
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
    for (name, values), (color, style) in zip(log_alphas.items(), line_styles(), strict=False):
        clipped = as_numpy(values).ravel().clip(-15, 15)
        bins = {"bins": 90, "range": (-15, 15), "density": True}
        axis.hist(clipped, histtype="step", label=name, color=color, linestyle=style, **bins)
    if threshold is not None:
        axis.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
    axis.set(xlabel="log α (clipped to ±15)", ylabel="density", yscale="log", title=title)
    axis.legend(fontsize="small")
    return figure


def mean_and_scale(
    loc: Tensor, log_variance: Tensor, *, threshold: float | None = None, title: str = "", figure: Any = None
) -> Any:
    """Draws the posterior scale of each weight against its mean, and the lines where log α is the threshold.

    Args:
        loc: The mean of each weight.
        log_variance: log σ² of each weight.
        threshold: The log α above which weights are dropped: those above the lines.
        title: What to write above.
        figure: Where to draw.

    Returns:
        The figure.

    Example:
        >>> len(mean_and_scale(torch.randn(9), torch.randn(9), threshold=3.0).axes[0].get_lines())
        2
    """
    figure = figure_or_new(figure)
    axis = figure.subplots()
    means, scales = as_numpy(loc).ravel(), as_numpy((0.5 * log_variance).exp()).ravel()
    axis.plot(means, scales, ".", color=BLUE, markersize=2, alpha=0.4, rasterized=True)
    if threshold is not None:
        line = np.array([-1.0, 0.0, 1.0]) * (np.abs(means).max() or 1.0)
        label = f"log α = {threshold:g}: above it, dropped"
        axis.plot(line, np.abs(line) * math.exp(threshold / 2), color=ORANGE, linestyle="--", label=label)
        axis.legend(fontsize="small")
    axis.set(xlabel="mean θ", ylabel="standard deviation σ", ylim=(0, 1.05 * scales.max()), title=title)
    return figure


def prior_comparison(comparison: PriorComparison, *, title: str = "", figure: Any = None) -> Any:
    """Draws error and, below, negative log likelihood on test data against compression: a mark per prior and seed.

    Args:
        comparison: What :func:`~.compare.compare_priors` returns.
        title: What to write above.
        figure: Where to draw.

    Returns:
        The figure. A prior that missed the error level has a hollow mark at 1; one that needs no weights has none.

    Example:
        >>> result = svd.comparison.PriorResult("normal", 0, 0.05, 0.2, 0.01, 0.05, 0.06, 4.0, 1.5, 0.06, 2e-3)
        >>> len(prior_comparison(PriorComparison((result,), "error")).axes)
        3
    """
    figure = figure_or_new(figure)
    axes = figure.subplot_mosaic([["error", "names"], ["nll", "names"]], width_ratios=[2, 1])
    percent = 100 if comparison.error_name == "error" else 1
    looks: dict[str, dict[str, str]] = {}
    for r in comparison.results:
        color, mark = line_styles()[len(looks)][0], "os^DvP*X<>hp"[len(looks) % 12]
        look = looks.setdefault(r.prior, {"color": color, "marker": mark, "linestyle": ""})
        missed = math.isnan(r.compression)
        for axis, y in (axes["error"], percent * (r.error if missed else r.sparse_error)), (axes["nll"], r.nll):
            axis.plot(1 if missed else r.compression, y, fillstyle="none" if missed else "full", **look)
    for prior, look in looks.items():
        axes["names"].plot([], [], label=prior, **look)
    axes["names"].set_axis_off()
    axes["names"].legend(loc="center left", fontsize="small")
    axes["error"].set(xscale="log", ylabel="error, %" if percent == 100 else "mean squared error", title=title)
    axes["nll"].set(xscale="log", ylabel="NLL, nats", xlabel="compression at equal validation error")
    return figure
