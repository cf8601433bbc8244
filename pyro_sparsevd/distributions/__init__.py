"""The prior and the posterior as Pyro distributions, and their KL."""

__all__ = ["EmpiricalBayesNormal", "ImproperPriorWarning", "LogUniform", "SparseNormal", "kl_normal_log_uniform"]

from .empirical_normal import EmpiricalBayesNormal
from .improper import ImproperPriorWarning
from .kl import kl_normal_log_uniform
from .log_uniform import LogUniform
from .sparse_normal import SparseNormal
