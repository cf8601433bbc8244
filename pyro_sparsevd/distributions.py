"""The log-uniform prior and the Gaussian posterior of Sparse Variational Dropout, as Pyro distributions.

:class:`LogUniform` is the prior ``p(w) ∝ 1/|w|``, :class:`SparseNormal` the posterior N(θ, σ²) in the parameters that
are optimised, θ and log σ². Their divergence is registered with torch, so ``torch.distributions.kl_divergence`` and
every Pyro ELBO that uses it know it, also inside ``to_event``.
"""

__all__ = [
    "IMPROPER_LOG_NORMALIZER",
    "ImproperPriorWarning",
    "LogUniform",
    "SparseNormal",
    "kl_normal_log_uniform",
    "log_variance_of",
    "unwrap_independent",
]

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Distribution, register_kl
from torch.distributions.utils import broadcast_all

from .improper import ImproperPriorWarning as ImproperPriorWarning
from .improper import warn_of_sample
from .ops import divergence

# KL(N(θ, σ²) ‖ 1 / (2 |w| log(high / low))) is the divergence that vanishes as α → ∞ plus log log(high / low) minus
# this.
_CONSTANT = 0.5 * (1 + 0.57721566490153286 + math.log(math.pi))

IMPROPER_LOG_NORMALIZER = -_CONSTANT - math.log(2)
"""What added to -log|w| gives the log density from which the divergence vanishes as α → ∞, in nats per weight."""


