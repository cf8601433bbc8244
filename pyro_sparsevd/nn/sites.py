"""What a parameter of a network is after it was given a prior."""

__all__ = ["EverySite", "SharedSite", "SitePrior", "Sites", "WeightPrior", "without_sites"]

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution

from .._compat import in_backward_pass
from ..distributions.util import map_tensors


class WeightPrior(dist.Independent):
    """The prior of one parameter of a network, with the parameter's value.

    Args:
        base_dist: The prior of the single weights, of the parameter's shape.
        reinterpreted_batch_ndims: How many trailing dimensions are event dimensions.
        value: The value that the parameter had.
        zero_row: The row that is zero in every sample, if there is one.

    Example:
        >>> prior = WeightPrior(svd.LogUniform().expand([3, 4]), 2, torch.zeros(3, 4))
        >>> prior.event_shape
        torch.Size([3, 4])
    """

    def __init__(
        self, base_dist: Distribution, reinterpreted_batch_ndims: int, value: Tensor, zero_row: int | None = None
    ) -> None:
        super().__init__(base_dist, reinterpreted_batch_ndims, validate_args=False)
        self.value = value
        self.zero_row = zero_row if reinterpreted_batch_ndims else None  # no row of a joint prior is apart
        self.site = "weight"

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draws from the prior.

        Raises:
            RuntimeError: In a backward pass, where the weight of the forward pass is meant.
        """
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
        """Returns the log density of a value; a row that is zero, as it is by construction, has none.

        Another guide than :class:`~.autoguide.AutoSparseNormal` may sample the row; it then counts as any other.
        """
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
        return values.index_fill(-dims, torch.tensor(self.zero_row, device=values.device), number)

    def expand(self, batch_shape: Any, _instance: Any = None) -> dist.Independent:
        """Returns the expanded prior, without the value."""
        return dist.Independent(self.base_dist, self.reinterpreted_batch_ndims).expand(batch_shape, _instance)


class SitePrior:
    """What Pyro calls where a module's attribute is read: the prior, or outside a call of the network its value.

    The prior follows the module to another device or dtype. The value lets modules that look at their own weights,
    as ``nn.LSTM`` does when it is copied, do so without a sample.

    Args:
        buffer: The name of the module's buffer with the value that the attribute had.
        prior: The prior, of the value's shape.

    Example:
        >>> net = nn.Linear(4, 3)
        >>> bnn = svd.bayesianize(net, svd.LogUniform(1e-4, 1.0))
        >>> torch.equal(bnn.weight, net.weight)
        True
        >>> bnn._pyro_samples["weight"].of(bnn.double()).sample().dtype
        torch.float64
    """

    def __init__(self, buffer: str, prior: Distribution) -> None:
        self.buffer = buffer
        self.prior = prior
        self.zero_row: int | None = None
        self._last: WeightPrior | None = None

    def __call__(self, module: PyroModule) -> WeightPrior | Tensor:
        """Returns the prior within a call of the network, and outside of one the value.

        Raises:
            RuntimeError: Outside of a call of the network in a backward pass, as in a checkpoint of activations.
        """
        if module._pyro_context.active:
            return self.of(module)
        if in_backward_pass():
            raise RuntimeError(_RECOMPUTED.format(self._name(module)))
        return module._buffers[self.buffer]

    def of(self, module: nn.Module) -> WeightPrior:
        """Returns the prior on the device and of the dtype that the module now has.

        Args:
            module: The module whose attribute it is.

        Returns:
            The prior.
        """
        value = module._buffers[self.buffer]
        assert value is not None
        if self._last is None or self._last.value is not value:
            with torch.inference_mode(False):
                prior = map_tensors(self.prior, lambda t: t.to(value) if t.is_floating_point() else t.to(value.device))
            self._last = WeightPrior(prior, value.dim() - len(prior.event_shape), value, self.zero_row)
            self._last.site = self._name(module)
        return self._last

    def _name(self, module: nn.Module) -> str:
        samples = module.__dict__["_pyro_samples"]
        attribute = next(name for name, prior in samples.items() if prior is self)
        return _full(module.__dict__["_pyro_name"], attribute)


class SharedSite:
    """What Pyro calls for a parameter that another module owns: the owner's draw.

    Args:
        owner: The module whose site it is.
        attribute: The owner's name for it.

    Example:
        >>> owner = nn.Linear(2, 2)
        >>> SharedSite(owner, "weight")(nn.Embedding(2, 2)) is owner.weight
        True
    """

    def __init__(self, owner: nn.Module, attribute: str) -> None:
        self.owner = owner
        self.attribute = attribute

    def __call__(self, module: nn.Module) -> Tensor:
        """Returns the owner's draw."""
        return getattr(self.owner, self.attribute)


