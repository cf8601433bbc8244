"""Batches of data: from what a user has to the tensors that a model takes."""

__all__ = ["moved", "pairs"]

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def moved(batch: Any, device: torch.device | None) -> Any:
    """Returns a batch with its tensors on a device, and lists made tuples; a named tuple keeps its type."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved(part, device) for name, part in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [moved(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    return batch


def pairs(name: str, data: Any, device: torch.device | None = None) -> Iterator[tuple[Any, Any]]:
    """Yields the inputs and targets of each batch, on a device; ``data`` may be a function that returns the batches.

    Raises TypeError for what cannot be iterated, and ValueError for a batch that is no pair, or where there is none.
    """
    found = data() if callable(data) and not isinstance(data, Iterable) else data
    if not isinstance(found, Iterable) or isinstance(found, Tensor | Mapping):
        raise TypeError(f"{name}: expected batches (x, y), such as a DataLoader, but got {type(data).__name__}")
    batch = None
    for batch in found:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            size = f" of {len(batch)}" if isinstance(batch, tuple | list | Mapping) else ""
            raise ValueError(
                f"{name}: expected pairs (x, y) of inputs and targets, but got a {type(batch).__name__}{size}; several "
                "inputs are a tuple or dictionary x"
            )
        x, y = batch
        if y is None:
            raise ValueError(f"{name}: expected targets y in each batch, but got None")
        yield moved(x, device), moved(y, device)
    if batch is None:
        raise ValueError(f"{name}: expected at least one batch, but got none")
