"""Priors whose scales are latents, too."""

__all__ = ["HierarchicalPrior", "HierarchicalSite", "Scale", "ScaleSite", "ShrunkWeightPrior"]

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution

from .sites import SitePrior, WeightPrior


class Scale(NamedTuple):
    """A scale of a weight that is a latent.

    Args:
        prior: Its prior, of positive support, without batch shape.
        dims: Those dimensions of the weight along which it differs: ``()`` for one scale, None for each weight's own.
    """

    prior: Distribution
    dims: tuple[int, ...] | None


class HierarchicalPrior:
    """What :func:`~.bayesianize.bayesianize` takes as a prior with scales: see :func:`~.priors.horseshoe`.

    Args:
        scales: The scales by the ends of their names: that of ``fc.weight`` and ``"scale"`` is ``fc.weight_scale``.
        group_dims: Those dimensions of the weight along which groups differ that are kept or dropped as a whole; None
            where each weight is on its own.

    Raises:
        ValueError: If there is no scale, or a scale's prior is not positive or has a shape.

    Example:
        >>> prior = HierarchicalPrior({"scale": Scale(dist.HalfNormal(1.0), (0,))}, group_dims=(0,))
        >>> pyro.poutine.trace(svd.bayesianize(nn.Linear(4, 3), prior)).get_trace(torch.zeros(1, 4)).stochastic_nodes
        ['weight_scale', 'weight']
    """

    def __init__(self, scales: Mapping[str, Scale], group_dims: tuple[int, ...] | None = None) -> None:
        if not scales:
            raise ValueError("scales: expected at least one")
        for name, (prior, _) in scales.items():
            support: Any = prior.support
            if not bool(support.check(torch.tensor(1e9))) or bool(support.check(torch.tensor(-1.0))):
                raise ValueError(f"{name}: expected a prior of the positive numbers, but got {prior}")
            if prior.shape():  # type: ignore[attr-defined] # as of every Pyro distribution
                raise ValueError(f"{name}: expected a prior without a shape, but got {prior}")
        self.scales = dict(scales)
        self.group_dims = group_dims

    def check_shape(self, name: str, shape: torch.Size) -> None:
        """Refuses a weight without the dimensions that scales or groups differ along.

        Args:
            name: The weight's name.
            shape: Its shape.

        Raises:
            ValueError: If a dimension is missing.
        """
        for dims in (self.group_dims, *(scale.dims for scale in self.scales.values())):
            if dims and max(dims) >= len(shape):
                raise ValueError(
                    f"{name}: expected a weight with the dimensions {dims}, but its shape is {tuple(shape)}"
                )

    def make_site(self, module: PyroModule, attribute: str, buffer: str) -> "HierarchicalSite":
        """Gives a module the sites of the scales of one of its weights.

        A scale that differs along all dimensions (``dims=None``) starts at 1, any other at the root mean square of the
        whole weight.

        Args:
            module: The module.
            attribute: The weight's name in it.
            buffer: The name of the buffer with the weight's value.

        Returns:
            The site of the weight.
        """
        value = module._buffers[buffer]
        assert value is not None
        names = []
        for end, scale in self.scales.items():
            name = f"{attribute}_{end}"
            while hasattr(module, name):
                name += "_"
            initial = _initial_scale(value, scale.dims)
            module.register_buffer(f"{name}_initial", initial, persistent=False)
            prior: Any = scale.prior
            module._pyro_samples[name] = ScaleSite(f"{name}_initial", prior.expand(initial.shape))
            names.append(name)
        return HierarchicalSite(buffer, names, self.group_dims)


class ShrunkWeightPrior(WeightPrior):
    """The prior of a weight given its scales.

    Args:
        base_dist: The prior of the single weights, of the parameter's shape.
        reinterpreted_batch_ndims: How many trailing dimensions are event dimensions.
        value: The value that the parameter had.
        group_dims: As for :class:`HierarchicalPrior`.
        zero_row: As for :class:`~.sites.WeightPrior`.

    Example:
        >>> prior = ShrunkWeightPrior(dist.Normal(0.0, 1.0).expand([3, 4]), 2, torch.zeros(3, 4), (0,))
        >>> prior.group_dims
        (0,)
    """

    def __init__(
        self,
        base_dist: Distribution,
        reinterpreted_batch_ndims: int,
        value: Tensor,
        group_dims: tuple[int, ...] | None,
        zero_row: int | None = None,
    ) -> None:
        super().__init__(base_dist, reinterpreted_batch_ndims, value, zero_row)
        self.group_dims = group_dims


class ScaleSite(SitePrior):
    """The site of a scale: not a parameter of the network that the weight is one of."""


class HierarchicalSite(SitePrior):
    """The site of a weight whose scales are other sites of its module.

    Args:
        buffer: As for :class:`~.sites.SitePrior`.
        scales: The names of the scales in the module.
        group_dims: As for :class:`HierarchicalPrior`.

    Example:
        >>> site = svd.bayesianize(nn.Linear(4, 3), svd.nn.horseshoe())._pyro_samples["weight"]
        >>> site.scales
        ['weight_local_scale', 'weight_global_scale']
    """

    def __init__(self, buffer: str, scales: list[str], group_dims: tuple[int, ...] | None) -> None:
        super().__init__(buffer, dist.Normal(0.0, 1.0))
        self.scales = scales
        self.group_dims = group_dims

    def of(self, module: nn.Module) -> WeightPrior:
        """Returns the prior given the scales: within a call of the network their samples, else where they start.

        Args:
            module: The module whose attribute it is.

        Returns:
            The prior.
        """
        value = module._buffers[self.buffer]
        assert value is not None
        scale = torch.ones_like(value)
        for name in self.scales:
            scale = scale * getattr(module, name)
        prior = dist.Normal(torch.zeros_like(value), scale, validate_args=False)
        found = ShrunkWeightPrior(prior, value.dim(), value, self.group_dims, self.zero_row)
        found.site = self._name(module)
        return found


def _initial_scale(value: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    if dims is None:
        return torch.ones_like(value)
    # Not that of the scale's own group: a group of one weight that starts near 0 would find it hard to grow.
    shape = [size if dim in dims else 1 for dim, size in enumerate(value.shape)]
    return value.square().mean().sqrt().nan_to_num().clamp_min(1e-3).expand(shape).clone()
