"""Random weights: what ``bayesianize`` puts in place of a parameter."""

__all__ = [
    "SampledAttributes",
    "SharedSite",
    "SitePrior",
    "WeightPrior",
    "free_name",
    "sample_unused_sites",
    "set_site",
    "site_paths",
    "take_parameter",
    "without_sites",
]

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution

from .._compat import call_context, in_backward_pass, set_sites, site_name, sites_of
from ..distributions.util import map_tensors


class WeightPrior(dist.Independent):
    """The prior of one parameter of a network, with the value that the parameter had and the name of its site.

    ``zero_row`` is the row that is zero in every sample, such as that of an embedding's padding token.
    """

    def __init__(
        self, base_dist: Distribution, event_dims: int, value: Tensor, zero_row: int | None = None, site: str = "weight"
    ) -> None:
        super().__init__(base_dist, event_dims, validate_args=False)
        self.value = value
        self.zero_row = zero_row if event_dims else None  # a joint prior has no separate rows
        self.site = site

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Samples the prior; in a backward pass, where the sample of the forward pass is meant, that is an error."""
        if in_backward_pass():
            raise RuntimeError(_RECOMPUTED.format(self.site))
        return super().__call__(*args, **kwargs)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 # as in torch
        """Samples the prior."""
        return self._with_row(super().rsample(sample_shape), 0.0, 2)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 # as in torch
        """Samples the prior without a gradient."""
        return self._with_row(super().sample(sample_shape), 0.0, 2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density of a value; the zero row adds nothing, unless another guide sampled it."""
        if self.zero_row is None:
            return super().log_prob(value)
        dims = self.reinterpreted_batch_ndims
        row = value.select(-2, self.zero_row)
        is_zero = (row == 0).all()
        shown = torch.where(is_zero, self._with_row(value, 1.0, 2), value)  # as 0 may have no density
        found = self.base_dist.log_prob(shown)
        return sum_rightmost(torch.where(is_zero, self._with_row(found, 0.0, dims), found), dims)

    def _with_row(self, values: Tensor, number: float, dims: int) -> Tensor:
        if self.zero_row is None:
            return values
        row = values.select(-dims, self.zero_row)
        return values.select_scatter(torch.full_like(row, number), -dims, self.zero_row)

    def expand(self, batch_shape: Any, _instance: Any = None) -> dist.Independent:
        """Returns the expanded prior, without the value."""
        return dist.Independent(self.base_dist, self.reinterpreted_batch_ndims).expand(batch_shape, _instance)


class SitePrior:
    """The prior of a module's attribute; Pyro calls it where the attribute is read.

    It follows the module to another device or dtype. :func:`set_site` fills in the attribute's name, and that of the
    module's buffer with the value that the parameter had.
    """

    attribute: str
    buffer: str
    zero_row: int | None = None

    def __init__(self, prior: Distribution) -> None:
        self.prior = prior
        self._last: WeightPrior | None = None

    def __call__(self, module: PyroModule) -> WeightPrior | Tensor:
        """Returns the prior within a call of the network, and outside of one the value that the parameter had.

        The value lets modules that look at their own weights, as ``nn.LSTM`` does when it is copied, do so without a
        sample. In a backward pass it would be wrong, and is an error.
        """
        if call_context(module).active:
            return self.of(module)
        if in_backward_pass():
            raise RuntimeError(_RECOMPUTED.format(site_name(module, self.attribute)))
        return self.value(module)

    def value(self, module: nn.Module) -> Tensor:
        """Returns the value that the parameter had."""
        value = module._buffers[self.buffer]
        assert value is not None
        return value

    def of(self, module: nn.Module) -> WeightPrior:
        """Returns the prior on the device and of the dtype that the module now has."""
        value = self.value(module)
        if self._last is None or self._last.value is not value:
            with torch.inference_mode(False):
                prior = map_tensors(self.prior, lambda t: t.to(value) if t.is_floating_point() else t.to(value.device))
            event_dims = value.dim() - len(prior.event_shape)
            self._last = WeightPrior(prior, event_dims, value, self.zero_row, site_name(module, self.attribute))
        return self._last


@dataclass(eq=False)
class SharedSite:
    """The site of a parameter that another module owns, too: it reads the owner's attribute."""

    owner: nn.Module
    attribute: str

    def __call__(self, module: nn.Module) -> Tensor:
        """Returns the owner's sample."""
        return getattr(self.owner, self.attribute)


class SampledAttributes(OrderedDict[str, Any]):
    """The sample sites of a module by attribute, without those whose parameter somebody gave the module.

    ``torch.func.functional_call`` does so, and a layer is then to use what it is given.
    """

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.parameters = {} if parameters is None else parameters

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) and self.parameters.get(str(name)) is None


def take_parameter(module: Any, attribute: str) -> nn.Parameter:
    """Takes a parameter out of a ``PyroModule``, so that a sample site can have its name."""
    # Not by setattr: that of nn.LSTM would read, and so sample, its other weights. None keeps the place in the order.
    parameter, module._parameters[attribute] = module._parameters[attribute], None
    if not isinstance(sites_of(module), SampledAttributes):
        set_sites(module, SampledAttributes(module._parameters))
    return parameter


def set_site(module: nn.Module, attribute: str, prior: SitePrior, value: Tensor) -> None:
    """Makes an attribute of a ``PyroModule`` a sample site, with its value in a buffer that no state holds."""
    prior.attribute, prior.buffer = attribute, free_name(module, f"{attribute}_initial")
    module.register_buffer(prior.buffer, value.detach(), persistent=False)
    sites_of(module)[attribute] = prior


def free_name(module: nn.Module, name: str) -> str:
    """Returns a name that no attribute of the module has: this one, or with underscores at its end."""
    while hasattr(module, name):
        name += "_"
    return name


def site_paths(network: nn.Module) -> Iterator[tuple[str, ...]]:
    """Yields the place of each site in a network: the names of the modules on the way to it, and its attribute."""
    for path, module in network.named_modules():
        for attribute, prior in sites_of(module).items():
            if isinstance(prior, SitePrior):
                yield (*path.split("."), attribute) if path else (attribute,)


def sample_unused_sites(network: nn.Module, names: dict[tuple[str, ...], str | None]) -> None:
    """Samples the sites that a pass did not use: the prior of a layer counts, whether a pass skips the layer or not.

    ``names`` has the name of each site by its place, see :func:`site_paths`; None becomes the name that the site has in
    this first pass, and a site that later has another name is an error.
    """
    for place, before in names.items():
        *path, attribute = place
        module: Any = network
        for part in path:
            module = None if module is None else module._modules.get(part)
        if module is not None and attribute in sites_of(module):
            name = site_name(module, attribute)
            if before is None:
                names[place] = name
            elif name != before:
                raise ValueError(
                    f"{before}: expected this site to keep its name, but another PyroModule took the network in and "
                    f"made it {name}, which no guide of before has; give that module a copy.deepcopy of the network, "
                    "or take it in before it is used"
                )
            getattr(module, attribute)


def without_sites(network: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Removes sample sites from a state, into which some modules put them themselves."""
    for path, module in network.named_modules(prefix=prefix.rstrip(".")):
        for attribute in sites_of(module):
            state.pop(f"{path}.{attribute}" if path else attribute, None)


_RECOMPUTED = (
    "{}: read in a backward pass, where its draw is not known, as by torch.utils.checkpoint of its layer; read the "
    "weight outside of the checkpoint and give it, checkpoint(F.linear, x, layer.weight, layer.bias, "
    "use_reentrant=False), or add context_fn=pyro_sparsevd.recompute_contexts"
)
