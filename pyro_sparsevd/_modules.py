"""Helpers for nn.Module: validation, copying, temporary modes."""

__all__ = [
    "check_finite",
    "copied",
    "device_of",
    "evaluation_mode",
    "random_state",
    "require_deterministic",
    "same_random_numbers",
    "takes",
]

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from ._compat import sites_of


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Puts every module of a model, if it is a module, into evaluation mode for a while."""
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def same_random_numbers(model: Any = None) -> Iterator[None]:
    """Restores the random number generators of :func:`random_state` at the end."""
    restore = random_state(model)
    try:
        yield
    finally:
        restore()


def random_state(model: Any = None) -> Callable[[], None]:
    """Returns a function that restores the random number generators.

    They are torch's of the CPU and of each accelerator in use, and those that are attributes of the model's modules.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    own = {v: v.get_state() for m in modules for v in m.__dict__.values() if isinstance(v, torch.Generator)}
    of_cpu = torch.get_rng_state()
    of_devices = [(d, d.get_rng_state_all()) for d in (torch.cuda, torch.xpu) if d.is_initialized()]
    of_mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def restore() -> None:
        torch.set_rng_state(of_cpu)
        for device, states in of_devices:
            device.set_rng_state_all(states)
        if of_mps is not None:
            torch.mps.set_rng_state(of_mps)
        for generator, state in own.items():
            generator.set_state(state)

    return restore


def copied(net: nn.Module, replaced: Mapping[nn.Module, nn.Module] | None = None) -> nn.Module:
    """Copies a network in depth, also where a module has a tensor with a graph, which ``copy.deepcopy`` refuses.

    Modules that are keys of ``replaced`` are not copied: their values take their place wherever they are referred to.
    """
    tensors = (v for module in net.modules() for v in module.__dict__.values() if isinstance(v, Tensor))
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in tensors if not t.is_leaf}
    return copy.deepcopy(net, memo | {id(old): new for old, new in (replaced or {}).items()})


def device_of(*modules: Any) -> torch.device | None:
    """Returns the device of the first parameter of those that are modules, if there is one."""
    parameters = chain.from_iterable(module.parameters() for module in modules if isinstance(module, nn.Module))
    return next((parameter.device for parameter in parameters), None)


def require_deterministic(net: Any) -> None:
    """Raises TypeError for what is not a network, or has Bayesian parts."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"net: expected an nn.Module, but got {type(net).__name__}")
    bayesian = [(name, module) for name, module in net.named_modules() if isinstance(module, PyroModule)]
    if any(sites_of(module) for _, module in bayesian):
        raise TypeError(
            f"net: expected a deterministic network, but {bayesian[0][0] or 'it'} is Bayesian; prune it first"
        )


def check_finite(net: nn.Module) -> None:
    """Raises ValueError for parameters and statistics that are not finite, and for other buffers with NaN.

    A buffer that is no statistic of a normalisation may be infinite, as masks of attention are.
    """
    for name, values in chain(net.named_parameters(), net.named_buffers()):
        finite = isinstance(values, nn.Parameter) or name.endswith(("running_mean", "running_var"))
        bad = ~values.isfinite() if finite else values.isnan()
        if bad.any():
            expected, found = ("finite numbers", "infinite or NaN") if finite else ("numbers", "NaN")
            raise ValueError(
                f"{name}: expected {expected}, but {int(bad.sum())} of {values.numel()} are {found}; train it again"
            )


def takes(function: Callable[..., Any], *args: Any) -> bool:
    """Tells whether a function can be called with these arguments, as far as its signature, if it has one, says."""
    try:
        inspect.signature(function).bind(*args)
    except TypeError:
        return False
    except ValueError:
        pass
    return True
