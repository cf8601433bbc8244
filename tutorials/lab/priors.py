"""The priors of weights that are in common use, to be compared."""

__all__ = ["common_priors"]

import pyro.distributions as dist

from pyro_sparsevd.distributions.empirical_normal import EmpiricalBayesNormal
from pyro_sparsevd.distributions.log_uniform import LogUniform
from pyro_sparsevd.nn.bayesianize import Prior
from pyro_sparsevd.nn.priors import fan_in_normal, group_normal_jeffreys, horseshoe, scale_mixture


def common_priors() -> dict[str, Prior]:
    """Returns priors for :func:`~.bayesianize.bayesianize` by name: those that make weights sparse, and others.

    Returns:
        Ten priors. The scales of those that have a fixed one are of the order of 1; the groups of the last are the
        inputs of each layer.

    Example:
        >>> list(common_priors())[:4]
        ['log-uniform', 'relevance (ARD)', 'normal, scale learnt', 'normal']
    """
    return {
        "log-uniform": LogUniform(),
        "relevance (ARD)": EmpiricalBayesNormal(),
        "normal, scale learnt": EmpiricalBayesNormal(()),
        "normal": dist.Normal(0.0, 1.0),
        "normal by fan-in": fan_in_normal(),
        "Laplace": dist.Laplace(0.0, 1.0),
        "Student's t": dist.StudentT(3.0, 0.0, 1.0),
        "scale mixture": scale_mixture(),
        "horseshoe": horseshoe(),
        "group normal-Jeffreys, inputs": group_normal_jeffreys((1,)),
    }
