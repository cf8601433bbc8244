"""Validation of distributions on their own device, where nothing waits for its result.

torch validates a distribution where it is made and where its density is taken, and reads each result: on an accelerator
the host waits each time. Within ``validation_deferred``, which all of this is for, what is not valid has NaN for a
density instead. Whoever reads the sum of all densities learns of it; :func:`raise_invalid` then says what it was.
"""

__all__ = ["deferred_log_prob", "parameters_are_valid", "raise_invalid"]

import copy
import math
from collections.abc import Iterator
from functools import reduce
from operator import and_
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import lazy_property

from .._compat import is_deferred
from .util import unmasked, unwrap_independent


def deferred_log_prob(name: str, fn: Any, value: Tensor) -> Tensor:
    """Returns the log density of a site's value: NaN everywhere if any of it is outside of the support.

    So it is if a parameter is not what the distribution needs. A distribution made with ``validate_args=False`` is
    taken as it is.
    """
    checked = _checked(fn)
    if checked is None:
        return _unvalidated(fn).log_prob(value)
    _check_shape(name, checked, value)
    try:
        support = checked.support
    except NotImplementedError:  # as torch, which warns where such a distribution validates a value
        return fn.log_prob(value)
    valid = support.check(value).all()
    of_parameters = parameters_are_valid(fn)
    if of_parameters is not None:
        valid = valid & of_parameters
    if support.is_discrete:  # a class that is none is an index outside of the logits
        value = torch.where(valid, value, torch.zeros_like(value))
    return torch.where(valid, _unvalidated(fn).log_prob(value), math.nan)


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


def _check_shape(name: str, fn: Any, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, but got {type(value).__name__}; give torch.as_tensor of it")
    shape = fn.batch_shape + fn.event_shape
    pairs = zip(reversed(value.shape), reversed(shape), strict=False)  # torch.broadcast_shapes would load SymPy
    is_event = value.shape[value.dim() - len(fn.event_shape) :] == fn.event_shape
    if not (is_event and all(given == size or 1 in (given, size) for given, size in pairs)):
        raise ValueError(f"{name}: expected a value of shape {tuple(shape)}, but got {tuple(value.shape)}")


def _unvalidated(fn: Any) -> Any:
    """Returns a distribution whose density validates nothing."""
    if not any(part._validate_args for part in _parts(fn)):
        return fn
    new = copy.copy(fn)
    inner = {name: _unvalidated(part) for name, part in vars(fn).items() if isinstance(part, Distribution)}
    new.__dict__.update(inner, _validate_args=False)
    return new
