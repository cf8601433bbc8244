"""The warning about samples of an improper prior."""

__all__ = ["ImproperPriorWarning", "warn_of_sample"]

import warnings
from typing import Any

from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.inspect import TrackProvenance
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.enum_messenger import EnumMessenger

from .._compat import HANDLER_STACK


class ImproperPriorWarning(UserWarning):
    """An improper prior was sampled, from a proper truncation of it."""


def warn_of_sample() -> bool:
    """Warns that a sample is of a truncation of the log-uniform prior, and tells whether it did.

    It does not where a model is run only to learn shapes, dependencies or initial values.
    """
    learning = [place for place, handler in enumerate(HANDLER_STACK) if _only_learns(handler)]
    # A Markov chain learns its shapes of a model that enumerates, and then uses the density.
    if learning and not any(isinstance(handler, EnumMessenger) for handler in HANDLER_STACK[learning[0] :]):
        return False
    warnings.warn(
        "The log-uniform prior is improper and has no samples: sampling its truncation to 1e-8 <= |w| <= 1. Give "
        "LogUniform low and high for a prior that can be sampled, also by a Markov chain.",
        ImproperPriorWarning,
        stacklevel=3,
    )
    return True


def _only_learns(handler: Any) -> bool:
    is_prototype = isinstance(handler, BlockMessenger) and handler.hide_fn is prototype_hide_fn  # of Pyro's guides
    return is_prototype or isinstance(handler, InitMessenger | TrackProvenance)
