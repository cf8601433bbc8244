"""The geometry of convolutions: sizes, padding, patches of the input.

A ``geometry`` is what ``torch.convolution`` takes: stride, padding, dilation, transposed, output padding and groups.
"""

__all__ = ["output_size", "pad_same", "patches_of", "per_dim", "prefers_channels_last"]

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import Workspace


def per_dim(value: int | Sequence[int], dims: int) -> list[int]:
    """Returns an argument of a convolution, one number for all dimensions or one for each, for each of them."""
    value = [value] if isinstance(value, int) else list(value)
    return value * dims if len(value) == 1 else value


def pad_same(batch: Tensor, kernel: torch.Size, dilation: list[int]) -> tuple[Tensor, list[int]]:
    """Applies the part of padding ``"same"`` that is not symmetric, and returns the symmetric padding left to do."""
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(total % 2 for total in totals):
        batch = F.pad(batch, [side for total in reversed(totals) for side in (0, total % 2)])
    return batch, [total // 2 for total in totals]


def prefers_channels_last(x: Tensor, weight: Tensor, geometry: tuple) -> bool:
    """Tells whether oneDNN would pad channels to a multiple of 16, at up to twice the time of a channels-last input."""
    *_, groups = geometry
    is_image = x.is_cpu and x.dim() == 4 and x.dtype == torch.float32 and groups == 1
    return is_image and x.is_contiguous() and any(channels % 16 for channels in weight.shape[:2])


def output_size(x: Tensor, kernel: torch.Size, geometry: tuple) -> list[int]:
    """Returns the size of each spatial dimension of the output, which is 0 or less where the kernel does not fit."""
    stride, padding, dilation, *_ = geometry
    sizes = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]


def patches_of(x: Tensor, kernel: torch.Size, geometry: tuple, workspace: Workspace) -> Tensor:
    """Returns the patches of images of one channel, of shape (images, elements of the kernel, pixels of the output)."""
    stride, padding, dilation, *_ = geometry
    windows = len(x), *kernel, *output_size(x, kernel, geometry)
    if any(padding):
        x = F.pad(x, [side for p in reversed(padding) for side in (p, p)])
    of_image, _, *of_pixel = x.stride()
    steps = [size * step for steps in (dilation, stride) for size, step in zip(of_pixel, steps, strict=True)]
    patches = workspace.empty(windows, x).copy_(x.as_strided(windows, (of_image, *steps)))
    return patches.flatten(3).flatten(1, 2)
