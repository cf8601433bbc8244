"""Pictures from plain data; imported on demand."""

__all__ = [
    "animate_weight_images",
    "compression_curves",
    "connections",
    "divergences",
    "log_alpha_histogram",
    "mean_and_scale",
    "prior_and_posteriors",
    "prior_comparison",
    "threshold_curves",
    "training_curves",
    "weight_images",
]

from .curves import compression_curves, threshold_curves, training_curves
from .posterior import divergences, log_alpha_histogram, mean_and_scale, prior_and_posteriors
from .priors import prior_comparison
from .weights import animate_weight_images, connections, weight_images
