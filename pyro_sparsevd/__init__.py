"""Sparse Variational Dropout for every Pyro model and torch network (Molchanov, Ashukha, Vetrov, 2017).

The rooms, in order of dependence; each imports only from those above it::

    ops            numerics: KL divergences, and linear operations that sample their output
    distributions  prior and posterior as Pyro distributions, and their KL
    poutine        effect handlers: deferred weights, and the local reparameterisation
    nn             bayesianize and Supervised: from a torch network to a Pyro model
    infer          AutoSparseNormal and SparseVD_ELBO: the guide and the bound
    shrink         from a network with zeros to a smaller one
    storage        networks as small files, and as ONNX
    sparsity       sparsify, prune and thresholds: from a posterior to a sparse network
    plots          figures from plain data; imported on demand
    training       from batches of data to a posterior
    evaluation     scores of predictions; comparison of priors
"""

__all__ = [
    "AutoSparseNormal",
    "EmpiricalBayesNormal",
    "GaussianLikelihood",
    "ImproperPriorWarning",
    "LinearWarmup",
    "LogUniform",
    "SparseNormal",
    "SparseVD_ELBO",
    "Supervised",
    "bayesianize",
    "choose",
    "compare_priors",
    "divergence",
    "export_onnx",
    "fit",
    "fixed_sparsity",
    "group_normal_jeffreys",
    "horseshoe",
    "init_to_weights",
    "load_sparse",
    "local_reparam",
    "prune",
    "recompute_contexts",
    "save_sparse",
    "shrink",
    "shrink_report",
    "sparsify",
    "threshold_sweep",
    "to_sparse",
]

__version__ = "0.1.0"

from .distributions import EmpiricalBayesNormal, ImproperPriorWarning, LogUniform, SparseNormal
from .evaluation import compare_priors
from .infer import AutoSparseNormal, LinearWarmup, SparseVD_ELBO, init_to_weights
from .nn import GaussianLikelihood, Supervised, bayesianize, choose, group_normal_jeffreys, horseshoe
from .nn import fan_in_normal as fan_in_normal
from .nn import scale_mixture as scale_mixture
from .ops import divergence
from .poutine import local_reparam, recompute_contexts
from .shrink import shrink, shrink_report, to_sparse
from .sparsity import fixed_sparsity, prune, sparsify, threshold_sweep
from .sparsity import quantization_steps as quantization_steps
from .storage import StorageError as StorageError
from .storage import export_onnx, load_sparse, save_sparse
from .training.fit import fit
