"""Sparse Variational Dropout for every Pyro model and torch network.

Rooms, as Pyro's own; each imports only from those above it::

    ops            numbers: divergences, linear operations that sample their output
    distributions  the prior and the posterior as Pyro distributions, and their KL
    poutine        effect handlers: the weight that is not sampled, outputs sampled instead
    nn             bayesianize and Supervised: a torch network as a Pyro model
    infer          AutoSparseNormal and SparseVD_ELBO: the guide and the bound
    shrink         a network with zeros as a smaller one
    storage        a network as a small file, or for runtimes without torch
    sparsity       sparsify and prune: from the posterior to a sparse network
    training       from batches to a posterior
    evaluation     how good and how sure predictions are; priors side by side
    plots          pictures from plain data; imported on demand

References:
    | Variational Dropout Sparsifies Deep Neural Networks (Molchanov, Ashukha, Vetrov, 2017)
    | https://arxiv.org/abs/1701.05369
"""

__version__ = "0.1.0"

from .distributions import ImproperPriorWarning as ImproperPriorWarning
from .distributions.empirical_normal import EmpiricalNormal as EmpiricalNormal
from .distributions.log_uniform import LogUniform as LogUniform
from .distributions.sparse_normal import SparseNormal as SparseNormal
from .infer.autoguide import AutoSparseNormal as AutoSparseNormal
from .infer.elbo import SparseVD_ELBO as SparseVD_ELBO
from .infer.initialization import init_to_weights as init_to_weights
from .infer.local_gap import local_reparam_gap as local_reparam_gap
from .infer.schedules import LinearWarmup as LinearWarmup
from .nn.bayesianize import bayesianize as bayesianize
from .nn.likelihoods import GaussianLikelihood as GaussianLikelihood
from .nn.priors import fan_in_normal as fan_in_normal
from .nn.priors import group_normal_jeffreys as group_normal_jeffreys
from .nn.priors import horseshoe as horseshoe
from .nn.priors import scale_mixture as scale_mixture
from .nn.selection import choose as choose
from .nn.supervised import Supervised as Supervised
from .ops import divergence as divergence
from .poutine.local_reparam import local_reparam as local_reparam
from .poutine.trace import checkpoint_contexts as checkpoint_contexts
from .shrink.report import shrink_report as shrink_report
from .shrink.shrink import shrink as shrink
from .shrink.sparse_linear import to_sparse as to_sparse
from .sparsity.pruning import fixed_sparsity as fixed_sparsity
from .sparsity.pruning import prune as prune
from .sparsity.quantization import quantization_steps as quantization_steps
from .sparsity.summary import SparsitySummary as SparsitySummary
from .sparsity.summary import sparsify as sparsify
from .sparsity.threshold import threshold_sweep as threshold_sweep
from .storage.onnx import export_onnx as export_onnx
from .storage.sparse_file import StorageError as StorageError
from .storage.sparse_file import load_sparse as load_sparse
from .storage.sparse_file import register_architecture as register_architecture
from .storage.sparse_file import save_sparse as save_sparse
