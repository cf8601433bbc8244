"""Names in Pyro's parameter store: kept apart between models and guides, and freed with their owners."""

__all__ = ["IsolateParamsMessenger", "ensure_unique_name", "params_are_traced", "register_params"]

import weakref
from collections.abc import Callable, Mapping
from itertools import chain, count
from typing import Any

from pyro.distributions import constraints
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from .._compat import HANDLER_STACK, forget_params, path_of, rename, store_param, stored_params


class IsolateParamsMessenger(Messenger):
    """Keeps a model's parameters its own where Pyro's global store already holds another tensor of the name.

    ``pyro.param`` would otherwise record, and an optimiser then train, the tensor of the other model. It would also
    make a frozen parameter trainable, which is therefore no parameter to Pyro, and copy one that is not contiguous,
    which is therefore put into the store here. What it put there leaves the store with ``model``.
    """

    def __init__(self, model: object) -> None:
        super().__init__()
        self.model = model

    def _pyro_param(self, msg: Any) -> None:
        name, *init = msg["args"]
        constraint = msg["kwargs"].get("constraint", init[1] if len(init) > 1 else constraints.real)
        if not init or not isinstance(init[0], nn.Parameter) or constraint is not constraints.real:
            return  # under a constraint, Pyro makes a parameter of its own
        parameter = init[0]
        if not parameter.requires_grad:
            msg["value"], msg["done"], msg["stop"] = parameter, True, True
            return
        parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined] # as Pyro does elsewhere
        stored = stored_params()
        names = chain([msg["name"]], (f"{name}_{number}" for number in count(2)))
        msg["name"] = next(free for free in names if stored.get(free, parameter) is parameter)
        msg["args"] = (msg["name"], parameter)
        if msg["name"] in stored:
            return
        if not parameter.is_contiguous():
            store_param(msg["name"], parameter)
        register_params(self.model, {msg["name"]: parameter})


def params_are_traced() -> bool:
    """Tells whether an active handler sees parameters."""
    return any(hasattr(handler, "_pyro_param") or hasattr(handler, "_pyro_post_param") for handler in HANDLER_STACK)


def ensure_unique_name(guide: PyroModule, mine: Mapping[str, Tensor]) -> None:
    """Adds a number to the names of a guide and its parts where Pyro's store holds parameters of another of its name.

    What no guide has put there, as after ``pyro.get_param_store().load``, is not another's: Pyro makes it the guide's,
    but an error is raised if its shape differs. ``mine`` are the parameters of the guide, by their names in the store;
    if there are none, the store must hold no other guide's below the guide's name.
    """
    stored = stored_params()
    if mine and all(stored.get(key) is value for key, value in mine.items()):
        return
    owned = {id(value()) for own_of in _OWN.values() for value in own_of.values()}
    others = {key for key, value in stored.items() if key.startswith(f"{path_of(guide)}.") and id(value) in owned}
    if mine:
        others = {key for key in others & mine.keys() if stored[key] is not mine[key]}
        for key, value in mine.items():
            if key in stored and key not in others and stored[key].shape != value.shape:
                raise ValueError(
                    f"{key}: expected a parameter of shape {tuple(value.shape)}, but Pyro's parameter store was "
                    f"loaded with one of {tuple(stored[key].shape)}; clear the store, or load that of this model"
                )
    if others:
        _add_number(guide)


def register_params(owner: object, parameters: Mapping[str, Tensor]) -> None:
    """Notes whose the parameters are, by their names in the store, which they leave with their owner."""
    own = _OWN.get(owner)
    if own is None:
        own = _OWN[owner] = {}
        weakref.finalize(owner, _leave_store, own).atexit = False
    own.update((key, weakref.ref(value)) for key, value in parameters.items())


def _leave_store(own: Mapping[str, Callable[[], Tensor | None]]) -> None:
    """Removes from the store those of its parameters that belonged to an owner that is gone."""
    stored = stored_params()
    gone = {key for key, value in own.items() if key in stored and stored[key] is value()}
    if gone:
        forget_params(gone)


def _add_number(guide: PyroModule) -> None:
    old, stored = path_of(guide), stored_params()
    names = (f"{old}_{number}" for number in count(2))
    new = next(name for name in names if not any(key.startswith(f"{name}.") for key in stored))
    for module in guide.modules():
        rename(module, new + path_of(module).removeprefix(old))


# The names in the store, and the parameters, of each guide and model.
_OWN: Any = weakref.WeakKeyDictionary()
