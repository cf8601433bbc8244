"""Distributions without their wrappers."""

__all__ = ["map_tensors", "unmasked", "unwrap_independent"]

import copy
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from .improper import ImproperPriorWarning as ImproperPriorWarning


def unwrap_independent(distribution: Distribution) -> Distribution:
    """Returns the distribution inside any number of ``to_event`` wrappers.

    Args:
        distribution: Any distribution.

    Returns:
        The innermost base distribution.

    Example:
        >>> unwrap_independent(svd.LogUniform().expand([2]).to_event(1))
        LogUniform(batch_shape: (2,))
    """
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    return distribution


def map_tensors(value: Any, function: Callable[[Tensor], Tensor], memo: dict[int, Any] | None = None) -> Any:
    """Applies a function to every tensor of a distribution, its bases and its transforms.

    Args:
        value: A distribution; it is not changed.
        function: The function.
        memo: What was mapped already, by identity; a transform and its inverse refer to each other.

    Returns:
        A copy of the distribution.

    Example:
        >>> map_tensors(dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1), Tensor.double).mean.dtype
        torch.float64
    """
    if isinstance(value, Tensor):
        return function(value)
    memo = {} if memo is None else memo
    if isinstance(value, Distribution | torch.distributions.Transform):
        if id(value) not in memo:
            memo[id(value)] = mapped = copy.copy(value)
            mapped.__dict__.update({k: map_tensors(v, function, memo) for k, v in value.__dict__.items()})
        return memo[id(value)]
    return type(value)(map_tensors(v, function, memo) for v in value) if type(value) in (list, tuple) else value


def unmasked(distribution: Distribution) -> tuple[Any, Tensor | bool]:
    """Returns a distribution without its masks, and what they leave of it.

    Args:
        distribution: Any distribution.

    Returns:
        The distribution, and the mask of the elements of what :func:`~.util.unwrap_independent` makes of it.

    Example:
        >>> unmasked(dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(torch.tensor(False)))
        (Independent(Normal(loc: torch.Size([2]), scale: torch.Size([2])), 1), tensor([False]))
    """
    if isinstance(distribution, torch.distributions.Independent):
        base, mask = unmasked(distribution.base_dist)
        if base is distribution.base_dist:
            return distribution, mask
        return base.to_event(distribution.reinterpreted_batch_ndims), mask
    if isinstance(distribution, dist.MaskedDistribution):
        base, mask = unmasked(distribution.base_dist)
        own = distribution._mask
        if isinstance(own, Tensor):
            own = own.reshape(own.shape + (1,) * (len(unwrap_independent(base).batch_shape) - len(base.batch_shape)))
        return base, own & mask
    return distribution, True
