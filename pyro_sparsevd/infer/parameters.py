"""The parameters of a factorised Gaussian guide: how they are made, read, and loaded from a state without data."""

__all__ = ["GaussianParameters", "Parameterization"]

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pyro.infer.autoguide.guides import AutoGuide
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from .._compat import declare_param, path_of
from .latents import Latent

Parameterization = Literal["additive", "multiplicative"]


class GaussianParameters(AutoGuide):
    """A guide with a mean and a scale parameter, log σ² or log α, for each element of each site."""

    def __init__(
        self,
        model: Callable,
        init_log_variance: float,
        init_scale: float,
        create_plates: Callable | None,
        parameterization: Parameterization,
    ) -> None:
        if parameterization not in _SCALE_PARAMS:
            expected = " or ".join(map(repr, _SCALE_PARAMS))
            raise ValueError(f"parameterization: expected {expected}, but got {parameterization!r}")
        if not -80 <= init_log_variance <= 80:  # where the exponential fits into float32
            raise ValueError(f"init_log_variance: expected a number from -80 to 80, but got {init_log_variance}")
        if not math.exp(-40) <= init_scale <= math.exp(40):
            raise ValueError(f"init_scale: expected a number from exp(-40) to exp(40), but got {init_scale}")
        super().__init__(model, create_plates=create_plates)
        self.init_log_variance = init_log_variance
        self.init_scale = init_scale
        self.parameterization = parameterization
        self.locs = PyroModule()
        setattr(self, _SCALE_PARAMS[parameterization], PyroModule())
        self._sites: dict[str, Latent] = {}
        self._loaded: set[str] = set()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads a state, making the parameters that the model has not been run to make; see ``nn.Module``."""
        before = self._loaded
        try:
            return super().load_state_dict(*args, **kwargs)
        except RuntimeError:
            for name in self._loaded - self._sites.keys() - before:
                self._remove_site(name)
            self._loaded = before
            raise

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.prototype_trace is None:
            start = f"{prefix}locs."
            keys = [key for key in state_dict if key.startswith(start) and key.endswith(_UNCONSTRAINED)]
            locs = {key[len(start) :].removesuffix(_UNCONSTRAINED): state_dict[key] for key in keys}
            self._loaded = set(locs)
            for name, value in locs.items():
                if name not in self._site_names() or _is_in_plates(self._parameters_of(name)[0], value):
                    new = torch.zeros_like(value, device=next(self.parameters(), value).device)
                    self._make(name, (new, new.clone()), None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def in_support(self, name: str, value: Tensor) -> Tensor:
        """Maps a value of a site to the support of its prior, if that is known: not yet after a state was loaded."""
        site = self._sites.get(name)
        return value if site is None else site.transform(value)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own version would also remove the model from the guide that is pickled.
        state = dict(PyroModule.__getstate__(self))
        state.update(_model=None, master=None)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> "GaussianParameters":
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(PyroModule.__getstate__(self), memo))
        return new

    def copy_with_same_model(self) -> "GaussianParameters":
        """Returns a copy that shares the model, where ``copy.deepcopy`` copies that too."""
        return copy.deepcopy(self, {id(self._model): self._model})

    @torch.no_grad()
    def drop_(self, name: str, mask: Tensor) -> None:
        """Sets the means of weights that a mask drops to zero."""
        self._raw_parameters_of(name)[0].mul_(mask)

    def _write(self, name: str, loc: Tensor, event_dim: int, log_variance: float) -> None:
        """Makes the parameters of a site; existing ones keep their values, unless the site now has another shape."""
        known = self._parameters_of(name)[0].shape if name in self._site_names() else None
        if known is not None and known != loc.shape and name in self._loaded:
            raise ValueError(
                f"{name}: the state loaded is of shape {tuple(known)}, but the model's site needs {tuple(loc.shape)}"
            )
        if known is not None:
            for module, attribute in self._leaves(name):
                declare_param(module, attribute, event_dim)
        if known == loc.shape:
            return
        with torch.inference_mode(False):  # inference tensors could not be trained
            loc = loc.detach().clone(memory_format=torch.contiguous_format)
            scale_param = torch.full_like(loc, log_variance)
        if self.parameterization == "multiplicative":
            scale_param -= _log_squares(loc)
        if known is None:
            self._make(name, (loc, scale_param), event_dim)
        else:  # in place, because an optimiser may hold them
            for parameter, value in zip(self._unconstrained(name), (loc, scale_param), strict=True):
                parameter.data = value

    def _make(self, name: str, values: tuple[Tensor, Tensor], event_dim: int | None) -> None:
        for parameters, value in zip(self._parameter_modules(), values, strict=True):
            deep_setattr(parameters, name, PyroParam(value, constraints.real, event_dim))

    def _remove_site(self, name: str) -> None:
        for module, attribute in self._leaves(name):
            delattr(module, attribute)

    def _parameters_of(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns mean and log variance, by ``pyro.param`` where the guide is being called."""
        # Not getattr, which would find the methods of nn.Module first: a site may be called "half" or "type".
        loc, scale_param = (module.__getattr__(attribute) for module, attribute in self._leaves(name))
        return loc, self._log_variance(loc, scale_param)

    def _raw_parameters_of(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns mean and log variance without ``pyro.param``."""
        loc, scale_param = self._unconstrained(name)
        return loc, self._log_variance(loc, scale_param)

    def _stored(self) -> dict[str, Tensor]:
        """Returns the parameters by the names that Pyro's store has for them."""
        kinds = ("locs", _SCALE_PARAMS[self.parameterization])
        named = [(name, self._unconstrained(name)) for name in self._sites]
        start = path_of(self)
        return {f"{start}.{kind}.{name}": of_site[i] for i, kind in enumerate(kinds) for name, of_site in named}

    def _log_variance(self, loc: Tensor, scale_param: Tensor) -> Tensor:
        return scale_param if self.parameterization == "additive" else scale_param + _log_squares(loc)

    def _parameter_modules(self) -> tuple[Any, Any]:
        # Not by getattr: PyroModule.__getattr__ is slow.
        return self._modules["locs"], self._modules[_SCALE_PARAMS[self.parameterization]]

    def _leaves(self, name: str) -> list[tuple[Any, str]]:
        """Returns the module of each of the two parameters of a site, and its attribute there."""
        *path, attribute = name.split(".")
        modules = self._parameter_modules()
        for part in path:
            modules = modules[0]._modules[part], modules[1]._modules[part]
        return [(module, attribute) for module in modules]

    def _unconstrained(self, name: str) -> tuple[Tensor, Tensor]:
        (locs, attribute), (scale_params, _) = self._leaves(name)
        key = attribute + _UNCONSTRAINED
        return locs._parameters[key], scale_params._parameters[key]

    def _site_names(self) -> list[str]:
        """Returns the names of the sites that have parameters, in the order of the model as far as that is known."""
        made = [name.removesuffix(_UNCONSTRAINED) for name, _ in self.locs.named_parameters()]
        return [name for name in self._sites if name in made] + [name for name in made if name not in self._sites]


def _is_in_plates(early: Tensor, value: Tensor) -> bool:
    """Tells whether a value loaded has the shape of a site made before its plates were known, with plates in front."""
    return value.dim() > early.dim() and value.shape[value.dim() - early.dim() :] == early.shape


def _log_squares(loc: Tensor) -> Tensor:
    return 2 * loc.abs().clamp_min(1e-15).log()  # whose square float32 can hold


_SCALE_PARAMS = {"additive": "log_variances", "multiplicative": "log_alphas"}
_UNCONSTRAINED = "_unconstrained"  # what Pyro appends to the name of a PyroParam
