"""Units, which are features or channels, of the tensors within a network: torch only."""

__all__ = ["Ties", "Units", "same"]

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Ties:
    """Which units are there only together, such as the terms of a residual sum: a forest of ids.

    The units of id 0 always stay.

    Example:
        >>> ties = Ties()
        >>> a, b = ties.new(2), ties.new(2)
        >>> ties.tie(a[:1], b[:1])
        >>> ties.roots(torch.cat([a, b]))
        tensor([1, 2, 1, 4])
    """

    def __init__(self) -> None:
        self._parents = [0]

    def new(self, count: int) -> Tensor:
        """Returns ids that are tied to no others."""
        ids = range(len(self._parents), len(self._parents) + count)
        self._parents.extend(ids)
        return torch.tensor(ids, dtype=torch.long)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Ties each id of one tensor to that at the same place of another of the same shape."""
        for pair in torch.stack([a.flatten(), b.flatten()], 1).unique(dim=0).tolist():
            low, high = sorted(map(self._root, pair))
            self._parents[high] = low

    def roots(self, ids: Tensor) -> Tensor:
        """Returns for each the smallest id that it is tied to."""
        return torch.tensor([self._root(i) for i in ids.tolist()], dtype=torch.long)

    def _root(self, i: int) -> int:
        while self._parents[i] != i:
            self._parents[i] = i = self._parents[self._parents[i]]
        return i


@dataclass(eq=False)
class Units:
    """What is known of a tensor between two operations.

    Args:
        known: Of the tensor's shape, but for a batch of one: the numbers that are the same for every input of the
            network, in double precision, and NaN elsewhere.
        dim: The dimension that the units are along; ``None`` if all of the tensor stays.
        ids: The id of each unit.
        needed: Which units make a difference to the output of the network.
        varies: Which units padding makes differ from place to place, so that what is known of them is known for
            tensors of this size alone.

    Example:
        >>> known = torch.tensor([[[0.5, 0.5], [0.5, 0.7]]], dtype=torch.float64)
        >>> Units.along(1, known, torch.tensor([1, 2])).constants(1)
        tensor([0.5000,    nan], dtype=torch.float64)
    """

    known: Tensor
    dim: int | None
    ids: Tensor
    needed: Tensor
    varies: Tensor

    @classmethod
    def whole(cls, shape: Sequence[int], device: torch.device) -> "Units":
        """Returns a tensor of which nothing is known and all stays."""
        known = torch.full((1, *shape[1:]), math.nan, dtype=torch.float64, device=device)
        none = torch.zeros(0, dtype=torch.bool)
        return cls(known, None, torch.zeros(0, dtype=torch.long), none, none)

    @classmethod
    def along(cls, dim: int, known: Tensor, ids: Tensor, varies: Tensor | None = None) -> "Units":
        """Returns units that nothing needs yet."""
        none = torch.zeros(len(ids), dtype=torch.bool)
        return cls(known, dim, ids, none, none.clone() if varies is None else varies)

    def fits(self, dim: int) -> bool:
        """Returns whether the units are along a dimension, or can be taken to be."""
        return self.dim in (None, dim) and 0 < dim < self.known.dim()

    def ids_along(self, dim: int) -> Tensor:
        """Returns the ids along a dimension that :meth:`fits`."""
        return torch.zeros(self.known.shape[dim], dtype=torch.long) if self.dim is None else self.ids

    def varies_along(self, dim: int) -> Tensor:
        """Returns which units vary, along a dimension that :meth:`fits`."""
        return torch.zeros(self.known.shape[dim], dtype=torch.bool) if self.dim is None else self.varies

    def need(self, units: Tensor) -> None:
        """Notes that units are needed."""
        if self.dim is not None:
            self.needed |= units

    def constants(self, dim: int) -> Tensor:
        """Returns the number that a unit has at every place, along a dimension that :meth:`fits`; or NaN."""
        places = self.known.movedim(dim, 0).flatten(1)
        varies = self.varies_along(dim).to(places.device)
        return torch.where(same(places, places[:, :1]).all(1) & ~varies, places[:, 0], math.nan)


def same(a: Tensor, b: Tensor) -> Tensor:
    """Returns which numbers are equal up to rounding.

    Args:
        a: The numbers, in double precision.
        b: Those to compare them with.

    Returns:
        Whether they are, for each; infinity is not the same as infinity.

    Example:
        >>> same(torch.tensor([0.1 + 1e-15, 0.1 + 1e-6, math.inf]).double(), torch.tensor([0.1, 0.1, math.inf]))
        tensor([ True, False, False])
    """
    # The same operation may be rounded otherwise in another part of a vectorised loop.
    return (a - b).abs() <= 1e-9 * b.abs()
