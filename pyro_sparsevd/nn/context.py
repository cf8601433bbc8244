"""The context of a call of a Bayesian network, and the names of its modules in it."""

__all__ = ["NetworkContext", "join_network"]

from typing import Any

from pyro.nn import PyroModule
from pyro.poutine.runtime import _PYRO_STACK

from .._compat import PyroContext, call_context
from ..poutine.param_store import OwnParameters


class NetworkContext(PyroContext):
    """The context that the modules of a network share; within it, parameters stay the network's own, or frozen."""

    _own_parameters: OwnParameters | None = None

    def __enter__(self) -> None:
        if not self.active and not any(isinstance(handler, OwnParameters) for handler in _PYRO_STACK):
            self._own_parameters = OwnParameters(self)
            self._own_parameters.__enter__()
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if not self.active and self._own_parameters is not None:
            self._own_parameters.__exit__(*error)
            self._own_parameters = None


def join_network(module: PyroModule, path: str, context: NetworkContext) -> None:
    """Gives a module its name and context in a network."""
    module._pyro_name, module._pyro_context = path, context
    module.__dict__["_pyro_set_supermodule"] = _SetSupermodule(module)


class _SetSupermodule:
    """Gives a module the name and the context of another module that takes it in, unless the network is running.

    So the sites of ``self.layers[:2](x)``, a new module around old ones, are those of ``self.layers(x)``.
    """

    def __init__(self, module: PyroModule) -> None:
        self.module = module

    def __call__(self, name: str, context: PyroContext) -> None:
        if not call_context(self.module).active:
            type(self.module)._pyro_set_supermodule(self.module, name, context)
