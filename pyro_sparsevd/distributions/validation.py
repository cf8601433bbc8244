"""Validation of distributions on an accelerator, where nothing waits for its result.

torch validates a distribution where it is made and where its density is taken, and reads each result: on an accelerator
the host waits each time. Within ``validation_deferred``, which all of this is for, what is not valid has NaN for a
density instead. Whoever reads the sum of all densities learns of it; :func:`raise_invalid` then says what it was.
Distributions of sites are validated, with those they are made of; others, made within a density, are not.
"""

__all__ = ["deferred_log_prob", "parameters_are_valid", "raise_invalid"]

import copy
import math
from collections.abc import Iterator
from functools import partial, reduce
from operator import and_
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import lazy_property

from .._compat import is_deferred, mask_of
from .util import unmasked, unwrap_independent


def deferred_log_prob(name: str, fn: Any, value: Tensor) -> Tensor:
    """Returns the log density of a site's value: NaN everywhere if any of it, or a parameter, is not valid.

    Where validation is not deferred, that is torch's error, with the name of the site. A distribution made with
    ``validate_args=False`` is taken as it is.
    """
    if not is_deferred(Distribution):
        try:
            return fn.log_prob(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if isinstance(fn, MaskedDistribution) and mask_of(fn) is False:
        return fn.log_prob(value)
    noted: list[Tensor] = []
    of_value = _checked(fn)
    if of_value is not None and _is_discrete(of_value):  # a class that is none is an index outside of the logits
        _note(name, of_value, noted, value)
        value = torch.where(noted[0], value, torch.zeros_like(value))
    log_prob = _noting(name, fn, noted).log_prob(value)
    of_parameters = parameters_are_valid(fn)
    noted += [] if of_parameters is None else [of_parameters]
    return torch.where(reduce(and_, noted), log_prob, math.nan) if noted else log_prob


def parameters_are_valid(*fns: Distribution) -> Tensor | None:
    """Tells whether all parameters satisfy the constraints that were not checked; None if all were."""
    deferred = (part for fn in fns for part in _parts(fn) if is_deferred(part))
    checks = [constraint.check(value).all() for part in deferred for value, constraint in _constrained(part)]
    return reduce(and_, checks) if checks else None


def raise_invalid(name: str, fn: Any, value: Tensor) -> None:
    """Raises torch's error, with the name of a site, if its parameters or its value are not valid."""
    checked = _checked(fn)
    try:
        # Not for wrappers, which have no parameters and share the flag that this sets with what they wrap.
        for part in (part for part in _parts(fn) if is_deferred(part) and any(True for _ in _constrained(part))):
            Distribution.__init__(copy.copy(part), part.batch_shape, part.event_shape, validate_args=True)
        if checked is not None:
            checked._validate_sample(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _checked(fn: Any) -> Any:
    """Returns the distribution that validates values, within ``to_event`` and masks, or None if that does not."""
    base = unwrap_independent(unmasked(fn)[0])
    return None if base._validate_args is False else base


def _parts(fn: Distribution) -> Iterator[Distribution]:
    """Yields a distribution and those within it, such as the base of one that is transformed."""
    yield fn
    for part in vars(fn).values():
        if isinstance(part, Distribution):
            yield from _parts(part)


def _constrained(fn: Distribution) -> Iterator[tuple[Tensor, Any]]:
    """Yields the parameters that ``Distribution.__init__`` checks, with their constraints."""
    try:
        of_parameters = fn.arg_constraints
    except NotImplementedError:
        return
    for name, constraint in of_parameters.items():
        is_lazy = name not in vars(fn) and isinstance(getattr(type(fn), name, None), lazy_property)
        if not (is_lazy or constraints.is_dependent(constraint)):
            yield getattr(fn, name), constraint


def _is_discrete(fn: Any) -> bool:
    try:
        return fn.support.is_discrete
    except NotImplementedError:
        return False


def _noting(name: str, fn: Any, noted: list[Tensor]) -> Any:
    """Returns a distribution that notes whether a value is valid where it would raise an error if not."""
    new = copy.copy(fn)
    new.__dict__.update(
        {k: _noting(name, part, noted) for k, part in vars(fn).items() if isinstance(part, Distribution)}
    )
    if fn._validate_args is not False:
        new.__dict__.update(_validate_args=True)
        if type(fn)._validate_sample is Distribution._validate_sample:  # others, such as hidden Markov models, wait
            new.__dict__.update(_validate_sample=partial(_note, name, fn, noted))
    return new


def _note(name: str, fn: Any, noted: list[Tensor], value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, but got {type(value).__name__}; give torch.as_tensor of it")
    shape = (*fn.batch_shape, *fn.event_shape)
    pairs = zip(reversed(value.shape), reversed(shape), strict=False)  # torch.broadcast_shapes would load SymPy
    is_event = tuple(value.shape[value.dim() - len(fn.event_shape) :]) == tuple(fn.event_shape)
    if not (is_event and all(given == size or 1 in (given, size) for given, size in pairs)):
        raise ValueError(f"{name}: expected a value of shape {shape}, but got {tuple(value.shape)}")
    try:
        support = fn.support
    except NotImplementedError:  # as torch, which then warns that it validates nothing
        return
    noted.append(support.check(value).all())
