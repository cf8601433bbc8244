"""Priors onto the parameters of a network, and the network as a Pyro model of a data set.

:func:`bayesianize` turns chosen parameters of any ``nn.Module`` into Pyro sample sites named as the parameters are;
:class:`Supervised` adds a likelihood and the size of the data set.
"""

__all__ = ["Supervised", "bayesianize"]

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any, TypeAlias

import pyro
import torch
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor, nn
from torch.distributions import Distribution

from .distributions import LogUniform
from .hierarchical import HierarchicalPrior
from .plain import copied
from .records import sole_recorder
from .selection import Pattern, choose, matches
from .sites import EverySite, SharedSite, SitePrior
from .store_names import OwnParameters

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
    of :class:`~.guides.AutoSparseNormal`. By default every parameter of two or more dimensions is chosen: biases,
    other parameters of one dimension, such as those of batch normalisation, all buffers, and what is frozen
    (``requires_grad=False``) stay as they are. (In a :class:`Supervised` they also stay frozen; elsewhere Pyro makes
    each parameter trainable that a call of a PyroModule reads.) A tensor that several modules share is one site, under
    its first name.

    Args:
        net: Any network. It is not changed.
        prior: The prior of each weight: a distribution that broadcasts to the parameter's shape, a prior with scales
            such as :func:`~.hierarchical.horseshoe`, a mapping from globs on the parameters' names to these (the
            first that matches counts), or a function of ``(name, parameter)``; see :mod:`~.weight_priors`. The
            default is the improper :class:`~.distributions.LogUniform`.
        include: What to choose instead of the default: globs on the parameters' names, module types, predicates of
            ``(name, parameter)``, or several of these. A glob or a type takes parameters of fewer than two
            dimensions only where it would take nothing else.
        exclude: What to leave out of the choice, in the same terms.

    Returns:
        The Bayesian network.

    Raises:
        TypeError: If ``net`` is not a module, or has a part that Pyro cannot make its own, such as a compiled one; or
            if ``prior`` or a pattern is of another type than these.
        ValueError: If a pattern matches no parameter, a prior does not fit its parameter, nothing is chosen, or a
            chosen parameter is not initialised, not floating point or hidden behind a parametrisation.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> bnn = bayesianize(net, {"0.*": LogUniform(1e-4, 1.0), "*": dist.Normal(0.0, 1.0)})
        >>> pyro.poutine.trace(bnn).get_trace(torch.zeros(1, 4)).stochastic_nodes
        ['0.weight', '2.weight']
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"bayesianize: expected an nn.Module, but got {type(net).__name__}")
    for path, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or "_orig_mod" in module._modules:
            raise TypeError(
                f"{path or 'net'}: expected a module in Python, but it is compiled or scripted; give bayesianize the "
                "network before that"
            )
    chosen = choose(net, include, exclude)
    prior = LogUniform() if prior is None else prior
    if isinstance(prior, Mapping):
        for glob in prior:
            if not isinstance(glob, str):
                raise TypeError(f"prior: expected globs on the names of parameters as keys, but got {glob!r}")
            matches(net, dict(net.named_parameters()), glob, "prior")
    names = _aliases(net)
    priors = {name: _fitted_prior(names[name], net.get_parameter(name), prior) for name in chosen}
    bnn = copied(net)
    _to_pyro_modules(bnn)
    for path, module in bnn.named_modules():  # a shared module goes by its first name, as its parameters do
        if path and isinstance(module, PyroModule):
            module._pyro_name = path
    for name, fitted in priors.items():
        for alias in names[name]:
            _make_site(bnn, alias, name, fitted)
    return bnn


