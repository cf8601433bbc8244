"""The log-uniform prior."""

__all__ = ["IMPROPER_LOG_NORMALIZER", "LogUniform"]

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all

from .improper import warn_of_sample

# KL(N(θ, σ²) ‖ 1 / (2 |w| log(high / low))) = the divergence that vanishes as α → ∞ + log log(high / low) - this.
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
        """Samples; without bounds, from the truncation to ``1e-8 ≤ |w| ≤ 1``, with a warning."""
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


def _show(bound: Tensor) -> str:
    return f"{bound.reshape(-1)[0].item():g}" if bound.unique().numel() == 1 else f"of shape {tuple(bound.shape)}"


class Jeffreys(dist.FoldedDistribution):
    """The improper prior of a scale, p(z) ∝ 1 / z; its samples are the magnitudes of those of :class:`LogUniform`."""

    def __init__(self, validate_args: bool | None = None) -> None:
        super().__init__(LogUniform(), validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density of each value in nats, up to a constant."""
        if self._validate_args:
            self._validate_sample(value)
        return -value.log().expand(torch.broadcast_shapes(value.shape, self.batch_shape))
