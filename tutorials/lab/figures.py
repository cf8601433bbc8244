"""Figures of one tutorial each, from plain data; each is drawn on ``figure``, or on a new one, and returned."""

__all__ = [
    "compression_curves",
    "connections",
    "divergences",
    "prior_and_posteriors",
]

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.collections import LineCollection
from torch import Tensor

from pyro_sparsevd.distributions.log_uniform import LogUniform
from pyro_sparsevd.distributions.sparse_normal import SparseNormal
from pyro_sparsevd.ops.divergence import kl_log_uniform
from pyro_sparsevd.plots.style import BLUE, ORANGE, as_numpy, figure_or_new, line_styles, plain_numbers


def prior_and_posteriors(
    posteriors: Mapping[str, tuple[float, float]], *, limit: float = 3.0, title: str = "", figure: Any = None
) -> Any:
    """Draws the log-uniform prior, in blue, and Gaussian posteriors of single weights, with the KL of each in nats.

    The posteriors are mean and log variance of each weight, by its label; ``limit`` is the end of the axis of weights.

    Example:
        >>> figure = prior_and_posteriors({"kept": (1.0, -3.0), "dropped": (0.01, 0.0)})
        >>> [line.get_label() for line in figure.axes[0].get_lines()]
        ['log-uniform prior, p(w) ∝ 1/|w|', 'kept: log α = -3.0, KL 2.11', 'dropped: log α = 9.2, KL 0.00']
    """
    figure = figure_or_new(figure)
    axis = figure.subplots()
    w = torch.linspace(-limit, limit, 2001, dtype=torch.float64)
    prior = LogUniform().log_prob(w).exp() / 4
    axis.plot(w, prior, color=BLUE, linewidth=2, label="log-uniform prior, p(w) ∝ 1/|w|")
    for (name, (loc, log_variance)), style in zip(posteriors.items(), line_styles(skip=BLUE), strict=False):
        q = SparseNormal(torch.tensor(loc).double(), torch.tensor(log_variance).double())
        divergence = kl_log_uniform(q.loc, q.log_variance, "exact")
        label = f"{name}: log α = {q.log_alpha:.1f}, KL {divergence:.2f}"
        axis.plot(w, q.log_prob(w).exp(), color=style.color, linestyle=style.line, label=label)
    axis.set(xlabel="weight w", ylabel="density", ylim=(0, 2.5), xlim=(-limit, limit), title=title)
    axis.legend(fontsize="small")
    return figure


def divergences(
    *, samples: Mapping[float, float] | None = None, limit: float = 8.0, title: str = "", figure: Any = None
) -> Any:
    """Draws the KL divergence against log α, exact and approximate, and below the difference from the exact one.

    Monte Carlo estimates of the divergence, by log α, are drawn beside; ``limit`` is the largest magnitude of log α.

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


def connections(weights: Sequence[Tensor], *, title: str = "", figure: Any = None) -> Any:
    """Draws the non-zero weights of a small fully-connected network as a graph, inputs to the left.

    Positive weights are solid lines in blue, negative ones broken lines in orange, as wide as they are large within
    their layer. A unit that nothing connects is a pale dot.

    ``weights`` has the weight of each layer in turn, of shape ``(outputs, inputs)``.

    Raises:
        ValueError: If the shapes are not those of layers that follow each other.

    Example:
        >>> figure = connections([torch.eye(3), torch.ones(1, 3)])
        >>> sum(len(lines.get_segments()) for lines in figure.axes[0].collections if hasattr(lines, "get_segments"))
        6
    """
    shapes = [tuple(w.shape) for w in weights]
    follow = all(before[0] == after[1] for before, after in pairwise(shapes) if len(after) == 2)
    if not shapes or any(len(shape) != 2 for shape in shapes) or not follow:
        raise ValueError(f"weights: expected shapes (b, a), (c, b), ... of layers in a row, but got {shapes}")
    figure = figure_or_new(figure)
    axis = figure.subplots()
    sizes = [shapes[0][1], *(shape[0] for shape in shapes)]
    heights = [np.linspace(-0.5, 0.5, size + 2)[1:-1] for size in sizes]
    connected = [np.zeros(size, dtype=bool) for size in sizes]
    for layer, weight in enumerate(map(as_numpy, weights)):
        for sign, color, style in ((1, BLUE, "-"), (-1, ORANGE, "--")):
            to, of = np.nonzero(sign * weight > 0)
            ends = zip(heights[layer][of], heights[layer + 1][to], strict=True)
            widths = 0.3 + 2 * np.abs(weight[to, of]) / (np.abs(weight).max() or 1.0)
            lines = [[(layer, start), (layer + 1, end)] for start, end in ends]
            axis.add_collection(LineCollection(lines, colors=color, linestyles=style, linewidths=widths, alpha=0.7))
            connected[layer][of] = connected[layer + 1][to] = True
    for layer, (height, alive) in enumerate(zip(heights, connected, strict=True)):
        axis.scatter(np.full(height.shape, layer), height, c=np.where(alive, "black", "lightgray"), s=12, zorder=2)
    axis.set(xticks=range(len(sizes)), xlabel="layer", yticks=[], title=title)
    return figure


def compression_curves(
    compressions: Sequence[float],
    errors: Mapping[str, Sequence[float]],
    *,
    baseline: float | None = None,
    title: str = "",
    figure: Any = None,
) -> Any:
    """Draws the errors of several methods against compression, on logarithmic axes.

    The errors, one for each compression, are fractions, as is ``baseline``, the error of a dense network.

    Example:
        >>> figure = compression_curves([10, 100], {"magnitude": [0.02, 0.1], "Sparse VD": [0.02, 0.02]})
        >>> [line.get_label() for line in figure.axes[0].get_lines()]
        ['magnitude', 'Sparse VD']
    """
    figure = figure_or_new(figure)
    axis = figure.subplots()
    for (method, found), (color, line, marker) in zip(errors.items(), line_styles(), strict=False):
        axis.plot(compressions, [100 * e for e in found], color=color, linestyle=line, marker=marker, label=method)
    if baseline is not None:
        axis.axhline(100 * baseline, color="gray", linestyle=":", linewidth=1, label="dense")
    axis.set(xlabel="compression", ylabel="error, %", xscale="log", yscale="log", title=title)
    plain_numbers(axis.xaxis)
    plain_numbers(axis.yaxis)
    axis.legend(fontsize="small")
    return figure
