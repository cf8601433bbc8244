"""The size of each layer of a network, before and after units were removed."""

__all__ = ["LayerSize", "ShrinkReport", "layer_sizes"]

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _tables as tables
from .._modules import copied
from .flow import Layer


@dataclass(frozen=True)
class LayerSize:
    """The size of a linear layer or a convolution.

    Args:
        units: Features or channels that come out.
        parameters: Weights and biases.
        multiply_adds: One for each use of a weight, for one datum.

    Example:
        >>> layer_sizes(nn.Sequential(nn.Conv2d(1, 2, 3)), torch.rand(5, 1, 6, 6))
        {'0': LayerSize(units=2, parameters=20, multiply_adds=288)}
    """

    units: int
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class ShrinkReport:
    """What was removed from a network: a table when printed.

    Args:
        names: The names of the linear layers and convolutions, in the network before.
        before: Their sizes.
        after: Their sizes in the network after.
        parameters_before: The number of all parameters.
        parameters_after: The number of them after.
        notes: What was left whole, and why.

    Example:
        >>> sizes = LayerSize(300, 235500, 235200), LayerSize(30, 23550, 23520)
        >>> print(ShrinkReport(("fc1",), sizes[:1], sizes[1:], 235500, 23550, ("fc1: an example",)))
        layer        units         parameters      multiply-adds
        fc1      300 -> 30  235,500 -> 23,550  235,200 -> 23,520
        network             235,500 -> 23,550  235,200 -> 23,520
        note: fc1: an example
    """

    names: tuple[str, ...]
    before: tuple[LayerSize, ...]
    after: tuple[LayerSize, ...]
    parameters_before: int
    parameters_after: int
    notes: tuple[str, ...] = ()

    @property
    def multiply_adds_before(self) -> int:
        """The number of multiply-adds of all layers."""
        return sum(layer.multiply_adds for layer in self.before)

    @property
    def multiply_adds_after(self) -> int:
        """The number of them after."""
        return sum(layer.multiply_adds for layer in self.after)

    def to_dict(self) -> dict[str, Any]:
        """Returns the table as plain numbers, for a file.

        Returns:
            A dictionary with the layers, the totals and the notes.
        """
        rows = zip(self.names, self.before, self.after, strict=True)
        return {
            "layers": {name: {"before": asdict(before), "after": asdict(after)} for name, before, after in rows},
            "network": {
                "parameters": {"before": self.parameters_before, "after": self.parameters_after},
                "multiply_adds": {"before": self.multiply_adds_before, "after": self.multiply_adds_after},
            },
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("layer", "units", "parameters", "multiply-adds")]
        for name, before, after in zip(self.names, self.before, self.after, strict=True):
            pairs = zip(asdict(before).values(), asdict(after).values(), strict=True)
            cells.append((name, *(_change(*pair) for pair in pairs)))
        totals = (self.parameters_before, self.parameters_after), (self.multiply_adds_before, self.multiply_adds_after)
        cells.append(("network", "", *(_change(*pair) for pair in totals)))
        return "\n".join([tables.as_text(cells), *(f"note: {note}" for note in self.notes)])


@torch.no_grad()
def layer_sizes(net: nn.Module, example_input: Tensor) -> dict[str, LayerSize]:
    """Counts units, parameters and multiply-adds of the linear layers and convolutions that a network uses.

    Args:
        net: The network.
        example_input: An input that it accepts, with a batch first.

    Returns:
        The sizes, by the name of the layer; multiply-adds are zero for a layer that no module call reaches.

    Example:
        >>> layer_sizes(nn.Sequential(nn.Linear(3, 2)), torch.rand(5, 3))
        {'0': LayerSize(units=2, parameters=8, multiply_adds=6)}
    """
    net = copied(net).eval()
    layers = {name: module for name, module in net.named_modules() if isinstance(module, Layer)}
    positions = dict.fromkeys(layers.values(), 0)

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, Layer)
        positions[module] += output.numel() // max(1, len(module.weight))

    for layer in positions:
        layer.register_forward_hook(count)
    net(example_input.clone())
    return {
        name: LayerSize(
            units=len(layer.weight),
            parameters=sum(p.numel() for p in layer.parameters()),
            multiply_adds=positions[layer] * layer.weight.numel() // len(example_input),
        )
        for name, layer in layers.items()
    }


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,}"
