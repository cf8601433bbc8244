"""The Gaussian posterior in the parameters that are optimised, θ and log σ²."""

__all__ = ["MaskedNormal", "SparseNormal", "log_variance_of"]

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.utils import broadcast_all

from ..ops import divergence


class SparseNormal(dist.Normal):
    r"""A normal distribution in the parameters θ and log σ², the posterior of a weight; not itself sparse.

    This additive parameterisation is the one whose gradient in θ has no multiplicative noise. The log dropout rate
    :attr:`log_alpha` = log σ² - log θ² says how little the weight matters.

    References:
        | Variational Dropout Sparsifies Deep Neural Networks (Molchanov, Ashukha, Vetrov, 2017)
        | https://arxiv.org/abs/1701.05369

    Args:
        loc: The mean θ.
        log_variance: log σ², of a shape that broadcasts with ``loc``.
        validate_args: Whether to check the parameters and the values given to :meth:`log_prob`.

    Example:
        >>> posterior = SparseNormal(torch.tensor([0.1, 1.0]), torch.tensor(-4.0))
        >>> posterior.log_alpha > 0
        tensor([ True, False])
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "log_variance": constraints.real}

    def __init__(self, loc: Tensor | float, log_variance: Tensor | float, validate_args: bool | None = None) -> None:
        if not (isinstance(loc, Tensor) and isinstance(log_variance, Tensor) and loc.shape == log_variance.shape):
            loc, log_variance = broadcast_all(loc, log_variance)
        self.loc, self.log_variance = loc, log_variance
        Distribution.__init__(self, self.loc.shape, validate_args=validate_args)

    @property
    def scale(self) -> Tensor:
        """The standard deviation σ."""
        return (0.5 * self.log_variance).exp()

    @property
    def noise_scale(self) -> Tensor:
        """The factor of the standard normal noise in a sample, which is σ."""
        return self.scale

    @property
    def variance(self) -> Tensor:
        """The variance σ²."""
        return self.log_variance.exp()

    @property
    def log_alpha(self) -> Tensor:
        """The log dropout rate, log σ² - log θ²."""
        return divergence.log_alpha(self.loc, self.log_variance)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "SparseNormal":
        """Returns this distribution with its parameters expanded to ``batch_shape``."""
        new = self._get_checked_instance(SparseNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc, new.log_variance = self.loc.expand(batch_shape), self.log_variance.expand(batch_shape)
        Distribution.__init__(new, batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density of each value, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        deviation = (value - self.loc) ** 2 * (-self.log_variance).exp()
        return -0.5 * (deviation + self.log_variance + math.log(2 * math.pi))

    def entropy(self) -> Tensor:
        """Returns the entropy in nats."""
        return 0.5 * (self.log_variance + 1 + math.log(2 * math.pi))


def log_variance_of(q: torch.distributions.Normal) -> Tensor:
    """Returns log σ² of a normal distribution, of its batch shape."""
    return q.log_variance if isinstance(q, SparseNormal) else 2 * q.scale.log()


class MaskedNormal(SparseNormal):
    """The posterior of weights of which those that are not ``kept`` are held at zero.

    To a divergence and to a sampled output, these are weights of mean 0 and of the smallest variance whose inverse is
    finite in single precision; their samples are zero.
    """

    def __init__(self, loc: Tensor, log_variance: Tensor, kept: Tensor) -> None:
        super().__init__(loc * kept, torch.where(kept, log_variance, -80.0), validate_args=False)
        self.kept = kept

    @property
    def noise_scale(self) -> Tensor:
        """The factor of the noise in a sample, 0 for weights that are held at zero."""
        return super().noise_scale * self.kept

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Samples the weights that are kept; the others are 0."""
        return super().rsample(torch.Size(sample_shape)) * self.kept

    sample = Distribution.sample  # by rsample

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density of each weight, 0 where it is held at zero."""
        return torch.where(self.kept, super().log_prob(value), 0.0)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "MaskedNormal":
        """Returns this distribution with its batch shape expanded."""
        new = super().expand(batch_shape, self._get_checked_instance(MaskedNormal, _instance))
        new.kept = self.kept.expand(batch_shape)
        return new
