"""Private names of torch and Pyro, in one place."""

__all__ = ["PyroContext", "forget_on_state_dict", "on_state_dict"]

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from pyro.nn.module import _Context as PyroContext  # Pyro 1.9.1: the cache of a call; nothing public sees it begin
from torch import nn


def on_state_dict(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Calls a function of module, state and prefix on each state of a module (torch 2.13; public only in some)."""
    module._register_state_dict_hook(hook)


def forget_on_state_dict(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Undoes :func:`on_state_dict`, in a copy of the module, too, to which the handles of torch are of no use."""
    module._state_dict_hooks = OrderedDict((k, h) for k, h in module._state_dict_hooks.items() if h is not hook)
