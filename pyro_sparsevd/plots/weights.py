"""Figures of weights."""

__all__ = ["weight_images"]

from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from torch import Tensor

from .style import SIGNED, as_numpy, figure_or_new


def weight_images(
    weight: Tensor,
    *,
    count: int = 36,
    limit: float | None = None,
    colorbar_label: str | None = "weight",
    title: str = "",
    figure: Any = None,
) -> Any:
    """Draws the incoming weights of units as a grid of images, on one scale symmetric about 0.

    Weights are lighter the larger they are, from dark blue (negative) to yellow (positive); only zeros are gray.

    Args:
        weight: Weights of shape ``(units, height, width)``; a dense layer as one image is ``weight[None]``.
        count: The largest number of units to draw, the first ones.
        limit: The magnitude at the ends of the scale; by default the largest that is drawn.
        colorbar_label: What the numbers are, with their unit; no colour bar if None.
        title: The title.
        figure: The figure or sub-figure to draw on; by default a new one.

    Returns:
        The figure.

    Raises:
        ValueError: If ``weight`` is not three-dimensional.

    Example:
        >>> figure = weight_images(torch.randn(4, 5, 5), title="kernels", colorbar_label="weight, 1/V")
        >>> figure.get_suptitle(), figure.axes[-1].get_ylabel()
        ('kernels', 'weight, 1/V')
    """
    if weight.dim() != 3:
        raise ValueError(f"weight: expected shape (units, height, width), but got {tuple(weight.shape)}")
    figure = figure_or_new(figure)
    images = as_numpy(weight[:count])
    columns = int(np.ceil(np.sqrt(len(images))))
    rows = int(np.ceil(len(images) / columns))
    limit = _largest(images) if limit is None else limit
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.08, "hspace": 0.08})
    for axis in axes.flat:
        axis.set_axis_off()
    colors = ScalarMappable(Normalize(-limit, limit), SIGNED)
    for axis, image in zip(axes.flat, images, strict=False):
        axis.imshow(np.ma.masked_equal(image, 0), cmap=colors.cmap, norm=colors.norm, interpolation="nearest")
    if colorbar_label is not None:
        bar = figure.colorbar(colors, ax=axes, label=colorbar_label)
        bar.ax.set_ylim(-limit if (images < 0).any() else 0, limit)  # counts, say, have no lower half
    figure.suptitle(title)
    return figure


def _largest(images: np.ndarray) -> float:
    """Returns the largest magnitude, or 1 where all are 0."""
    return float(np.abs(images).max()) or 1.0
