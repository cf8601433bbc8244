"""Sparse Variational Dropout for every Pyro model and torch network.

Data walks down this list of modules, and a module imports only from those above it::

    _compat          what is private to torch and Pyro, and used
    kernels          the divergences and their slopes as functions of 1/α: torch only
    fused            the loops over all weights in one pass, where a C compiler was at hand: torch only
    blocks           elementwise work in blocks, with scratch memory that is used again: torch only
    divergence       KL(N(θ, σ²) || log-uniform), approximate and exact, and log α: torch only
    workspace        memory that is used again: torch only
    geometry         sizes, padding and patches of convolutions: torch only
    improper         the warning about samples of an improper prior, where they are used
    distributions    LogUniform, SparseNormal
    gaussians        Gaussians that a guide writes in other ways
    weight_priors    other priors of weights, and what a Gaussian costs under them
    plain            plain networks: checks, and evaluation mode for a while
    sites            what a parameter of a network is after it was given a prior
    local_functions  linear operations that sample their output: torch only
    lazy_weight      the weight that is not drawn until somebody needs its numbers
    local_reparam    outputs sampled instead of weights, as an effect handler
    masking          the posterior with dropped weights at zero
    records          the sample sites of a run, and their densities
    hierarchical     priors whose scales are latents, too: horseshoe, group_normal_jeffreys
    weights          which parameters are weights, and which parameters can have no prior: torch only
    selection        which parameters to give one
    store_names      names of a model's or guide's own in Pyro's parameter store
    network_context  the context of a call of a network with priors
    priors           bayesianize: priors onto a network
    supervised       Supervised: network + likelihood + data-set size
    likelihoods      GaussianLikelihood
    common_priors    ten priors to compare
    latents          what a guide learns about the latents of a model
    initialization   where a guide starts
    parameters       the parameters of a factorised Gaussian guide
    guides           AutoSparseNormal
    dependence       which latents of a guide may depend on each other against the order of the model
    schedules        KL weights as pure functions of the step
    checks           of what goes into a bound
    site_divergence  KL of latents: in closed form where one is known, else sampled
    site_names       sets of sites by name or glob
    loss_module      the bound as a torch module, and the parameters that no optimiser would see
    elbo             SparseVD_ELBO
    local_gap        what sampling outputs instead of weights makes of a bound
    tables           of text, as characters and as HTML
    summary          sparsify: which weights matter
    sweep            threshold_sweep: error and compression against the threshold
    pruning          prune: a plain sparse network; masks_held: to train it on
    units            features and channels of the tensors within a network: torch only
    unit_flow        how units pass through one operation: torch only
    operations       which node of a traced network is which operation: torch only
    dead_units       which units make no difference
    layer_sizes      units, parameters and multiply-adds of each layer, before and after
    shrinking        shrink: a sparse network without its dead units
    sparse_layers    to_sparse: linear layers that multiply only the weights that are left
    nets, datasets   the paper's networks; readers for MNIST, CIFAR-10, bundled digits; regression data sets
    range_coder      integers of known probabilities as few bits
    coding           models of where the weights of a sparse matrix are, and how large
    container        the file of a sparse network
    quantization     weights as multiples of a step as wide as the posterior
    tensor_codes     tensors of every dtype as bytes, and back
    storage          save_sparse, load_sparse: a network as one small file
    export           export_onnx: a network for runtimes without torch
    checkpoints      files that a training goes on from
    training         a loop that goes on where it was killed
    metrics          how good and how sure the predictions of a classifier are
    recipes          from data to a sparse classifier, as it was measured to work
    comparison       what a comparison of priors found, as numbers and as a table
    compare          compare_priors: a network under several priors, measured on held-out data
    drawing          colours, line styles and axes that the pictures share
    weight_plots     pictures of weights from plain data
    curve_plots      pictures of error, compression and the bound
    plots            pictures from plain data; imported on demand

References:
    | Variational Dropout Sparsifies Deep Neural Networks (Molchanov, Ashukha, Vetrov, 2017)
    | https://arxiv.org/abs/1701.05369
"""

__version__ = "0.1.0"

from . import divergence as divergence
from .distributions import ImproperPriorWarning as ImproperPriorWarning
from .distributions import LogUniform as LogUniform
from .distributions import SparseNormal as SparseNormal
from .elbo import SparseVD_ELBO as SparseVD_ELBO
from .export import export_onnx as export_onnx
from .guides import AutoSparseNormal as AutoSparseNormal
from .hierarchical import group_normal_jeffreys as group_normal_jeffreys
from .hierarchical import horseshoe as horseshoe
from .initialization import init_to_weights as init_to_weights
from .likelihoods import GaussianLikelihood as GaussianLikelihood
from .local_gap import local_reparam_gap as local_reparam_gap
from .local_reparam import local_reparam as local_reparam
from .priors import bayesianize as bayesianize
from .pruning import masks_held as masks_held
from .pruning import prune as prune
from .quantization import quantization_steps as quantization_steps
from .records import checkpoint_contexts as checkpoint_contexts
from .schedules import LinearWarmup as LinearWarmup
from .selection import choose as choose
from .shrinking import shrink as shrink
from .shrinking import shrink_with_report as shrink_with_report
from .sparse_layers import to_sparse as to_sparse
from .storage import StorageError as StorageError
from .storage import load_sparse as load_sparse
from .storage import register_architecture as register_architecture
from .storage import save_sparse as save_sparse
from .summary import SparsitySummary as SparsitySummary
from .summary import sparsify as sparsify
from .supervised import Supervised as Supervised
from .sweep import threshold_sweep as threshold_sweep
from .weight_priors import EmpiricalNormal as EmpiricalNormal
from .weight_priors import fan_in_normal as fan_in_normal
from .weight_priors import scale_mixture as scale_mixture
