"""Metadata of a model's latents for the guide: transforms, plates, groups, sparsity."""

__all__ = ["Latent", "attribute_sites", "is_target", "keep_latents", "latent_of"]

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.ops.tensor_utils import periodic_repeat
from torch import Tensor, nn
from torch.distributions import Distribution, biject_to
from torch.distributions.transforms import AffineTransform, ComposeTransform, Transform

from .._compat import site_name, sites_of
from ..distributions.empirical_normal import EmpiricalBayesNormal
from ..distributions.log_uniform import LogUniform
from ..distributions.sparse_normal import MaskedNormal, SparseNormal
from ..distributions.util import map_tensors, unmasked, unwrap_independent
from ..nn.scales import ShrunkWeightPrior
from ..nn.sites import SitePrior, WeightPrior
from .gaussians import parts_of


class Latent(NamedTuple):
    """Metadata of a latent; it holds no numbers of the model.

    ``transform`` leads from unconstrained space to the latent's support, ``event_dim`` counts the dimensions of an
    event in unconstrained space, ``plates`` are names. Groups that matter or not as a whole differ along
    ``group_dims``; if empty, there are none. ``zero_row`` is the row that is held at zero, if there is one.
    """

    transform: Transform
    event_dim: int
    plates: tuple[str, ...]
    is_sparse: bool
    group_dims: tuple[int, ...]
    zero_row: int | None = None

    @property
    def is_real(self) -> bool:
        """Whether its support is all real numbers, so that it may be 0."""
        return not parts_of(self.transform)

    def log_alpha(self, q: SparseNormal) -> Tensor:
        """Returns log α of each weight, or of its group: log Σσ² - log Σθ² over the group."""
        if not self.group_dims:
            return q.log_alpha
        pooled = [dim for dim in range(q.loc.dim()) if dim not in self.group_dims]
        if not pooled:
            return q.log_alpha
        of_group = q.log_variance.logsumexp(pooled, keepdim=True) - q.loc.square().sum(pooled, keepdim=True).log()
        return torch.where(q.kept, of_group, torch.inf) if isinstance(q, MaskedNormal) else of_group.expand_as(q.loc)

    def gaussian(self, loc: Tensor, log_variance: Tensor) -> SparseNormal:
        """Returns the distribution in unconstrained space, given its parameters."""
        if self.zero_row is None:
            return SparseNormal(loc, log_variance, validate_args=False)
        kept = torch.arange(loc.shape[-2], device=loc.device) != self.zero_row
        return MaskedNormal(loc, log_variance, kept.unsqueeze(-1).expand_as(loc))

    def posterior(self, loc: Tensor, log_variance: Tensor) -> Distribution:
        """Returns the distribution at the site, given the parameters in unconstrained space."""
        base = self.gaussian(loc, log_variance).to_event(self.event_dim)
        if self.is_real:
            return base
        # The cache makes the density at a sample exact, and finite where the inverse is not.
        return dist.TransformedDistribution(base, [self.transform.with_cache()], validate_args=False)


def attribute_sites(model: Any) -> Iterator[tuple[str, Distribution]]:
    """Yields the name and the prior of each sample site that is an attribute of a module of the model."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for attribute, prior in sites_of(module).items():
            fn = prior.of(module) if isinstance(prior, SitePrior) else prior
            if isinstance(fn, Distribution):
                yield site_name(module, attribute), fn


def latent_of(name: str, prior: Distribution, value: Tensor, frames: tuple) -> tuple[Latent, Tensor]:
    """Returns the metadata of a latent, and its value in unconstrained space, over the full size of its plates."""
    transform = _simplified(biject_to(prior.support))
    loc = transform.inv(value.detach())
    if not bool(loc.isfinite().all()):
        raise ValueError(
            f"{name}: expected initial values inside the support of the prior, {prior.support}; give the guide an "
            "init_loc_fn, or the site another prior"
        )
    event_dim = len(prior.event_shape) + loc.dim() - value.dim()
    for frame in frames:
        full_size = frame.full_size or frame.size
        if full_size != frame.size:
            loc = periodic_repeat(loc, full_size, frame.dim - event_dim)
    plates = tuple(frame.name for frame in frames if frame.vectorized)
    zero_row = prior.zero_row if isinstance(prior, WeightPrior) else None
    return Latent(transform, event_dim, plates, *_sparsity_of(prior), zero_row), loc


def _sparsity_of(prior: Distribution) -> tuple[bool, tuple[int, ...]]:
    """Tells whether a prior makes weights sparse, and along which dimensions groups of them differ, if it has any."""
    base: Any = unwrap_independent(unmasked(prior)[0])
    if isinstance(prior, ShrunkWeightPrior):
        return True, prior.group_dims or ()
    if isinstance(base, EmpiricalBayesNormal):
        return base.is_sparse, (base.group_dims or ()) if base.is_sparse else ()
    return isinstance(base, LogUniform), ()


def is_target(site: Any) -> bool:
    """Tells whether a site is what a model predicts, and no latent where it is not given."""
    return bool(site["infer"].get("is_target"))


def _simplified(transform: Transform) -> Transform:
    """Drops x ↦ 0 + 1 x, as at the end of torch's map onto the positive numbers, which hides equal transforms."""
    if not isinstance(transform, ComposeTransform):
        return transform
    parts = [_simplified(part) for part in transform.parts]
    parts = [part for part in parts if not (isinstance(part, AffineTransform) and part == AffineTransform(0, 1))]
    return parts[0] if len(parts) == 1 else ComposeTransform(parts)


def keep_latents(trace: Any) -> None:
    """Removes from a prototype what a copy or a pickle of it could not, or need not, hold."""
    for name, node in list(trace.nodes.items()):
        if node["type"] != "sample" or node["is_observed"]:
            trace.remove_node(name)
        else:
            node.update(fn=map_tensors(node["fn"], Tensor.detach), value=node["value"].detach(), continuation=None)
