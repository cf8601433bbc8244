"""Priors of weights that Pyro lacks."""

__all__ = ["fan_in_normal", "scale_mixture"]

import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import nn
from torch.distributions import Distribution


def fan_in_normal(scale: float = 1.0) -> Callable[[str, nn.Parameter], Distribution]:
    r"""Returns a prior N(0, scale² / fan-in) for each weight of a network, with the number of its unit's inputs.

    That is the number of weights of a row of the parameter, as in linear layers and convolutions.

    References:
        | Bayesian Learning for Neural Networks (Neal, 1996)

    Args:
        scale: The standard deviation of a sum of as many weights as a unit has.

    Returns:
        What :func:`~.priors.bayesianize` takes as its prior: a function of a parameter's name and value.

    Raises:
        ValueError: If ``scale`` is not positive and finite.

    Example:
        >>> fan_in_normal()("weight", nn.Linear(4, 3).weight).scale
        tensor(0.5000)
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a positive and finite number, but got {scale}")
    return lambda name, weight: dist.Normal(0.0, scale / math.sqrt(max(weight[:1].numel(), 1)))


class _MixtureOfReals(dist.MixtureSameFamily):
    support = constraints.real  # torch's own is one that no transform is known to


def scale_mixture(weight: float = 0.5, wide: float = 1.0, narrow: float = 0.0025) -> dist.MixtureSameFamily:
    r"""Returns the prior of two Gaussians of mean 0, one wide and one narrow.

    .. math:: p(w) = \pi \mathcal N(w \mid 0, \sigma_1^2) + (1 - \pi) \mathcal N(w \mid 0, \sigma_2^2)

    References:
        | Weight Uncertainty in Neural Networks (Blundell, Cornebise, Kavukcuoglu, Wierstra, 2015)
        | https://arxiv.org/abs/1505.05424

    Args:
        weight: π, the probability of the wide one.
        wide: Its standard deviation.
        narrow: That of the other.

    Returns:
        The prior of a weight.

    Raises:
        ValueError: If not 0 < weight < 1 or not 0 < narrow < wide < ∞.

    Example:
        >>> scale_mixture().expand([3, 4]).sample().shape
        torch.Size([3, 4])
    """
    if not (0 < weight < 1 and 0 < narrow < wide < math.inf):
        raise ValueError(
            f"scale_mixture: expected 0 < weight < 1 and 0 < narrow < wide < inf, but got {weight}, {wide}, {narrow}"
        )
    return _MixtureOfReals(
        dist.Categorical(torch.tensor([weight, 1 - weight])), dist.Normal(0.0, torch.tensor([wide, narrow]))
    )
