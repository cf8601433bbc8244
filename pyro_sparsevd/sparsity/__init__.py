"""From a posterior to a sparse network."""

__all__ = [
    "SparsitySummary",
    "choose_threshold",
    "fixed_sparsity",
    "prune",
    "quantization_steps",
    "sparsify",
    "threshold_sweep",
]

from .pruning import fixed_sparsity, prune
from .quantization import quantization_steps
from .summary import SparsitySummary, sparsify
from .threshold import choose_threshold, threshold_sweep
