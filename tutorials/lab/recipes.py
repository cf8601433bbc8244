"""Tested training recipes for classifiers, from data to a sparse network."""

__all__ = ["fine_tune", "train_dense", "train_sparse"]

import copy
import math
import warnings
from pathlib import Path

import torch
from torch import nn

from pyro_sparsevd.infer.autoguide import AutoSparseNormal
from pyro_sparsevd.infer.elbo import SparseVD_ELBO
from pyro_sparsevd.infer.kl import KL
from pyro_sparsevd.nn.supervised import Supervised
from pyro_sparsevd.sparsity.pruning import fixed_sparsity, prune
from pyro_sparsevd.sparsity.summary import sparsify
from pyro_sparsevd.training.checkpoints import Checkpoint
from pyro_sparsevd.training.loop import CrossEntropy, constant_then_linear, error, fit, fit_posterior
from pyro_sparsevd.training.split import Split


def train_dense(
    network: nn.Module,
    split: Split,
    *,
    epochs: int,
    batch_size: int,
    lr: float = 1e-3,
    checkpoint: str | Path | Checkpoint | None = None,
) -> nn.Module:
    """Fits a classifier by maximum likelihood, in place, with Adam; returns it.

    The learning rate is constant for half of the epochs, then falls linearly to 0.
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
    """Fits the posterior of a Bayesian classifier by ``fit_posterior``, and validates the pruned network each epoch.

    Returns for each epoch ``nll`` and ``kl`` of its last batch, in nats over the data set, and ``error``, ``sparsity``
    and ``compression`` of the network pruned at ``threshold``. Warns if no weight is left although the network
    predicted held-out data better while the KL weight was 0.

    Example:
        >>> net = sparsevd.bayesianize(nn.Linear(4, 3))
        >>> model = sparsevd.Supervised(net, lambda logits: dist.Categorical(logits=logits), num_data=20)
        >>> split = Split(torch.rand(20, 4), torch.zeros(20, dtype=torch.long))
        >>> history = train_sparse(model, AutoSparseNormal(model), split, validation=split, epochs=2, batch_size=10)
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
    """Warns if every weight is dropped and held-out data show, by 4 standard errors, that there was a signal."""
    errors = at_zero_kl_weight, last["error"]
    standard_error = math.sqrt(sum(e * (1 - e) for e in errors) / count)
    if last["sparsity"] == 1 and errors[1] - errors[0] > 4 * standard_error:
        warnings.warn(
            f"the posterior collapsed: every weight is dropped, and the held-out error, {errors[0]:.3f} at zero KL "
            f"weight, is {errors[1]:.3f}; raise the KL weight more slowly (warm_up), or train on more data",
            stacklevel=3,
        )


def fine_tune(network: nn.Module, split: Split, *, epochs: int, batch_size: int, lr: float = 1e-3) -> nn.Module:
    """Returns a copy of a sparse classifier whose remaining weights are fitted as by :func:`train_dense`."""
    with fixed_sparsity(copy.deepcopy(network)) as tuned:
        train_dense(tuned, split, epochs=epochs, batch_size=batch_size, lr=lr)
    return tuned
