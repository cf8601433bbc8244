"""The names under which a guide's parameters stand in Pyro's parameter store: its own, never another guide's."""

__all__ = ["claim_name", "mark_as_taken", "parameters_are_seen"]

from collections.abc import Iterable, Mapping
from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


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
