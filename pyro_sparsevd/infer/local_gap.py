"""The loss with sampled outputs against the loss with sampled weights."""

__all__ = ["Estimate", "LocalReparamGap", "local_reparam_gap"]

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .buffers import unchanged_buffers
from .elbo import SparseVD_ELBO


class Estimate(NamedTuple):
    """A mean with its standard error."""

    mean: float
    standard_error: float


class LocalReparamGap(NamedTuple):
    """The loss of a model and its guide in two ways, in nats over the data set.

    ``sampled_outputs`` is that of ``local_reparam=True``; ``sampled_weights`` the negative evidence lower bound of any
    model.
    """

    sampled_outputs: Estimate
    sampled_weights: Estimate

    @property
    def sigmas(self) -> float:
        """The difference of the two in its standard errors; beyond 3 or so, it is not due to chance."""
        error = math.hypot(self.sampled_outputs.standard_error, self.sampled_weights.standard_error)
        difference = self.sampled_outputs.mean - self.sampled_weights.mean
        return difference / error if error > 0 else math.copysign(math.inf, difference) if difference else 0.0


def local_reparam_gap(
    elbo: SparseVD_ELBO, model: Callable, guide: Callable, *args: Any, num_passes: int = 100, **kwargs: Any
) -> LocalReparamGap:
    """Measures whether sampled outputs give the loss of sampled weights.

    Both are the same where each row that a linear layer gives is an example of its own. Where rows are mixed later on,
    as in graphs, sets and attention over positions, their noise is not that of one weight for all of them.

    Args:
        elbo: The bound; it is not changed.
        model: The model; its buffers are not changed.
        guide: The guide; how far it is trained matters.
        *args: Given to both.
        num_passes: The number of evaluations of each.
        **kwargs: Given to both.

    Returns:
        Both losses.

    Raises:
        ValueError: If ``num_passes`` is less than 2.

    Example:
        >>> bnn = sparsevd.bayesianize(nn.Linear(4, 3))
        >>> model = sparsevd.Supervised(bnn, lambda x: dist.Categorical(logits=x), num_data=10)
        >>> guide = sparsevd.AutoSparseNormal(model)
        >>> gap = local_reparam_gap(sparsevd.SparseVD_ELBO(), model, guide, torch.randn(10, 4), torch.zeros(10))
        >>> abs(gap.sigmas) < 5
        True
    """
    if num_passes < 2:
        raise ValueError(f"num_passes: expected at least 2, but got {num_passes}")
    estimates = []
    for local_reparam in (True, False):
        own = copy.deepcopy(elbo)
        own.local_reparam = local_reparam
        with unchanged_buffers(model):
            losses = torch.tensor([own.loss(model, guide, *args, **kwargs) for _ in range(num_passes)])
        estimates.append(Estimate(losses.mean().item(), losses.std().item() / math.sqrt(num_passes)))
    return LocalReparamGap(*estimates)
