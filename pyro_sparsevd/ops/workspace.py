"""Memory that is used again.

On a CPU, a fresh megabyte costs page faults: often more than the arithmetic done on it, at every training step. CUDA
has a caching allocator; this is one for the CPU, for tensors whose life ends within a step or that an optimiser
releases after it.
"""

__all__ = ["Workspace", "is_channels_last"]

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Workspace:
    """Hands out uninitialised tensors, and their memory again once nothing else refers to it.

    The memory belongs to NumPy arrays, which count the tensors that use them, so what is still referred to, as a
    gradient that is accumulated, is never handed out twice. Elsewhere than on a CPU, and for small tensors, this is
    plain ``torch.empty``. Memory of a size that the last steps did not ask for is given back.

    Example:
        >>> workspace = Workspace()
        >>> first = workspace.empty((512, 512), torch.ones(1))
        >>> address = first.data_ptr()
        >>> workspace.empty((512, 512), torch.ones(1)).data_ptr() == address
        False
        >>> del first
        >>> workspace.empty((512, 512), torch.ones(1)).data_ptr() == address
        True
    """

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, torch.dtype], list[np.ndarray]] = {}
        self._last_asked: dict[tuple[int, torch.dtype], int] = {}
        self._step = 0

    def start_step(self) -> None:
        """Says that a new step begins, and gives memory back that was not asked for in the last three."""
        self._step += 1
        for key in [key for key, step in self._last_asked.items() if step < self._step - 3]:
            del self._arrays[key], self._last_asked[key]

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Returns an uninitialised contiguous tensor.

        Args:
            shape: Its shape.
            like: A tensor of its dtype and device.

        Returns:
            The tensor.
        """
        size = math.prod(shape)
        if size < _SMALL or not like.is_cpu or like.dtype not in _NUMPY_TYPES:
            return like.new_empty(shape)
        return torch.from_numpy(self._free_array(size, like.dtype).reshape(shape))

    def empty_like(self, like: Tensor) -> Tensor:
        """Returns an uninitialised tensor of the shape, dtype and device of another, channels-last where that is.

        Args:
            like: The other tensor.

        Returns:
            The tensor.
        """
        return self.empty_channels_last(like.shape, like) if is_channels_last(like) else self.empty(like.shape, like)

    def empty_channels_last(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Returns an uninitialised tensor whose channels lie beside each other.

        Args:
            shape: Its shape: images, channels, height and width.
            like: A tensor of its dtype and device.

        Returns:
            The tensor.
        """
        images, channels, height, width = shape
        return self.empty((images, height, width, channels), like).permute(0, 3, 1, 2)

    def _free_array(self, size: int, dtype: torch.dtype) -> np.ndarray:
        arrays = self._arrays.setdefault((size, dtype), [])
        self._last_asked[size, dtype] = self._step
        for array in arrays:
            if sys.getrefcount(array) <= _UNUSED:
                return array
        arrays.append(np.empty(size, _NUMPY_TYPES[dtype]))
        return arrays[-1]


def is_channels_last(x: Tensor) -> bool:
    """Tells whether a batch of images is channels-last in memory, and not contiguous at the same time.

    Args:
        x: Any tensor.

    Returns:
        Whether it is.

    Example:
        >>> images = torch.ones(2, 3, 8, 8)
        >>> is_channels_last(images), is_channels_last(images.to(memory_format=torch.channels_last))
        (False, True)
    """
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


_NUMPY_TYPES = {torch.float32: np.float32, torch.float64: np.float64}
_SMALL = 2**13  # below this, malloc's own free lists serve


def _references_to_a_listed_array() -> int:
    # What a version of Python counts for the list, the loop and the call.
    for array in [np.empty(1)]:
        return sys.getrefcount(array)
    return 0


_UNUSED = _references_to_a_listed_array()
