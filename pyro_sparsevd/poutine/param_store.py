"""The names under which parameters stand in Pyro's store: a model's or guide's own, for as long as there is one."""

__all__ = ["OwnParameters", "claim_name", "mark_as_taken", "parameters_are_seen"]

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pyro
from pyro.distributions import constraints
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


class OwnParameters(Messenger):
    """Keeps a model's parameters its own where Pyro's global store already holds another tensor of the name.

    ``pyro.param`` would otherwise record, and an optimiser then train, the tensor of the other model. It would also
    make a frozen parameter trainable, which is therefore no parameter to Pyro, and copy one that is not contiguous,
    which is therefore put into the store here. What it put there leaves the store with the model.

    Args:
        model: The model, or what lives as long as it.

    Example:
        >>> frozen = PyroModule[nn.Linear](2, 1).requires_grad_(False)
        >>> with OwnParameters(frozen):
        ...     output = frozen(torch.zeros(1, 2))
        >>> frozen.weight.requires_grad, list(pyro.get_param_store())
        (False, [])
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
        store = pyro.get_param_store()
        number = 1
        while store._params.get(msg["name"], parameter) is not parameter:
            number += 1
            msg["name"] = f"{name}_{number}"
        msg["args"] = (msg["name"], parameter)
        if msg["name"] in store._params:
            return
        if not parameter.is_contiguous():
            store._params[msg["name"]] = parameter
            store._param_to_name[parameter] = msg["name"]
            store._constraints[msg["name"]] = constraints.real
        _own(self.model, {msg["name"]: parameter})


def parameters_are_seen() -> bool:
    """Tells whether a handler looks at parameters at the moment.

    Returns:
        Whether one does.

    Example:
        >>> parameters_are_seen()
        False
    """
    return any(hasattr(handler, "_pyro_param") or hasattr(handler, "_pyro_post_param") for handler in _PYRO_STACK)


def claim_name(guide: PyroModule, own: Mapping[str, Tensor]) -> None:
    """Numbers a guide where Pyro's parameter store holds parameters of another of its name.

    What no guide has put there, as after ``pyro.get_param_store().load``, is not another's: Pyro makes it the guide's.

    Args:
        guide: The guide; if need be, it and its parts are renamed.
        own: Its parameters that the store may hold, by their names below the guide's; without any, the store must
            hold no other guide's below the guide's name.

    Raises:
        ValueError: If the store holds, from elsewhere, a parameter of another shape.

    Example:
        >>> guide = svd.AutoSparseNormal(lambda: None)
        >>> claim_name(guide, {})
        >>> guide._pyro_name
        'AutoSparseNormal'
    """
    stored = pyro.get_param_store()._params
    mine = {f"{guide._pyro_name}.{name}": value for name, value in own.items()}
    if mine and all(stored.get(key) is value for key, value in mine.items()):
        return
    below = {key: value for key, value in stored.items() if key.startswith(f"{guide._pyro_name}.")}
    others = {key: value for key, value in below.items() if value in _OF_GUIDES}
    if mine:
        others = {key: value for key, value in others.items() if key in mine and value is not mine[key]}
        for key in mine:  # in the order of the sites
            if key in below and key not in others and below[key].shape != mine[key].shape:
                raise ValueError(
                    f"{key}: expected a parameter of shape {tuple(mine[key].shape)}, but Pyro's parameter store was "
                    f"loaded with one of {tuple(below[key].shape)}; clear the store, or load that of this model"
                )
    if others:
        _take_number(guide)


def mark_as_taken(guide: PyroModule, parameters: Mapping[str, Tensor]) -> None:
    """Notes that parameters are those of a guide, with which they leave the store.

    Args:
        guide: The guide.
        parameters: Its parameters, by their names below the guide's.

    Example:
        >>> mark_as_taken(PyroModule("guide"), {"locs.w": torch.zeros(3)})
    """
    for parameter in _own(guide, {f"{guide._pyro_name}.{name}": value for name, value in parameters.items()}):
        _OF_GUIDES[parameter] = True


def _own(owner: object, parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """Notes whose parameters they are, and returns those that are new."""
    own = _OWN.get(owner)
    if own is None:
        own = _OWN[owner] = {}
        weakref.finalize(owner, _leave_store, own).atexit = False
    new = {key: value for key, value in parameters.items() if key not in own or own[key]() is not value}
    own.update((key, weakref.ref(value)) for key, value in new.items())
    return list(new.values())


def _leave_store(own: Mapping[str, Callable[[], Tensor | None]]) -> None:
    """Removes from the store those of its parameters that were an owner's, which is gone."""
    store = pyro.get_param_store()
    gone = {key for key, value in own.items() if key in store and store._params[key] is value()}
    if gone:
        # New dictionaries: the garbage collector may come here while somebody goes through the old ones.
        store._params = {key: value for key, value in store._params.items() if key not in gone}
        store._param_to_name = {value: key for value, key in store._param_to_name.items() if key not in gone}
        store._constraints = {key: value for key, value in store._constraints.items() if key not in gone}


def _take_number(guide: PyroModule) -> None:
    old, number = guide._pyro_name, 2
    start = f"{old}_"
    taken = {key[len(start) :].split(".")[0] for key in pyro.get_param_store() if key.startswith(start)}
    while str(number) in taken:
        number += 1
    for module in guide.modules():
        module._pyro_name = f"{old}_{number}{module._pyro_name[len(old) :]}"


_OF_GUIDES: Any = WeakTensorKeyDictionary()
# The names in the store, and the parameters, of each guide and model.
_OWN: Any = weakref.WeakKeyDictionary()
