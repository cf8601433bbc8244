"""Sparse Variational Dropout for every Pyro model and torch network (Molchanov, Ashukha, Vetrov, 2017).

The rooms, in order of dependence; each imports only from those above it::

    ops            numerics: KL divergences, and linear operations that sample their output
    distributions  prior and posterior as Pyro distributions, and their KL
    plots          figures from plain data; imported on demand
    poutine        effect handlers: deferred weights, and the local reparameterisation
    nn             bayesianize and Supervised: from a torch network to a Pyro model
    infer          AutoSparseNormal and SparseVD_ELBO: the guide and the bound
    shrink         from a network with zeros to a smaller one
    storage        networks as small files, and as ONNX
    sparsity       sparsify, prune and thresholds: from a posterior to a sparse network
    training       from batches of data to a posterior
    evaluation     scores of predictions; comparison of priors
"""

__all__ = [
    "AutoSparseNormal",
    "EmpiricalBayesNormal",
    "GaussianLikelihood",
    "LinearWarmup",
    "LogUniform",
    "SparseNormal",
    "SparseVD_ELBO",
    "Supervised",
    "bayesianize",
    "compare_priors",
    "divergence",
    "export_onnx",
    "fit",
    "fixed_sparsity",
    "load_sparse",
    "local_reparam",
    "prune",
    "save_sparse",
    "shrink",
    "sparsify",
    "threshold_sweep",
]

__version__ = "0.1.0"

from .distributions import EmpiricalBayesNormal, LogUniform, SparseNormal
from .distributions import ImproperPriorWarning as ImproperPriorWarning
from .evaluation import compare_priors
from .infer import AutoSparseNormal, LinearWarmup, SparseVD_ELBO
from .infer import init_to_weights as init_to_weights
from .nn import GaussianLikelihood, Supervised, bayesianize
from .nn import choose as choose
from .nn import fan_in_normal as fan_in_normal
from .nn import group_normal_jeffreys as group_normal_jeffreys
from .nn import horseshoe as horseshoe
from .nn import scale_mixture as scale_mixture
from .ops import divergence
from .poutine import local_reparam
from .poutine import recompute_contexts as recompute_contexts
from .shrink import shrink
from .shrink import shrink_report as shrink_report
from .shrink import to_sparse as to_sparse
from .sparsity import fixed_sparsity, prune, sparsify, threshold_sweep
from .sparsity import quantization_steps as quantization_steps
from .storage import StorageError as StorageError
from .storage import export_onnx, load_sparse, save_sparse
from .training.fit import fit
