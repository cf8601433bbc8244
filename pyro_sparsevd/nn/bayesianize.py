"""From a torch network to a Bayesian one: its parameters become sample sites of Pyro, of the same names."""

__all__ = ["Prior", "bayesianize"]

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.distributions import Distribution
from torch.fx import GraphModule

from .._compat import on_state_dict, sites_of
from .._modules import copied, takes
from ..distributions.log_uniform import LogUniform
from .context import NetworkContext, join_network
from .scales import HierarchicalPrior
from .selection import Pattern, choose, matches
from .sites import SharedSite, SitePrior, set_site, take_parameter, without_sites
from .weights import padding_rows

WeightPriors: TypeAlias = Distribution | HierarchicalPrior
Prior: TypeAlias = WeightPriors | Mapping[str, WeightPriors] | Callable[[str, nn.Parameter], WeightPriors]


def bayesianize(
    net: nn.Module,
    prior: Prior | None = None,
    *,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] = (),
) -> PyroModule:
    r"""Returns a copy of a network whose weights are Pyro sample sites with a prior.

    Each chosen parameter becomes a ``PyroSample`` named like the parameter, and keeps its value as the initial mean
    of :class:`~.autoguide.AutoSparseNormal`. By default what a layer multiplies with its input is chosen, see
    :func:`~.selection.choose`: biases, normalisations, class tokens, position embeddings, all buffers, and what is
    frozen (``requires_grad=False``) stay as they are, and frozen. A tensor that several modules share is one site,
    under its first name.

    Args:
        net: Any network. It is not changed.
        prior: The prior of each weight: a distribution that broadcasts to the parameter's shape, a prior with scales
            such as :func:`~.priors.horseshoe`, a mapping from globs on the parameters' names to these (the
            first that matches counts), or a function of ``(name, parameter)``; see :func:`~.priors.named_prior`. The
            default is the improper :class:`~.log_uniform.LogUniform`. A glob that matches no chosen parameter is an
            error, and so is one after a glob that matches more.
        include: What to choose instead of the default: globs on the parameters' names, predicates of
            ``(name, parameter)``, module types, or several of these. A glob takes all that it matches, biases, too; a
            type the weights of its modules, or where they have none, all their parameters.
        exclude: What to leave out of the choice, in the same terms; a type leaves out all of its modules' parameters.

    Returns:
        The Bayesian network.

    Raises:
        TypeError: If ``net`` is not a module, or has a part that Pyro cannot make its own, such as a compiled one; or
            if ``prior`` or a pattern is of another type than these.
        ValueError: If a pattern matches no parameter, a prior does not fit its parameter, nothing is chosen, or a
            chosen parameter is not initialised, not floating point, hidden behind a parametrisation, held in a list
            or the like, or a view of another's memory.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> bnn = bayesianize(net, {"0.*": LogUniform(1e-4, 1.0), "*": dist.Normal(0.0, 1.0)})
        >>> pyro.poutine.trace(bnn).get_trace(torch.zeros(1, 4)).stochastic_nodes
        ['0.weight', '2.weight']
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"bayesianize: expected an nn.Module, but got {type(net).__name__}")
    for path, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule | GraphModule) or "_orig_mod" in module._modules:
            raise TypeError(
                f"{path or 'net'}: expected a module in Python, but it is compiled, scripted or traced; give "
                "bayesianize the network before that (instead of a feature extractor, a module that calls its layers)"
            )
    chosen = choose(net, include=include, exclude=exclude)
    priors = _fitted_priors(net, chosen, LogUniform() if prior is None else prior)
    bnn = copied(net)
    _to_pyro_modules(bnn)
    context = NetworkContext()
    for path, module in bnn.named_modules():  # a shared module goes by its first name, as its parameters do
        if isinstance(module, PyroModule):
            join_network(module, path, context)
    names, rows = _aliases(net), padding_rows(net)
    for name, fitted in priors.items():
        for alias in names[name]:
            _make_site(bnn, alias, name, fitted, rows.get(name))
    on_state_dict(bnn, without_sites)
    return bnn


def _to_pyro_modules(net: nn.Module) -> None:
    """Converts all modules in place but those, such as ``nn.ReLU``, to which Pyro's calls would only add time."""
    for path, module in reversed(list(net.named_modules())):
        order = list(module._modules)
        if isinstance(module, PyroModule):
            for name in order:
                setattr(module, name, module._modules[name])
        elif not _is_stateless_layer(module):
            try:
                to_pyro_module_(module, recurse=False)
            except TypeError as error:  # such as a class with another metaclass
                raise TypeError(
                    f"{path or 'net'}: expected a module that Pyro can make a PyroModule, but {type(module).__name__} "
                    f"is none ({error}); derive it from nn.Module alone, without abc.ABC and the like"
                ) from error
        for name in order:  # restores the order: Pyro puts PyroModules last
            module._modules[name] = module._modules.pop(name)


