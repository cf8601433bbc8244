"""Likelihoods that have parameters of their own."""

__all__ = ["GaussianLikelihood"]

import math

import torch
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor, nn


class GaussianLikelihood(nn.Module):
    r"""The likelihood of a regression, with one standard deviation s that is learnt with the network.

    .. math:: p(y \mid f) = \mathcal N(y \mid f, s^2)

    Args:
        init_scale: Where s starts, in units of the targets.

    Raises:
        ValueError: If ``init_scale`` is not a positive number.

    Example:
        >>> likelihood = GaussianLikelihood()
        >>> likelihood(torch.zeros(5))
        Normal(loc: torch.Size([5]), scale: torch.Size([5]))
        >>> network = sparsevd.bayesianize(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)))
        >>> model = sparsevd.Supervised(network, likelihood, num_data=100)
    """

    def __init__(self, init_scale: float = 1.0) -> None:
        super().__init__()
        if not 0 < init_scale < math.inf:
            raise ValueError(f"init_scale: expected a positive number, but got {init_scale}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(init_scale)))

    @property
    def scale(self) -> Tensor:
        """The standard deviation s, a scalar."""
        return self.log_scale.exp()

    def forward(self, mean: Tensor) -> TorchDistribution:
        """Returns the distribution of the targets.

        Args:
            mean: The outputs of the network, of the shape of the targets: ``(N,)``, or ``(N, ...)`` where an example
                has several.

        Returns:
            A normal distribution of N examples.
        """
        return Normal(mean, self.scale).to_event(mean.dim() - 1)
