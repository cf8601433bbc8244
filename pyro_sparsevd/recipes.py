"""Recipes for classifiers: from data to a sparse network, as they were measured to work.

These are short; copy what you want otherwise.
"""

__all__ = ["choose_threshold", "fine_tune", "fit_posterior", "train_dense", "train_sparse"]

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoints import Checkpoint
from .datasets import Split
from .elbo import SparseVD_ELBO
from .guides import AutoSparseNormal
from .pruning import masks_held, prune
from .schedules import LinearWarmup
from .site_divergence import KL
from .summary import sparsify
from .supervised import Supervised
from .training import CrossEntropy, constant_then_linear, error, fit, logits


def train_dense(
    network: nn.Module,
    split: Split,
    *,
    epochs: int,
    batch_size: int,
    lr: float = 1e-3,
    checkpoint: str | Path | Checkpoint | None = None,
) -> nn.Module:
    """Fits a classifier by maximum likelihood, with Adam.

    Args:
        network: A network that returns class logits; it is trained in place.
        split: The training data.
        epochs: How many times to go through the data.
        batch_size: The number of data of a step.
        lr: The learning rate, constant for half of the epochs, then linear to 0.
        checkpoint: As for :func:`~.training.fit`.

    Returns:
        The network.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        >>> split = Split(torch.rand(20, 1, 28, 28), torch.zeros(20, dtype=torch.long))
        >>> train_dense(network, split, epochs=1, batch_size=10) is network
        True
    """
    optimizer = torch.optim.Adam(network.parameters(), lr, fused=True)
    fit(
        CrossEntropy(network),
        split,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        scheduler=constant_then_linear(optimizer, epochs),
        checkpoint=checkpoint,
        description="maximum likelihood",
    )
    return network


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
        batch_size: The number of data of a step.
        lr: The learning rate.
        warm_up: The part of the epochs after which the KL weight is 1, more than a fortieth.
        after_epoch: As for :func:`~.training.fit`.
        checkpoint: As for :func:`~.training.fit`.

    Returns:
        What ``after_epoch`` returned, for each epoch.

    Example:
        >>> model = Supervised(svd.bayesianize(nn.Linear(4, 3)), lambda x: dist.Categorical(logits=x), num_data=20)
        >>> split = Split(torch.rand(20, 4), torch.zeros(20, dtype=torch.long))
        >>> elbo = SparseVD_ELBO()
        >>> history = fit_posterior(elbo, model, AutoSparseNormal(model), split, epochs=4, batch_size=10)
        >>> elbo.kl_weight
        1.0
    """
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


def train_sparse(
    model: Supervised,
    guide: AutoSparseNormal,
    split: Split,
    *,
    validation: Split,
    epochs: int,
    batch_size: int,
    lr: float = 3e-3,
    kl: KL = "exact",
    warm_up: float = 0.5,
    threshold: float = 3.0,
    checkpoint: str | Path | Checkpoint | None = None,
) -> list[dict[str, float]]:
    """Fits the posterior of a Bayesian classifier, as :func:`fit_posterior` does, and follows what it can do without.

    Args:
        model: The model; ``split`` must be the data set whose size it was given.
        guide: Its guide.
        split: The training data.
        validation: The data on which the pruned network is tried after each epoch.
        epochs: How many times to go through the data.
        batch_size: The number of data of a step.
        lr: The learning rate.
        kl: The form of the divergence.
        warm_up: The part of the epochs after which the KL weight is 1, more than a fortieth.
        threshold: The log α above which weights are dropped for the trial after each epoch.
        checkpoint: As for :func:`~.training.fit`.

    Returns:
        For each epoch ``nll`` and ``kl``, in nats over the data set, of its last batch, and ``error``, ``sparsity``
        and ``compression`` of the pruned network.

    Example:
        >>> model = Supervised(svd.bayesianize(nn.Linear(4, 3)), lambda x: dist.Categorical(logits=x), num_data=20)
        >>> split = Split(torch.rand(20, 4), torch.zeros(20, dtype=torch.long))
        >>> guide = AutoSparseNormal(model)
        >>> history = train_sparse(model, guide, split, validation=split, epochs=2, batch_size=10)
        >>> sorted(history[1])
        ['compression', 'error', 'kl', 'nll', 'sparsity']
    """
    elbo = SparseVD_ELBO(kl=kl)

    def after_epoch(epoch: int) -> dict[str, float]:
        summary = sparsify(guide, threshold)
        return {
            **{name: value.item() for name, value in elbo.terms.items()},
            "error": error(prune(model.network, guide, summary), validation),
            "sparsity": summary.sparsity,
            "compression": summary.compression,
        }

    return fit_posterior(
        elbo,
        model,
        guide,
        split,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        warm_up=warm_up,
        after_epoch=after_epoch,
        checkpoint=checkpoint,
    )


def fine_tune(network: nn.Module, split: Split, *, epochs: int, batch_size: int, lr: float = 1e-3) -> nn.Module:
    """Fits the weights of a sparse network that are left, by maximum likelihood.

    Args:
        network: A plain sparse network; it is not changed.
        split: The training data.
        epochs: How many times to go through the data.
        batch_size: The number of data of a step.
        lr: The learning rate, as for :func:`train_dense`.

    Returns:
        The tuned network.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        >>> split = Split(torch.rand(20, 1, 28, 28), torch.zeros(20, dtype=torch.long))
        >>> tuned = fine_tune(network, split, epochs=1, batch_size=10)
    """
    with masks_held(copy.deepcopy(network)) as tuned:
        train_dense(tuned, split, epochs=epochs, batch_size=batch_size, lr=lr)
    return tuned


def choose_threshold(
    model: Supervised,
    guide: AutoSparseNormal,
    split: Split,
    *,
    validation: Split,
    thresholds: Iterable[float],
    epochs: int,
    batch_size: int,
    tolerance: float | None = None,
) -> float:
    """Returns the smallest threshold whose fine-tuned network predicts held-out data not significantly worse.

    Each network is compared with that of the smallest negative log likelihood, in this and in its error: by the means
    of the differences, datum by datum. A mean is significantly larger than 0 if it is more than 1.96 of its standard
    errors: a one-sided test at the level of 2.5 %, for at most 5 % in the two together. A few data that are very
    unlikely under either network hide in the one what the other shows.

    Args:
        model: The model.
        guide: Its guide.
        split: The data to fine-tune with.
        validation: The held-out data.
        thresholds: The thresholds to try, at least one.
        epochs: How many epochs to fine-tune for.
        batch_size: The number of data of a step.
        tolerance: How much larger than the smallest the mean negative log likelihood may be, as a fraction of it,
            instead of the tests.

    Returns:
        The threshold.

    Raises:
        ValueError: If there is no threshold, or if the tolerance is negative or NaN.

    Example:
        >>> model = Supervised(svd.bayesianize(nn.Linear(4, 3)), lambda x: dist.Categorical(logits=x), num_data=20)
        >>> split = Split(torch.rand(20, 4), torch.zeros(20, dtype=torch.long))
        >>> options = {"validation": split, "thresholds": [1.0, 3.0], "epochs": 1, "batch_size": 10}
        >>> choose_threshold(model, AutoSparseNormal(model), split, **options)
        1.0
    """
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance: expected a fraction that is not negative, but got {tolerance}")
    nlls, wrong = {}, {}
    thresholds = list(thresholds)
    if not thresholds:
        raise ValueError("thresholds: expected at least one, but got none")
    for threshold in thresholds:
        pruned = prune(model.network, guide, sparsify(guide, threshold))
        tuned = fine_tune(pruned, split, epochs=epochs, batch_size=batch_size)
        found = logits(tuned, validation)
        nlls[threshold] = F.cross_entropy(found, validation.labels, reduction="none").double()
        wrong[threshold] = (found.argmax(-1) != validation.labels).double()
    best = min(nlls, key=lambda t: float(nlls[t].mean()))
    if tolerance is not None:
        return min(t for t in nlls if nlls[t].mean() <= (1 + tolerance) * nlls[best].mean())
    return min(t for t in nlls if all(_is_as_good(of[t], of[best]) for of in (nlls, wrong)))


def _is_as_good(losses: Tensor, best: Tensor) -> bool:
    difference = losses - best
    standard_error = difference.std(correction=0) / math.sqrt(len(difference))
    return bool(difference.mean() <= NormalDist().inv_cdf(0.975) * standard_error)
