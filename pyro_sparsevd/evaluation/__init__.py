"""Accuracy, calibration and uncertainty of predictions; comparison of priors."""

__all__ = [
    "Predictions",
    "PriorComparison",
    "PriorResult",
    "compare_priors",
    "entropies",
    "network_predictions",
    "ood_auroc",
    "sampled_predictions",
    "scores",
]

from .compare import compare_priors
from .metrics import entropies, ood_auroc, scores
from .predictions import Predictions, network_predictions, sampled_predictions
from .report import PriorComparison, PriorResult
