"""Recipes for classifiers: from data to a sparse network, as they were measured to work.

These are short; copy what you want otherwise.
"""

__all__ = ["choose_threshold", "fine_tune", "fit_posterior", "train_dense", "train_sparse"]

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from ..infer.autoguide import AutoSparseNormal
from ..infer.elbo import SparseVD_ELBO
from ..infer.kl import KL
from ..infer.schedules import LinearWarmup
from ..nn.supervised import Supervised
from ..sparsity.pruning import fixed_sparsity, prune
from ..sparsity.summary import sparsify
from ..sparsity.threshold import smoothed_threshold
from .checkpoints import Checkpoint
from .fit import CrossEntropy, constant_then_linear, error, fit, negative_log_likelihood
from .split import Split


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
        checkpoint: As for :func:`~.fit.fit`.

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
        after_epoch: As for :func:`~.fit.fit`.
        checkpoint: As for :func:`~.fit.fit`.

    Returns:
        What ``after_epoch`` returned, for each epoch.

    Raises:
        ValueError: If ``split`` is not as large as the model's ``num_data``.

    Example:
        >>> model = Supervised(svd.bayesianize(nn.Linear(4, 3)), lambda x: dist.Categorical(logits=x), num_data=20)
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
        checkpoint: As for :func:`~.fit.fit`.

    Returns:
        For each epoch ``nll`` and ``kl``, in nats over the data set, of its last batch, and ``error``, ``sparsity``
        and ``compression`` of the pruned network.

    Raises:
        ValueError: If ``split`` is not as large as the model's ``num_data``.

    Warns:
        UserWarning: If no weight is left although, at zero KL weight, the network predicted held-out data better. With
            labels that do not depend on the inputs, it did not.

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

    history = fit_posterior(
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
    _warn_of_collapse(history[epochs // 40]["error"], history[-1], len(validation))
    return history


def _warn_of_collapse(at_zero_kl_weight: float, last: dict[str, float], count: int) -> None:
    """Warns if every weight is gone and held-out data show that there was something to learn, by 4 standard errors."""
    errors = at_zero_kl_weight, last["error"]
    standard_error = math.sqrt(sum(e * (1 - e) for e in errors) / count)
    if last["sparsity"] == 1 and errors[1] - errors[0] > 4 * standard_error:
        warnings.warn(
            f"the posterior collapsed: every weight is dropped, and the held-out error, {errors[0]:.3f} at zero KL "
            f"weight, is {errors[1]:.3f}; raise the KL weight more slowly (warm_up), or train on more data",
            stacklevel=3,
        )


def fine_tune(network: nn.Module, split: Split, *, epochs: int, batch_size: int, lr: float = 1e-3) -> nn.Module:
    """Fits the weights of a sparse network that are left, by maximum likelihood.

    Args:
        network: A plain sparse network; it is not changed.
        split: The training data, with classes for labels: a regression needs a loss of its own, given to
            :func:`~.fit.fit` within :func:`~.pruning.fixed_sparsity`.
        epochs: How many times to go through the data.
        batch_size: The number of data of a step.
        lr: The learning rate, as for :func:`train_dense`.

    Returns:
        The tuned network.

    Raises:
        TypeError: If the labels are no integers.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        >>> split = Split(torch.rand(20, 1, 28, 28), torch.zeros(20, dtype=torch.long))
        >>> tuned = fine_tune(network, split, epochs=1, batch_size=10)
    """
    with fixed_sparsity(copy.deepcopy(network)) as tuned:
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
    tolerance: float = 0.05,
) -> float:
    """Returns a threshold whose fine-tuned network predicts held-out data about as well as the best.

    The network of each threshold is fine-tuned, and :func:`~.threshold.smoothed_threshold` chooses by their mean
    negative log likelihoods.

    Args:
        model: The model of a classifier.
        guide: Its guide.
        split: The data to fine-tune with.
        validation: The held-out data.
        thresholds: The thresholds to try, at least one; seven or more, evenly spaced, leave little to chance.
        epochs: How many epochs to fine-tune for.
        batch_size: The number of data of a step.
        tolerance: As for :func:`~.threshold.smoothed_threshold`.

    Returns:
        The threshold.

    Raises:
        ValueError: As of :func:`~.threshold.smoothed_threshold`.

    Example:
        >>> model = Supervised(svd.bayesianize(nn.Linear(4, 3)), lambda x: dist.Categorical(logits=x), num_data=20)
        >>> split = Split(torch.rand(20, 4), torch.zeros(20, dtype=torch.long))
        >>> options = {"validation": split, "thresholds": [3.0], "epochs": 1, "batch_size": 10}
        >>> choose_threshold(model, AutoSparseNormal(model), split, **options)
        3.0
    """
    nlls = {}
    for threshold in thresholds:
        pruned = prune(model.network, guide, sparsify(guide, threshold))
        tuned = fine_tune(pruned, split, epochs=epochs, batch_size=batch_size)
        nlls[threshold] = negative_log_likelihood(tuned, validation)
    return smoothed_threshold(nlls, tolerance)
