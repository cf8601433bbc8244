"""The warning about samples of an improper prior, where they are used."""

__all__ = ["ImproperPriorWarning", "warn_of_sample"]

import warnings
from typing import Any

from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.inspect import TrackProvenance
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import _PYRO_STACK


class ImproperPriorWarning(UserWarning):
    """Says that numbers were sampled where a prior is improper."""


def warn_of_sample() -> bool:
    """Warns that a sample is of the truncation of the log-uniform prior, if somebody uses it.

    Returns:
        Whether somebody does, which is not so where the model is run to learn shapes, relations or initial values.

    Example:
        >>> from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
        >>> with InitMessenger(init_to_sample):
        ...     warn_of_sample()
        False
    """
    learning = [place for place, handler in enumerate(_PYRO_STACK) if _only_learns(handler)]
    # A Markov chain learns its shapes of a model that enumerates, and then uses the density.
    if learning and not any(isinstance(handler, EnumMessenger) for handler in _PYRO_STACK[learning[0] :]):
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
