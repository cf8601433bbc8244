"""Accuracy, calibration and uncertainty of predictions; comparison of priors."""

__all__ = [
    "PriorComparison",
    "PriorResult",
    "Uncertainty",
    "compare_priors",
    "entropies",
    "network_log_probs",
    "ood_auroc",
    "sampled_log_probs",
    "uncertainty",
]

from .compare import compare_priors
from .metrics import Uncertainty, entropies, network_log_probs, ood_auroc, sampled_log_probs, uncertainty
from .report import PriorComparison, PriorResult
