"""Context managers that restore a model's buffers and frozen parameters after a run of it."""

__all__ = ["unchanged_buffers", "unchanged_buffers_on_error"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import unwrap
from torch import Tensor, nn

from .._compat import sites_of
from ..nn.sites import SitePrior


@contextmanager
def unchanged_buffers(model: Any) -> Iterator[None]:
    """Undoes what a run of the model does to its buffers, such as the statistics of batch normalisation.

    It restores frozen parameters, too, such as those of an encoder that follows another by momentum.
    """
    restore = _restorer(model, with_frozen=True)
    try:
        yield
    finally:
        restore()


@contextmanager
def unchanged_buffers_on_error(model: Any, with_frozen: bool) -> Iterator[None]:
    """Undoes what a run of the model did to its buffers, and to frozen parameters, where it ends in an error."""
    restore = _restorer(model, with_frozen)
    try:
        yield
    except BaseException:  # KeyboardInterrupt included
        restore()
        raise


def _restorer(model: Any, with_frozen: bool) -> Callable[[], None]:
    buffers = _running_buffers(model, with_frozen)
    kept = [buffer.clone() for _, _, buffer in buffers]

    @torch.no_grad()
    def restore() -> None:
        for (owner, name, buffer), value in zip(buffers, kept, strict=True):
            buffer.copy_(value)
            owner[name] = buffer  # a module may have put another tensor there

    return restore


def _running_buffers(model: Any, with_frozen: bool) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Returns the buffers that a run may change, with owner and name: all but the initial values of sites."""
    found: list[tuple[dict[str, Any], str, Tensor]] = []
    model = unwrap(model)
    modules: list[Any] = [model] if isinstance(model, nn.Module) else []
    seen = set(modules)
    for module in modules:  # faster than model.modules(), at every step
        for child in module._modules.values():
            if child is not None and child not in seen:
                modules.append(child)
                seen.add(child)
        if module._buffers:
            initial = {prior.buffer for prior in sites_of(module).values() if isinstance(prior, SitePrior)}
            own = module._buffers
            found += [(own, name, value) for name, value in own.items() if value is not None and name not in initial]
        if with_frozen:
            own = module._parameters
            found += [(own, name, p) for name, p in own.items() if p is not None and not p.requires_grad]
    return found
