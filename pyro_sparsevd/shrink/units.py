"""Units, which are features or channels, of the tensors within a network."""

__all__ = ["UnionFind", "Units", "same"]

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class UnionFind:
    """Union-find over the ids of units that must be kept or removed together; the units of id 0 are always kept."""

    def __init__(self) -> None:
        self._parents = [0]

    def new(self, count: int) -> Tensor:
        """Returns new ids, each in a set of its own."""
        ids = range(len(self._parents), len(self._parents) + count)
        self._parents.extend(ids)
        return torch.tensor(ids, dtype=torch.long)

    def union(self, a: Tensor, b: Tensor) -> None:
        """Joins, element by element, the sets of two tensors of ids of the same shape."""
        for pair in torch.stack([a.flatten(), b.flatten()], 1).unique(dim=0).tolist():
            low, high = sorted(map(self._root, pair))
            self._parents[high] = low

    def find(self, ids: Tensor) -> Tensor:
        """Returns the smallest id in the set of each id."""
        return torch.tensor([self._root(i) for i in ids.tolist()], dtype=torch.long)

    def _root(self, i: int) -> int:
        while self._parents[i] != i:
            self._parents[i] = i = self._parents[self._parents[i]]
        return i


@dataclass(eq=False)
class Units:
    """What is known of a tensor between two operations."""

    constant: Tensor  # its values for a batch of one, in double precision; NaN where they depend on the network's input
    dim: int | None  # the dimension that the units are along; None if the tensor is kept whole
    ids: Tensor  # of each unit, for :class:`UnionFind`
    live: Tensor  # whether the output of the network depends on a unit
    position_dependent: Tensor  # whether padding makes a unit's values differ, so that they hold for this size alone

    @classmethod
    def whole(cls, shape: Sequence[int], device: torch.device) -> "Units":
        """Returns the units of a tensor that is kept whole and of which nothing is known."""
        constant = torch.full((1, *shape[1:]), math.nan, dtype=torch.float64, device=device)
        none = torch.zeros(0, dtype=torch.bool)
        return cls(constant, None, torch.zeros(0, dtype=torch.long), none, none)

    @classmethod
    def along(cls, dim: int, constant: Tensor, ids: Tensor, position_dependent: Tensor | None = None) -> "Units":
        """Returns units none of which is live yet."""
        none = torch.zeros(len(ids), dtype=torch.bool)
        return cls(constant, dim, ids, none, none.clone() if position_dependent is None else position_dependent)

    def fits(self, dim: int) -> bool:
        """Returns whether the units are along a dimension, or can be taken to be."""
        return self.dim in (None, dim) and 0 < dim < self.constant.dim()

    def ids_along(self, dim: int) -> Tensor:
        """Returns the ids along a dimension that :meth:`fits`."""
        return torch.zeros(self.constant.shape[dim], dtype=torch.long) if self.dim is None else self.ids

    def position_dependent_along(self, dim: int) -> Tensor:
        """Returns which units depend on the position, along a dimension that :meth:`fits`."""
        return torch.zeros(self.constant.shape[dim], dtype=torch.bool) if self.dim is None else self.position_dependent

    def mark_live(self, units: Tensor) -> None:
        """Marks units as live; no others stop being so."""
        if self.dim is not None:
            self.live |= units

    def unit_constants(self, dim: int) -> Tensor:
        """Returns the number that a unit has at every position, along a dimension that :meth:`fits`; else NaN."""
        values = self.constant.movedim(dim, 0).flatten(1)
        varies = self.position_dependent_along(dim).to(values.device)
        return torch.where(same(values, values[:, :1]).all(1) & ~varies, values[:, 0], math.nan)


def same(a: Tensor, b: Tensor) -> Tensor:
    """Returns which numbers are equal up to rounding; infinity is not equal to infinity."""
    # Elements of one vectorised operation may be rounded differently.
    return (a - b).abs() <= 1e-9 * b.abs()
