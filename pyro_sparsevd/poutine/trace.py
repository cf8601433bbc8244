"""A lean trace and replay of sample sites, and the densities of the sites."""

__all__ = [
    "SiteTrace",
    "Sites",
    "active_trace",
    "density",
    "log_prob",
    "recompute_contexts",
    "value_for_density",
    "without_subsampling",
]

from typing import Any, TypeAlias

import torch
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .._compat import HANDLER_STACK, is_untraced
from ..distributions.log_uniform import IMPROPER_LOG_NORMALIZER, LogUniform
from ..distributions.util import unmasked, unwrap_independent
from ..distributions.validation import deferred_log_prob
from .local_reparam import LocalReparamMessenger
from .unsampled_weight import UnsampledWeight

Sites: TypeAlias = dict[str, Any]


class SiteTrace(Messenger):
    """Records sample sites in ``found``; latents take the values of the sites of their names in ``values_from``.

    With ``local_reparam``, weights are not sampled unless their numbers are needed.
    """

    def __init__(self, values_from: Sites | None = None, local_reparam: LocalReparamMessenger | None = None) -> None:
        super().__init__()
        self.values_from = values_from or {}
        self.local_reparam = local_reparam
        self.found: Sites = {}

    def _pyro_sample(self, msg: Any) -> None:
        source = self.values_from.get(msg["name"])
        if source is not None and not msg["is_observed"]:
            if msg["value"] is not None and site_is_subsample(msg):
                _check_subsample(msg, source["value"])
            msg["value"], msg["infer"], msg["done"] = source["value"], source["infer"], True
        elif self.local_reparam is not None:
            self.local_reparam._pyro_sample(msg)

    def _pyro_post_sample(self, msg: Any) -> None:
        if not is_untraced(msg):
            self._record(msg.copy())

    def sample(
        self, name: str, fn: Any, obs: Tensor | None = None, scale: float = 1.0, plates: tuple[Any, ...] = ()
    ) -> Tensor:
        """Does what ``pyro.sample`` does under this handler alone, in less time.

        The distribution has the sizes of the frames in ``plates`` already.
        """
        site: Any = {"type": "sample", "name": name, "fn": fn, "value": obs, "is_observed": obs is not None}
        site.update(infer={}, scale=scale, mask=None, cond_indep_stack=plates, done=False)
        self._pyro_sample(site)
        if site["value"] is None:
            site["value"] = fn()
        self._record(site)
        return site["value"]

    def _record(self, site: Any) -> None:
        if site["name"] in self.found:
            raise ValueError(f"{site['name']}: expected a name for every sample site, but two share this one")
        self.found[site["name"]] = site


def active_trace() -> SiteTrace | None:
    """Returns the active handler if it is a :class:`SiteTrace` alone, so that its ``sample`` can replace Pyro's."""
    return HANDLER_STACK[0] if len(HANDLER_STACK) == 1 and type(HANDLER_STACK[0]) is SiteTrace else None


def recompute_contexts() -> tuple[Messenger, Messenger]:
    """Gives a layer that is computed again in the backward pass the weights that it had in the forward pass.

    It is for ``torch.utils.checkpoint``, which saves memory by not keeping the activations of a layer::

        checkpoint(layer, x, use_reentrant=False, context_fn=recompute_contexts)

    Returns:
        The context of the forward pass and that of its repetition.

    Example:
        >>> forward, again = recompute_contexts()
        >>> with forward:
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        >>> with again:
        ...     w is pyro.sample("w", dist.Normal(0.0, 1.0))
        True
    """
    forward = SiteTrace()
    return forward, _Repeated(forward.found)


def without_subsampling(sites: Sites) -> Sites:
    """Returns the sites that have a density, which excludes the choice of a subsample."""
    return {name: site for name, site in sites.items() if not site_is_subsample(site)}


def log_prob(site: Any) -> Tensor:
    """Returns the log density of a site's value in nats, scaled, masked and summed to a scalar.

    What is not valid has NaN, see :func:`~.validation.deferred_log_prob`. An improper log-uniform prior
    counts with the constant with which its divergence vanishes as α → ∞.
    """
    fn, value = site["fn"], value_for_density(site)
    without_masks, counted = unmasked(fn)
    base: Any = unwrap_independent(without_masks)
    is_improper = isinstance(base, LogUniform) and not base.is_proper
    if is_improper:  # a sample that rounding made 0, once in some 1e9, has no density
        value = torch.where(value == 0, torch.finfo(value.dtype).eps, value)
    found = deferred_log_prob(site["name"], fn, value)
    _check_shape(site["name"], fn, value, found, site["cond_indep_stack"])
    if is_improper:
        weights = (counted.to(found) if isinstance(counted, Tensor) else found.new_full((), counted)).expand(
            base.batch_shape
        )
        found = found + IMPROPER_LOG_NORMALIZER * sum_rightmost(weights, len(fn.event_shape))
    return scale_and_mask(found, site["scale"], site["mask"]).sum()


def value_for_density(site: Any) -> Tensor:
    """Returns a site's value; a weight that is not sampled has a sample of its own for this."""
    value = site["value"]
    return value.value_for_density() if isinstance(value, UnsampledWeight) else value


def density(name: str, fn: Any, value: Tensor, plates: tuple[Any, ...] = ()) -> Tensor:
    """Returns the log density of a value, of the batch shape, in nats.

    A value that broadcasts with its distribution to something larger is refused, except along those of ``plates`` that
    have no size.
    """
    found: Tensor = fn.log_prob(value)
    _check_shape(name, fn, value, found, plates)
    return found


def _check_shape(name: str, fn: Any, value: Tensor, found: Tensor, plates: tuple[Any, ...]) -> None:
    if found.shape != fn.batch_shape:
        open_dims = {frame.dim for frame in plates if frame.vectorized and frame.size == -1}
        sizes = [found.shape[dim] if dim in open_dims else 1 for dim in range(-found.dim(), 0)]
        if found.shape != torch.broadcast_shapes(fn.batch_shape, sizes):
            raise ValueError(f"{name}: expected a value of shape {tuple(fn.shape())}, but got {tuple(value.shape)}")


def _check_subsample(plate: Any, of_guide: Any) -> None:
    given = plate["value"]
    if not (given is of_guide or torch.equal(torch.as_tensor(given), torch.as_tensor(of_guide))):
        raise ValueError(
            f"{plate['name']}: the model gives this plate its subsample, which another of the guide would replace; "
            "give the guide the same, as by create_plates, a function of the model's arguments"
        )


class _Repeated(Messenger):
    def __init__(self, sites: Sites) -> None:
        super().__init__()
        self.sites = sites

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.sites:
            msg["value"], msg["done"] = self.sites[msg["name"]]["value"], True
