"""Elementwise work on many weights in blocks, with scratch memory that is used again."""

__all__ = ["blocks"]

import threading
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

# On a CPU, a temporary of a megabyte costs more in page faults than the arithmetic on it. Work is done in blocks
# whose scratch memory each thread keeps: four of these, 8 MB in float32. Smaller blocks cost more in calls than they
# save in cache misses.
_BLOCK = 2**19


def blocks(*tensors: Tensor) -> Iterator[tuple[list[Tensor], tuple[Tensor, ...]]]:
    """Yields matching pieces of tensors of one shape, and four pieces of scratch memory.

    Args:
        *tensors: The tensors.

    Example:
        >>> [(piece, *_), scratch] = next(blocks(torch.zeros(2, 3)))
        >>> piece.shape, len(scratch)
        (torch.Size([2, 3]), 4)
    """
    like = tensors[0]
    total = like.numel()
    if total <= _BLOCK or not like.is_cpu:
        yield list(tensors), _scratch(like.shape, like)
        return
    flat = [t.reshape(-1) for t in tensors]
    for start in range(0, total, _BLOCK):
        length = min(_BLOCK, total - start)
        yield [t.narrow(0, start, length) for t in flat], _scratch(torch.Size([length]), like)


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
