"""What is common to all networks: checks, copies, and what is undone after a while."""

__all__ = ["check_finite", "check_plain", "copied", "evaluation_mode", "random_state", "same_random_numbers", "takes"]

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Puts every module of a model into evaluation mode, and back into the mode that it was in.

    Args:
        model: A module, or any function, which has no mode.

    Example:
        >>> net = nn.Sequential(nn.Dropout())
        >>> with evaluation_mode(net):
        ...     net.training, net[0].training
        (False, False)
        >>> net[0].training
        True
    """
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
    """Puts the random number generators back to where they were, see :func:`random_state`.

    Example:
        >>> with same_random_numbers():
        ...     first = torch.rand(())
        >>> bool(torch.rand(()) == first)
        True
    """
    restore = random_state(model)
    try:
        yield
    finally:
        restore()


def random_state(model: Any = None) -> Callable[[], None]:
    """Returns what puts torch's generators of the CPU and of each accelerator in use, and a model's own, back.

    Args:
        model: A module, whose attributes may be generators, or any function.

    Example:
        >>> restore = random_state()
        >>> first = torch.rand(())
        >>> restore()
        >>> bool(torch.rand(()) == first)
        True
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
    """Copies a network in depth, with what its forward pass or hooks computed and left in its modules.

    Args:
        net: The network.
        replaced: Modules of the network, and what the copy has in their place, wherever they are referred to.

    Returns:
        The copy.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> net.last = net(torch.ones(1, 2))  # of which copy.deepcopy makes an error
        >>> torch.equal(copied(net).last, net.last)
        True
    """
    tensors = (v for module in net.modules() for v in module.__dict__.values() if isinstance(v, Tensor))
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in tensors if not t.is_leaf}
    return copy.deepcopy(net, memo | {id(old): new for old, new in (replaced or {}).items()})


def check_plain(net: Any) -> None:
    """Refuses what is not a network, or has Bayesian parts.

    Args:
        net: Any object.

    Raises:
        TypeError: If it is not a plain network.

    Example:
        >>> check_plain(svd.bayesianize(nn.Linear(2, 3)))
        Traceback (most recent call last):
            ...
        TypeError: net: expected a plain network, but it is Bayesian; prune it first
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net: expected an nn.Module, but got {type(net).__name__}")
    bayesian = [(name, module) for name, module in net.named_modules() if isinstance(module, PyroModule)]
    if any(module._pyro_samples for _, module in bayesian):
        raise TypeError(f"net: expected a plain network, but {bayesian[0][0] or 'it'} is Bayesian; prune it first")


def check_finite(net: nn.Module) -> None:
    """Refuses parameters and statistics that are not finite, and other buffers with NaN.

    Args:
        net: The network. A buffer that is no statistic of a normalisation may be infinite, as masks of attention are.

    Raises:
        ValueError: If one is refused, which the message names.

    Example:
        >>> check_finite(nn.Linear(2, 3))
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
    """Tells whether a function can be called with these arguments, as far as its signature says.

    Args:
        function: The function.
        *args: The arguments.

    Returns:
        Whether it can; True where there is no signature.

    Example:
        >>> takes(torch.nn.functional.mse_loss, None), takes(lambda output: None, None)
        (False, True)
    """
    try:
        inspect.signature(function).bind(*args)
    except TypeError:
        return False
    except ValueError:
        pass
    return True
