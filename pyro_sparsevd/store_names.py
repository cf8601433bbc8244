"""The names under which a guide's parameters stand in Pyro's parameter store: its own, never another guide's."""

__all__ = ["has_own_name", "parameters_are_seen", "take_own_name"]

from collections.abc import Mapping

import pyro
from pyro.nn import PyroModule
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor


def parameters_are_seen() -> bool:
    """Tells whether a handler looks at parameters at the moment.

    Returns:
        Whether one does.

    Example:
        >>> parameters_are_seen()
        False
    """
    return any(hasattr(handler, "_pyro_param") or hasattr(handler, "_pyro_post_param") for handler in _PYRO_STACK)


def has_own_name(guide: PyroModule, own: Mapping[str, Tensor]) -> bool:
    """Tells whether the store holds no parameters of another guide of the name.

    Args:
        guide: The guide.
        own: Its parameters that the store may hold, by their names below the guide's; without any, the store must
            hold nothing below the guide's name.

    Returns:
        Whether the name is its own.

    Example:
        >>> guide = svd.AutoSparseNormal(lambda: None)
        >>> has_own_name(guide, {})
        True
    """
    stored = pyro.get_param_store()._params
    if not own:
        return not any(key.startswith(f"{guide._pyro_name}.") for key in stored)
    return all(stored.get(f"{guide._pyro_name}.{name}", value) is value for name, value in own.items())


def take_own_name(guide: PyroModule) -> None:
    """Numbers a guide, as the store holds parameters of another of its name.

    Args:
        guide: The guide; it and its parts are renamed.

    Example:
        >>> guide = svd.AutoSparseNormal(lambda: None)
        >>> take_own_name(guide)
        >>> guide._pyro_name
        'AutoSparseNormal_2'
    """
    stored = pyro.get_param_store()._params
    old, number = guide._pyro_name, 2
    while any(key.startswith(f"{old}_{number}.") for key in stored):
        number += 1
    for module in guide.modules():
        module._pyro_name = f"{old}_{number}{module._pyro_name[len(old) :]}"
