"""Which latents of a guide may depend on each other against the order of the model."""

__all__ = ["against_the_order", "is_factorised"]

from collections.abc import Callable
from typing import Any

from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from pyro.poutine.messenger import unwrap

from ..distributions.empirical_normal import EmpiricalBayesNormal
from ..distributions.log_uniform import LogUniform
from ..distributions.util import unwrap_independent
from ..nn.scales import ShrunkWeightPrior
from ..nn.sites import WeightPrior
from ..poutine.trace import Sites
from .autoguide import AutoSparseNormal
from .masked import SparsifiedGuide

_FACTORISED = {guide.forward for guide in (AutoSparseNormal, SparsifiedGuide, AutoNormal, AutoDelta)}


def is_factorised(guide: Callable) -> bool:
    """Tells whether a guide is known to sample every latent independently of all others.

    Args:
        guide: The guide, in any handlers.

    Returns:
        False where nothing is known.

    Example:
        >>> is_factorised(pyro.poutine.scale(AutoSparseNormal(lambda: None), 2.0)), is_factorised(lambda: None)
        (True, False)
    """
    within: Any = unwrap(guide)
    if type(within) is AutoGuideList:
        return all(is_factorised(part) for part in within)
    return getattr(type(within), "forward", None) in _FACTORISED


def against_the_order(model_sites: Sites, guide_sites: Sites) -> list[str]:
    """Returns the latents whose prior may depend on a latent that the guide samples later.

    That later one may depend on them in the guide, so that no divergence given its value is to be had in closed form.

    Args:
        model_sites: The sites of the model, as they were sampled.
        guide_sites: Those of the guide.

    Returns:
        The names; not those of priors that depend on no latent.

    Example:
        >>> with svd.poutine.trace.SiteTrace() as model:
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     y = pyro.sample("y", dist.Normal(x, 1.0))
        >>> against_the_order(model.found, dict(reversed(model.found.items())))
        ['y']
    """
    places = {name: place for place, name in enumerate(guide_sites)}
    found, latest = [], -1
    for name, site in model_sites.items():
        if name in places and not site["is_observed"]:
            if places[name] < latest and not _is_fixed(site["fn"]):
                found.append(name)
            latest = max(latest, places[name])
    return found


def _is_fixed(prior: Any) -> bool:
    if isinstance(prior, WeightPrior):
        return not isinstance(prior, ShrunkWeightPrior)
    base = unwrap_independent(prior)
    return isinstance(base, EmpiricalBayesNormal) or (isinstance(base, LogUniform) and not base.is_proper)