class LogUniform(dist.TorchDistribution):
    r"""A log-uniform distribution on both signs: the magnitude is log-uniform, the sign is fair.

    Without bounds it is the improper prior of Sparse Variational Dropout, :math:`p(w) \propto 1 / |w|`, whose
    :meth:`log_prob` is the unnormalised :math:`-\log |w|`. It has no samples; so that tools that run a model only to
    learn its shapes still work, :meth:`rsample` samples from the truncation to 1e-8 ≤ \|w\| ≤ 1, and says so with an
    :class:`~.improper.ImproperPriorWarning`, once, where such a sample is used. With bounds it is the proper

    .. math:: p(w) = \frac{1}{2 |w| \log(\mathrm{high} / \mathrm{low})}, \quad \mathrm{low} \le |w| \le \mathrm{high}.

    The registered divergence of a Gaussian from it is the exact one, in nats; from a bounded prior it ignores the
    posterior mass outside the bounds. Densities and divergences have the dtype and the device of the weight that they
    are of; samples, and with them initial values, those of the bounds, else of ``like``, else torch's default ones,
    which ``with torch.device(...)`` around a model sets.

    References:
        | Variational Dropout Sparsifies Deep Neural Networks (Molchanov, Ashukha, Vetrov, 2017)
        | https://arxiv.org/abs/1701.05369

    Args:
        low: The smallest magnitude, positive; a number or a tensor. Give both bounds or neither.
        high: The largest magnitude, greater than ``low``.
        validate_args: Whether to check the values given to :meth:`log_prob`.
        like: A tensor of the dtype and on the device that samples of the improper prior are to have, such as the data.

    Raises:
        ValueError: If one bound is missing, or not 0 < low < high < ∞.

    Example:
        >>> prior = LogUniform(0.001, 1.0).expand([300, 784]).to_event(2)
        >>> prior.sample().shape
        torch.Size([300, 784])
        >>> LogUniform().log_prob(torch.tensor([-0.5, 0.5])).exp()
        tensor([2., 2.])
    """

    # The bounds are checked by __init__, whatever validate_args says.
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real
    has_rsample = True

    def __init__(
        self,
        low: Tensor | float | None = None,
        high: Tensor | float | None = None,
        validate_args: bool | None = None,
        *,
        like: Tensor | None = None,
    ) -> None:
        if (low is None) != (high is None):
            raise ValueError(f"LogUniform: expected both bounds or neither, but got low={low}, high={high}")
        self.is_proper = low is not None
        if low is not None and high is not None:
            low, high = broadcast_all(low, high)
            dtype = low.dtype if low.is_floating_point() else torch.get_default_dtype()
            self.low, self.high = low.to(dtype), high.to(dtype)
            if not bool(((self.low > 0) & (self.low < self.high) & self.high.isfinite()).all()):
                raise ValueError(f"LogUniform: expected 0 < low < high < inf, but got low={low}, high={high}")
        else:
            like = torch.empty(()) if like is None else like
            self.low, self.high = like.new_tensor(1e-8), like.new_tensor(1.0)
        self._warned = SimpleNamespace(done=False)  # shared by all expansions of this prior
        super().__init__(self.low.shape, validate_args=validate_args)

    def __repr__(self) -> str:
        bounds = f"low: {_show(self.low)}, high: {_show(self.high)}" if self.is_proper else ""
        shape = f"batch_shape: {tuple(self.batch_shape)}" if self.batch_shape else ""
        return f"LogUniform({', '.join(filter(None, (bounds, shape)))})"

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LogUniform":
        """Returns this distribution with its parameters expanded to ``batch_shape``."""
        new = self._get_checked_instance(LogUniform, _instance)
        batch_shape = torch.Size(batch_shape)
        new.low, new.high = self.low.expand(batch_shape), self.high.expand(batch_shape)
        new.is_proper, new._warned = self.is_proper, self._warned
        super(LogUniform, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def log_normalizer(self) -> Tensor:
        """What the KL divergence from this prior adds, per weight, to :func:`~.divergence.kl_log_uniform`."""
        if not self.is_proper:
            return torch.zeros_like(self.low)
        return self._log_range.log() - _CONSTANT

    @property
    def mean(self) -> Tensor:
        """The mean, 0, of a proper prior."""
        self._require_proper("mean")
        return torch.zeros_like(self.low)

    @property
    def variance(self) -> Tensor:
        """The variance of a proper prior."""
        self._require_proper("variance")
        return (self.high**2 - self.low**2) / (2 * self._log_range)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density of each value in nats; without bounds, up to a constant."""
        if self._validate_args:
            self._validate_sample(value)
        magnitude = value.abs()
        if not self.is_proper:
            return -magnitude.log().expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        # The clamp keeps the gradient of a value outside at 0.
        log_density = -magnitude.clamp(self.low, self.high).log() - (2 * self._log_range).log()
        return torch.where((self.low <= magnitude) & (magnitude <= self.high), log_density, -math.inf)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 # as in torch
        """Draws samples; without bounds, from the truncation to ``1e-8 ≤ |w| ≤ 1``, with a warning."""
        if not (self.is_proper or self._warned.done):
            self._warned.done = warn_of_sample()
        shape = self._extended_shape(torch.Size(sample_shape))
        uniform = torch.rand(shape, dtype=self.low.dtype, device=self.low.device) * 2 - 1
        low = self.low.clamp_min(torch.finfo(self.low.dtype).tiny)  # 1e-8 is 0 in half precision
        magnitude = torch.lerp(low.log(), self.high.log(), uniform.abs()).exp()
        return magnitude.clamp(low, self.high).copysign(uniform)

    @property
    def _log_range(self) -> Tensor:
        return self.high.log() - self.low.log()  # the quotient may overflow

    def _require_proper(self, what: str) -> None:
        if not self.is_proper:
            raise NotImplementedError(f"The improper log-uniform prior has no {what}: give LogUniform low and high.")


class SparseNormal(dist.Normal):
    r"""The Gaussian posterior N(θ, σ²) of a weight, in the parameters θ and log σ².

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


@register_kl(torch.distributions.Normal, LogUniform)
def kl_normal_log_uniform(q: torch.distributions.Normal, p: LogUniform, form: divergence.Form = "exact") -> Tensor:
    """Returns KL(q ‖ p) of each weight in nats; for a bounded prior, ignoring the mass of q outside the bounds.

    Args:
        q: The Gaussian posterior.
        p: The log-uniform prior.
        form: ``"exact"``, which is what torch's registry uses, or ``"approximate"``.

    Returns:
        The divergence, with the batch shape of the two.

    Raises:
        ValueError: If ``form`` is neither of the two.

    Example:
        >>> torch.distributions.kl_divergence(SparseNormal(0.0, 1.0), LogUniform())
        tensor(0.)
    """
    kl = divergence.kl_log_uniform(q.loc, log_variance_of(q), form)
    return kl + p.log_normalizer if p.is_proper else kl.expand(torch.broadcast_shapes(kl.shape, p.batch_shape))


def log_variance_of(q: torch.distributions.Normal) -> Tensor:
    """Returns log σ² of a normal distribution.

    Args:
        q: The distribution.

    Returns:
        Its log variance, of its batch shape.

    Example:
        >>> log_variance_of(dist.Normal(0.0, 1.0))
        tensor(0.)
    """
    return q.log_variance if isinstance(q, SparseNormal) else 2 * q.scale.log()


def unwrap_independent(distribution: Distribution) -> Distribution:
    """Returns the distribution inside any number of ``to_event`` wrappers.

    Args:
        distribution: Any distribution.

    Returns:
        The innermost base distribution.

    Example:
        >>> unwrap_independent(LogUniform().expand([2]).to_event(1))
        LogUniform(batch_shape: (2,))
    """
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    return distribution


def _show(bound: Tensor) -> str:
    return f"{bound.reshape(-1)[0].item():g}" if bound.unique().numel() == 1 else f"of shape {tuple(bound.shape)}"
