"""Figures from plain data; imported on demand."""

__all__ = [
    "animate",
    "animate_weight_images",
    "intervals",
    "kept_weights",
    "log_alpha_histogram",
    "mean_and_scale",
    "threshold_curves",
    "training_curves",
    "weight_images",
]

from .comparison import intervals
from .curves import threshold_curves, training_curves
from .posterior import kept_weights, log_alpha_histogram, mean_and_scale
from .weights import animate, animate_weight_images, weight_images
