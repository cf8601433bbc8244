"""Which parameters of a network to give a prior."""

__all__ = ["Pattern", "choose", "matches"]

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

Pattern: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Parameter], bool]


def choose(net: nn.Module, include: Any, exclude: Any) -> list[str]:
    """Returns the names of the parameters that get a prior.

    Args:
        net: The network.
        include: What to choose, or None for the parameters of two or more dimensions that are not frozen.
        exclude: What to leave out.

    Returns:
        The names, in the network's order.

    Raises:
        TypeError: If a pattern is none.
        ValueError: If a pattern matches nothing, nothing is left, or a chosen parameter cannot have a prior.

    Example:
        >>> choose(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), None, "1.*")
        ['0.weight']
    """
    parameters = dict(net.named_parameters())
    for name, parameter in parameters.items():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(f"{name}: expected an initialised parameter; run the network once on data first")
    if include is None:
        chosen = [name for name, p in parameters.items() if p.dim() > 1 and p.requires_grad]
    else:
        taken = set().union(*(matches(net, parameters, p, "include") for p in _listed(include)))
        chosen = [name for name in parameters if name in taken]
    left_out = set().union(*(matches(net, parameters, p, "exclude") for p in _listed(exclude)))
    chosen = [name for name in chosen if name not in left_out]
    if not chosen:
        frozen = include is None and not all(p.requires_grad for p in parameters.values())
        hint = "; frozen ones (requires_grad=False) get one only where include= names them" if frozen else ""
        raise ValueError(f"bayesianize: no parameter is left to give a prior, of {_names(parameters)}{hint}")
    for name in chosen:
        _check_parameter(net, name, parameters[name])
    return chosen


def _listed(patterns: Any) -> list[Any]:
    return list(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str | type) else [patterns]


def matches(net: nn.Module, parameters: Mapping[str, nn.Parameter], pattern: Any, option: str) -> set[str]:
    """Returns the names of the parameters that a pattern matches.

    Args:
        net: The network.
        parameters: Its parameters by name.
        pattern: A glob, a module type or a predicate.
        option: The option it was given for, to name in errors.

    Returns:
        The names.

    Raises:
        TypeError: If the pattern is none of the three.
        ValueError: If a glob or a type matches nothing.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> matches(net, dict(net.named_parameters()), "b*", "include")
        {'bias'}
    """
    if isinstance(pattern, str):
        first = {id(p): name for name, p in parameters.items()}  # of a tied parameter, any name will do
        named = net.named_parameters(remove_duplicate=False)
        found = {first[id(p)] for name, p in named if id(p) in first and fnmatchcase(name, pattern)}
    elif isinstance(pattern, type) and issubclass(pattern, nn.Module):
        owned = {id(p) for m in net.modules() if isinstance(m, pattern) for p in m.parameters()}
        found = {name for name, p in parameters.items() if id(p) in owned}
    elif callable(pattern):
        return {name for name, p in parameters.items() if pattern(name, p)}
    else:
        raise TypeError(f"{option}: expected a glob, a module type or a predicate, but got {pattern!r}")
    if not found:
        raise ValueError(
            f"{option}: expected a pattern that matches a parameter, but {pattern!r} fits none of {_names(parameters)}"
        )
    return {name for name in found if parameters[name].dim() > 1} or found


def _check_parameter(net: nn.Module, name: str, parameter: nn.Parameter) -> None:
    if not parameter.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point parameter, but got {parameter.dtype}")
    owner = net.get_submodule(name.rpartition(".")[0])
    hooks = owner._forward_pre_hooks.values()
    if "parametrizations" in name.split(".") or any(isinstance(h, _REPARAMETRISATIONS) for h in hooks):
        raise ValueError(
            f"{name}: expected a plain parameter, but it is behind a parametrisation (weight_norm, spectral_norm, "
            "pruning, ...), and samples of its parts make no weight; remove that or exclude the parameter"
        )


def _names(parameters: Iterable[str]) -> str:
    return ", ".join(parameters) or "none"


_REPARAMETRISATIONS = (WeightNorm, SpectralNorm, BasePruningMethod)
