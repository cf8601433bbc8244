"""The arithmetic of convolutions: sizes, padding, patches of the input."""

__all__ = ["output_size", "pad_same", "patches_of", "per_dim", "wastes_channels"]

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .workspace import Workspace


def per_dim(value: int | Sequence[int], dims: int) -> list[int]:
    """Returns an argument of a convolution for each of its dimensions.

    Args:
        value: One number for all, or one for each.
        dims: The number of dimensions.

    Returns:
        One for each.

    Example:
        >>> per_dim(1, 2), per_dim((2,), 2), per_dim((1, 2), 2)
        ([1, 1], [2, 2], [1, 2])
    """
    value = [value] if isinstance(value, int) else list(value)
    return value * dims if len(value) == 1 else value


def pad_same(batch: Tensor, kernel: torch.Size, dilation: list[int]) -> tuple[Tensor, list[int]]:
    """Pads a batch as far as padding ``"same"`` is not symmetric.

    Args:
        batch: The batch.
        kernel: The sizes of the kernel.
        dilation: The dilation of each dimension.

    Returns:
        The batch, padded behind where the total is odd, and the symmetric padding that is left to do.

    Example:
        >>> batch, padding = pad_same(torch.zeros(1, 1, 5), torch.Size([4]), [1])
        >>> batch.shape, padding
        (torch.Size([1, 1, 6]), [1])
    """
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(total % 2 for total in totals):
        batch = F.pad(batch, [side for total in reversed(totals) for side in (0, total % 2)])
    return batch, [total // 2 for total in totals]


def wastes_channels(x: Tensor, weight: Tensor, geometry: tuple) -> bool:
    """Tells whether oneDNN would pad channels to a multiple of 16, at up to twice the time of a channels-last input.

    Args:
        x: The input.
        weight: The kernels.
        geometry: Stride, padding, dilation, whether it is transposed, output padding, and groups.

    Returns:
        Whether it would.

    Example:
        >>> geometry = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
        >>> wastes_channels(torch.zeros(1, 3, 8, 8), torch.zeros(16, 3, 5, 5), geometry)
        True
    """
    *_, groups = geometry
    is_image = x.is_cpu and x.dim() == 4 and x.dtype == torch.float32 and groups == 1
    return is_image and x.is_contiguous() and any(channels % 16 for channels in weight.shape[:2])


def output_size(x: Tensor, kernel: torch.Size, geometry: tuple) -> list[int]:
    """Returns the size of each dimension of the output.

    Args:
        x: The input.
        kernel: The sizes of the kernel.
        geometry: Stride, padding, dilation, and what else is not needed here.

    Returns:
        The sizes.

    Example:
        >>> output_size(torch.zeros(1, 3, 8, 9), torch.Size([5, 5]), ([1, 2], [0, 0], [1, 1]))
        [4, 3]
    """
    stride, padding, dilation, *_ = geometry
    sizes = zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]


def patches_of(x: Tensor, kernel: torch.Size, geometry: tuple, workspace: Workspace) -> Tensor:
    """Returns what each element of the kernel meets in images of one channel.

    Args:
        x: The images, of shape (images, 1, height, width).
        kernel: The sizes of the kernel.
        geometry: As for :func:`output_size`.
        workspace: Where to take memory from.

    Returns:
        The patches, of shape (images, elements of the kernel, pixels of the output).

    Example:
        >>> image = torch.arange(9.0).reshape(1, 1, 3, 3)
        >>> patches_of(image, torch.Size([2, 2]), ([1, 1], [0, 0], [1, 1]), Workspace())[0, 0]
        tensor([0., 1., 3., 4.])
    """
    stride, padding, dilation, *_ = geometry
    windows = len(x), *kernel, *output_size(x, kernel, geometry)
    if any(padding):
        x = F.pad(x, [side for p in reversed(padding) for side in (p, p)])
    of_image, _, *of_pixel = x.stride()
    steps = [s * d for s, d in zip(of_pixel, dilation, strict=True)] + [
        s * t for s, t in zip(of_pixel, stride, strict=True)
    ]
    patches = workspace.empty(windows, x).copy_(x.as_strided(windows, (of_image, *steps)))
    return patches.flatten(3).flatten(1, 2)
