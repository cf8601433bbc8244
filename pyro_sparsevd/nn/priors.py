"""Priors of weights that Pyro lacks, and well-known ones by name."""

__all__ = ["PRIOR_NAMES", "fan_in_normal", "group_normal_jeffreys", "horseshoe", "named_prior", "scale_mixture"]

import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import nn
from torch.distributions import Distribution

from ..distributions.empirical_normal import EmpiricalBayesNormal
from ..distributions.log_uniform import Jeffreys, LogUniform
from .bayesianize import Prior
from .scales import HierarchicalPrior, Scale


def fan_in_normal(scale: float = 1.0) -> Callable[[str, nn.Parameter], Distribution]:
    r"""Returns a prior N(0, scale² / fan-in) for each weight of a network, with the number of its unit's inputs.

    That is the number of weights of a row of the parameter, as in linear layers and convolutions.

    References:
        | Bayesian Learning for Neural Networks (Neal, 1996)

    Args:
        scale: The standard deviation of a sum of as many weights as a unit has.

    Returns:
        What :func:`~.bayesianize.bayesianize` takes as its prior: a function of a parameter's name and value.

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
    support = constraints.real  # biject_to has no transform to the support that torch declares


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


def horseshoe(global_scale: float = 1.0) -> HierarchicalPrior:
    r"""Returns the horseshoe prior: each weight has a scale of its own, and all of a tensor share one.

    .. math:: w_i \sim \mathcal N(0, \lambda_i^2 \tau^2), \quad \lambda_i \sim C^+(0, 1), \quad \tau \sim C^+(0, \tau_0)

    The sites are ``weight``, ``weight_local_scale`` and ``weight_global_scale``. A factorised posterior of weights and
    scales shrinks less than the exact one.

    References:
        | The horseshoe estimator for sparse signals (Carvalho, Polson, Scott, 2010)
        | Model Selection in Bayesian Neural Networks via Horseshoe Priors (Ghosh, Doshi-Velez, 2017)
        | https://arxiv.org/abs/1705.10388

    Args:
        global_scale: τ₀.

    Returns:
        The prior, for :func:`~.bayesianize.bayesianize`.

    Raises:
        ValueError: If ``global_scale`` is not positive.

    Example:
        >>> list(sparsevd.AutoSparseNormal(sparsevd.bayesianize(nn.Linear(4, 3), horseshoe())).posteriors)
        ['weight_local_scale', 'weight_global_scale', 'weight']
    """
    if not global_scale > 0:
        raise ValueError(f"global_scale: expected a positive number, but got {global_scale}")
    local, shared = dist.HalfCauchy(1.0), dist.HalfCauchy(float(global_scale))
    return HierarchicalPrior({"local_scale": Scale(local, None), "global_scale": Scale(shared, ())})


def group_normal_jeffreys(group_dims: tuple[int, ...] = (0,)) -> HierarchicalPrior:
    r"""Returns a prior that drops whole units, filters or inputs: each group of weights has one scale of its own.

    .. math:: w_{gk} \sim \mathcal N(0, z_g^2), \quad p(z_g) \propto 1 / z_g

    The sites are ``weight`` and ``weight_group_scale``. :func:`~.summary.sparsify` keeps or drops a group as a whole,
    by the log α of its pooled moments. The prior is that of Bayesian Compression; the posterior is not: there the
    scales are part of that of the weights, here weights and scales are independent.

    References:
        | Bayesian Compression for Deep Learning (Louizos, Ullrich, Welling, 2017)
        | https://arxiv.org/abs/1705.08665

    Args:
        group_dims: Those dimensions of the weight along which groups differ: ``(0,)`` for the units of a linear layer
            and the filters of a convolution, ``(1,)`` for their inputs.

    Returns:
        The prior, for :func:`~.bayesianize.bayesianize`.

    Raises:
        ValueError: If there is no dimension, or not of distinct ones counted from 0.

    Example:
        >>> bnn = sparsevd.bayesianize(nn.Linear(4, 3), group_normal_jeffreys())
        >>> sparsevd.AutoSparseNormal(bnn).posteriors["weight_group_scale"].batch_shape
        torch.Size([3, 1])
    """
    if not group_dims or min(group_dims) < 0 or len(set(group_dims)) < len(group_dims):
        raise ValueError(f"group_dims: expected distinct dimensions, counted from 0, but got {group_dims}")
    return HierarchicalPrior({"group_scale": Scale(Jeffreys(), tuple(group_dims))}, tuple(group_dims))


_BY_NAME: dict[str, Callable[[], Prior]] = {
    "log-uniform": LogUniform,
    "ard": EmpiricalBayesNormal,
    "horseshoe": horseshoe,
    "group normal-jeffreys": lambda: group_normal_jeffreys((1,)),
    "normal": lambda: dist.Normal(0.0, 1.0),
    "normal by fan-in": fan_in_normal,
    "normal, scale learnt": lambda: EmpiricalBayesNormal(()),
    "laplace": lambda: dist.Laplace(0.0, 1.0),
    "student-t": lambda: dist.StudentT(3.0, 0.0, 1.0),
    "scale mixture": scale_mixture,
}
PRIOR_NAMES = tuple(_BY_NAME)


def named_prior(name: str) -> Prior:
    """Returns a well-known prior, for :func:`~.bayesianize.bayesianize`.

    ``"log-uniform"``, ``"ard"``, ``"horseshoe"`` and ``"group normal-jeffreys"`` (of the inputs of each layer) make
    weights sparse. Others are ``"normal"``, ``"normal by fan-in"``, ``"normal, scale learnt"`` (one for each
    tensor), ``"laplace"``, ``"student-t"`` (3 degrees of freedom) and ``"scale mixture"``. Scales that are fixed are
    about 1.

    Args:
        name: One of these, the ``PRIOR_NAMES``.

    Raises:
        ValueError: If it is none of them.

    Example:
        >>> named_prior("normal")
        Normal(loc: 0.0, scale: 1.0)
    """
    if name not in _BY_NAME:
        known = ", ".join(map(repr, _BY_NAME))
        raise ValueError(f"prior: expected one of {known}, or a prior itself, but got {name!r}")
    return _BY_NAME[name]()
