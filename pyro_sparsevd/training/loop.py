"""The loop of the tutorials' classifiers, which resumes from checkpoints; :mod:`~.fit` is for everything else."""

__all__ = [
    "CrossEntropy",
    "batches",
    "constant_then_linear",
    "error",
    "fit",
    "fit_posterior",
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
from ..infer.autoguide import AutoSparseNormal
from ..infer.elbo import SparseVD_ELBO
from ..infer.schedules import LinearWarmup
from ..nn.supervised import Supervised
from .checkpoints import Checkpoint, load, save
from .split import Split


def batches(split: Split, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields images and labels of all data once, in random order, ``size`` at a time; the last batch may be smaller."""
    if size <= 0:
        raise ValueError(f"size: expected a positive batch size, but got {size}")
    order = torch.randperm(len(split), device=split.labels.device)
    for index in order.split(size):
        yield split.images[index], split.labels[index]


class CrossEntropy(nn.Module):
    """The mean cross-entropy of a classifier that returns logits, in nats per example."""

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
            "for a regression, give training.loop.fit a loss of its own, within fixed_sparsity for a sparse network"
        )
    return labels


@torch.no_grad()
def logits(network: nn.Module, split: Split, batch_size: int = 1_000) -> Tensor:
    """Returns the logits of a classifier for all data, of shape ``(N, classes)``, computed in evaluation mode."""
    with evaluation_mode(network):
        return torch.cat([network(images) for images in split.images.split(batch_size)])


def error(network: nn.Module, split: Split, batch_size: int = 1_000) -> float:
    """Returns the fraction of data that a classifier gets wrong, in evaluation mode."""
    return float((logits(network, split, batch_size).argmax(-1) != _classes(split.labels)).float().mean())


def negative_log_likelihood(network: nn.Module, split: Split, batch_size: int = 1_000) -> float:
    """Returns the mean negative log likelihood of a classifier's labels, in nats per example, in evaluation mode."""
    return float(F.cross_entropy(logits(network, split, batch_size), _classes(split.labels)))


def constant_then_linear(
    optimizer: torch.optim.Optimizer, epochs: int, constant: float = 0.5
) -> torch.optim.lr_scheduler.LambdaLR:
    """Returns a schedule that keeps the learning rate for a part of the epochs, then lowers it linearly to 0."""
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

    With a checkpoint, the state of the training is written after each epoch, and an existing file is resumed from: the
    result is that of an uninterrupted run. The file is complete or absent at any moment.

    Args:
        loss: A module that maps a batch to a scalar, such as ``SparseVD_ELBO()(model, guide)``.
        split: The training data.
        epochs: How many times to go through the data.
        batch_size: The number of examples in a step.
        optimizer: The optimiser of the loss's parameters.
        scheduler: Stepped after each epoch.
        before_epoch: Called with the number of each epoch, from 0, before it; sets the KL weight, for example.
        after_epoch: Called with the number of each epoch after it; returns numbers to keep and to show.
        checkpoint: A file to write after each epoch and to resume from. A :class:`~.checkpoints.Checkpoint` stores
            settings as well, and refuses a file that was written with others.
        description: The label of the progress bar.

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
        >>> fit(loss, split, epochs=2, batch_size=10, optimizer=optimizer, after_epoch=lambda e: {"epoch": e})
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


def fit_posterior(
    elbo: SparseVD_ELBO,
    model: Supervised,
    guide: AutoSparseNormal,
    split: Split,
    *,
    epochs: int,
    batch_size: int,
    lr: float = 3e-3,
    warm_up: float = 0.5,
    after_epoch: Callable[[int], dict[str, float]] | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
) -> list[dict[str, float]]:
    """Fits the posterior of a Bayesian network, with Adam.

    The KL weight is 0 for a fortieth of the epochs, then rises linearly to 1; the learning rate is constant for half
    of the epochs, then falls linearly to 0.

    Args:
        elbo: The loss, whose KL weight is set.
        model: The model; ``split`` must be the data set whose size it was given.
        guide: Its guide.
        split: The training data.
        epochs: How many times to go through the data.
        batch_size: The number of examples in a step.
        lr: The learning rate.
        warm_up: The part of the epochs after which the KL weight is 1, more than a fortieth.
        after_epoch: As for :func:`fit`.
        checkpoint: As for :func:`fit`.

    Returns:
        What ``after_epoch`` returned, for each epoch.

    Raises:
        ValueError: If ``split`` is not as large as the model's ``num_data``.

    Example:
        >>> net = sparsevd.bayesianize(nn.Linear(4, 3))
        >>> model = Supervised(net, lambda logits: dist.Categorical(logits=logits), num_data=20)
        >>> split = Split(torch.rand(20, 4), torch.zeros(20, dtype=torch.long))
        >>> elbo = SparseVD_ELBO()
        >>> history = fit_posterior(elbo, model, AutoSparseNormal(model), split, epochs=4, batch_size=10)
        >>> elbo.kl_weight
        1.0
    """
    if len(split) != model.num_data:
        raise ValueError(f"split: expected the num_data = {model.num_data} data of the model, but got {len(split)}")
    loss = elbo(model, guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr, fused=True)
    schedule = LinearWarmup(epochs / 40, warm_up * epochs)

    def before_epoch(epoch: int) -> None:
        elbo.kl_weight = schedule(epoch)

    return fit(
        loss,
        split,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        scheduler=constant_then_linear(optimizer, epochs),
        before_epoch=before_epoch,
        after_epoch=after_epoch,
        checkpoint=checkpoint,
        description=f"sparse variational dropout, {elbo.kl} KL",
    )
