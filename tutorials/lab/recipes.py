"""Training recipes for any likelihood, from batches to a sparse network."""

__all__ = ["fine_tune", "score", "train_dense", "train_sparse"]

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from pyro_sparsevd.evaluation import network_predictions, scores
from pyro_sparsevd.infer.autoguide import AutoSparseNormal
from pyro_sparsevd.infer.kl import KL
from pyro_sparsevd.sparsity.pruning import fixed_sparsity, prune
from pyro_sparsevd.sparsity.summary import sparsify
from pyro_sparsevd.training.lightning import SparseVDModule

from .training import MaximumLikelihood, Run, train


def score(network: nn.Module, likelihood: Callable[[Any], Any], batches: Iterable[Any], name: str = "error") -> float:
    """Returns a score of what a network predicts, by its name in ``evaluation.scores``."""
    return scores(network_predictions(network, likelihood, batches))[name]


def train_dense(
    network: nn.Module,
    likelihood: Callable[[Any], Any],
    batches: DataLoader,
    *,
    epochs: int,
    lr: float = 1e-3,
    run: Run | None = None,
) -> nn.Module:
    """Fits a network by maximum likelihood, in place, and the parameters of its likelihood; returns the network.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from lab.datasets import batches
        >>> data = batches(TensorDataset(torch.rand(20, 4), torch.rand(20, 1)), 10)
        >>> network = train_dense(nn.Linear(4, 1), sparsevd.GaussianLikelihood(), data, epochs=2)
    """
    module = MaximumLikelihood(network, likelihood, lr)
    train(module, batches, epochs=epochs, run=run or Run(), description="maximum likelihood")
    return network


def train_sparse(
    model: Any,
    guide: AutoSparseNormal,
    batches: DataLoader,
    *,
    epochs: int,
    validation: Iterable[Any] | None = None,
    lr: float = 3e-3,
    kl: KL = "exact",
    warm_up: float = 0.5,
    run: Run | None = None,
    after_epoch: Callable[[int], Mapping[str, float]] | None = None,
) -> list[dict[str, float]]:
    """Fits a posterior as :class:`~.lightning.SparseVDModule` does, and validates the pruned network each epoch.

    Returns for each epoch the means of ``nll`` and ``kl``, in nats over the data set, ``sparsity`` and ``compression``
    at the threshold 3, with ``validation`` the ``error`` or ``rmse`` of the network pruned there, and what
    ``after_epoch`` returned. Warns if no weight is left although the network predicted held-out data better while the
    KL weight was 0.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from lab.datasets import batches
        >>> model = sparsevd.Supervised(sparsevd.bayesianize(nn.Linear(4, 1)), sparsevd.GaussianLikelihood(), 20)
        >>> guide = sparsevd.AutoSparseNormal(model)
        >>> data = batches(TensorDataset(torch.rand(20, 4), torch.rand(20, 1)), 10)
        >>> history = train_sparse(model, guide, data, validation=data, epochs=2)
        >>> sorted(history[1])
        ['compression', 'kl', 'nll', 'rmse', 'sparsity']
    """

    def numbers(epoch: int) -> dict[str, float]:
        found: dict[str, float] = {}
        if validation is not None:
            network = prune(model.network, guide, sparsify(guide, 3.0))
            of_network = scores(network_predictions(network, model.likelihood, validation))
            found = {name: of_network[name] for name in ("error", "rmse") if name in of_network}
        return found | dict(after_epoch(epoch) if after_epoch is not None else {})

    module = SparseVDModule(model, guide, lr=lr, kl=kl, warm_up=warm_up)
    description = f"sparse variational dropout, {kl} KL"
    history = train(module, batches, epochs=epochs, run=run or Run(), description=description, after_epoch=numbers)
    if validation is not None and "error" in history[-1]:
        _warn_of_collapse(history[epochs // 40]["error"], history[-1], sum(len(y) for _, y in validation))
    return history


def _warn_of_collapse(at_zero_kl_weight: float, last: Mapping[str, float], count: int) -> None:
    """Warns if every weight is dropped and held-out data show, by 4 standard errors, that there was a signal."""
    errors = at_zero_kl_weight, last["error"]
    standard_error = math.sqrt(sum(e * (1 - e) for e in errors) / count)
    if last.get("sparsity") == 1 and errors[1] - errors[0] > 4 * standard_error:
        warnings.warn(
            f"the posterior collapsed: every weight is dropped, and the held-out error, {errors[0]:.3f} at zero KL "
            f"weight, is {errors[1]:.3f}; raise the KL weight more slowly (warm_up), or train on more data",
            stacklevel=3,
        )


def fine_tune(
    network: nn.Module,
    likelihood: Callable[[Any], Any],
    batches: DataLoader,
    *,
    epochs: int,
    lr: float = 1e-3,
    run: Run | None = None,
) -> nn.Module:
    """Returns a copy of a sparse network whose remaining weights are fitted as by :func:`train_dense`.

    The likelihood is the model's, such as ``model.likelihood``, and stays as it is.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from lab.datasets import batches
        >>> data = batches(TensorDataset(torch.rand(20, 4), torch.rand(20, 1)), 10)
        >>> network = nn.Linear(4, 1)
        >>> network.weight.data[0, :2] = 0
        >>> fine_tune(network, sparsevd.GaussianLikelihood(), data, epochs=2).weight[0, :2].tolist()
        [0.0, 0.0]
    """
    likelihood = copy.deepcopy(likelihood)
    if isinstance(likelihood, nn.Module):
        likelihood.requires_grad_(False)
    with fixed_sparsity(copy.deepcopy(network)) as tuned:
        module = MaximumLikelihood(tuned, likelihood, lr)
        train(module, batches, epochs=epochs, run=run or Run(), description="fine-tuning")
    return tuned
