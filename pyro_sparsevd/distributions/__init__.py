"""The prior and the posterior as Pyro distributions, and their divergences."""

__all__ = ["EmpiricalNormal", "ImproperPriorWarning", "LogUniform", "SparseNormal", "kl_normal_log_uniform"]

from .empirical_normal import EmpiricalNormal
from .improper import ImproperPriorWarning
from .kl import kl_normal_log_uniform
from .log_uniform import LogUniform
from .sparse_normal import SparseNormal