class Supervised(PyroModule):
    r"""A network, a likelihood and the size of a data set, as a Pyro model.

    .. math:: y_n \mid x_n, w \sim \mathrm{likelihood}(\mathrm{network}(x_n; w)), \quad n = 1 \ldots N

    The observations are the site ``y`` in the plate ``data``, which scales the log likelihood of a mini-batch of M
    by N/M. The sites of the network keep their own names, and all are drawn in every pass, those of layers that it
    skips too. The parameters of two models live side by side in Pyro's parameter store, whatever their names: the
    second to come is numbered. A store that was saved does not bring the network's own parameters, such as biases, back
    into another model: save ``state_dict()`` of model and guide.

    Args:
        network: A Bayesian network, as :func:`bayesianize` returns it.
        likelihood: A function from the network's output to the distribution of the targets, one per datum: its
            batch shape ends in the batch size.
        num_data: N, the size of the data set.

    Raises:
        TypeError: If ``network`` is not a ``PyroModule`` or ``likelihood`` not callable.
        ValueError: If ``num_data`` is not a positive integer, or if a weight is called ``data`` or ``y``.

    Example:
        >>> bnn = bayesianize(nn.Linear(4, 3))
        >>> model = Supervised(bnn, lambda logits: dist.Categorical(logits=logits), num_data=60_000)
        >>> guide = svd.AutoSparseNormal(model)
        >>> loss = svd.SparseVD_ELBO()(model, guide)(torch.randn(8, 4), torch.zeros(8))
    """

    def __init__(self, network: PyroModule, likelihood: Callable[[Any], Distribution], num_data: int) -> None:
        super().__init__()
        if not isinstance(network, PyroModule):
            raise TypeError(f"Supervised: expected network = bayesianize(net), but got {type(network).__name__}")
        if isinstance(likelihood, Distribution) or not callable(likelihood):
            raise TypeError(f"Supervised: expected a callable likelihood, but got {type(likelihood).__name__}")
        if isinstance(num_data, bool) or not isinstance(num_data, Integral) or num_data <= 0:
            raise ValueError(f"Supervised: expected num_data, a positive integer, but got {num_data!r}")
        # Past PyroModule.__setattr__, which would prefix the names of the network's sites.
        self._modules["network"] = network
        self.likelihood: Callable[[Any], Distribution] = likelihood
        self.num_data: int = num_data
        self._draw_every_site: EverySite = EverySite(network)
        for name in ("data", "y"):
            if name in self._draw_every_site.names:
                raise ValueError(
                    f"Supervised: a parameter of the network is called {name!r}, as a site of the model is"
                )

    @property
    def network(self) -> PyroModule:
        """The Bayesian network."""
        return self._modules["network"]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        """Runs the model on a batch.

        Args:
            x: Inputs, of shape ``(M, ...)``.
            y: Targets, of shape ``(M, ...)``; to predict, None.

        Returns:
            The output of the network.

        Raises:
            ValueError: If the batch is empty or larger than ``num_data``, or the sizes of ``x``, ``y`` and the
                likelihood differ.
        """
        size = self._batch_size(x, y)
        with OwnParameters(self):
            with self.network._pyro_context:
                output = self.network(x)
                self._draw_every_site(self.network)
            likelihood = self.likelihood(output)
        if not likelihood.batch_shape or likelihood.batch_shape[-1] != size:
            raise ValueError(
                f"likelihood: expected one distribution per datum, batch_shape (..., {size}), but got "
                f"{tuple(likelihood.batch_shape)}; .to_event(n) declares trailing dimensions as parts of a datum"
            )
        expected = likelihood.batch_shape + likelihood.event_shape
        if y is not None and y.shape != expected[-y.dim() :]:  # samples of the output may share their targets
            raise ValueError(f"y: expected targets of shape {tuple(expected)}, but got {tuple(y.shape)}")
        recorder = sole_recorder()
        if recorder is not None and y is not None:
            plate = CondIndepStackFrame("data", -1, size, 0, self.num_data)
            recorder.sample("y", likelihood, y, self.num_data / size, (plate,))
            return output
        with pyro.plate("data", self.num_data, subsample=x):
            pyro.sample("y", likelihood, obs=y, infer={"is_target": True})
        return output

    def _batch_size(self, x: Tensor, y: Tensor | None) -> int:
        size = len(x)
        if size == 0:
            raise ValueError("x: expected at least one datum, but got an empty batch")
        if y is None:
            return size
        if len(y) != size:
            raise ValueError(f"x and y: expected as many targets as inputs, but got {size} and {len(y)}")
        if size > self.num_data:
            raise ValueError(
                f"num_data: expected the size of the whole data set, but got {self.num_data} and a batch of {size}"
            )
        return size


