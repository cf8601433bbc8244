"""The parameters of a factorised Gaussian guide: made with the sites, read, and loaded from a state without data."""

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

from .latents import Latent

Parameterization = Literal["additive", "multiplicative"]


class GaussianParameters(AutoGuide):
    """A guide with a mean and a second parameter, log σ² or log α, for each element of each site.

    Args:
        model: A Pyro model.
        init_log_variance: The initial log σ² of sites with a sparse prior.
        init_scale: The initial σ of all others.
        create_plates: As for ``AutoNormal``.
        parameterization: ``"additive"``, in θ and log σ², or ``"multiplicative"``, in θ and log α.

    Raises:
        ValueError: If ``parameterization`` is neither of the two, or an initial log σ² not between -80 and 80.
    """

    def __init__(
        self,
        model: Callable,
        init_log_variance: float,
        init_scale: float,
        create_plates: Callable | None,
        parameterization: Parameterization,
    ) -> None:
        if parameterization not in _SPREADS:
            expected = " or ".join(map(repr, _SPREADS))
            raise ValueError(f"parameterization: expected {expected}, but got {parameterization!r}")
        if not -80 <= init_log_variance <= 80:  # of which float32 knows the exponential
            raise ValueError(f"init_log_variance: expected a number from -80 to 80, but got {init_log_variance}")
        if not math.exp(-40) <= init_scale <= math.exp(40):
            raise ValueError(f"init_scale: expected a number from exp(-40) to exp(40), but got {init_scale}")
        super().__init__(model, create_plates=create_plates)
        self.init_log_variance = init_log_variance
        self.init_scale = init_scale
        self.parameterization = parameterization
        self.locs = PyroModule()
        setattr(self, _SPREADS[parameterization], PyroModule())
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
            start, end = f"{prefix}locs.", "_unconstrained"
            keys = [key for key in state_dict if key.startswith(start) and key.endswith(end)]
            found = {key[len(start) : -len(end)]: state_dict[key] for key in keys}
            self._loaded = set(found)
            for name, value in found.items():
                if not self._has_parameters(name) or _is_in_plates(self._parameters_of(name)[0], value):
                    device = next(self.parameters(), value).device
                    for parameters in self._parameter_modules():
                        new = torch.zeros_like(value, device=device)
                        deep_setattr(parameters, name, PyroParam(new, constraints.real, None))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def in_support(self, name: str, value: Tensor) -> Tensor:
        """Maps a value of a site from unconstrained space to the support of its prior.

        Args:
            name: The name of the site.
            value: The value.

        Returns:
            The value; unchanged where the prior is not known yet, as after a state was loaded.
        """
        site = self._sites.get(name)
        return value if site is None else site.transform(value)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own would take the model from the live guide too.
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

    def _set_parameters(self, name: str, loc: Tensor, event_dim: int, log_variance: float) -> None:
        known = self._has_parameters(name)
        if known:
            existing = self._parameters_of(name)[0]
            if existing.shape == loc.shape:
                for module, attribute in self._leaves(name):
                    module._pyro_params[attribute] = constraints.real, event_dim
                return
            if name in self._loaded:
                raise ValueError(
                    f"{name}: the state loaded is of shape {tuple(existing.shape)}, but the model's site needs "
                    f"{tuple(loc.shape)}"
                )
        with torch.inference_mode(False):  # or no optimiser could change them
            loc = loc.detach().clone(memory_format=torch.contiguous_format)
            spread = torch.full_like(loc, log_variance)
        if self.parameterization == "multiplicative":
            spread -= _log_squares(loc)
        for parameters, value in zip(self._parameter_modules(), (loc, spread), strict=True):
            if known:  # an optimiser may have it already
                module, attribute = _leaf(parameters, name)
                module._parameters[f"{attribute}_unconstrained"].data = value
                module._pyro_params[attribute] = constraints.real, event_dim
            else:
                deep_setattr(parameters, name, PyroParam(value, constraints.real, event_dim))

    def _remove_site(self, name: str) -> None:
        for module, attribute in self._leaves(name):
            delattr(module, attribute)

    def _parameter_modules(self) -> tuple[Any, Any]:
        # Past PyroModule.__getattr__, which is slow.
        return self._modules["locs"], self._modules[_SPREADS[self.parameterization]]

    def _leaves(self, name: str) -> list[tuple[Any, str]]:
        return [_leaf(parameters, name) for parameters in self._parameter_modules()]

    def _parameters_of(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns mean and log variance."""
        # Not getattr, which would find the methods of nn.Module first: a site may be called "half" or "type".
        loc, spread = (module.__getattr__(attribute) for module, attribute in self._leaves(name))
        return loc, self._log_variance(loc, spread)

    def _plain_parameters_of(self, name: str) -> tuple[Tensor, Tensor]:
        """As :meth:`_parameters_of`, past Pyro's statements and its parameter store."""
        (locs, attribute), (spreads, _) = self._leaves(name)
        attribute += "_unconstrained"
        loc, spread = locs._parameters[attribute], spreads._parameters[attribute]
        return loc, self._log_variance(loc, spread)

    def _stored(self) -> dict[str, Tensor]:
        """Returns the parameters by the names that Pyro's store has for them, below the guide's."""
        kinds = [(f"{kind}.", self._modules[kind]) for kind in ("locs", _SPREADS[self.parameterization])]
        leaves = ((start + name, *_leaf(module, name)) for start, module in kinds for name in self._sites)
        return {key: module._parameters[f"{attribute}_unconstrained"] for key, module, attribute in leaves}

    def _log_variance(self, loc: Tensor, spread: Tensor) -> Tensor:
        return spread if self.parameterization == "additive" else spread + _log_squares(loc)

    def _has_parameters(self, name: str) -> bool:
        *path, attribute = name.split(".")
        module: Any = self._modules["locs"]
        for part in path:
            module = module and module._modules.get(part)
        return module is not None and f"{attribute}_unconstrained" in module._parameters

    def _site_names(self) -> list[str]:
        stored = dict.fromkeys(name.removesuffix("_unconstrained") for name, _ in self.locs.named_parameters())
        return [name for name in self._sites if name in stored] + [name for name in stored if name not in self._sites]


def _is_in_plates(early: Tensor, value: Tensor) -> bool:
    """Tells whether a value loaded has the shape of a site made before its plates were known, with plates in front."""
    return value.dim() > early.dim() and value.shape[value.dim() - early.dim() :] == early.shape


def _log_squares(loc: Tensor) -> Tensor:
    return 2 * loc.abs().clamp_min(1e-15).log()  # the square is still a number in single precision


# What holds the second parameter of each weight.
_SPREADS = {"additive": "log_variances", "multiplicative": "log_alphas"}


def _leaf(module: Any, name: str) -> tuple[Any, str]:
    *path, attribute = name.split(".")
    for part in path:
        module = module._modules[part]
    return module, attribute
