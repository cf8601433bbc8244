"""Pictures from plain data.

Each function draws into the figure, or sub-figure, that it is given, or into a new one, and returns it; nothing is
shown. This module is not imported with the package: ``from pyro_sparsevd import plots``.
"""

__all__ = ["log_alpha_histogram", "training_curves", "weight_images"]

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure, SubFigure
from torch import Tensor


def weight_images(weight: Tensor, *, count: int = 36, title: str = "", figure: Any = None) -> Any:
    """Draws the incoming weights of units as a grid of images, on one scale symmetric about 0.

    Args:
        weight: Weights of shape ``(units, height, width)``.
        count: The largest number of units to draw, the first ones.
        title: What to write above.
        figure: Where to draw.

    Returns:
        The figure.

    Raises:
        ValueError: If ``weight`` is not three-dimensional.

    Example:
        >>> weight_images(torch.randn(4, 5, 5), title="kernels").get_suptitle()
        'kernels'
    """
    if weight.dim() != 3:
        raise ValueError(f"weight: expected shape (units, height, width), but got {tuple(weight.shape)}")
    figure = _figure(figure)
    images = weight.detach().cpu().float().numpy()[:count]
    columns = int(np.ceil(np.sqrt(len(images))))
    rows = int(np.ceil(len(images) / columns))
    limit = float(np.abs(images).max()) or 1.0
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.08, "hspace": 0.08})
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image in zip(axes.flat, images, strict=False):
        axis.imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    figure.suptitle(title)
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
    figure = _figure(figure)
    axis = figure.subplots()
    for name, values in log_alphas.items():
        finite = values.detach().cpu().float().numpy().ravel().clip(-15, 15)
        axis.hist(finite, bins=90, range=(-15, 15), histtype="step", label=name, density=True)
    if threshold is not None:
        axis.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
    axis.set(xlabel="log α (clipped to ±15)", ylabel="density", yscale="log", title=title)
    axis.legend(fontsize="small")
    return figure


def training_curves(
    history: Sequence[Mapping[str, float]], *, baseline: float | None = None, title: str = "", figure: Any = None
) -> Any:
    """Draws error and compression against epochs.

    Args:
        history: For each epoch ``error``, a fraction, and ``compression``.
        baseline: The error of a dense network.
        title: What to write above.
        figure: Where to draw.

    Returns:
        The figure.

    Example:
        >>> len(training_curves([{"error": 0.5, "compression": 1.0}, {"error": 0.1, "compression": 9.0}]).axes)
        2
    """
    figure = _figure(figure)
    left = figure.subplots()
    right = left.twinx()
    epochs = range(1, len(history) + 1)
    left.plot(epochs, [100 * h["error"] for h in history], color="tab:red", label="error of the pruned network")
    if baseline is not None:
        left.axhline(100 * baseline, color="tab:red", linestyle=":", linewidth=1, label="error of the dense network")
    right.plot(epochs, [h["compression"] for h in history], color="tab:blue", label="compression")
    left.set(xlabel="epoch", ylabel="error, %", yscale="log", title=title)
    right.set(ylabel="compression", yscale="log")
    lines = left.get_lines() + right.get_lines()
    left.legend(lines, [str(line.get_label()) for line in lines], fontsize="small", loc="center right")
    return figure


def _figure(figure: Any) -> Figure | SubFigure:
    return Figure(figsize=(6, 4), layout="constrained") if figure is None else figure