class Sites(OrderedDict[str, Any]):
    """What Pyro samples where an attribute of a module is read, unless somebody gave the module its parameter.

    ``torch.func.functional_call`` does so, and a layer is then to use what it is given.

    Args:
        parameters: The module's parameters.

    Example:
        >>> bnn = svd.bayesianize(nn.Linear(2, 1, bias=False))
        >>> with bnn._pyro_context:
        ...     torch.func.functional_call(bnn, {"weight": torch.ones(1, 2)}, torch.ones(2))
        tensor([2.])
    """

    def __init__(self, parameters: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.parameters = {} if parameters is None else parameters

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) and self.parameters.get(str(name)) is None


class EverySite:
    """Draws the sites of a network that a pass did not use.

    What a layer weighs a priori does not depend on whether a pass skips it.

    Args:
        network: The Bayesian network.

    Example:
        >>> heads = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        >>> bnn = svd.bayesianize(heads, svd.LogUniform(1e-4, 1.0))
        >>> with pyro.poutine.trace() as trace, bnn._pyro_context:
        ...     output = bnn["a"](torch.zeros(1, 2))
        ...     EverySite(bnn)(bnn)
        >>> trace.trace.stochastic_nodes
        ['a.weight', 'b.weight']
    """

    def __init__(self, network: nn.Module) -> None:
        self._paths = [
            (*path.split("."), attribute) if path else (attribute,)
            for path, module in network.named_modules()
            for attribute, prior in module.__dict__.get("_pyro_samples", {}).items()
            if isinstance(prior, SitePrior)
        ]
        self._modules_called: dict[tuple[str, ...], str] = {}

    @property
    def names(self) -> set[str]:
        """The names of all sites of the network."""
        return {".".join(path) for path in self._paths}

    def __call__(self, network: nn.Module) -> None:
        """Draws them; those that the pass used have their values already.

        Args:
            network: The network, in the context of its pass.

        Raises:
            ValueError: If a site is called otherwise than in the first pass.
        """
        for *path, attribute in self._paths:
            module: Any = network
            for part in path:
                module = None if module is None else module._modules.get(part)
            if module is not None and attribute in module.__dict__.get("_pyro_samples", ()):
                name = module.__dict__["_pyro_name"]
                before = self._modules_called.setdefault((*path, attribute), name)
                if name != before:
                    raise ValueError(
                        f"{_full(before, attribute)}: expected this site to keep its name, but another PyroModule took "
                        f"the network in and made it {_full(name, attribute)}, which no guide of before has; give that "
                        "module a copy.deepcopy of the network, or take it in before it is used"
                    )
                getattr(module, attribute)


def without_sites(network: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Takes out of a state what modules put there of their own accord and is a sample site now.

    Args:
        network: The Bayesian network.
        state: Its state.
        prefix: What the names in the state begin with.

    Example:
        >>> state = {"net.weight": 0, "net.bias": 1}
        >>> without_sites(svd.bayesianize(nn.Linear(2, 2)), state, "net.")
        >>> state
        {'net.bias': 1}
    """
    for path, module in network.named_modules(prefix=prefix.rstrip(".")):
        for attribute in module.__dict__.get("_pyro_samples", ()):
            state.pop(_full(path, attribute), None)


def _full(module: str, attribute: str) -> str:
    return f"{module}.{attribute}" if module else attribute


_RECOMPUTED = (
    "{}: read in a backward pass, where its draw is not known, as by torch.utils.checkpoint of its layer; read the "
    "weight outside of the checkpoint and give it, checkpoint(F.linear, x, layer.weight, layer.bias, "
    "use_reentrant=False), or add context_fn=pyro_sparsevd.recompute_contexts"
)
