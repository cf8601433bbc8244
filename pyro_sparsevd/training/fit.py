"""A training loop for losses that are torch modules, which goes on where it was killed."""

__all__ = [
    "CrossEntropy",
    "batches",
    "constant_then_linear",
    "error",
    "fit",
    "logits",
    "negative_log_likelihood",
]

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .._modules import evaluation_mode
from .checkpoints import Checkpoint, load, save
from .split import Split


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


class CrossEntropy(nn.Module):
    """The mean cross-entropy, in nats per datum, of a plain classifier.

    Args:
        network: A network that returns class logits.

    Raises:
        TypeError: When called with labels that are no integers, such as the targets of a regression.

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
        return F.cross_entropy(self.network(x), _classes(y))


def _classes(labels: Tensor) -> Tensor:
    # Torch would take floating-point targets for the probabilities of the classes.
    if labels.is_floating_point():
        raise TypeError(
            f"labels: expected the classes of a classifier as integers, but got {labels.dtype}; "
            "for a regression, give training.fit a loss of its own, within fixed_sparsity for a sparse network"
        )
    return labels


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
    return float((logits(network, split, batch_size).argmax(-1) != _classes(split.labels)).float().mean())


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
    return float(F.cross_entropy(logits(network, split, batch_size), _classes(split.labels)))


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
        history = load(checkpoint, parts, split.images.device, epochs)
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
                save(checkpoint, parts, history, split.images.device)
    return history
