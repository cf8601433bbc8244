"""Distributions without their wrappers, and copies of them."""

__all__ = ["map_tensors", "unmasked", "unwrap_independent"]

import copy
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from .._compat import mask_of


def unwrap_independent(distribution: Distribution) -> Distribution:
    """Returns the distribution inside any number of ``to_event`` wrappers."""
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    return distribution


def map_tensors(value: Any, function: Callable[[Tensor], Tensor], memo: dict[int, Any] | None = None) -> Any:
    """Returns a copy of a distribution with a function applied to every tensor of it, its bases and its transforms.

    ``memo`` holds what was mapped already, by identity, since a transform and its inverse refer to each other.
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
    """Returns a distribution without its masks, and the mask of the elements of its innermost base distribution."""
    if isinstance(distribution, torch.distributions.Independent):
        base, mask = unmasked(distribution.base_dist)
        if base is distribution.base_dist:
            return distribution, mask
        return base.to_event(distribution.reinterpreted_batch_ndims), mask
    if isinstance(distribution, dist.MaskedDistribution):
        base, mask = unmasked(distribution.base_dist)
        own = mask_of(distribution)
        if isinstance(own, Tensor):
            own = own.reshape(own.shape + (1,) * (len(unwrap_independent(base).batch_shape) - len(base.batch_shape)))
        return base, own & mask
    return distribution, True
