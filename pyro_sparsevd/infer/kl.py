"""KL(q || p) of a guide's latents: in closed form where one is known, else from one sample."""

__all__ = ["KL", "Terms", "kl_terms"]

import logging
import math
import warnings
from collections.abc import Collection, Iterable
from typing import Any, Literal, TypeAlias, cast

import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from ..distributions.improper import ImproperPriorWarning
from ..distributions.kl import kl_normal_log_uniform
from ..distributions.log_uniform import LogUniform
from ..distributions.util import unmasked, unwrap_independent
from ..distributions.validation import parameters_are_valid
from ..ops.divergence import Form
from ..poutine.kl import kl_log_uniform_total
from ..poutine.trace import log_prob
from ..poutine.unsampled_weight import UnsampledWeight
from .gaussians import as_gaussian

logger = logging.getLogger(__name__)

KL = Literal["approximate", "exact", "monte_carlo"]
Terms: TypeAlias = list[tuple[str, Tensor]]  # names of sites and what they add to a bound


def kl_terms(latents: Iterable[tuple[str, Any, Any]], kl: KL, joint: Collection[str], warned: set[str]) -> Terms:
    """Returns KL(q || p) of latents, each a name with its sites in the guide and the model, by the names of the sites.

    The terms are in nats over the data set, with the scale and mask of each site. Weights under the log-uniform prior
    that were not sampled are taken together, which is faster, those of the same scale in one term. ``joint`` names the
    latents that have no KL of their own, given the others: their densities are taken at the sample. Where no closed
    form is known, a debug-level log names the site, and where the prior is improper a warning, unless ``warned`` does.
    """
    terms: Terms = []
    lazy: dict[float, list[UnsampledWeight]] = {}
    for name, q, p in latents:
        prior = unwrap_independent(p["fn"])
        if kl == "monte_carlo" or name in joint:
            terms.append((name, _sampled(name, q, p)))
        elif isinstance(prior, LogUniform) and _is_lazy_of_shape(prior, q, p):
            lazy.setdefault(q["scale"], []).append(q["value"])
            if prior.is_proper:
                kept = getattr(q["value"].base_dist, "kept", 1)
                terms.append((name, (prior.log_normalizer * kept).sum() * q["scale"]))
        else:
            known = _closed_form(q, p, kl)
            if known is None:
                _report(name, q["fn"], p["fn"], warned)
                known = _sampled(name, q, p)
            terms.append((name, known))
    for scale, weights in lazy.items():
        names = ", ".join(weight.site for weight in weights)
        terms.append((names, scale * kl_log_uniform_total(weights, cast(Form, kl))))
    return terms


def _sampled(name: str, q: Any, p: Any) -> Tensor:
    """Returns log q - log p, both at the one sample."""
    if isinstance(q["value"], UnsampledWeight):
        sample = q["value"].value_for_density()
        q, p = {**q, "value": sample}, {**p, "value": sample}
    q, p = _mask_dropped(q, p)
    try:
        return log_prob(q) - log_prob(p)
    except NotImplementedError as error:
        raise ValueError(f"{name}: {error}") from error


def _report(name: str, q: Distribution, p: Distribution, warned: set[str]) -> None:
    logger.debug("%s: no closed form of KL(%s || %s), sampling it", name, q, p)
    prior = unwrap_independent(unmasked(p)[0])
    if isinstance(prior, LogUniform) and not prior.is_proper and name not in warned:
        warned.add(name)
        warnings.warn(
            f"{name}: no closed form of the divergence of this guide's {type(unwrap_independent(q)).__name__} from the "
            "improper log-uniform prior is known, so it is sampled, with a gradient of infinite variance; use a "
            "Gaussian of independent elements, as of AutoSparseNormal or AutoNormal, or LogUniform(low, high)",
            ImproperPriorWarning,
            stacklevel=2,
        )


def _is_lazy_of_shape(prior: LogUniform, q: Any, p: Any) -> bool:
    return (
        type(q["value"]) is UnsampledWeight
        and prior.batch_shape == q["value"].base_dist.batch_shape
        and isinstance(q["scale"], float)
        and q["mask"] is None
        and _are_same(q["scale"], p["scale"])
        and _are_same(q["mask"], p["mask"])
    )


def _are_same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first is second or torch.equal(first, second)
    return type(first) is type(second) and first == second


def _closed_form(q: Any, p: Any, form: Any) -> Tensor | None:
    """Returns E[c log q - d log p], c and d the scales and masks of the two, or None where no closed form is known.

    That is d KL(q || p) + (d - c) H(q), which is the divergence where they are the same.
    """
    (q_fn, q_mask), (p_fn, p_mask) = unmasked(as_gaussian(q["fn"])), unmasked(p["fn"])
    q_base, p_base = as_gaussian(unwrap_independent(q_fn)), unwrap_independent(p_fn)
    if isinstance(q_base, Delta):  # Pyro's KL of a Delta ignores its log_density
        return None
    event_dims = len(q_base.batch_shape) - len(q_fn.batch_shape)
    is_same = all(_are_same(*pair) for pair in ((q["scale"], p["scale"]), (q["mask"], p["mask"]), (q_mask, p_mask)))
    if q_base.batch_shape == p_base.batch_shape:
        kept = getattr(q_base, "kept", True)
        q_mask, p_mask = q_mask & kept, p_mask & kept
    elif q_mask is True and p_mask is True:  # one of them is multivariate
        q_base, p_base, event_dims = q_fn, p_fn, 0
    else:
        return None
    try:
        if isinstance(q_base, torch.distributions.Normal) and isinstance(p_base, LogUniform):
            known = kl_normal_log_uniform(q_base, p_base, form)
        else:
            known = kl_divergence(q_base, p_base)
        total = _counted(known, p, p_mask, event_dims)
        if not is_same:
            entropy = q_base.entropy()
            total = total + _counted(entropy, p, p_mask, event_dims) - _counted(entropy, q, q_mask, event_dims)
    except NotImplementedError:
        return None
    valid = parameters_are_valid(q["fn"], p["fn"])
    return total if valid is None else torch.where(valid, total, math.nan)


def _counted(values: Tensor, site: Any, mask: Any, event_dims: int) -> Tensor:
    """Returns the sum of the values of a site's elements, scaled and masked as the site is."""
    if mask is not True:
        values = scale_and_mask(values, mask=mask)
    scale, mask = (
        factor.reshape(factor.shape + (1,) * event_dims) if isinstance(factor, Tensor) else factor
        for factor in (site["scale"], site["mask"])
    )
    return scale_and_mask(values, scale, mask).sum()


def _mask_dropped(q: Any, p: Any) -> tuple[Any, Any]:
    """Masks the weights that the guide holds at zero, in the sites of guide and model, if there are any."""
    kept = getattr(unwrap_independent(q["fn"]), "kept", None)
    if kept is None or unwrap_independent(p["fn"]).batch_shape != kept.shape:
        return q, p
    return _masked(q, kept), _masked(p, kept)


def _masked(site: Any, kept: Tensor) -> Any:
    fn: Any = unwrap_independent(site["fn"])
    value = torch.where(kept, site["value"], 1.0)  # as 0 may have no density
    return {**site, "fn": fn.mask(kept).to_event(len(site["fn"].event_shape)), "value": value}
