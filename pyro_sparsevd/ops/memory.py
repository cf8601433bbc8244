"""Memory that is used again on a CPU, where page faults of a fresh megabyte often cost more than the work on it."""

__all__ = ["Workspace", "blocks", "is_channels_last"]

import math
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Workspace:
    """A caching allocator of uninitialised CPU tensors, as CUDA has one.

    The memory belongs to NumPy arrays, whose reference counts tell which are free; so what is still referred to, such
    as an accumulated gradient, is never handed out twice. Small tensors and those on other devices are ``torch.empty``.
    """

    def __init__(self) -> None:
        self._arrays: dict[tuple[int, torch.dtype], list[np.ndarray]] = {}
        self._last_asked: dict[tuple[int, torch.dtype], int] = {}
        self._step = 0

    def start_step(self) -> None:
        """Starts a new step, and frees memory of sizes that the last three did not ask for."""
        self._step += 1
        for key in [key for key, step in self._last_asked.items() if step < self._step - 3]:
            del self._arrays[key], self._last_asked[key]

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Returns a contiguous tensor of a shape, with the dtype and device of ``like``."""
        size = math.prod(shape)
        if size < _SMALL or not like.is_cpu or like.dtype not in _NUMPY_TYPES:
            return like.new_empty(shape)
        return torch.from_numpy(self._free_array(size, like.dtype).reshape(shape))

    def empty_like(self, like: Tensor) -> Tensor:
        """Returns a tensor of the shape, dtype and device of ``like``, channels-last where that is."""
        return self.empty_channels_last(like.shape, like) if is_channels_last(like) else self.empty(like.shape, like)

    def empty_channels_last(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Returns a channels-last tensor of shape (images, channels, height, width)."""
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
    """Tells whether a batch of images is channels-last in memory, and not contiguous at the same time."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def blocks(like: Tensor, *others: Tensor | None) -> Iterator[tuple[list[Any], tuple[Tensor, ...]]]:
    """Yields matching pieces of tensors of one shape, and four pieces of scratch memory, which each thread keeps.

    A scalar is its own piece, and so is None.
    """
    tensors = [like, *others]
    total = like.numel()
    if total <= _BLOCK or not like.is_cpu:
        yield tensors, _scratch(like.shape, like)
        return
    flat = [t.reshape(-1) if t is not None and t.dim() else t for t in tensors]
    for start in range(0, total, _BLOCK):
        length = min(_BLOCK, total - start)
        pieces = [t.narrow(0, start, length) if t is not None and t.dim() else t for t in flat]
        yield pieces, _scratch(torch.Size([length]), like)


def _scratch(shape: torch.Size, like: Tensor) -> tuple[Tensor, ...]:
    if not like.is_cpu:
        return like.new_empty(4, *shape).unbind()
    return _kept_scratch(shape, like.dtype, threading.get_ident())


@lru_cache(maxsize=256)
def _kept_scratch(shape: torch.Size, dtype: torch.dtype, thread: int) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):  # or it could not be written to outside of it
        return tuple(t.narrow(0, 0, shape.numel()).view(shape) for t in _kept_memory(dtype, thread))


@lru_cache(maxsize=16)
def _kept_memory(dtype: torch.dtype, thread: int) -> tuple[Tensor, ...]:
    return torch.empty(4, _BLOCK, dtype=dtype, device="cpu").unbind()


def _references_to_a_listed_array() -> int:
    for array in [np.empty(1)]:
        return sys.getrefcount(array)
    return 0


_BLOCK = 2**19  # smaller blocks cost more in calls than they save in cache misses
_NUMPY_TYPES = {torch.float32: np.float32, torch.float64: np.float64}
_SMALL = 2**13  # below this, malloc's own free lists serve
_UNUSED = _references_to_a_listed_array()  # the count of an array that only its list refers to, in this Python
