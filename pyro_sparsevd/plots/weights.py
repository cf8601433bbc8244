"""Figures of weights, and of weights over training."""

__all__ = ["animate", "animate_weight_images", "weight_images"]

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
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

    Units stand in the order of how many weights they have left; those without any are counted below and not drawn.
    Negative weights are blue, positive ones red, and zeros white.

    Args:
        weight: Weights of shape ``(units, height, width)``; a dense layer as one image is ``weight[None]``.
        count: The largest number of units to draw.
        limit: The magnitude at the ends of the scale; by default the largest that is drawn. Give figures that are
            compared the same.
        colorbar_label: What the numbers are, with their unit; no colour bar if None.
        title: The title.
        figure: The figure or sub-figure to draw on; by default a new one.

    Returns:
        The figure.

    Raises:
        ValueError: If ``weight`` is not three-dimensional.

    Example:
        >>> weight = torch.cat([torch.zeros(3, 5, 5), torch.randn(4, 5, 5)])
        >>> figure = weight_images(weight, title="kernels", colorbar_label="weight, 1/V")
        >>> figure.get_suptitle(), figure.axes[-1].get_ylabel(), figure.get_supxlabel()
        ('kernels', 'weight, 1/V', '4 of 7 units, 3 without weights')
    """
    if weight.dim() != 3:
        raise ValueError(f"weight: expected shape (units, height, width), but got {tuple(weight.shape)}")
    images = as_numpy(weight)
    order = _by_weights_left(images)
    empty = len(images) - int(images.any((1, 2)).sum())
    drawn = images[order[: max(min(count, len(images) - empty), 1)]]
    figure = _grid(drawn, limit, colorbar_label, figure)
    figure.suptitle(title)
    if empty or len(drawn) < len(images):
        figure.supxlabel(
            f"{len(drawn)} of {len(images)} units" + (f", {empty} without weights" if empty else ""), fontsize="medium"
        )
    return figure


def animate(
    draw: Callable[..., Any],
    frames: Iterable[Any],
    path: str | Path,
    *,
    size: tuple[float, float] = (4.0, 4.0),
    frames_per_second: int = 5,
    hold: int = 5,
    colors: int = 256,
) -> None:
    """Writes what a function draws of each of several frames as an animated GIF.

    Args:
        draw: Called with each frame, and with ``figure``, an empty figure to draw on.
        frames: At least one.
        path: The file to write, overwritten if there is one.
        size: Width and height in inches, of 80 pixels each.
        frames_per_second: How fast to show them.
        hold: How many times as long to show the last one.
        colors: How many colours all frames share, from 2 to 256. Fewer make a smaller file.

    Raises:
        ValueError: If there is no frame.

    Example:
        >>> histories = [torch.randn(100) * scale for scale in (1.0, 0.5)]
        >>> draw = lambda values, figure: sparsevd.plots.log_alpha_histogram({"w": values}, figure=figure)
        >>> animate(draw, histories, getfixture("tmp_path") / "log_alpha.gif")
    """
    frames = list(frames)
    if not frames:
        raise ValueError("frames: expected at least one, but got none")
    figure = Figure(figsize=size, dpi=80, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    images = []
    for frame in frames:
        figure.clear()
        draw(frame, figure=figure)
        canvas.draw()
        images.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    # With one palette, pixels that stay as they are take no space.
    some = images[:: max(1, len(images) // 8)] + images[-1:]
    palette = Image.fromarray(np.concatenate(some)).quantize(colors, Image.Quantize.FASTOCTREE)
    first, *others = (Image.fromarray(image).quantize(palette=palette, dither=Image.Dither.NONE) for image in images)
    duration = 1000 // frames_per_second
    durations = [*[duration] * len(others), duration * hold]
    first.save(path, "GIF", save_all=True, append_images=others, duration=durations if others else durations[0], loop=0)


def animate_weight_images(
    history: Sequence[Tensor],
    path: str | Path,
    *,
    count: int = 36,
    colorbar_label: str | None = "weight",
    title: str | Sequence[str] = "epoch {}",
    size: tuple[float, float] = (4.0, 4.0),
    frames_per_second: int = 5,
) -> None:
    """Writes the weights of units over training as an animated GIF, all frames on one scale.

    The units are those that :func:`weight_images` would draw of the last frame first, in that order.

    Args:
        history: The weights at each frame, of shape ``(units, height, width)``.
        path: The file to write, overwritten if there is one.
        count: The largest number of units to draw.
        colorbar_label: As for :func:`weight_images`.
        title: What to write above: one for each frame, or one for all with the number of the frame, from 1, for ``{}``.
        size: Width and height in inches, of 80 pixels each.
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
    images = [as_numpy(weight) for weight in history]
    order = _by_weights_left(images[-1])[:count]
    limit = max(_largest(frame[order]) for frame in images)

    def draw(frame: tuple[np.ndarray, str], figure: Figure) -> None:
        _grid(frame[0][order], limit, colorbar_label, figure)
        figure.suptitle(frame[1])

    animate(draw, zip(images, titles, strict=True), path, size=size, frames_per_second=frames_per_second)


def _by_weights_left(images: np.ndarray) -> np.ndarray:
    return np.argsort(-np.count_nonzero(images, axis=(1, 2)), kind="stable")


def _grid(images: np.ndarray, limit: float | None, colorbar_label: str | None, figure: Any) -> Any:
    """Draws images as they come, on one scale."""
    figure = figure_or_new(figure)
    columns = int(np.ceil(np.sqrt(len(images))))
    rows = int(np.ceil(len(images) / columns))
    limit = _largest(images) if limit is None else limit
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.08, "hspace": 0.08})
    colors = ScalarMappable(Normalize(-limit, limit), SIGNED)
    for axis in axes.flat[len(images) :]:
        axis.set_axis_off()
    for axis, image in zip(axes.flat, images, strict=False):
        axis.imshow(np.ma.masked_equal(image, 0), cmap=colors.cmap, norm=colors.norm, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color="lightgray", linewidth=0.5)
    if colorbar_label is not None:
        bar = figure.colorbar(colors, ax=axes, label=colorbar_label)
        bar.ax.set_ylim(-limit if (images < 0).any() else 0, limit)  # counts, say, have no lower half
    return figure


def _largest(images: np.ndarray) -> float:
    """Returns the largest magnitude, or 1 where all are 0."""
    return float(np.abs(images).max()) or 1.0
