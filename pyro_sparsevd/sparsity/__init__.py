"""From a posterior to a sparse network."""

__all__ = [
    "SiteSparsity",
    "SparsitySummary",
    "SweepPoint",
    "choose_threshold",
    "fixed_sparsity",
    "prune",
    "quantization_steps",
    "smoothed_threshold",
    "sparsify",
    "threshold_sweep",
]

from .pruning import fixed_sparsity, prune
from .quantization import quantization_steps
from .summary import SiteSparsity, SparsitySummary, sparsify
from .threshold import SweepPoint, choose_threshold, smoothed_threshold, threshold_sweep
