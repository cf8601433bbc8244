"""The choice of the parameters of a network that get a prior, by globs, types and predicates."""

__all__ = ["Pattern", "choose", "first_match", "glob_matches", "matches", "require_matches"]

from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from .checks import check_parameter, check_references
from .weights import is_reparametrised, weights_of

Pattern: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Parameter], bool]


def choose(
    net: nn.Module, *, include: Pattern | Iterable[Pattern] | None = None, exclude: Pattern | Iterable[Pattern] = ()
) -> list[str]:
    """Returns the names of the parameters to which :func:`~.bayesianize.bayesianize` gives a prior.

    Args:
        net: The network.
        include: What to choose, as for ``bayesianize``; None for the weights that are not frozen.
        exclude: What to leave out.

    Returns:
        The names, in the network's order.

    Raises:
        TypeError: If a pattern is none.
        ValueError: If a pattern matches nothing, nothing is left, or a chosen parameter cannot have a prior.

    Example:
        >>> choose(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), exclude="1.*")
        ['0.weight']
    """
    parameters = dict(net.named_parameters())
    for name, parameter in parameters.items():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(f"{name}: expected an initialised parameter; run the network once on data first")
    weights = weights_of(net)
    if include is None:
        weights |= {name for name, p in parameters.items() if p.dim() > 1 and is_reparametrised(net, name)}
        taken = {name for name in weights if parameters[name].requires_grad}
    else:
        taken = set()
        for pattern in _listed(include):
            found = matches(net, parameters, pattern, "include")
            taken |= (found & weights or found) if isinstance(pattern, type) else found
    left_out = set().union(*(matches(net, parameters, p, "exclude") for p in _listed(exclude)))
    taken -= left_out
    chosen = [name for name in parameters if name in taken]
    if not chosen:
        frozen = include is None and not all(p.requires_grad for p in parameters.values())
        hint = "; frozen ones (requires_grad=False) get one only where include= names them" if frozen else ""
        raise ValueError(f"bayesianize: no parameter is left to give a prior, of {_names(parameters)}{hint}")
    for name in chosen:
        check_parameter(net, name)
    check_references(net, chosen)
    return chosen


def _listed(patterns: Any) -> list[Any]:
    return list(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str | type) else [patterns]


def matches(net: nn.Module, parameters: Mapping[str, nn.Parameter], pattern: Any, option: str) -> set[str]:
    """Returns the names of the parameters that a glob, a module type or a predicate matches.

    A glob or type that matches none is an error, which names the option that it was given for.
    """
    if isinstance(pattern, str):
        first = {id(p): name for name, p in parameters.items()}  # a tied parameter matches by any of its names
        named = net.named_parameters(remove_duplicate=False)
        found = {first[id(p)] for name, p in named if id(p) in first and glob_matches(pattern, name)}
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
    return found


def glob_matches(glob: str, name: str) -> bool:
    """Tells whether a glob matches a name; every name matches itself, one with brackets, too."""
    return name == glob or fnmatchcase(name, glob)


def first_match(globs: Iterable[str], *names: str) -> str | None:
    """Returns the first glob that matches one of the names, or None."""
    return next((glob for glob in globs if any(glob_matches(glob, name) for name in names)), None)


def require_matches(globs: Iterable[str], names: Collection[str], expected: str) -> None:
    """Refuses a glob that matches none of the names, as an error says by what was expected."""
    for glob in globs:
        if first_match([glob], *names) is None:
            raise ValueError(f"{expected}, of {_names(names)}, but got {glob!r}")


def _names(parameters: Iterable[str]) -> str:
    return ", ".join(parameters) or "none"
