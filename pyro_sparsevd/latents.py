"""What a guide learns about the latents of a model, and where it starts."""

__all__ = [
    "Latent",
    "Start",
    "attribute_sites",
    "init_to_weights",
    "initial_value",
    "is_target",
    "keep_latents",
    "simplified",
    "sparsity_of",
    "unchanged_buffers",
    "unchanged_buffers_on_error",
]

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from numbers import Number
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible
from pyro.poutine.messenger import unwrap
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.distributions.transforms import AffineTransform, ComposeTransform, IndependentTransform, Transform

from .distributions import LogUniform, SparseNormal, unwrap_independent
from .hierarchical import ShrunkWeightPrior
from .masking import KeptNormal
from .sites import SitePrior, WeightPrior, map_tensors
from .weight_priors import EmpiricalNormal


def init_to_weights(site: Any = None, *, fallback: Callable = init_to_feasible) -> Any:
    """Initialises a network's site to the weight it had, as :func:`~.priors.bayesianize` keeps it.

    Another site with a log-uniform or an empirical prior starts at small random values, uniform with the standard
    deviation of torch's linear layers; any other as ``fallback`` says.

    Args:
        site: A Pyro trace site; without it, the function itself is returned.
        fallback: The initialisation of all other sites.

    Returns:
        The initial value.

    Example:
        >>> weight = torch.randn(3, 4)
        >>> site = {"fn": WeightPrior(LogUniform().expand([3, 4]), 2, weight)}
        >>> torch.equal(init_to_weights(site), weight)
        True
    """
    if site is None:
        return lambda site: init_to_weights(site, fallback=fallback)
    fn = site["fn"]
    if isinstance(fn, WeightPrior):
        return fn.value
    prior = unwrap_independent(fn)
    if not isinstance(prior, LogUniform | EmpiricalNormal):
        return fallback(site)
    shape = fn.shape()
    bound = 1 / math.sqrt(max(shape[1:].numel() if len(shape) > 1 else shape.numel(), 1))
    like = prior.low if isinstance(prior, LogUniform) else prior.mean
    return like.new_empty(shape).uniform_(-bound, bound)


def initial_value(site: Any, value: Any) -> Tensor:
    """Returns what an initialisation gave for a site as a tensor of the prior's type.

    Args:
        site: A Pyro trace site.
        value: The value: numbers of the site's shape, or one number for all.

    Returns:
        The tensor.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> initial_value({"name": "w", "fn": dist.Normal(torch.zeros(2).double(), 1.0)}, 3)
        tensor([3., 3.], dtype=torch.float64)
    """
    name, fn = site["name"], site["fn"]
    expected = f"{name}: expected an initial value of shape {tuple(fn.shape())}, but init_loc_fn gave"
    try:
        given = torch.as_tensor(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{expected} {type(value).__name__}: {error}") from error
    if isinstance(value, Number):
        given = given.expand(fn.shape())
    if given.shape != fn.shape():
        raise ValueError(f"{expected} {tuple(given.shape)}")
    like = _tensor_of(fn)
    keeps_dtype = given.is_floating_point() and isinstance(value, Tensor) and not isinstance(fn, WeightPrior)
    return given.to(like.device, given.dtype if keeps_dtype else like.dtype)


def _tensor_of(prior: Distribution) -> Tensor:
    """Returns a tensor of the device and dtype of a prior."""
    if isinstance(prior, WeightPrior):
        return prior.value
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(prior, note)
    of_prior = [t for t in found if t.is_floating_point()] or [torch.empty(())]
    # Numbers of a prior, such as its mean, may be on the CPU where others are not.
    device = max((t.device for t in of_prior), key=lambda device: device.type != "cpu")
    return torch.empty((), device=device, dtype=reduce(torch.promote_types, (t.dtype for t in of_prior)))


class Start(InitMessenger):
    """Gives a model's latents their initial values, and notes the plates whose subsample the model gives.

    Args:
        init_fn: The initialisation.
        given: Where the names of those plates are put.

    Example:
        >>> given = set()
        >>> with Start(lambda site: torch.zeros(()), given):
        ...     w = pyro.sample("w", dist.Normal(0.0, 1.0))
        ...     plates = pyro.plate("a", 9, subsample_size=3), pyro.plate("b", 9, subsample=torch.arange(3))
        >>> w, given
        (tensor(0.), {'b'})
    """

    def __init__(self, init_fn: Callable, given: set[str]) -> None:
        super().__init__(init_fn)
        self.given = given

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is not None:
            self.given.add(msg["name"])
        super()._pyro_sample(msg)


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
        return KeptNormal(loc, log_variance, kept.unsqueeze(-1).expand_as(loc))

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
    base: Any = unwrap_independent(prior)
    if isinstance(base, dist.MaskedDistribution):
        base = base.base_dist
    if isinstance(prior, ShrunkWeightPrior):
        return True, prior.group_dims or ()
    if isinstance(base, EmpiricalNormal):
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
    """Undoes what a run of the model does to its buffers, such as the statistics of batch normalisation."""
    restore = _restorer(model)
    try:
        yield
    finally:
        restore()


@contextmanager
def unchanged_buffers_on_error(model: Any) -> Iterator[None]:
    """Undoes what a run of the model did to its buffers, where it ends in an error."""
    restore = _restorer(model)
    try:
        yield
    except BaseException:  # an interrupt, too
        restore()
        raise


def _restorer(model: Any) -> Callable[[], None]:
    buffers = _running_buffers(model)
    kept = [buffer.clone() for _, _, buffer in buffers]

    @torch.no_grad()
    def restore() -> None:
        for (owner, name, buffer), value in zip(buffers, kept, strict=True):
            buffer.copy_(value)
            owner[name] = buffer  # a module may have put another tensor there

    return restore


def _running_buffers(model: Any) -> list[tuple[dict[str, Any], str, Tensor]]:
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
    return found
