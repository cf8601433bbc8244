"""Hierarchical priors of weights, whose scales are latents, too."""

__all__ = ["HierarchicalPrior", "HierarchicalSite", "Scale", "ScaleSite", "ShrunkWeightPrior"]

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Distribution

from .._compat import site_name
from .sites import SitePrior, WeightPrior, free_name, set_site


class Scale(NamedTuple):
    """A scale of a weight that is a latent, with a prior of positive support and without batch shape.

    ``dims`` are the weight's dimensions along which it differs: ``()`` for one scale, None for one of each weight.
    """

    prior: Distribution
    dims: tuple[int, ...] | None


class HierarchicalPrior:
    """A prior with scales, for :func:`~.bayesianize.bayesianize`; see :func:`~.priors.horseshoe`.

    ``scales`` are by the ends of their names: that of ``fc.weight`` and ``"scale"`` is ``fc.weight_scale``. Groups that
    are kept or dropped as a whole differ along ``group_dims``; with None, each weight is on its own.
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
        """Refuses a weight without the dimensions that scales or groups differ along."""
        for dims in (self.group_dims, *(scale.dims for scale in self.scales.values())):
            if dims and max(dims) >= len(shape):
                raise ValueError(
                    f"{name}: expected a weight with the dimensions {dims}, but its shape is {tuple(shape)}"
                )

    def set_scales(self, module: PyroModule, attribute: str, value: Tensor) -> "HierarchicalSite":
        """Gives a module the sites of the scales of one of its weights, and returns the prior of the weight.

        A scale that differs along all dimensions (``dims=None``) starts at 1, any other at the root mean square of the
        whole weight.
        """
        names = []
        for end, scale in self.scales.items():
            name = free_name(module, f"{attribute}_{end}")
            initial = _initial_scale(value.detach(), scale.dims)
            prior: Any = scale.prior
            set_site(module, name, ScaleSite(prior.expand(initial.shape)), initial)
            names.append(name)
        return HierarchicalSite(names, self.group_dims)


class ShrunkWeightPrior(WeightPrior):
    """The prior of a weight given its scales, with the ``group_dims`` of its :class:`HierarchicalPrior`."""

    def __init__(self, *args: Any, group_dims: tuple[int, ...] | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group_dims = group_dims


class ScaleSite(SitePrior):
    """The prior of a scale: unlike a weight, no parameter of the original network."""


class HierarchicalSite(SitePrior):
    """The prior of a weight whose scales are other sites of its module; ``scales`` has their names there."""

    def __init__(self, scales: list[str], group_dims: tuple[int, ...] | None) -> None:
        super().__init__(dist.Normal(0.0, 1.0))
        self.scales = scales
        self.group_dims = group_dims

    def of(self, module: nn.Module) -> WeightPrior:
        """Returns the prior given the scales: within a call of the network their samples, else where they start."""
        value = self.value(module)
        scale = torch.ones_like(value)
        for name in self.scales:
            scale = scale * getattr(module, name)
        prior = dist.Normal(torch.zeros_like(value), scale, validate_args=False)
        name = site_name(module, self.attribute)
        return ShrunkWeightPrior(prior, value.dim(), value, self.zero_row, name, group_dims=self.group_dims)


def _initial_scale(value: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    if dims is None:
        return torch.ones_like(value)
    # Not that of the scale's own group: a group of one weight that starts near 0 would find it hard to grow.
    shape = [size if dim in dims else 1 for dim, size in enumerate(value.shape)]
    return value.square().mean().sqrt().nan_to_num().clamp_min(1e-3).expand(shape).clone()
