"""Dependence of a guide's latents on each other, where it rules out a KL in closed form."""

__all__ = ["is_factorised", "sampled_before_parents"]

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
    """Tells whether a guide, in any handlers, is known to sample every latent independently of all others."""
    within: Any = unwrap(guide)
    if type(within) is AutoGuideList:
        return all(is_factorised(part) for part in within)
    return getattr(type(within), "forward", None) in _FACTORISED


def sampled_before_parents(model_sites: Sites, guide_sites: Sites) -> list[str]:
    """Returns the names of latents whose prior may depend on a latent that the guide samples later.

    That later one may depend on them in the guide, so their KL given its value has no closed form.
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
