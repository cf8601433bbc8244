"""From a torch network to a Pyro model."""

__all__ = [
    "PRIOR_NAMES",
    "GaussianLikelihood",
    "HeteroscedasticGaussianLikelihood",
    "HierarchicalPrior",
    "NegativeBinomialLikelihood",
    "StudentTLikelihood",
    "Supervised",
    "bayesianize",
    "choose",
    "fan_in_normal",
    "group_normal_jeffreys",
    "horseshoe",
    "named_prior",
    "scale_mixture",
]

from .bayesianize import bayesianize
from .likelihoods import (
    GaussianLikelihood,
    HeteroscedasticGaussianLikelihood,
    NegativeBinomialLikelihood,
    StudentTLikelihood,
)
from .priors import PRIOR_NAMES, fan_in_normal, group_normal_jeffreys, horseshoe, named_prior, scale_mixture
from .scales import HierarchicalPrior
from .selection import choose
from .supervised import Supervised
