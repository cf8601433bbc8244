"""The context of a call of a network with priors."""

__all__ = ["FixedName", "NetworkContext"]

from typing import Any

from pyro.nn import PyroModule

from .._compat import HANDLER_STACK, PyroContext
from ..poutine.param_store import IsolateParamsMessenger


class NetworkContext(PyroContext):
    """What the modules of a network share, within which its parameters stay its own, and frozen ones frozen.

    Example:
        >>> net = nn.Linear(2, 1).requires_grad_(False)
        >>> bnn = svd.bayesianize(net, svd.LogUniform(1e-4, 1.0), include="weight")
        >>> output = bnn(torch.zeros(1, 2))
        >>> bnn.bias.requires_grad, list(pyro.get_param_store())
        (False, [])
    """

    _isolate_params: IsolateParamsMessenger | None = None

    def __enter__(self) -> None:
        if not self.active and not any(isinstance(handler, IsolateParamsMessenger) for handler in HANDLER_STACK):
            self._isolate_params = IsolateParamsMessenger(self)
            self._isolate_params.__enter__()
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if not self.active and self._isolate_params is not None:
            self._isolate_params.__exit__(*error)
            self._isolate_params = None


class FixedName:
    """What a module of a network does where another module takes it in: it keeps its name while the network runs.

    So the sites of ``self.layers[:2](x)``, a new module around old ones, are those of ``self.layers(x)``.
    """

    def __init__(self, module: PyroModule) -> None:
        self.module = module

    def __call__(self, name: str, context: PyroContext) -> None:
        """Takes the name and the context of another module, unless the network runs."""
        if not self.module._pyro_context.active:
            type(self.module)._pyro_set_supermodule(self.module, name, context)
