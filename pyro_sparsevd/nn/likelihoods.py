"""Likelihoods: from a network's output to the distribution of its targets.

Any function does that returns a distribution with one element of its batch shape per example. Where it has no
parameters of its own, a line is enough; the others are modules here, whose parameters are learnt with the network.

======================================  =================================================================
targets                                 likelihood of an output ``f``
======================================  =================================================================
classes                                 ``lambda f: dist.Categorical(logits=f)``
yes or no                               ``lambda f: dist.Bernoulli(logits=f)``
several of these                        ``lambda f: dist.Bernoulli(logits=f).to_event(1)``
counts                                  ``lambda f: dist.Poisson(f.exp())``
counts that vary more than that         :class:`NegativeBinomialLikelihood`
real numbers                            :class:`GaussianLikelihood`
real numbers, noise of which is known   ``lambda f: dist.Normal(f, 0.1)``, for several ``.to_event(1)``
real numbers, noise depends on inputs   :class:`HeteroscedasticGaussianLikelihood`, of two outputs each
real numbers, some far off              :class:`StudentTLikelihood`
======================================  =================================================================
"""

__all__ = [
    "GaussianLikelihood",
    "HeteroscedasticGaussianLikelihood",
    "NegativeBinomialLikelihood",
    "StudentTLikelihood",
]

import math

import torch
from pyro.distributions import NegativeBinomial, Normal, StudentT, TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus


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
        self.log_scale = _log_parameter("init_scale", init_scale)

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


class HeteroscedasticGaussianLikelihood(nn.Module):
    r"""The likelihood of a regression whose noise depends on the inputs: the network returns mean and scale.

    .. math:: p(y \mid f) = \mathcal N(y \mid f_1, s^2), \quad s = s_0 + \log(1 + e^{f_2})

    The floor :math:`s_0` keeps the density of a target that the mean hits, which would be infinite, from being what
    is learnt.

    References:
        | Estimating the mean and variance of the target probability distribution (Nix, Weigend, 1994)
        | https://doi.org/10.1109/ICNN.1994.374138

    Args:
        min_scale: s₀, in units of the targets.

    Raises:
        ValueError: If ``min_scale`` is not a positive number.

    Example:
        >>> likelihood = HeteroscedasticGaussianLikelihood()
        >>> likelihood(torch.zeros(5, 2))
        Normal(loc: torch.Size([5]), scale: torch.Size([5]))
        >>> bnn = sparsevd.bayesianize(nn.Linear(4, 2))
        >>> model = sparsevd.Supervised(bnn, likelihood, num_data=100)
    """

    def __init__(self, min_scale: float = 1e-3) -> None:
        super().__init__()
        self.min_scale = _positive("min_scale", min_scale)

    def forward(self, output: Tensor) -> TorchDistribution:
        """Returns the distribution of the targets.

        Args:
            output: The outputs of the network, of shape ``(N, 2)``, or ``(N, ..., 2)`` where an example has several
                targets: of each, f₁ and f₂.

        Returns:
            A normal distribution of N examples.

        Raises:
            ValueError: If the outputs are of another shape.
        """
        if output.dim() < 2 or output.shape[-1] != 2:
            raise ValueError(
                "HeteroscedasticGaussianLikelihood: expected outputs of shape (N, ..., 2), mean and scale of each "
                f"target, but got {tuple(output.shape)}"
            )
        mean, raw_scale = output.unbind(-1)
        return Normal(mean, self.min_scale + softplus(raw_scale)).to_event(mean.dim() - 1)


class StudentTLikelihood(nn.Module):
    r"""The likelihood of a regression some of whose targets are far off, with scale s and degrees of freedom ν.

    .. math:: p(y \mid f) \propto \Big(1 + \frac{(y - f)^2}{\nu s^2}\Big)^{-\frac{\nu + 1}{2}}

    Both are learnt with the network. As ν grows, this becomes the Gaussian likelihood; it stays above 1, so that the
    distribution has a mean.

    References:
        | Robust Statistical Modeling Using the t Distribution (Lange, Little, Taylor, 1989)
        | https://doi.org/10.1080/01621459.1989.10478852

    Args:
        init_scale: Where s starts, in units of the targets.
        init_df: Where ν starts.

    Raises:
        ValueError: If ``init_scale`` is not a positive number, or ``init_df`` not a number above 1.

    Example:
        >>> StudentTLikelihood()(torch.zeros(5)).batch_shape
        torch.Size([5])
    """

    def __init__(self, init_scale: float = 1.0, init_df: float = 4.0) -> None:
        super().__init__()
        self.log_scale = _log_parameter("init_scale", init_scale)
        if not 1 < init_df < math.inf:
            raise ValueError(f"init_df: expected a number above 1, but got {init_df}")
        self.log_df_above_1 = _log_parameter("init_df", init_df - 1)

    @property
    def scale(self) -> Tensor:
        """The scale s, a scalar."""
        return self.log_scale.exp()

    @property
    def df(self) -> Tensor:
        """The degrees of freedom ν, a scalar."""
        return 1 + _exact(self.log_df_above_1).exp()

    def forward(self, mean: Tensor) -> TorchDistribution:
        """Returns the distribution of the targets.

        Args:
            mean: The outputs of the network, of the shape of the targets: ``(N,)``, or ``(N, ...)`` where an example
                has several.

        Returns:
            A Student t distribution of N examples.
        """
        return StudentT(self.df, _exact(mean), _exact(self.scale)).to_event(mean.dim() - 1)


class NegativeBinomialLikelihood(nn.Module):
    r"""The likelihood of counts that vary more than those of a Poisson distribution; the network returns log means.

    .. math:: p(y \mid f) = \frac{\Gamma(y + r)}{y! \, \Gamma(r)} \Big(\frac{r}{r + m}\Big)^r
        \Big(\frac{m}{r + m}\Big)^y, \quad m = e^f

    The mean is m and the variance :math:`m + m^2 / r`; r is learnt with the network. As it grows, this becomes the
    Poisson likelihood.

    References:
        | Negative Binomial Regression (Hilbe, 2011)
        | https://doi.org/10.1017/CBO9780511973420

    Args:
        init_total_count: Where r starts.

    Raises:
        ValueError: If ``init_total_count`` is not a positive number.

    Example:
        >>> NegativeBinomialLikelihood()(torch.tensor([0.0, 2.0])).mean
        tensor([1.0000, 7.3891], dtype=torch.float64, grad_fn=<MulBackward0>)
    """

    def __init__(self, init_total_count: float = 1.0) -> None:
        super().__init__()
        self.log_total_count = _log_parameter("init_total_count", init_total_count)

    @property
    def total_count(self) -> Tensor:
        """The parameter r, a scalar."""
        return self.log_total_count.exp()

    def forward(self, log_mean: Tensor) -> TorchDistribution:
        """Returns the distribution of the targets.

        Args:
            log_mean: The outputs of the network, of the shape of the targets: ``(N,)``, or ``(N, ...)`` where an
                example has several.

        Returns:
            A negative binomial distribution of N examples.
        """
        log_total_count = _exact(self.log_total_count)
        logits = _exact(log_mean) - log_total_count
        return NegativeBinomial(log_total_count.exp(), logits=logits).to_event(log_mean.dim() - 1)


def _exact(value: Tensor) -> Tensor:
    """Returns a tensor in double precision, if its device has it: differences of log-gamma functions lose the rest."""
    return value if value.device.type == "mps" else value.double()


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number, but got {value}")
    return value


def _log_parameter(name: str, value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(math.log(_positive(name, value))))
