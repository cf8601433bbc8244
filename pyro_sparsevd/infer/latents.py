"""What a guide learns about the latents of a model."""

__all__ = [
    "Latent",
    "attribute_sites",
    "is_target",
    "keep_latents",
    "simplified",
    "sparsity_of",
    "unchanged_buffers",
    "unchanged_buffers_on_error",
]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import unwrap
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.transforms import AffineTransform, ComposeTransform, IndependentTransform, Transform

from ..distributions.empirical_normal import EmpiricalBayesNormal
from ..distributions.log_uniform import LogUniform
from ..distributions.sparse_normal import MaskedNormal, SparseNormal
from ..distributions.util import map_tensors, unmasked, unwrap_independent
from ..nn.scales import ShrunkWeightPrior
from ..nn.sites import SitePrior


class Latent(NamedTuple):
    """What the guide needs to know of a latent: nothing that holds numbers of the model.

    Args:
        transform: From unconstrained space to the latent's support.
        event_dim: The number of dimensions of an event, in unconstrained space.
        plates: The names of the plates it is in.
        is_sparse: Whether its prior makes weights sparse.
        group_dims: Those of its dimensions along which groups differ that matter or not as a whole; none if empty.
        zero_row: The row that is held at zero, if there is one.
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
        return _is_identity(self.transform)

    def log_alpha(self, q: SparseNormal) -> Tensor:
        """Returns log α of each weight, or of its group: log Σσ² - log Σθ² over the group."""
        if not self.group_dims:
            return q.log_alpha
        pooled = [dim for dim in range(q.loc.dim()) if dim not in self.group_dims]
        if not pooled:
            return q.log_alpha
        of_group = q.log_variance.logsumexp(pooled, keepdim=True) - q.loc.square().sum(pooled, keepdim=True).log()
        return of_group.expand_as(q.loc)

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
        return dist.TransformedDistribution(base, [self.transform.with_cache()])


def attribute_sites(model: Any) -> Iterator[dict[str, Any]]:
    """Yields each sample site that is an attribute of a module of the model, as Pyro records it before it is drawn."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for attribute, prior in getattr(module, "_pyro_samples", {}).items():
            found = prior.of(module) if isinstance(prior, SitePrior) else prior
            if isinstance(found, Distribution):
                site: dict[str, Any] = {"type": "sample", "fn": found, "value": None, "is_observed": False}
                site["name"] = f"{module._pyro_name}.{attribute}" if module._pyro_name else attribute
                yield {
                    **site,
                    "args": (),
                    "kwargs": {},
                    "infer": {},
                    "scale": 1.0,
                    "mask": None,
                    "cond_indep_stack": (),
                }


def sparsity_of(prior: Distribution) -> tuple[bool, tuple[int, ...]]:
    """Tells whether a prior makes weights sparse, and along which dimensions groups of them differ, if it has any.

    Args:
        prior: The prior of a site.

    Returns:
        Both.

    Example:
        >>> sparsity_of(LogUniform()), sparsity_of(dist.Normal(0.0, 1.0))
        ((True, ()), (False, ()))
    """
    base: Any = unwrap_independent(unmasked(prior)[0])
    if isinstance(prior, ShrunkWeightPrior):
        return True, prior.group_dims or ()
    if isinstance(base, EmpiricalBayesNormal):
        return base.is_sparse, (base.group_dims or ()) if base.is_sparse else ()
    return isinstance(base, LogUniform), ()


def is_target(site: Any) -> bool:
    """Tells whether a site is what a model predicts, and no latent where it is not given.

    Args:
        site: A Pyro trace site.

    Returns:
        Whether its model says so.

    Example:
        >>> is_target({"infer": {"is_target": True}})
        True
    """
    return bool(site["infer"].get("is_target"))


def simplified(transform: Transform) -> Transform:
    """Drops x ↦ 0 + 1 x, as at the end of torch's map onto the positive numbers, which hides equal transforms."""
    if not isinstance(transform, ComposeTransform):
        return transform
    parts = [simplified(part) for part in transform.parts]
    parts = [part for part in parts if not (isinstance(part, AffineTransform) and part == AffineTransform(0, 1))]
    return parts[0] if len(parts) == 1 else ComposeTransform(parts)


def _is_identity(transform: Transform) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return isinstance(transform, ComposeTransform) and not transform.parts


def keep_latents(trace: Any) -> None:
    """Removes from a prototype what a copy or a pickle of it could not, or need not, hold."""
    for name, node in list(trace.nodes.items()):
        if node["type"] != "sample" or node["is_observed"]:
            trace.remove_node(name)
        else:
            node.update(fn=map_tensors(node["fn"], Tensor.detach), value=node["value"].detach(), continuation=None)


@contextmanager
def unchanged_buffers(model: Any) -> Iterator[None]:
    """Undoes what a run of the model does to its buffers, such as the statistics of batch normalisation.

    So for frozen parameters, as of an encoder that follows another by momentum.
    """
    restore = _restorer(model, with_frozen=True)
    try:
        yield
    finally:
        restore()


@contextmanager
def unchanged_buffers_on_error(model: Any, with_frozen: bool) -> Iterator[None]:
    """Undoes what a run of the model did to its buffers, and to frozen parameters, where it ends in an error."""
    restore = _restorer(model, with_frozen)
    try:
        yield
    except BaseException:  # an interrupt, too
        restore()
        raise


def _restorer(model: Any, with_frozen: bool) -> Callable[[], None]:
    buffers = _running_buffers(model, with_frozen)
    kept = [buffer.clone() for _, _, buffer in buffers]

    @torch.no_grad()
    def restore() -> None:
        for (owner, name, buffer), value in zip(buffers, kept, strict=True):
            buffer.copy_(value)
            owner[name] = buffer  # a module may have put another tensor there

    return restore


def _running_buffers(model: Any, with_frozen: bool) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Returns where the buffers are, and those, that a run may change: all but the values that weights had."""
    found: list[tuple[dict[str, Any], str, Tensor]] = []
    model = unwrap(model)  # of handlers
    modules: list[Any] = [model] if isinstance(model, nn.Module) else []
    seen = set(modules)
    for module in modules:  # not model.modules(), which takes its time at every step
        for child in module._modules.values():
            if child is not None and child not in seen:
                modules.append(child)
                seen.add(child)
        if module._buffers:
            priors = module.__dict__.get("_pyro_samples", {}).values()
            initial = {prior.buffer for prior in priors if isinstance(prior, SitePrior)}
            own = module._buffers
            found += [(own, name, value) for name, value in own.items() if value is not None and name not in initial]
        if with_frozen:
            own = module._parameters
            found += [(own, name, p) for name, p in own.items() if p is not None and not p.requires_grad]
    return found
