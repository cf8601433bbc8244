"""Helpers for nn.Module: validation, copying, temporary modes."""

__all__ = [
    "batch_tensor",
    "call_arguments",
    "check_finite",
    "cloned",
    "copied",
    "device_of",
    "evaluation_mode",
    "map_tensors",
    "named_leaves",
    "random_state",
    "require_deterministic",
    "run_network",
    "same_random_numbers",
    "takes",
    "tensors_of",
    "with_tensors",
]

import copy
import inspect
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

import numpy as np
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


def run_network(network: nn.Module, x: Any) -> Any:
    """Calls a network with the inputs of a batch, of any kind, as :func:`call_arguments` says."""
    args, kwargs = call_arguments(network, x)
    return network(*args, **kwargs)


def call_arguments(network: nn.Module, x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments, by position and by name, that a network gets for the inputs of a batch.

    The parts of a tuple or list are given by position, and those of a mapping by name, if its keys are names of
    parameters of ``network.forward``. Anything else is the one argument, and so is a mapping with no such key.
    """
    if type(x) in (tuple, list):
        return tuple(x), {}
    if not isinstance(x, Mapping):
        return (x,), {}
    signature = inspect.signature(network.forward)
    try:
        signature.bind(**x)
    except TypeError as error:
        if not signature.parameters.keys() & x.keys():
            return (x,), {}
        raise TypeError(
            f"x: expected keys that are the parameters of the network's forward, {', '.join(signature.parameters)}, "
            f"but got {', '.join(map(str, x))}: {error}; a dictionary that is its one argument is given as (x,)"
        ) from error
    return (), dict(x)


def named_leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields what nested tuples, lists, mappings and dataclasses hold, with names such as ``x[0]['mask']``."""
    if isinstance(value, Mapping):
        parts = [(f"{name}[{key!r}]", part) for key, part in value.items()]
    elif isinstance(value, tuple | list):
        parts = [(f"{name}[{i}]", part) for i, part in enumerate(value)]
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [(f"{name}.{field.name}", getattr(value, field.name)) for field in fields(value)]
    else:
        yield name, value
        return
    for part_name, part in parts:
        yield from named_leaves(part_name, part)


def tensors_of(value: Any) -> list[Tensor]:
    """Returns the tensors that nested tuples, lists, mappings and dataclasses hold."""
    return [leaf for _, leaf in named_leaves("", value) if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Returns a copy of nested tuples, lists, mappings and dataclasses with a function applied to every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        parts = {key: map_tensors(function, part) for key, part in value.items()}
        if not isinstance(value, MutableMapping):
            return parts
        mapped: Any = copy.copy(value)
        mapped.update(parts)
        return mapped
    if isinstance(value, tuple | list):
        mapped = [map_tensors(function, part) for part in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    if is_dataclass(value) and not isinstance(value, type):
        mapped = copy.copy(value)
        for field in fields(value):
            object.__setattr__(mapped, field.name, map_tensors(function, getattr(value, field.name)))
        return mapped
    return value


def with_tensors(value: Any, tensors: Iterable[Any]) -> Any:
    """Returns a copy in which others take the place of the tensors, in the order of :func:`tensors_of`."""
    rest = iter(tensors)
    return map_tensors(lambda _: next(rest), value)


def cloned(x: Any) -> Any:
    """Returns a copy of the inputs of a batch, since a network may change them in place."""
    return map_tensors(torch.clone, x)


def batch_tensor(name: str, x: Any) -> Tensor:
    """Returns the tensor that the batch size is of: the first of two or more dimensions, else the first of one.

    It raises TypeError for inputs of a kind that :func:`call_arguments` does not know, and for NumPy arrays, and
    ValueError where no tensor has a datum.
    """
    leaves = list(named_leaves(name, x))
    for part, leaf in leaves:
        if isinstance(leaf, np.ndarray) or (part == name and not isinstance(leaf, Tensor)):
            raise TypeError(
                f"{part}: expected a tensor, or a tuple or dictionary of tensors, but got {type(leaf).__name__}; make "
                "numbers a tensor by torch.as_tensor, and take anything else apart in a module around the network"
            )
    tensors = tensors_of(x)
    if not tensors:
        raise ValueError(f"{name}: expected at least one tensor, but got {reprlib.repr(x)}")
    batch = next((t for t in tensors if t.dim() > 1), next((t for t in tensors if t.dim()), None))
    if batch is None:
        raise ValueError(f"{name}: expected a tensor of shape (M, ...), but got a scalar")
    if len(batch) == 0:
        raise ValueError(f"{name}: expected at least one datum, but got an empty batch")
    return batch
