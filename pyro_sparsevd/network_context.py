"""The context of a call of a network with priors."""

__all__ = ["NetworkContext"]

from typing import Any

from ._compat import PyroContext
from .store_names import OwnParameters


class NetworkContext(PyroContext):
    """What the modules of a network share, within which its parameters stay its own, and frozen ones frozen.

    Example:
        >>> net = nn.Linear(2, 1).requires_grad_(False)
        >>> bnn = svd.bayesianize(net, svd.LogUniform(1e-4, 1.0), include="weight")
        >>> output = bnn(torch.zeros(1, 2))
        >>> bnn.bias.requires_grad, list(pyro.get_param_store())
        (False, [])
    """

    def __enter__(self) -> None:
        if not self.active:
            self._own_parameters = OwnParameters()
            self._own_parameters.__enter__()
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if not self.active:
            self._own_parameters.__exit__(*error)
            del self._own_parameters
