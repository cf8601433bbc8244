"""The bound of a model and its guide as a torch module, and the parameters that no optimiser would see."""

__all__ = ["LossModule", "seen_by_svi", "warn_of_untrained"]

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import pyro
from pyro.infer.elbo import ELBOModule
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

from .._compat import HANDLER_STACK, not_compiled


class LossModule(ELBOModule):
    """The loss of a model and its guide, which says once where its parameters are not all that the loss depends on.

    Args:
        model: The model.
        guide: The guide.
        elbo: The bound.
    """

    def __init__(self, model: Any, guide: Any, elbo: Any) -> None:
        super().__init__(model, guide, elbo)
        self._is_checked = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss, see the bound.

        Args:
            *args: As for the model.
            **kwargs: As for the model.

        Returns:
            The loss, in nats over the data set.
        """
        loss = super().forward(*args, **kwargs)
        if not self._is_checked and loss.requires_grad:
            self._is_checked = True
            own = list(self.parameters())
            if own:  # without any, an optimiser says so itself
                remedy = "make what has them an attribute of a model that is a torch module, or train with SVI"
                warn_of_untrained(loss, own, f"the parameters() of the loss lack them; {remedy}")
        return loss


def seen_by_svi() -> list[Tensor] | None:
    """Returns the parameters that a step of ``SVI`` has seen so far and is going to change; None outside of one.

    Returns:
        The parameters.

    Example:
        >>> with pyro.poutine.trace(param_only=True):
        ...     p = pyro.param("p", torch.zeros(3))
        ...     len(seen_by_svi())
        1
    """
    handlers = [h for h in HANDLER_STACK if isinstance(h, TraceMessenger) and h.param_only]
    sites = [site for handler in handlers for site in handler.trace.nodes.values() if site["type"] == "param"]
    return [site["value"].unconstrained() for site in sites] if handlers else None


@not_compiled
def warn_of_untrained(loss: Tensor, trained: Iterable[Tensor], why: str) -> None:
    """Warns of parameters that a loss depends on and that are not trained, by name.

    Args:
        loss: The loss.
        trained: The parameters that are.
        why: What to say of the others.

    Example:
        >>> scale = nn.Parameter(torch.ones(()))
        >>> warn_of_untrained(2 * scale, [scale], "nobody has them")
    """
    known, store = set(map(id, trained)), pyro.get_param_store()
    names = [
        store.param_name(leaf) or f"one of shape {tuple(leaf.shape)}"
        for leaf in _leaves(loss)
        if id(leaf) not in known and (isinstance(leaf, nn.Parameter) or store.param_name(leaf))
    ]
    if names:
        warnings.warn(
            f"{', '.join(names)}: the loss depends on these, but no optimiser would change them, since {why}",
            stacklevel=3,
        )


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """Yields the leaves of the graph of a loss."""
    nodes: list[Any] = [loss.grad_fn]
    seen = set(nodes)
    for node in nodes:
        if hasattr(node, "variable"):
            yield node.variable
        new = dict.fromkeys(parent for parent, _ in getattr(node, "next_functions", ()) if parent not in seen)
        seen.update(new)
        nodes += new
