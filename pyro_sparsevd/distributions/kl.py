"""Registers the KL from a Gaussian posterior to each prior with torch.

The formulas of the log-uniform prior and of automatic relevance determination are in :mod:`~.divergence`.
"""

__all__ = ["kl_normal_log_uniform"]

import math

import torch
from torch import Tensor
from torch.distributions import register_kl

from ..ops import divergence
from ..ops.divergence import kl_ard
from .empirical_normal import EmpiricalBayesNormal
from .log_uniform import LogUniform
from .sparse_normal import log_variance_of


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
        >>> torch.distributions.kl_divergence(sparsevd.SparseNormal(0.0, 1.0), sparsevd.LogUniform())
        tensor(0.)
    """
    kl = divergence.kl_log_uniform(q.loc, log_variance_of(q), form)
    return kl + p.log_normalizer if p.is_proper else kl.expand(torch.broadcast_shapes(kl.shape, p.batch_shape))


@register_kl(torch.distributions.Normal, EmpiricalBayesNormal)
def _kl_normal_empirical_normal(q: torch.distributions.Normal, p: EmpiricalBayesNormal) -> Tensor:
    log_variance = log_variance_of(q)
    if p.group_dims is None:
        return kl_ard(q.loc, log_variance)
    second_moment = q.loc**2 + log_variance.exp()
    pooled = [dim for dim in range(second_moment.dim()) if dim not in p.group_dims]
    variance = _mean_of_kept(second_moment, getattr(q, "kept", None), pooled)
    return 0.5 * (variance.log() - log_variance + second_moment / variance - 1)


def _mean_of_kept(values: Tensor, kept: Tensor | None, dims: list[int]) -> Tensor:
    """Returns means along dimensions, over the weights that are kept."""
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
