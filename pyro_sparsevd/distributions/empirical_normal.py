"""A normal prior whose variance is at the optimum of the bound."""

__all__ = ["EmpiricalBayesNormal"]

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


class EmpiricalBayesNormal(dist.TorchDistribution):
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
        >>> prior = EmpiricalBayesNormal((0,)).expand([3, 4])
        >>> q = sparsevd.SparseNormal(torch.zeros(3, 4), torch.zeros(3, 4))
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
        return f"EmpiricalBayesNormal(group_dims={self.group_dims}, batch_shape: {tuple(self.batch_shape)})"

    def expand(self, batch_shape: Any, _instance: Any = None) -> "EmpiricalBayesNormal":
        """Returns this distribution with its batch shape expanded.

        Raises:
            ValueError: If that has not the dimensions of the groups.
        """
        new = self._get_checked_instance(EmpiricalBayesNormal, _instance)
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
        super(EmpiricalBayesNormal, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """The mean, 0."""
        return self._mean

    def log_prob(self, value: Tensor) -> Tensor:
        """Raises, since the scale depends on the posterior."""
        raise NotImplementedError(
            "EmpiricalBayesNormal has no density, as its scale depends on the posterior; use a bound with the closed "
            'form, such as SparseVD_ELBO(kl="approximate")'
        )

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 # as in torch
        """Samples the standard normal distribution."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return torch.randn(shape, dtype=self._mean.dtype, device=self._mean.device)
