"""The sample sites of a run of a model or guide: a lean trace and replay, and the densities of its sites."""

__all__ = ["SampleSites", "Sites", "checkpoint_contexts", "density", "log_prob", "scored", "sole_recorder"]

from typing import Any, TypeAlias

import torch
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..distributions.log_uniform import IMPROPER_LOG_NORMALIZER, LogUniform
from ..distributions.util import unmasked, unwrap_independent
from .lazy_weight import LazyWeight
from .local_reparam import LocalReparamMessenger

Sites: TypeAlias = dict[str, Any]


class SampleSites(Messenger):
    """Records sample sites, those of latents with the values of other sites of the names.

    Args:
        values_from: The sites whose values latents take, by name.
        local_reparam: What makes weights lazy; without it, they are drawn.

    Example:
        >>> with SampleSites() as sites:
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        >>> list(sites.found)
        ['w']
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
        if not (msg["infer"].get("_do_not_trace") or msg["infer"].get("_deterministic")):
            self._record(msg.copy())

    def sample(
        self, name: str, fn: Any, obs: Tensor | None = None, scale: float = 1.0, plates: tuple[Any, ...] = ()
    ) -> Tensor:
        """Does what ``pyro.sample`` does under this handler alone, in less time.

        Args:
            name: The name of the site.
            fn: Its distribution.
            obs: Its value, if that is observed.
            scale: The factor of its log density.
            plates: The frames of the plates it is in, of whose sizes the distribution already is.

        Returns:
            The value.

        Raises:
            ValueError: If a site of the name is there already.
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


def sole_recorder() -> SampleSites | None:
    """Returns the :class:`SampleSites` that a run is under, if it is under no other handler.

    Returns:
        The handler, whose :meth:`~SampleSites.sample` then does for ``pyro.sample``.

    Example:
        >>> with SampleSites() as sites:
        ...     sole_recorder() is sites
        True
    """
    return _PYRO_STACK[0] if len(_PYRO_STACK) == 1 and type(_PYRO_STACK[0]) is SampleSites else None


def checkpoint_contexts() -> tuple[Messenger, Messenger]:
    """Returns what gives a layer in a checkpoint of activations, computed again, the weights that it had.

    It is for ``torch.utils.checkpoint``, where a network has layers computed again in the backward pass::

        checkpoint(layer, x, use_reentrant=False, context_fn=checkpoint_contexts)

    Returns:
        The context of the forward pass and that of its repetition.

    Example:
        >>> forward, again = checkpoint_contexts()
        >>> with forward:
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        >>> with again:
        ...     w is pyro.sample("w", dist.Normal(0.0, 1.0))
        True
    """
    forward = SampleSites()
    return forward, _Repeated(forward.found)


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

    Raises:
        ValueError: If the value is of more dimensions or other sizes than the distribution.

    Example:
        >>> with SampleSites() as sites:
        ...     w = pyro.sample("w", dist.Delta(torch.zeros(3)).to_event(1))
        >>> log_prob(sites.found["w"])
        tensor(0.)
    """
    fn, value = site["fn"], site["value"]
    plain, counted = unmasked(fn)
    base: Any = unwrap_independent(plain)
    is_improper = isinstance(base, LogUniform) and not base.is_proper
    value = value.value_for_density() if isinstance(value, LazyWeight) else value
    if is_improper:  # a draw that rounding made 0, once in some 1e9, has no density
        value = torch.where(value == 0, torch.finfo(value.dtype).eps, value)
    found = density(site["name"], fn, value, site["cond_indep_stack"])
    if is_improper:
        weights = torch.as_tensor(counted, device=found.device).to(found).expand(base.batch_shape)
        found = found + IMPROPER_LOG_NORMALIZER * sum_rightmost(weights, len(fn.event_shape))
    return scale_and_mask(found, site["scale"], site["mask"]).sum()


def density(name: str, fn: Any, value: Tensor, plates: tuple[Any, ...] = ()) -> Tensor:
    """Returns the log density of a value, which must not broadcast with its distribution to something larger.

    Args:
        name: The name of the site.
        fn: Its distribution.
        value: Its value.
        plates: The frames of the plates it is in, of which those without a size take a value of any.

    Returns:
        The log density, of the batch shape, in nats.

    Raises:
        ValueError: If the value is of more dimensions or other sizes than the distribution.

    Example:
        >>> density("y", dist.Normal(torch.zeros(3), 1.0), torch.zeros(3, 1))
        Traceback (most recent call last):
            ...
        ValueError: y: expected a value of shape (3,), but got (3, 1)
    """
    found: Tensor = fn.log_prob(value)
    if found.shape != fn.batch_shape:
        open_dims = {frame.dim for frame in plates if frame.vectorized and frame.size == -1}
        sizes = [found.shape[dim] if dim in open_dims else 1 for dim in range(-found.dim(), 0)]
        if found.shape != torch.broadcast_shapes(fn.batch_shape, sizes):
            raise ValueError(f"{name}: expected a value of shape {tuple(fn.shape())}, but got {tuple(value.shape)}")
    return found


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
