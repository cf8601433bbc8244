"""Numbers: divergences, linear operations that sample their output, loops over all weights. torch only."""

__all__ = ["divergence"]

from . import divergence