def _to_pyro_modules(net: nn.Module) -> None:
    """Converts all modules in place but those, such as ``nn.ReLU``, to which Pyro's calls would only add time."""
    for path, module in reversed(list(net.named_modules())):
        order = list(module._modules)
        if isinstance(module, PyroModule):
            for name in order:
                setattr(module, name, module._modules[name])
        elif not _is_plain_function(module):
            try:
                to_pyro_module_(module, recurse=False)
            except TypeError as error:  # such as a class with another metaclass
                raise TypeError(
                    f"{path or 'net'}: expected a module that Pyro can make a PyroModule, but {type(module).__name__} "
                    f"is none ({error}); derive it from nn.Module alone, without abc.ABC and the like"
                ) from error
        for name in order:  # Pyro puts its own modules last
            module._modules[name] = module._modules.pop(name)


def _is_plain_function(module: nn.Module) -> bool:
    """Tells whether a module is a layer of torch's own without parameters, parts or numbers that could be random."""
    *package, file = type(module).__module__.split(".")
    holds = module._parameters or module._buffers or module._modules
    has_reals = any(isinstance(value, float) for value in vars(module).values())
    return package == ["torch", "nn", "modules"] and file != "container" and not (holds or has_reals)


def _fitted_prior(names: Sequence[str], parameter: nn.Parameter, prior: Prior) -> WeightPriors:
    """Returns the prior of a parameter, which may have several names, expanded to its shape."""
    name = names[0]
    found = _prior_of(names, parameter, prior)
    if isinstance(found, HierarchicalPrior):
        found.check_shape(name, parameter.shape)
        return found
    event_dim = len(found.event_shape)
    wrong = (
        f"{name}: expected a prior that broadcasts to shape {tuple(parameter.shape)}, but got batch shape "
        f"{tuple(found.batch_shape)} and event shape {tuple(found.event_shape)}"
    )
    try:
        fitted = found.expand(parameter.shape[: parameter.dim() - event_dim])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{wrong}: {error}") from error
    if fitted.batch_shape + fitted.event_shape != parameter.shape:
        raise ValueError(wrong)
    return fitted


def _prior_of(names: Sequence[str], parameter: nn.Parameter, prior: Prior) -> WeightPriors:
    name = names[0]
    if isinstance(prior, Mapping):
        matching = [p for glob, p in prior.items() if any(fnmatchcase(alias, glob) for alias in names)]
        if not matching:
            raise ValueError(f"{name}: expected a prior, but none of {list(prior)} matches; add one or exclude it")
        found = matching[0]
    elif isinstance(prior, WeightPriors):
        found = prior
    elif callable(prior):
        found = prior(name, parameter)
    else:
        found = prior
    if not isinstance(found, WeightPriors):
        raise TypeError(f"{name}: expected a distribution as its prior, but got {found!r}")
    return found


def _aliases(net: nn.Module) -> dict[str, list[str]]:
    """Returns all names of each parameter, by the first, which is the one ``named_parameters`` gives."""
    names: dict[int, list[str]] = {}
    for prefix, module in net.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{prefix}.{attribute}" if prefix else attribute)
    return {aliases[0]: aliases for aliases in names.values()}


def _make_site(bnn: PyroModule, alias: str, name: str, prior: WeightPriors) -> None:
    # The parameter is replaced past __setattr__: that of nn.LSTM would read, and so sample, its other weights.
    path, _, attribute = alias.rpartition(".")
    module: Any = bnn.get_submodule(path)
    value, module._parameters[attribute] = module._parameters[attribute], None  # None keeps its place in the order
    if alias == name:
        buffer = f"{attribute}_initial"
        while hasattr(module, buffer):
            buffer += "_"
        module.register_buffer(buffer, value.detach(), persistent=False)
        if isinstance(prior, HierarchicalPrior):
            module._pyro_samples[attribute] = prior.make_site(module, attribute, buffer)
        else:
            module._pyro_samples[attribute] = SitePrior(buffer, prior)
    else:
        path, _, owner_attribute = name.rpartition(".")
        module._pyro_samples[attribute] = SharedSite(bnn.get_submodule(path), owner_attribute)
