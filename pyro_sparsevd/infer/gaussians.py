"""Gaussians that a guide writes as transforms of Gaussians, or as a Delta at an auxiliary Gaussian site."""

__all__ = ["as_gaussian", "parts_of", "with_auxiliary_sites_exchanged"]

from typing import Any

import torch
from pyro.distributions import Delta, Independent, Normal
from torch.distributions import Distribution, TransformedDistribution
from torch.distributions.transforms import AffineTransform, ComposeTransform, IndependentTransform, Transform

from ..distributions.util import unwrap_independent


def as_gaussian(distribution: Any) -> Any:
    """Returns the Gaussian that affine transforms make of a Gaussian; any other distribution as it is."""
    if not isinstance(distribution, TransformedDistribution):
        return distribution
    base = unwrap_independent(distribution.base_dist)
    if not isinstance(base, torch.distributions.Normal):
        return distribution
    for part in parts_of(ComposeTransform(list(distribution.transforms))):
        if not isinstance(part, AffineTransform):
            return distribution
        loc, scale = torch.as_tensor(part.loc), torch.as_tensor(part.scale)
        base = Normal(loc + scale * base.loc, scale.abs() * base.scale)
    event_dims = len(distribution.event_shape)
    return Independent(base, event_dims) if event_dims else base


def parts_of(transform: Transform) -> list[Transform]:
    """Returns the transforms that a transform is composed of, each without its event dimensions."""
    if isinstance(transform, IndependentTransform):
        return parts_of(transform.base_transform)
    if isinstance(transform, ComposeTransform):
        return [inner for part in transform.parts for inner in parts_of(part)]
    return [transform]


def with_auxiliary_sites_exchanged(sites: dict[str, Any]) -> dict[str, Any]:
    """Exchanges each Delta at the value of an auxiliary site with that site, as those of ``AutoNormal``.

    The density of the two is the same, and the latent then has the distribution that its value is sampled from.
    """
    auxiliary = {id(site["value"]): name for name, site in sites.items() if site["infer"].get("is_auxiliary")}
    if not auxiliary:
        return sites
    partners = {}
    for name, site in sites.items():
        found = auxiliary.pop(id(_value_of_delta(site["fn"])), None)
        if found is not None and _shapes(sites[found]["fn"]) == _shapes(site["fn"]):
            partners.update({name: found, found: name})
    names = {name: partners.get(name, name) for name in sites}
    return {names[name]: {**site, "infer": sites[names[name]]["infer"]} for name, site in sites.items()}


def _value_of_delta(distribution: Distribution) -> Any:
    base = unwrap_independent(distribution)
    return base.v if isinstance(base, Delta) else None


def _shapes(distribution: Distribution) -> tuple[torch.Size, torch.Size]:
    return distribution.batch_shape, distribution.event_shape
