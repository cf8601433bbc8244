"""Where a guide starts: the initial values of a model's latents."""

__all__ = ["Start", "init_to_weights", "initial_value"]

import math
from collections.abc import Callable
from functools import reduce
from numbers import Number
from typing import Any

import torch
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from ..distributions.empirical_normal import EmpiricalBayesNormal
from ..distributions.log_uniform import LogUniform
from ..distributions.util import map_tensors, unmasked, unwrap_independent
from ..nn.sites import WeightPrior


def init_to_weights(site: Any = None, *, fallback: Callable = init_to_feasible) -> Any:
    """Initialises a network's site to the weight it had, as :func:`~.bayesianize.bayesianize` keeps it.

    Another site with a log-uniform or an empirical prior starts at small random values, uniform with the standard
    deviation of torch's linear layers; any other as ``fallback`` says.

    Args:
        site: A Pyro trace site; without it, the function itself is returned.
        fallback: The initialisation of all other sites.

    Returns:
        The initial value.

    Example:
        >>> weight = torch.randn(3, 4)
        >>> site = {"fn": WeightPrior(LogUniform().expand([3, 4]), 2, weight)}
        >>> torch.equal(init_to_weights(site), weight)
        True
    """
    if site is None:
        return lambda site: init_to_weights(site, fallback=fallback)
    fn = site["fn"]
    if isinstance(fn, WeightPrior):
        return fn.value
    prior = unwrap_independent(fn)
    if not isinstance(prior, LogUniform | EmpiricalBayesNormal):
        return fallback(site)
    shape = fn.shape()
    bound = 1 / math.sqrt(max(shape[1:].numel() if len(shape) > 1 else shape.numel(), 1))
    like = prior.low if isinstance(prior, LogUniform) else prior.mean
    return like.new_empty(shape).uniform_(-bound, bound)


def initial_value(site: Any, value: Any) -> Tensor:
    """Returns what an initialisation gave for a site as a tensor of the prior's type.

    Args:
        site: A Pyro trace site.
        value: The value: numbers of the site's shape, or one number for all.

    Returns:
        The tensor.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> initial_value({"name": "w", "fn": dist.Normal(torch.zeros(2).double(), 1.0)}, 3)
        tensor([3., 3.], dtype=torch.float64)
    """
    name, fn = site["name"], site["fn"]
    expected = f"{name}: expected an initial value of shape {tuple(fn.shape())}, but init_loc_fn gave"
    try:
        given = torch.as_tensor(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{expected} {type(value).__name__}: {error}") from error
    if isinstance(value, Number):
        given = given.expand(fn.shape())
    if given.shape != fn.shape():
        raise ValueError(f"{expected} {tuple(given.shape)}")
    of_prior = _numbers(fn)
    if not of_prior:
        is_typed = isinstance(value, Tensor) and value.is_floating_point()
        return given if is_typed else given.to(torch.get_default_dtype())
    # Numbers of a prior, such as its mean, may be on the CPU where others are not.
    device = max((t.device for t in of_prior), key=lambda device: device.type != "cpu")
    return given.to(device, reduce(torch.promote_types, (t.dtype for t in of_prior)))


def _numbers(prior: Distribution) -> list[Tensor]:
    """Returns what the dtype and device of a prior's samples follow: nothing where it has no numbers of its own."""
    if isinstance(prior, WeightPrior):
        return [prior.value]
    base: Any = unwrap_independent(unmasked(prior)[0])
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    if not isinstance(base, LogUniform) or base.is_proper:
        map_tensors(base, note)
    return [tensor for tensor in found if tensor.is_floating_point()]


class Start(InitMessenger):
    """Gives a model's latents their initial values, and notes the plates whose subsample the model gives.

    Args:
        init_fn: The initialisation.
        given: Where the names of those plates are put.

    Example:
        >>> given = set()
        >>> with Start(lambda site: torch.zeros(()), given):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     plates = pyro.plate("a", 9, subsample_size=3), pyro.plate("b", 9, subsample=torch.arange(3))
        >>> w, given
        (tensor(0.), {'b'})
    """

    def __init__(self, init_fn: Callable, given: set[str]) -> None:
        super().__init__(init_fn)
        self.given = given

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is not None:
            self.given.add(msg["name"])
        super()._pyro_sample(msg)
