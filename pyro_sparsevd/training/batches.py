"""Batches of any kind: what is in one, what a loss makes of it, and how many data an epoch has."""

__all__ = ["EpochSize", "arguments", "batches", "inputs", "known_length", "known_size", "loss_of", "size_of"]

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from .._modules import tensors_of
from ..nn.batches import moved
from ..nn.supervised import Supervised


def batches(name: str, loader: Any, model: Callable, device: torch.device | None) -> Iterator[Any]:
    """Yields the batches of an epoch, on a device; each must have the structure of the first, the model's arguments."""
    parts = loader if isinstance(loader, tuple) else (loader,)
    if isinstance(loader, Mapping) or any(isinstance(part, Tensor | np.ndarray) for part in parts):
        raise TypeError(f"{name}: expected batches, but got the tensors of one; give a list of it, [(x, y)]")
    batches = loader() if callable(loader) and not isinstance(loader, Iterable) else loader
    if not isinstance(batches, Iterable):
        raise TypeError(f"{name}: expected batches, or a function that returns them, but got {type(loader).__name__}")
    if batches is loader and isinstance(loader, Iterator):
        raise ValueError(
            f"{name}: expected batches that can be gone through again in each epoch, but got a {type(loader).__name__}"
            "; give a DataLoader, a list, or a function that returns an iterator"
        )
    first = None
    for number, batch in enumerate(batches):
        structure = _structure(batch)
        if first is None:
            first = structure
            _require_arguments(name, model, batch)
        elif structure != first:
            raise ValueError(f"{name}: expected batches like the first, {first}, but batch {number} is {structure}")
        yield moved(batch, device)
    if first is None:
        raise ValueError(f"{name}: expected at least one batch, but got none")


def _structure(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return "{" + ", ".join(sorted(f"{key!r}: {_structure(part)}" for key, part in batch.items())) + "}"
    if isinstance(batch, tuple | list) and (tensors_of(batch) or not batch):
        return "(" + ", ".join(map(_structure, batch)) + ")"
    return type(batch).__name__


def _require_arguments(name: str, model: Callable, batch: Any) -> None:
    signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    args, kwargs = arguments(batch)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{name}: expected batches of the model's arguments, {signature}, but got {_structure(batch)}: {error}; "
            "several inputs x are a tuple or a dictionary, ((a, b), y)"
        ) from error


def arguments(batch: Any) -> tuple[tuple, Mapping[str, Any]]:
    """Returns the positional and the named arguments that a batch holds."""
    if isinstance(batch, Mapping):
        return (), batch
    return (tuple(batch) if isinstance(batch, tuple | list) else (batch,)), {}


def inputs(batch: Any) -> tuple[tuple, Mapping[str, Any]]:
    """Returns the arguments of a batch without its targets: the first, or all but ``y``."""
    args, kwargs = arguments(batch)
    return args[:1], {name: part for name, part in kwargs.items() if name != "y"}


def loss_of(loss: nn.Module, batch: Any) -> Tensor:
    """Calls a loss with the parts of a batch as its arguments."""
    args, kwargs = arguments(batch)
    return loss(*args, **kwargs)


def size_of(batch: Any) -> int:
    """Returns the number of data of a batch: of its targets, else of its first tensor; 0 where it has none."""
    args, kwargs = arguments(batch)
    targets = kwargs.get("y", args[1] if len(args) == 2 else None)
    return next((len(tensor) for tensor in tensors_of((targets, batch)) if tensor.dim()), 0)


def known_size(loader: Any) -> int:
    """Returns the number of data of an epoch as far as it is known without going through it, else 0."""
    if isinstance(loader, DataLoader):
        if not (loader.batch_size and isinstance(loader.sampler, Sized)) or isinstance(loader.dataset, IterableDataset):
            return 0
        return len(loader) * loader.batch_size if loader.drop_last else len(loader.sampler)
    return sum(map(size_of, loader)) if isinstance(loader, list) else 0


def known_length(loader: Any) -> int:
    """Returns the number of batches of an epoch as far as it is known without going through it, else 0."""
    found = loader() if callable(loader) and not isinstance(loader, Iterable) else loader
    try:
        return len(found)
    except TypeError:  # of a generator, or a DataLoader of an iterable data set
        return 0


class EpochSize:
    """Counts the data of an epoch, of which each of several processes has a share, beside a model's ``num_data``."""

    def __init__(self, model: Any, processes: int = 1) -> None:
        self.num_data = model.num_data if isinstance(model, Supervised) else None
        self.processes = processes
        self.count = self.largest = 0

    def add(self, size: int) -> None:
        """Counts the data of a batch; raises ValueError if they are more than ``num_data`` in all."""
        self.count, self.largest = self.count + size, max(self.largest, size)
        if self.num_data is not None and self.count > self.num_data:
            raise ValueError(
                f"num_data: expected as many data as an epoch has, {self.count} or more, but got {self.num_data}"
            )

    def warn_if_missing(self) -> None:
        """Warns at the end of an epoch if it had fewer data than ``num_data``, by more than a batch."""
        found, dropped = self.processes * self.count, self.processes * self.largest  # a last, smaller batch may be
        if self.num_data is not None and found + dropped <= self.num_data:
            warnings.warn(
                f"num_data: the likelihood is scaled to {self.num_data} data, but an epoch has {found}; give the model "
                "the number of those that it is trained on",
                stacklevel=3,
            )
