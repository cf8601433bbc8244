"""Sparse Variational Dropout for every Pyro model and torch network."""

from . import divergence as divergence
from .distributions import ImproperPriorWarning as ImproperPriorWarning
from .distributions import LogUniform as LogUniform
from .distributions import SparseNormal as SparseNormal
from .elbo import SparseVD_ELBO as SparseVD_ELBO
from .guides import AutoSparseNormal as AutoSparseNormal
from .guides import init_to_weights as init_to_weights
from .local_reparam import local_reparam as local_reparam
from .priors import Supervised as Supervised
from .priors import bayesianize as bayesianize
from .schedules import LinearWarmup as LinearWarmup
