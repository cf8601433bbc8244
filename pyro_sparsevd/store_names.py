"""The names under which parameters stand in Pyro's store: a model's or guide's own, never those of another."""

__all__ = ["OwnParameters", "claim_name", "mark_as_taken", "parameters_are_seen"]

import weakref
from collections.abc import Iterable, Mapping
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
    which is therefore put into the store here.

    Example:
        >>> frozen = PyroModule[nn.Linear](2, 1).requires_grad_(False)
        >>> with OwnParameters():
        ...     output = frozen(torch.zeros(1, 2))
        >>> frozen.weight.requires_grad, list(pyro.get_param_store())
        (False, [])
    """

    def _pyro_param(self, msg: Any) -> None:
        name, *init = msg["args"]
        if not init or not isinstance(init[0], nn.Parameter):
            return
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
        if not parameter.is_contiguous():
            store._params[msg["name"]] = parameter
            store._param_to_name[parameter] = msg["name"]
            store._constraints[msg["name"]] = constraints.real


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


def mark_as_taken(parameters: Iterable[Tensor]) -> None:
    """Notes that parameters are those of a guide, for as long as they are in use.

    Args:
        parameters: The parameters.

    Example:
        >>> mark_as_taken([torch.zeros(3)])
    """
    for parameter in parameters:
        _OF_GUIDES[parameter] = True


def _take_number(guide: PyroModule) -> None:
    stored = pyro.get_param_store()._params
    old, number = guide._pyro_name, 2
    while any(key.startswith(f"{old}_{number}.") for key in stored):
        number += 1
    for module in guide.modules():
        module._pyro_name = f"{old}_{number}{module._pyro_name[len(old) :]}"


_OF_GUIDES: Any = WeakTensorKeyDictionary()
