"""The context of a call of a Bayesian network, and the names of its modules in it."""

__all__ = ["NetworkContext", "join_network"]

from functools import partial
from typing import Any

from pyro.nn import PyroModule

from .._compat import HANDLER_STACK, PyroContext, call_context, move, set_place
from ..poutine.param_store import IsolateParamsMessenger


class NetworkContext(PyroContext):
    """The context that the modules of a network share; within it, parameters stay the network's own, or frozen."""

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


def join_network(module: PyroModule, path: str, context: NetworkContext) -> None:
    """Gives a module its name and context in a network."""
    set_place(module, path, context, on_move=partial(_move_unless_running, module))


def _move_unless_running(module: PyroModule, path: str, context: PyroContext) -> None:
    """Gives a module the name and the context of another module that takes it in, unless the network is running.

    So the sites of ``self.layers[:2](x)``, a new module around old ones, are those of ``self.layers(x)``.
    """
    if not call_context(module).active:
        move(module, path, context)
