"""The divergence of latents from their priors: in closed form where one is known, else from one sample."""

__all__ = ["KL", "Terms", "divergences"]

import logging
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, cast

import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask, sum_rightmost
from torch import Tensor
from torch.distributions import kl_divergence

from .distributions import LogUniform, kl_normal_log_uniform, unwrap_independent
from .divergence import Form
from .lazy_weight import LazyWeight, kl_log_uniform_total
from .masking import kept_parts
from .records import log_prob

logger = logging.getLogger(__name__)

KL = Literal["approximate", "exact", "monte_carlo"]
Terms: TypeAlias = list[tuple[str, Tensor]]  # names of sites and what they add to a bound


def divergences(latents: Iterable[tuple[str, Any, Any]], kl: KL) -> Terms:
    """Returns KL(q || p) of latents, each with the scale and the mask of its site.

    Weights under the log-uniform prior that were not drawn are taken together, which is faster, those of the same
    scale in one term. Where no closed form is known, a debug-level log names the site.

    Args:
        latents: For each the name of the site, the site in the guide and the site in the model.
        kl: The form of the divergence from the log-uniform prior, or ``"monte_carlo"`` for one sample of every latent.

    Returns:
        Scalars, in nats over the data set, by the names of the sites that they are of.

    Raises:
        ValueError: If a prior has no density where one is needed.

    Example:
        >>> q, p = ({"fn": dist.Normal(mean, 1.0), "scale": 10.0, "mask": None} for mean in (0.0, 1.0))
        >>> divergences([("w", q, p)], "exact")
        [('w', tensor(5.))]
    """
    terms: Terms = []
    lazy: dict[float, list[LazyWeight]] = {}
    for name, q, p in latents:
        prior = unwrap_independent(p["fn"])
        if kl != "monte_carlo" and isinstance(prior, LogUniform) and _is_lazy_of_shape(prior, q, p):
            lazy.setdefault(q["scale"], []).append(q["value"])
            if prior.is_proper:
                kept = getattr(q["value"].base_dist, "kept", 1)
                terms.append((name, (prior.log_normalizer * kept).sum() * q["scale"]))
        else:
            terms.append((name, _divergence(name, q, p, kl)))
    for scale, weights in lazy.items():
        names = ", ".join(weight.site for weight in weights)
        terms.append((names, scale * kl_log_uniform_total(weights, cast(Form, kl))))
    return terms


def _divergence(name: str, q: Any, p: Any, kl: KL) -> Tensor:
    if kl != "monte_carlo":
        if _have_same_scale_and_mask(q, p):
            known = _closed_form(q, p, kl)
            if known is not None:
                return scale_and_mask(known, q["scale"], q["mask"]).sum()
        logger.debug("%s: no closed form of KL(%s || %s), sampling it", name, q["fn"], p["fn"])
    q, p = kept_parts(q, p)
    try:
        return log_prob(q) - log_prob(p)
    except NotImplementedError as error:
        raise ValueError(f"{name}: {error}") from error


def _is_lazy_of_shape(prior: LogUniform, q: Any, p: Any) -> bool:
    return (
        type(q["value"]) is LazyWeight
        and prior.batch_shape == q["value"].base_dist.batch_shape
        and isinstance(q["scale"], float)
        and q["mask"] is None
        and _have_same_scale_and_mask(q, p)
    )


def _have_same_scale_and_mask(q: Any, p: Any) -> bool:
    return _are_same(q["scale"], p["scale"]) and _are_same(q["mask"], p["mask"])


def _are_same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first is second or torch.equal(first, second)
    return type(first) is type(second) and first == second


def _closed_form(q: Any, p: Any, form: Any) -> Tensor | None:
    """Returns the divergence of a site with its batch shape, or None where no closed form is known."""
    base_q, base_p = unwrap_independent(q["fn"]), unwrap_independent(p["fn"])
    if isinstance(base_q, torch.distributions.Normal) and isinstance(base_p, LogUniform):
        return sum_rightmost(kl_normal_log_uniform(base_q, base_p, form), len(p["fn"].event_shape))
    if isinstance(base_q, Delta):  # Pyro's rule for it ignores the density that an AutoNormal gives it
        return None
    q, p = kept_parts(q, p)
    try:
        return kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return None
