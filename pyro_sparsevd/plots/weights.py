"""Pictures of the weights of a network, from plain data; to be had from :mod:`~.plots` as well."""

__all__ = ["animate_weight_images", "connections", "weight_images"]

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from .style import BLUE, ORANGE, SIGNED, as_numpy, figure_or_new


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

    The larger a weight, the lighter: from dark blue, negative, to yellow, positive. Weights of exactly 0, such as those
    that were dropped, are gray, and no other is.

    Args:
        weight: Weights of shape ``(units, height, width)``; a dense layer as one image is ``weight[None]``.
        count: The largest number of units to draw, the first ones.
        limit: The magnitude at the ends of the scale; by default the largest that is drawn.
        colorbar_label: What the numbers are, with their unit, beside a bar of the colours; no bar if None.
        title: What to write above.
        figure: Where to draw.

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


def animate_weight_images(
    history: Sequence[Tensor],
    path: str | Path,
    *,
    count: int = 36,
    colorbar_label: str | None = "weight",
    title: str | Sequence[str] = "epoch {}",
    frames_per_second: int = 5,
) -> None:
    """Writes :func:`weight_images` over training as an animated GIF, all frames on one scale.

    Args:
        history: The weights at each frame, of shape ``(units, height, width)``.
        path: The file to write, overwritten if there is one.
        count: The largest number of units to draw, the first ones.
        colorbar_label: As for :func:`weight_images`.
        title: What to write above: one for each frame, or one for all with the number of the frame, from 1, for ``{}``.
        frames_per_second: How fast to show them.

    Raises:
        ValueError: If ``history`` is empty, or the number of titles is another than that of frames.

    Example:
        >>> frames = [torch.randn(4, 5, 5) for _ in range(3)]
        >>> titles = [f"threshold {threshold}" for threshold in (3, 2, 1)]
        >>> animate_weight_images(frames, getfixture("tmp_path") / "weights.gif", title=titles)
    """
    if not history:
        raise ValueError("history: expected the weights of at least one frame, but got none")
    titles = [title.format(n) for n in range(1, len(history) + 1)] if isinstance(title, str) else title
    if len(titles) != len(history):
        raise ValueError(f"title: expected one for each of {len(history)} frames, but got {len(titles)}")
    limit = max(_largest(as_numpy(weight[:count])) for weight in history)
    figure = Figure(figsize=(4, 4), layout="constrained")
    writer = PillowWriter(fps=frames_per_second)
    with writer.saving(figure, str(path), dpi=80):
        for weight, text in zip(history, titles, strict=True):
            figure.clear()
            weight_images(weight, count=count, limit=limit, colorbar_label=colorbar_label, title=text, figure=figure)
            writer.grab_frame()


def connections(weights: Sequence[Tensor], *, title: str = "", figure: Any = None) -> Any:
    """Draws the non-zero weights of a small fully-connected network as a graph, inputs to the left.

    Positive weights are solid lines in blue, negative ones broken lines in orange, as wide as they are large within
    their layer. A unit that nothing connects is a pale dot.

    Args:
        weights: The weight of each layer, of shape ``(outputs, inputs)``, in their order.
        title: What to write above.
        figure: Where to draw.

    Returns:
        The figure.

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


def _largest(images: np.ndarray) -> float:
    """Returns the largest magnitude, or 1 where all are 0, for a scale."""
    return float(np.abs(images).max()) or 1.0
