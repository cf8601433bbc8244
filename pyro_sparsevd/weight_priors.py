"""Priors of weights that Pyro lacks, and divergences of a Gaussian from priors that torch lacks.

Any Pyro distribution is a prior for :func:`~.priors.bayesianize`. Where no divergence is known in closed form, as for
Student's t or a scale mixture, the bound samples it.
"""

__all__ = ["EmpiricalNormal", "fan_in_normal", "scale_mixture"]

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import Distribution, register_kl

from .distributions import log_variance_of
from .ops.divergence import kl_ard


class EmpiricalNormal(dist.TorchDistribution):
    r"""The prior N(0, s²) with its variance at the optimum of the bound, one for each group of weights.

    Empirical Bayes has the optimum in closed form: s² is the mean of θ² + σ² over the group of K weights, which leaves

    .. math:: \mathrm{KL} = \sum_k \tfrac12 \log \frac{s^2}{\sigma_k^2}.

    Each weight a group of its own is automatic relevance determination, ½ log(1 + 1/α) for each weight, which makes
    weights sparse much as the log-uniform prior does. One group for each row of a layer does so for its units; one for
    the whole tensor learns the scale of its weights.

    The prior depends on the posterior, so it has no density. To tools that run a model only to learn its shapes it is
    the standard normal distribution.

    References:
        | Variational Dropout via Empirical Bayes (Kharitonov, Molchanov, Vetrov, 2018)
        | https://arxiv.org/abs/1811.00596

    Args:
        group_dims: Those dimensions of the weight along which groups differ: ``(0,)`` for one group for each unit of
            a linear layer or filter of a convolution, ``()`` for one group; None for each weight on its own.
        validate_args: As for any distribution.

    Raises:
        ValueError: If ``group_dims`` is not of distinct dimensions counted from 0.

    Example:
        >>> prior = EmpiricalNormal((0,)).expand([3, 4])
        >>> q = svd.SparseNormal(torch.zeros(3, 4), torch.zeros(3, 4))
        >>> torch.distributions.kl_divergence(q, prior).sum()
        tensor(0.)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, group_dims: tuple[int, ...] | None = None, validate_args: bool | None = None) -> None:
        if group_dims is not None and not (
            all(isinstance(dim, int) and dim >= 0 for dim in group_dims) and len(set(group_dims)) == len(group_dims)
        ):
            raise ValueError(f"group_dims: expected distinct dimensions, counted from 0, or None, but got {group_dims}")
        self.group_dims = group_dims if group_dims is None else tuple(group_dims)
        self.is_sparse = group_dims != ()  # one scale for a whole tensor makes nothing sparse
        self._mean = torch.zeros(())  # follows the module to its device and dtype
        super().__init__(validate_args=validate_args)

    def __repr__(self) -> str:
        return f"EmpiricalNormal(group_dims={self.group_dims}, batch_shape: {tuple(self.batch_shape)})"

    def expand(self, batch_shape: Any, _instance: Any = None) -> "EmpiricalNormal":
        """Returns this distribution with its batch shape expanded.

        Raises:
            ValueError: If that has not the dimensions of the groups.
        """
        new = self._get_checked_instance(EmpiricalNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        if self.group_dims and max(self.group_dims) >= len(batch_shape):
            raise ValueError(
                f"group_dims: expected dimensions of a weight of shape {tuple(batch_shape)}, but got {self.group_dims}"
            )
        new.group_dims, new._mean = self.group_dims, self._mean.expand(batch_shape)
        new.is_sparse = self.is_sparse
        added = len(batch_shape) - len(self.batch_shape)
        if added and self.batch_shape and self.group_dims is not None:  # in a plate, each part of which has its groups
            new.group_dims = (*range(added), *(dim + added for dim in self.group_dims))
        super(EmpiricalNormal, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """The mean, 0."""
        return self._mean

    def log_prob(self, value: Tensor) -> Tensor:
        """Raises, since the scale depends on the posterior."""
        raise NotImplementedError(
            "EmpiricalNormal has no density, as its scale depends on the posterior; use a bound with the closed form, "
            'such as SparseVD_ELBO(kl="approximate")'
        )

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 # as in torch
        """Draws from the standard normal distribution."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return torch.randn(shape, dtype=self._mean.dtype, device=self._mean.device)


@register_kl(torch.distributions.Normal, EmpiricalNormal)
def _kl_normal_empirical_normal(q: torch.distributions.Normal, p: EmpiricalNormal) -> Tensor:
    log_variance = log_variance_of(q)
    if p.group_dims is None:
        return kl_ard(q.loc, log_variance)
    second_moment = q.loc**2 + log_variance.exp()
    pooled = [dim for dim in range(second_moment.dim()) if dim not in p.group_dims]
    variance = _mean_of_kept(second_moment, getattr(q, "kept", None), pooled)
    return 0.5 * (variance.log() - log_variance + second_moment / variance - 1)


def _mean_of_kept(values: Tensor, kept: Tensor | None, dims: list[int]) -> Tensor:
    """Returns means along dimensions, over what is not held at zero."""
    if not dims:
        return values
    if kept is None:
        return values.mean(dims, keepdim=True)
    count = kept.sum(dims, keepdim=True)
    return torch.where(count > 0, (values * kept).sum(dims, keepdim=True) / count.clamp_min(1), 1.0)


@register_kl(torch.distributions.Normal, torch.distributions.Laplace)
def _kl_normal_laplace(q: torch.distributions.Normal, p: torch.distributions.Laplace) -> Tensor:
    # E|w - m| of a Gaussian is σ √(2/π) exp(-z²/2) + (θ - m) erf(z / √2), z = (θ - m) / σ.
    offset = q.loc - p.loc
    z = offset / q.scale
    deviation = q.scale * math.sqrt(2 / math.pi) * (-0.5 * z**2).exp() + offset * torch.erf(z / math.sqrt(2))
    return (2 * p.scale).log() + deviation / p.scale - 0.5 * (log_variance_of(q) + math.log(2 * math.pi) + 1)


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
