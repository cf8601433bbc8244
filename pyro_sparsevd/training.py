"""A training loop for losses that are torch modules, which goes on where it was killed."""

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CrossEntropy",
    "batches",
    "constant_then_linear",
    "error",
    "fit",
    "logits",
    "negative_log_likelihood",
]

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .datasets import Split
from .plain import evaluation_mode


def batches(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the data once, in random order.

    Args:
        split: The data.
        size: How many at a time; the last batch may have fewer.

    Yields:
        Images and labels.

    Raises:
        ValueError: If ``size`` is not positive.

    Example:
        >>> split = Split(torch.rand(5, 1, 28, 28), torch.arange(5))
        >>> [len(labels) for images, labels in batches(split, 2)]
        [2, 2, 1]
    """
    if size <= 0:
        raise ValueError(f"size: expected a positive batch size, but got {size}")
    order = torch.randperm(len(split), device=split.labels.device)
    for index in order.split(size):
        yield split.images[index], split.labels[index]


@dataclass(frozen=True)
class Checkpoint:
    """The file that a training goes on from, and what it must have in common with the training that wrote it.

    Args:
        path: The file.
        settings: What determines the training, such as its seed, by the name that an error should give it. Not the
            number of epochs, which may grow.

    Example:
        >>> Checkpoint("run.pt", {"seed": 0}).settings["seed"]
        0
    """

    path: str | Path
    settings: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)


class CheckpointError(ValueError):
    """A checkpoint that a training cannot go on from."""


class CrossEntropy(nn.Module):
    """The mean cross-entropy, in nats per datum, of a plain classifier.

    Args:
        network: A network that returns class logits.

    Example:
        >>> loss = CrossEntropy(nn.Linear(3, 2))(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))
        >>> loss.shape
        torch.Size([])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the loss of a batch."""
        return F.cross_entropy(self.network(x), y)


@torch.no_grad()
def logits(network: nn.Module, split: Split, batch_size: int = 1_000) -> Tensor:
    """Returns what a classifier says of data, in evaluation mode.

    Args:
        network: A network that returns class logits; it is left in the mode it was in.
        split: The data.
        batch_size: How many data to predict at a time.

    Returns:
        The logits, of shape ``(N, classes)``.

    Example:
        >>> logits(nn.Linear(4, 3), Split(torch.rand(5, 4), torch.arange(5)), batch_size=2).shape
        torch.Size([5, 3])
    """
    with evaluation_mode(network):
        return torch.cat([network(images) for images in split.images.split(batch_size)])


def error(network: nn.Module, split: Split, batch_size: int = 1_000) -> float:
    """Returns the fraction of data that a classifier gets wrong, in evaluation mode.

    Args:
        network: A network that returns class logits; it is left in the mode it was in.
        split: The data.
        batch_size: How many data to predict at a time.

    Returns:
        The error.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        >>> 0 <= error(network, Split(torch.rand(5, 1, 28, 28), torch.arange(5))) <= 1
        True
    """
    return float((logits(network, split, batch_size).argmax(-1) != split.labels).float().mean())


def negative_log_likelihood(network: nn.Module, split: Split, batch_size: int = 1_000) -> float:
    """Returns the mean negative log likelihood of a classifier's labels, in nats per datum, in evaluation mode.

    Args:
        network: A network that returns class logits; it is left in the mode it was in.
        split: The data.
        batch_size: How many data to predict at a time.

    Returns:
        The negative log likelihood.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        >>> negative_log_likelihood(network, Split(torch.rand(5, 1, 28, 28), torch.arange(5))) > 0
        True
    """
    return float(F.cross_entropy(logits(network, split, batch_size), split.labels))


def constant_then_linear(
    optimizer: torch.optim.Optimizer, epochs: int, constant: float = 0.5
) -> torch.optim.lr_scheduler.LambdaLR:
    """Returns a schedule that keeps the learning rate for a part of the epochs, then lowers it linearly to 0.

    Args:
        optimizer: The optimiser.
        epochs: The number of epochs, and of steps of the schedule.
        constant: The part of the epochs, less than 1.

    Returns:
        The schedule.

    Example:
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
        >>> constant_then_linear(optimizer, 10).get_last_lr()
        [1.0]
    """
    last = max(epochs, 1)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: min(1.0, (1 - e / last) / (1 - constant)))


def fit(
    loss: nn.Module,
    split: Split,
    *,
    epochs: int,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    before_epoch: Callable[[int], None] | None = None,
    after_epoch: Callable[[int], dict[str, float]] | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
    description: str = "training",
) -> list[dict[str, float]]:
    """Minimises a loss, with a progress bar.

    With a checkpoint, all that matters is written after each epoch, and a file that is found is gone on from: the
    result is that of a run that was never interrupted. The file is complete or absent at any moment.

    Args:
        loss: A module that maps a batch to a scalar, such as ``SparseVD_ELBO()(model, guide)``.
        split: The training data.
        epochs: How many times to go through the data.
        batch_size: The number of data of a step.
        optimizer: The optimiser of the loss's parameters.
        scheduler: Stepped after each epoch.
        before_epoch: Called with the number of each epoch, from 0, before it; sets the KL weight, for example.
        after_epoch: Called with the number of each epoch after it; returns numbers to keep and to show.
        checkpoint: A file to write after each epoch and to go on from, if it is there. With settings, they are kept
            in it, and a file that was written with others is refused.
        description: What the progress bar says.

    Returns:
        What ``after_epoch`` returned, for each epoch.

    Raises:
        CheckpointError: If the checkpoint cannot be read, or is of a longer training than ``epochs``, of other
            settings or of a loss with other parameters; before anything is changed.

    Example:
        >>> class Loss(nn.Linear):
        ...     def forward(self, images, labels):
        ...         return nn.functional.cross_entropy(super().forward(images.flatten(1)), labels)
        >>> loss, split = Loss(784, 10), Split(torch.rand(50, 1, 28, 28), torch.zeros(50, dtype=torch.long))
        >>> optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
        >>> history = fit(loss, split, epochs=2, batch_size=10, optimizer=optimizer, after_epoch=lambda e: {"epoch": e})
        >>> history
        [{'epoch': 0.0}, {'epoch': 1.0}]
    """
    history: list[dict[str, float]] = []
    parts = {"loss": loss, "optimizer": optimizer, **({"scheduler": scheduler} if scheduler else {})}
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    if checkpoint is not None and Path(checkpoint.path).is_file():
        history = _load(checkpoint, parts, split.images.device, epochs)
    with tqdm(total=epochs, initial=len(history), desc=description, unit="epoch") as progress:
        for epoch in range(len(history), epochs):
            if before_epoch is not None:
                before_epoch(epoch)
            loss.train()
            for images, labels in batches(split, batch_size):
                optimizer.zero_grad()
                loss(images, labels).backward()
                optimizer.step()
            if scheduler is not None:
                scheduler.step()
            numbers = {} if after_epoch is None else after_epoch(epoch)
            history.append({name: float(value) for name, value in numbers.items()})
            progress.set_postfix({name: f"{value:.4g}" for name, value in history[-1].items()}, refresh=False)
            progress.update()
            if checkpoint is not None:
                _save(checkpoint, parts, history, split.images.device)
    return history


def _save(checkpoint: Checkpoint, parts: dict[str, Any], history: list[dict[str, float]], device: torch.device) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"history": history, "settings": dict(checkpoint.settings), **_random_states(device)}
    path = Path(checkpoint.path)
    new = path.with_name(path.name + ".new")
    torch.save(state, new)
    os.replace(new, path)


def _load(checkpoint: Checkpoint, parts: dict[str, Any], device: torch.device, epochs: int) -> list[dict[str, float]]:
    state = _read(checkpoint.path, device, {*parts, "history", "generator"})
    history: list[dict[str, float]] = state["history"]
    _check_settings(checkpoint, state.get("settings", {}))  # those of earlier versions have none
    if len(history) > epochs:
        raise CheckpointError(
            f"{checkpoint.path}: expected at most {epochs} epochs, but it has {len(history)}; remove it to "
            "start again, or ask for as many"
        )
    _check_shapes(checkpoint.path, _shapes(parts["loss"].state_dict()), _shapes(state["loss"]))
    for name, part in parts.items():
        part.load_state_dict(state[name])
    _set_random_states(state, device)
    return history


def _read(path: str | Path, device: torch.device, parts: set[str]) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # which one depends on where the file is damaged
        raise CheckpointError(
            f"{path}: expected a checkpoint, but it cannot be read ({type(error).__name__}); remove it to start again"
        ) from error
    if not (isinstance(state, dict) and parts <= state.keys()):
        found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"{path}: expected a checkpoint of {', '.join(sorted(parts))}, but got {found}; choose another file"
        )
    return state


def _check_settings(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> None:
    for name, value in checkpoint.settings.items():
        if name in stored and stored[name] != value:
            raise CheckpointError(
                f"{checkpoint.path}: expected a training with {name} {value}, but it is of one with {name} "
                f"{stored[name]}; go on with {name} {stored[name]}, or remove the file to start again"
            )


def _check_shapes(path: str | Path, expected: dict[str, Any], stored: dict[str, Any]) -> None:
    for name in [*expected, *stored]:
        if expected.get(name) != stored.get(name):
            raise CheckpointError(
                f"{path}: expected parameters of this loss, {name} of shape {expected.get(name)}, but it has "
                f"{stored.get(name)}; go on with the network that it is of, or remove the file to start again"
            )


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """Returns the states of the generators that initial values, batches and noise come from."""
    states = {"generator": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda_generator"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["generator"].cpu())
    if device.type == "cuda" and "cuda_generator" in states:  # a checkpoint from a CPU has none
        torch.cuda.set_rng_state(states["cuda_generator"].cpu(), device)
