"""From a torch network to a Pyro model."""

__all__ = [
    "GaussianLikelihood",
    "Supervised",
    "bayesianize",
    "choose",
    "fan_in_normal",
    "group_normal_jeffreys",
    "horseshoe",
    "scale_mixture",
]

from .bayesianize import bayesianize
from .likelihoods import GaussianLikelihood
from .priors import fan_in_normal, group_normal_jeffreys, horseshoe, scale_mixture
from .selection import choose
from .supervised import Supervised
