"""The sample sites of a run of a model or guide: a lean trace and replay, and the densities of its sites."""

__all__ = ["SampleSites", "Sites", "log_prob", "scored"]

from typing import Any, TypeAlias

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .distributions import IMPROPER_LOG_NORMALIZER, LogUniform, unwrap_independent
from .lazy_weight import LazyWeight

Sites: TypeAlias = dict[str, Any]


class SampleSites(Messenger):
    """Records sample sites, those of latents with the values of other sites of the names.

    Args:
        values_from: The sites whose values latents take, by name.

    Example:
        >>> with SampleSites() as sites:
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        >>> list(sites.found)
        ['w']
    """

    def __init__(self, values_from: Sites | None = None) -> None:
        super().__init__()
        self.values_from = values_from or {}
        self.found: Sites = {}

    def _pyro_sample(self, msg: Any) -> None:
        source = self.values_from.get(msg["name"])
        if source is not None and not msg["is_observed"]:
            msg["value"], msg["infer"], msg["done"] = source["value"], source["infer"], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["infer"].get("_do_not_trace") or msg["infer"].get("_deterministic"):
            return
        if msg["name"] in self.found:
            raise ValueError(f"{msg['name']}: expected a name for every sample site, but two share this one")
        self.found[msg["name"]] = msg.copy()


def scored(sites: Sites) -> Sites:
    """Returns the sites that have a density, which the choice of a subsample has not.

    Args:
        sites: The sites by name.

    Returns:
        Those of them.

    Example:
        >>> scored({})
        {}
    """
    return {name: site for name, site in sites.items() if not site_is_subsample(site)}


def log_prob(site: Any) -> Tensor:
    """Returns the log density of a site's value in nats, scaled, masked and summed.

    An improper log-uniform prior counts with the constant with which its divergence vanishes as α → ∞.

    Args:
        site: A recorded site.

    Returns:
        A scalar.

    Example:
        >>> with SampleSites() as sites:
        ...     w = pyro.sample("w", dist.Delta(torch.zeros(3)).to_event(1))
        >>> log_prob(sites.found["w"])
        tensor(0.)
    """
    fn, value = site["fn"], site["value"]
    base = unwrap_independent(fn)
    is_improper = isinstance(base, LogUniform) and not base.is_proper
    value = value.value_for_density() if isinstance(value, LazyWeight) else value
    if is_improper:  # a draw that rounding made 0, once in some 1e9, has no density
        value = torch.where(value == 0, torch.finfo(value.dtype).eps, value)
    density = fn.log_prob(value)
    if is_improper:
        density = density + IMPROPER_LOG_NORMALIZER * fn.event_shape.numel()
    return scale_and_mask(density, site["scale"], site["mask"]).sum()
