"""Pictures of a comparison of priors."""

__all__ = ["prior_comparison"]

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.transforms import ScaledTranslation

from ..evaluation.comparison import PriorComparison
from .style import Style, are_wide, figure_or_new, line_styles, plain_numbers


def prior_comparison(comparison: PriorComparison, *, title: str = "", figure: Any = None) -> Any:
    """Draws error and, below, negative log likelihood on test data against compression: a mark per prior and seed.

    The error is that of the network with the weights dropped that make the compression. The likelihood is that of the
    posterior with all its weights. Marks of about the same compression, on thin lines, stand side by side.

    Args:
        comparison: What :func:`~.compare.compare_priors` returns.
        title: What to write above.
        figure: Where to draw.

    Returns:
        The figure. A prior that missed the error level has a hollow mark at 1, at its error with all weights; one that
        needs no weights has none.

    Example:
        >>> from pyro_sparsevd.evaluation.comparison import PriorResult
        >>> result = PriorResult("normal", 0, 0.05, 0.2, 0.01, 0.05, 0.06, 4.0, 1.5, 0.06, 2e-3)
        >>> len(prior_comparison(PriorComparison((result,), "error")).axes)
        3
    """
    figure = figure_or_new(figure, size=(8, 5.5))
    axes = figure.subplot_mosaic([["error", "names"], ["nll", "names"]], width_ratios=[2, 1])
    results = comparison.results
    looks = dict(zip(dict.fromkeys(r.prior for r in results), line_styles(), strict=False))
    scale, name = (
        (100, "error once pruned, %") if comparison.error_name == "error" else (1, "mean squared error\nonce pruned")
    )
    missed = [math.isnan(r.compression) for r in results]
    places = [1.0 if none else r.compression for r, none in zip(results, missed, strict=True)]
    errors = [scale * (r.error if none else r.sparse_error) for r, none in zip(results, missed, strict=True)]
    shifts = _side_by_side(places, [r.prior for r in results])
    for axis, values in (axes["error"], errors), (axes["nll"], [r.nll for r in results]):
        for r, none, x, y, shift in zip(results, missed, places, values, shifts, strict=True):
            _mark(axis, x, y, shift, looks[r.prior], hollow=none)
        axis.set(xscale="log", yscale="log" if are_wide(values, ratio=5) else "linear")
        axis.margins(x=0.14)  # room for the shifts
        plain_numbers(axis.xaxis)
        if axis.get_yscale() == "log":
            plain_numbers(axis.yaxis)
    _legend_of_priors(axes["names"], looks, any(missed))
    axes["error"].set(ylabel=name, title=title)
    place = "compression at equal validation error\n(marks side by side: about equal, at the thin lines)"
    axes["nll"].set(ylabel="NLL with all weights,\nnats per datum", xlabel=place)
    return figure


def _side_by_side(places: list[float], priors: list[str], width: float = 7.0) -> list[float]:
    """Returns how many points to shift each mark so that none hides that of another prior at about the same place."""
    shifts = [0.0] * len(places)
    groups: list[list[int]] = []
    for index in sorted(range(len(places)), key=places.__getitem__):
        # the compressions of a comparison are steps of a ninth: a mark's width where the axis spans two decades
        if groups and places[index] <= 1.12 * places[groups[-1][-1]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    for group in groups:
        order = list(dict.fromkeys(priors[index] for index in group))
        for index in group:
            shifts[index] = width * (order.index(priors[index]) - (len(order) - 1) / 2)
    return shifts


def _mark(axis: Any, x: float, y: float, shift: float, style: Style, hollow: bool) -> None:
    fill = "none" if hollow else "full"
    (mark,) = axis.plot(x, y, linestyle="", color=style.color, marker=style.marker, fillstyle=fill)
    # only now, since the limits of the axis are those of the numbers
    mark.set_transform(axis.transData + ScaledTranslation(shift / 72, 0, axis.figure.dpi_scale_trans))
    if shift and math.isfinite(x):
        axis.axvline(x, color="lightgray", linewidth=0.5, zorder=0)


def _legend_of_priors(axis: Any, looks: Mapping[str, Style], with_hollow: bool) -> None:
    for prior, style in looks.items():
        axis.plot([], [], linestyle="", color=style.color, marker=style.marker, label=prior)
    if with_hollow:
        axis.plot([], [], linestyle="", color="gray", marker="o", fillstyle="none", label="missed the level, unpruned")
    axis.set_axis_off()
    axis.legend(loc="center left", fontsize="small")
