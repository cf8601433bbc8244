"""Batches of any kind, and what a loss makes of one."""

__all__ = ["batches", "loss_of", "size_of"]

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.batches import moved


def batches(name: str, loader: Any, device: torch.device) -> Iterator[Any]:
    """Yields the batches of an epoch, on a device."""
    batches = loader() if callable(loader) and not isinstance(loader, Iterable) else loader
    if not isinstance(batches, Iterable):
        raise TypeError(f"{name}: expected batches, or a function that returns them, but got {type(loader).__name__}")
    if batches is loader and isinstance(loader, Iterator):
        raise ValueError(
            f"{name}: expected batches that can be gone through again in each epoch, but got a {type(loader).__name__}"
            "; give a DataLoader, a list, or a function that returns an iterator"
        )
    batch = None
    for batch in batches:
        yield moved(batch, device)
    if batch is None:
        raise ValueError(f"{name}: expected at least one batch, but got none")


def loss_of(loss: nn.Module, batch: Any) -> Tensor:
    """Calls a loss with the parts of a batch as its arguments."""
    if isinstance(batch, Mapping):
        return loss(**batch)
    return loss(*batch) if isinstance(batch, tuple | list) else loss(batch)


def size_of(batch: Any) -> int:
    """Returns the number of data of a batch, or 0 where it has no tensor of any."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 0
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return next((size for part in parts if (size := size_of(part))), 0)