def _is_stateless_layer(module: nn.Module) -> bool:
    """Tells whether a module is a layer of torch's own without parameters, parts or numbers that could be random."""
    *package, file = type(module).__module__.split(".")
    holds = module._parameters or module._buffers or module._modules
    has_reals = any(isinstance(value, float) for value in vars(module).values())
    return package == ["torch", "nn", "modules"] and file != "container" and not (holds or has_reals)


def _fitted_priors(net: nn.Module, chosen: Collection[str], prior: Prior) -> dict[str, WeightPriors]:
    """Returns the prior of each chosen parameter, of its shape."""
    if isinstance(prior, Mapping):
        found = _by_glob(net, chosen, prior)
    elif callable(prior) and not isinstance(prior, WeightPriors | type):
        if not takes(prior, "name", None):
            raise TypeError(f"prior: expected a function of (name, parameter), but got {prior}; perhaps call it first")
        found = {name: prior(name, net.get_parameter(name)) for name in chosen}
    else:
        found = dict.fromkeys(chosen, prior)
    return {name: _fitted(name, net.get_parameter(name).shape, value) for name, value in found.items()}


def _by_glob(net: nn.Module, chosen: Collection[str], table: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the prior of the first glob that matches each chosen parameter.

    Globs without effect are refused: those that match no chosen parameter, and those after a glob that matches more.
    """
    found: dict[str, Any] = {}
    wider: list[set[str]] = []
    for glob, prior in table.items():
        if not isinstance(glob, str):
            raise TypeError(f"prior: expected globs on the names of parameters as keys, but got {glob!r}")
        matched = matches(net, dict(net.named_parameters()), glob, "prior")
        if matched.isdisjoint(chosen):
            raise ValueError(
                f"prior: expected {glob!r} to match a chosen parameter, but {', '.join(sorted(matched))} is not; name "
                "it in include=, or leave the prior out"
            )
        if any(matched < others for others in wider):
            raise ValueError(
                f"prior: expected {glob!r} before the globs that match more, as the first that matches counts"
            )
        wider.append(matched)
        found = dict.fromkeys(matched, prior) | found
    for name in chosen:
        if name not in found:
            raise ValueError(f"{name}: expected a prior, but none of {list(table)} matches; add one or exclude it")
    return {name: found[name] for name in chosen}


def _fitted(name: str, shape: torch.Size, prior: Any) -> WeightPriors:
    """Returns the prior of a parameter expanded to its shape."""
    if isinstance(prior, type):
        raise TypeError(f"{name}: expected a distribution as its prior, but got the class; write {prior.__name__}()")
    if not isinstance(prior, WeightPriors):
        raise TypeError(f"{name}: expected a distribution as its prior, but got {prior!r}")
    if isinstance(prior, HierarchicalPrior):
        prior.check_shape(name, shape)
        return prior
    wrong = (
        f"{name}: expected a prior that broadcasts to shape {tuple(shape)}, but got batch shape "
        f"{tuple(prior.batch_shape)} and event shape {tuple(prior.event_shape)}"
    )
    try:
        fitted = prior.expand(shape[: len(shape) - len(prior.event_shape)])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{wrong}: {error}") from error
    if fitted.batch_shape + fitted.event_shape != shape:
        raise ValueError(wrong)
    return fitted


def _aliases(net: nn.Module) -> dict[str, list[str]]:
    """Returns all names of each parameter, by the first, which is the one ``named_parameters`` gives."""
    names: dict[int, list[str]] = {}
    for prefix, module in net.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{prefix}.{attribute}" if prefix else attribute)
    return {aliases[0]: aliases for aliases in names.values()}


def _make_site(bnn: PyroModule, alias: str, name: str, prior: WeightPriors, zero_row: int | None) -> None:
    path, _, attribute = alias.rpartition(".")
    module: Any = bnn.get_submodule(path)
    value = take_parameter(module, attribute)
    if alias != name:
        path, _, owner_attribute = name.rpartition(".")
        sites_of(module)[attribute] = SharedSite(bnn.get_submodule(path), owner_attribute)
        return
    if isinstance(prior, HierarchicalPrior):
        site: SitePrior = prior.set_scales(module, attribute, value)
    else:
        site = SitePrior(prior)
    site.zero_row = zero_row
    set_site(module, attribute, site, value)
