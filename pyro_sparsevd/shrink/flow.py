"""How units pass through one operation of a network, forwards and backwards."""

__all__ = [
    *("Channelwise", "Concatenation", "Flattening", "Layer", "Operation", "Pooling", "WeightedSum"),
    *("by_group", "folded"),
]

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .units import UnionFind, Units, same

Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class Operation(Protocol):
    """An operation that units can be followed through."""

    def forward(self, inputs: Sequence[Units], shape: Sequence[int], sets: UnionFind) -> Units | None:
        """Returns the units of the output, of this shape; ``None``, with no sets joined, if they cannot be followed."""

    def backward(self, inputs: Sequence[Units], output: Units) -> None:
        """Marks the units of the inputs that live units of the output depend on."""


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """A linear layer or a convolution; a group of channels is kept or removed as a whole."""

    layer: Layer

    def dim(self, units: Units) -> int:
        """Returns the dimension that the layer has units along."""
        return units.constant.dim() - 1 if isinstance(self.layer, nn.Linear) else 1

    def constants(self, units: Units) -> Tensor:
        """Returns the constants that can be folded into the bias; NaN for other units.

        At the border of zero padding a unit is constant only if it is zero.
        """
        constants = units.unit_constants(self.dim(units))
        return torch.where(constants == 0, constants, math.nan) if _on_padding(self.layer).any() else constants

    def reads(self, units: Units, outputs: Tensor) -> Tensor:
        """Returns the units that some outputs depend on, other than as constants."""
        weight = by_group(self.layer).cpu()
        used = weight.ne(0).any(-1) & outputs.view(len(weight), -1, 1)
        return used.any(1).flatten() & self.constants(units).isnan().cpu()

    def forward(self, inputs: Sequence[Units], shape: Sequence[int], sets: UnionFind) -> Units | None:
        """Returns new units, joined within a group; they are constant where their inputs are."""
        (units,) = inputs
        dim, groups = self.dim(units), len(by_group(self.layer))
        ndim = len(shape) if isinstance(self.layer, nn.Linear) else self.layer.weight.dim()
        if len(shape) != ndim or not units.fits(dim):
            return None
        ids = sets.new(shape[dim])
        if groups > 1:
            for part in (ids, units.ids_along(dim)):
                sets.union(part.view(groups, -1), ids.view(groups, -1)[:, :1].expand(groups, len(part) // groups))
        return Units.along(dim, self._sums(units), ids, self._position_dependent(units))

    def backward(self, inputs: Sequence[Units], output: Units) -> None:
        """Marks the inputs that live outputs read."""
        inputs[0].mark_live(self.reads(inputs[0], output.live))

    def _sums(self, units: Units) -> Tensor:
        dim, constants, weight = self.dim(units), self.constants(units), self.layer.weight
        rest = torch.where(_aligned(constants.isnan(), dim, units.constant), units.constant, 0)
        unknown = self._unbiased(weight.ne(0).float(), rest.isnan().float()) > 0.5
        sums = self._unbiased(weight.double(), torch.where(rest.isnan(), 0, rest))
        return torch.where(unknown, math.nan, sums + _aligned(folded(self.layer, constants), dim, sums))

    def _unbiased(self, weight: Tensor, x: Tensor) -> Tensor:
        bias = {} if self.layer.bias is None else {"bias": torch.zeros_like(self.layer.bias, dtype=weight.dtype)}
        output: Tensor = functional_call(self.layer, {"weight": weight, **bias}, (x,))
        return output

    def _position_dependent(self, units: Units) -> Tensor:
        used = by_group(self.layer).cpu().ne(0)
        rest = self.constants(units).isnan().cpu().view(len(used), 1, -1, 1)
        varies = units.position_dependent_along(self.dim(units)).view_as(rest) | _on_padding(self.layer)
        return (used & rest & varies).flatten(2).any(-1).flatten()


@dataclass(frozen=True, eq=False)
class Channelwise:
    """An operation with one unit of the output for each of its inputs: an activation, a norm, a sum of tensors.

    ``run`` returns the output for a batch of one, in which NaN must stay NaN within a unit. ``ndim`` is the number of
    dimensions that the operation needs, with units along dimension 1; ``None`` if it is elementwise.
    """

    run: Callable[..., Tensor]
    ndim: int | None

    def forward(self, inputs: Sequence[Units], shape: Sequence[int], sets: UnionFind) -> Units | None:
        """Returns the units of the first input, joined with those of the others."""
        dims = {units.dim for units in inputs} - {None}
        if not dims:
            return Units.whole(shape, inputs[0].constant.device)
        dim = dims.pop()
        assert dim is not None
        if dims or not all(self._follows(units, dim, shape) for units in inputs):
            return None
        constant = self.run(*(units.constant.clone() for units in inputs)).double()
        if constant.shape[1:] != shape[1:]:
            return None
        for units in inputs:
            # In some versions of torch, softshrink turns NaN into a number.
            if units.constant.shape == constant.shape:
                constant = torch.where(units.constant.isnan(), math.nan, constant)
        ids, *others = (units.ids_along(dim) for units in inputs)
        for other in others:
            sets.union(ids, other)
        varies = torch.stack([units.position_dependent_along(dim) for units in inputs]).any(0)
        return Units.along(dim, constant, ids, varies)

    def backward(self, inputs: Sequence[Units], output: Units) -> None:
        """Marks the live units of the output in each input."""
        for units in inputs:
            if output.dim is not None:
                units.mark_live(output.live)

    def _follows(self, units: Units, dim: int, shape: Sequence[int]) -> bool:
        ndim = len(shape) if self.ndim is None else self.ndim
        if units.constant.dim() != ndim or not units.fits(dim) or not (self.ndim is None or dim == 1):
            return False
        return units.constant.shape[dim] == shape[dim]


@dataclass(frozen=True, eq=False)
class Pooling(Channelwise):
    """A pooling or a mean over positions; ``adaptive`` if the windows depend on the size of the tensor."""

    adaptive: bool

    def forward(self, inputs: Sequence[Units], shape: Sequence[int], sets: UnionFind) -> Units | None:
        """Returns the units of the input; if adaptive, only unit constants stay known."""
        output = super().forward(inputs, shape, sets)
        if output is not None and output.dim is not None:
            before = inputs[0].unit_constants(1)
            if self.adaptive:
                output.constant[:, before.isnan()] = math.nan
            # Padding within a window changes a constant.
            output.position_dependent |= (before.isfinite() & ~same(output.unit_constants(1), before)).cpu()
        return output


class Flattening:
    """All dimensions after that of the batch into one: each number becomes a unit, with the id of its channel."""

    def forward(self, inputs: Sequence[Units], shape: Sequence[int], sets: UnionFind) -> Units | None:
        """Returns the numbers as units."""
        (units,) = inputs
        if len(shape) != 2 or shape[1] != units.constant[0].numel():
            return None
        if units.dim is None:
            return Units.whole(shape, units.constant.device)
        ids = _aligned(units.ids, units.dim, units.constant).expand(1, *units.constant.shape[1:]).flatten()
        return Units.along(1, units.constant.flatten(1), ids)

    def backward(self, inputs: Sequence[Units], output: Units) -> None:
        """Marks a unit if any of its numbers is live."""
        (units,) = inputs
        if units.dim is not None:
            units.mark_live(output.live.view_as(units.constant).movedim(units.dim, 0).flatten(1).any(1))


@dataclass(frozen=True)
class Concatenation:
    """Tensors one after the other along a dimension."""

    dim: int

    def forward(self, inputs: Sequence[Units], shape: Sequence[int], sets: UnionFind) -> Units | None:
        """Returns the units of all inputs."""
        dim = self.dim % len(shape)
        if all(units.dim is None for units in inputs):
            return Units.whole(shape, inputs[0].constant.device)
        if not all(units.fits(dim) for units in inputs):
            return None
        constant = torch.cat([units.constant for units in inputs], dim)
        ids = torch.cat([units.ids_along(dim) for units in inputs])
        return Units.along(dim, constant, ids, torch.cat([units.position_dependent_along(dim) for units in inputs]))

    def backward(self, inputs: Sequence[Units], output: Units) -> None:
        """Marks the live units of the output in the input that they come from."""
        if output.dim is not None:
            sizes = [units.constant.shape[output.dim] for units in inputs]
            for units, live in zip(inputs, output.live.split(sizes), strict=True):
                units.mark_live(live)


def by_group(layer: Layer) -> Tensor:
    """Returns the weights of a layer as (groups, outputs, inputs, positions in the kernel), detached."""
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    weight = layer.weight.detach()
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)


def folded(layer: Layer, constants: Tensor) -> Tensor:
    """Returns the bias of a layer, in double precision, plus what constant inputs add; NaN is not constant."""
    weight = by_group(layer).double().sum(-1)
    bias = torch.zeros(len(layer.weight)).to(weight) if layer.bias is None else layer.bias.detach().double()
    return bias + (weight @ constants.to(weight).nan_to_num(0).view(len(weight), -1, 1)).flatten()


def _aligned(units: Tensor, dim: int, like: Tensor) -> Tensor:
    return units.view(*(-1 if i == dim else 1 for i in range(like.dim())))


def _on_padding(layer: Layer) -> Tensor:
    """Returns which positions of the kernel may lie on zero padding, for some size of the input."""
    inside = torch.ones(1, dtype=torch.bool)
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros" or layer.padding == "valid":
        return ~inside
    for i, (size, dilation) in enumerate(zip(layer.kernel_size, layer.dilation, strict=True)):
        places = dilation * torch.arange(size)
        before = int(places[-1]) // 2 if layer.padding == "same" else int(layer.padding[i])
        after = int(places[-1]) - before if layer.padding == "same" else before
        inside = (inside[:, None] & (places >= before) & (places.flip(0) >= after)).flatten()
    return ~inside
