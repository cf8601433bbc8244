"""How units pass through one operation of a network: torch only."""

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

from .units import Ties, Units, same

Layer: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class Operation(Protocol):
    """An operation that units can be followed through."""

    def forward(self, inputs: Sequence[Units], shape: Sequence[int], ties: Ties) -> Units | None:
        """Returns the output, of this shape; ``None``, with nothing tied, if it is not one of followed units."""

    def backward(self, inputs: Sequence[Units], output: Units) -> None:
        """Notes which units of the inputs are needed for those that are needed of the output."""


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """A linear layer or a convolution; of a group of channels, all are there or none.

    Args:
        layer: The layer.

    Example:
        >>> sums = WeightedSum(nn.Linear(2, 1))
        >>> hidden = Units.along(1, torch.tensor([[math.nan, 0.5]]).double(), torch.tensor([1, 2]))
        >>> output = sums.forward([hidden], (1, 1), Ties())
        >>> output.need(torch.tensor([True]))
        >>> sums.backward([hidden], output)
        >>> hidden.needed
        tensor([ True, False])
    """

    layer: Layer

    def dim(self, units: Units) -> int:
        """Returns the dimension that the layer has units along."""
        return units.known.dim() - 1 if isinstance(self.layer, nn.Linear) else 1

    def constants(self, units: Units) -> Tensor:
        """Returns the constants that can stand in the bias as well; NaN for other units.

        At the border of zero padding a unit that is a constant is not one, but for zero.
        """
        constants = units.constants(self.dim(units))
        return torch.where(constants == 0, constants, math.nan) if _on_padding(self.layer).any() else constants

    def reads(self, units: Units, outputs: Tensor) -> Tensor:
        """Returns the units that some outputs depend on, other than as constants."""
        weight = by_group(self.layer).cpu()
        used = weight.ne(0).any(-1) & outputs.view(len(weight), -1, 1)
        return used.any(1).flatten() & self.constants(units).isnan().cpu()

    def forward(self, inputs: Sequence[Units], shape: Sequence[int], ties: Ties) -> Units | None:
        """Returns new units, tied within a group; of units that are constant, their known sums."""
        (units,) = inputs
        dim, groups = self.dim(units), len(by_group(self.layer))
        ndim = len(shape) if isinstance(self.layer, nn.Linear) else self.layer.weight.dim()
        if len(shape) != ndim or not units.fits(dim):
            return None
        ids = ties.new(shape[dim])
        if groups > 1:
            for part in (ids, units.ids_along(dim)):
                ties.tie(part.view(groups, -1), ids.view(groups, -1)[:, :1].expand(groups, len(part) // groups))
        return Units.along(dim, self._sums(units), ids, self._varies(units))

    def backward(self, inputs: Sequence[Units], output: Units) -> None:
        """Needs what the needed outputs read."""
        inputs[0].need(self.reads(inputs[0], output.needed))

    def _sums(self, units: Units) -> Tensor:
        dim, constants, weight = self.dim(units), self.constants(units), self.layer.weight
        rest = torch.where(_aligned(constants.isnan(), dim, units.known), units.known, 0)
        unknown = self._unbiased(weight.ne(0).float(), rest.isnan().float()) > 0.5
        sums = self._unbiased(weight.double(), torch.where(rest.isnan(), 0, rest))
        return torch.where(unknown, math.nan, sums + _aligned(folded(self.layer, constants), dim, sums))

    def _unbiased(self, weight: Tensor, x: Tensor) -> Tensor:
        bias = {} if self.layer.bias is None else {"bias": torch.zeros_like(self.layer.bias, dtype=weight.dtype)}
        output: Tensor = functional_call(self.layer, {"weight": weight, **bias}, (x,))
        return output

    def _varies(self, units: Units) -> Tensor:
        used = by_group(self.layer).cpu().ne(0)
        rest = self.constants(units).isnan().cpu().view(len(used), 1, -1, 1)
        varies = units.varies_along(self.dim(units)).view_as(rest) | _on_padding(self.layer)
        return (used & rest & varies).flatten(2).any(-1).flatten()


@dataclass(frozen=True, eq=False)
class Channelwise:
    """An operation whose output has a unit for each of its inputs': an activation, a norm, a sum of tensors.

    Args:
        run: Returns the output for a batch of one; NaN must stay NaN within a unit.
        ndim: The number of dimensions that the operation needs, with units along dimension 1; ``None`` if it is
            elementwise.

    Example:
        >>> hidden = Units.along(1, torch.tensor([[math.nan, -0.5]]).double(), torch.tensor([1, 2]))
        >>> Channelwise(torch.relu, None).forward([hidden], (1, 2), Ties()).known
        tensor([[nan, 0.]], dtype=torch.float64)
    """

    run: Callable[..., Tensor]
    ndim: int | None

    def forward(self, inputs: Sequence[Units], shape: Sequence[int], ties: Ties) -> Units | None:
        """Returns the units of the first input, tied to those of the others."""
        dims = {units.dim for units in inputs} - {None}
        if not dims:
            return Units.whole(shape, inputs[0].known.device)
        dim = dims.pop()
        assert dim is not None
        if dims or not all(self._follows(units, dim, shape) for units in inputs):
            return None
        known = self.run(*(units.known.clone() for units in inputs)).double()
        if known.shape[1:] != shape[1:]:
            return None
        for units in inputs:
            # In some versions of torch, softshrink makes a number of NaN.
            if units.known.shape == known.shape:
                known = torch.where(units.known.isnan(), math.nan, known)
        ids, *others = (units.ids_along(dim) for units in inputs)
        for other in others:
            ties.tie(ids, other)
        return Units.along(dim, known, ids, torch.stack([units.varies_along(dim) for units in inputs]).any(0))

    def backward(self, inputs: Sequence[Units], output: Units) -> None:
        """Needs the units that are needed."""
        for units in inputs:
            if output.dim is not None:
                units.need(output.needed)

    def _follows(self, units: Units, dim: int, shape: Sequence[int]) -> bool:
        ndim = len(shape) if self.ndim is None else self.ndim
        if units.known.dim() != ndim or not units.fits(dim) or not (self.ndim is None or dim == 1):
            return False
        return units.known.shape[dim] == shape[dim]


@dataclass(frozen=True, eq=False)
class Pooling(Channelwise):
    """A pooling or a mean over places.

    Args:
        run: See :class:`Channelwise`.
        ndim: See :class:`Channelwise`.
        adaptive: Whether what is pooled depends on the size of the tensor, as in a mean over all places.

    Example:
        >>> hidden = Units.along(1, torch.tensor([[[2.0, 2.0], [1.0, 2.0]]]).double(), torch.tensor([1, 2]))
        >>> Pooling(nn.AdaptiveAvgPool1d(1), 3, adaptive=True).forward([hidden], (1, 2, 1), Ties()).known.flatten()
        tensor([2., nan], dtype=torch.float64)
    """

    adaptive: bool

    def forward(self, inputs: Sequence[Units], shape: Sequence[int], ties: Ties) -> Units | None:
        """Returns the units of the input; if adaptive, only constants are known."""
        output = super().forward(inputs, shape, ties)
        if output is not None and output.dim is not None:
            before = inputs[0].constants(1)
            if self.adaptive:
                output.known[:, before.isnan()] = math.nan
            # What pads a window changes a constant.
            output.varies |= (before.isfinite() & ~same(output.constants(1), before)).cpu()
        return output


class Flattening:
    """All dimensions but that of the batch into one: each number becomes a unit, one of a channel's.

    Example:
        >>> channels = Units.along(1, torch.zeros(1, 2, 2), torch.tensor([1, 2]))
        >>> Flattening().forward([channels], (1, 4), Ties()).ids
        tensor([1, 1, 2, 2])
    """

    def forward(self, inputs: Sequence[Units], shape: Sequence[int], ties: Ties) -> Units | None:
        """Returns the numbers as units."""
        (units,) = inputs
        if len(shape) != 2 or shape[1] != units.known[0].numel():
            return None
        if units.dim is None:
            return Units.whole(shape, units.known.device)
        ids = _aligned(units.ids, units.dim, units.known).expand(1, *units.known.shape[1:]).flatten()
        return Units.along(1, units.known.flatten(1), ids)

    def backward(self, inputs: Sequence[Units], output: Units) -> None:
        """Needs a unit of which a number is needed."""
        (units,) = inputs
        if units.dim is not None:
            units.need(output.needed.view_as(units.known).movedim(units.dim, 0).flatten(1).any(1))


@dataclass(frozen=True)
class Concatenation:
    """Tensors one after the other, along a dimension.

    Args:
        dim: The dimension.

    Example:
        >>> a, b = (Units.along(1, torch.zeros(1, 1), torch.tensor([i])) for i in (1, 2))
        >>> Concatenation(1).forward([a, b], (1, 2), Ties()).ids
        tensor([1, 2])
    """

    dim: int

    def forward(self, inputs: Sequence[Units], shape: Sequence[int], ties: Ties) -> Units | None:
        """Returns the units of all inputs."""
        dim = self.dim % len(shape)
        if all(units.dim is None for units in inputs):
            return Units.whole(shape, inputs[0].known.device)
        if not all(units.fits(dim) for units in inputs):
            return None
        known = torch.cat([units.known for units in inputs], dim)
        ids = torch.cat([units.ids_along(dim) for units in inputs])
        return Units.along(dim, known, ids, torch.cat([units.varies_along(dim) for units in inputs]))

    def backward(self, inputs: Sequence[Units], output: Units) -> None:
        """Needs the units of each input that are needed."""
        if output.dim is not None:
            sizes = [units.known.shape[output.dim] for units in inputs]
            for units, needed in zip(inputs, output.needed.split(sizes), strict=True):
                units.need(needed)


def by_group(layer: Layer) -> Tensor:
    """Returns the weights of a layer as groups x outputs x inputs x places in the kernel.

    Args:
        layer: The layer; a linear one has one group and one place.

    Returns:
        The weights, without their history.

    Example:
        >>> by_group(nn.Conv1d(4, 6, 5, groups=2)).shape
        torch.Size([2, 3, 2, 5])
    """
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    weight = layer.weight.detach()
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)


def folded(layer: Layer, constants: Tensor) -> Tensor:
    """Returns the bias of a layer with what constant inputs add to its outputs.

    Args:
        layer: The layer.
        constants: A number for each input that is to be folded in; NaN for the others.

    Returns:
        The bias, in double precision.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[2.0, 3.0]])
        >>> folded(layer, torch.tensor([0.5, math.nan]))
        tensor([1.], dtype=torch.float64)
    """
    weight = by_group(layer).double().sum(-1)
    bias = torch.zeros(len(layer.weight)).to(weight) if layer.bias is None else layer.bias.detach().double()
    return bias + (weight @ constants.to(weight).nan_to_num(0).view(len(weight), -1, 1)).flatten()


def _aligned(units: Tensor, dim: int, like: Tensor) -> Tensor:
    return units.view(*(-1 if i == dim else 1 for i in range(like.dim())))


def _on_padding(layer: Layer) -> Tensor:
    """Returns which places of the kernel may come to lie on zero padding, whatever the size of the input."""
    inside = torch.ones(1, dtype=torch.bool)
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros" or layer.padding == "valid":
        return ~inside
    for i, (size, dilation) in enumerate(zip(layer.kernel_size, layer.dilation, strict=True)):
        places = dilation * torch.arange(size)
        before = int(places[-1]) // 2 if layer.padding == "same" else int(layer.padding[i])
        after = int(places[-1]) - before if layer.padding == "same" else before
        inside = (inside[:, None] & (places >= before) & (places.flip(0) >= after)).flatten()
    return ~inside
