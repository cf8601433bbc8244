"""A deterministic network as a model."""

__all__ = ["deterministic_model"]

from collections.abc import Callable
from functools import wraps
from typing import Any

from pyro.nn import PyroModule
from torch import nn
from torch.distributions import Distribution

from .._modules import require_deterministic
from .supervised import Supervised


def deterministic_model(network: nn.Module, likelihood: Callable[[Any], Distribution]) -> Supervised:
    """Returns a model without latents, for evaluation; the network keeps its mode, and is no part of the model."""
    require_deterministic(network)
    return Supervised(_Deterministic(network), likelihood, num_data=1)


class _Deterministic(PyroModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()

        @wraps(network.forward)  # by the names of its arguments it is known how to call it
        def forward(*args: Any, **kwargs: Any) -> Any:
            return network(*args, **kwargs)

        self.forward = forward  # the network is no submodule, which Pyro would rename
