"""The guide and the bound."""

__all__ = [
    "AutoSparseNormal",
    "LinearWarmup",
    "LocalReparamGap",
    "SparseVD_ELBO",
    "init_to_weights",
    "local_reparam_gap",
]

from .autoguide import AutoSparseNormal
from .elbo import SparseVD_ELBO
from .initialization import init_to_weights
from .local_gap import LocalReparamGap, local_reparam_gap
from .schedules import LinearWarmup
