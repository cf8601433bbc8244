"""The size of each layer of a network, before and after units were removed."""

__all__ = ["LayerSize", "ShrinkReport", "layer_sizes", "shrink_report"]

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _tables as tables
from .._modules import batch_tensor, cloned, copied, run_network
from .flow import Layer
from .shrink import shrink_with_notes


@dataclass(frozen=True)
class LayerSize:
    """Output units, parameters, and multiply-adds per example of a linear layer or a convolution."""

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
        parameters_before: The number of all parameters of the network before.
        parameters_after: The number of all parameters of the network after.
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
        """The number of multiply-adds of all layers after."""
        return sum(layer.multiply_adds for layer in self.after)

    def to_dict(self) -> dict[str, Any]:
        """Returns the layers, the totals and the notes as a dictionary of numbers and strings, for a file."""
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


def shrink_report(before: nn.Module, after: nn.Module, example_input: Any) -> ShrinkReport:
    """Returns what :func:`~.shrink.shrink` removed from a network, layer by layer, and what it left whole.

    The notes on what was left whole are found by shrinking ``before`` once more.

    Args:
        before: The network that was shrunk.
        after: The smaller network.
        example_input: An input that both accept, as for :func:`~.shrink.shrink`.

    Returns:
        The report, which is a table when printed.

    Raises:
        TypeError: See :func:`~.shrink.shrink`.
        ValueError: See :func:`~.shrink.shrink`; or if ``after`` has not the layers of ``before``.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> net[0].weight.data[0] = 0
        >>> x = torch.rand(5, 2)
        >>> print(shrink_report(net, sparsevd.shrink(net, x), x))
        layer     units  parameters  multiply-adds
        0        3 -> 2      9 -> 6         6 -> 4
        2        1 -> 1      4 -> 3         3 -> 2
        network             13 -> 9         9 -> 6
    """
    notes = shrink_with_notes(before, example_input)[1]
    sizes_before, sizes_after = layer_sizes(before, example_input), layer_sizes(after, example_input)
    if len(sizes_after) != len(sizes_before):
        raise ValueError(
            f"after: expected a smaller network of the {len(sizes_before)} layers of before, but got {len(sizes_after)}"
        )
    return ShrinkReport(
        names=tuple(sizes_before),
        before=tuple(sizes_before.values()),
        after=tuple(sizes_after.values()),
        parameters_before=sum(p.numel() for p in before.parameters()),
        parameters_after=sum(p.numel() for p in after.parameters()),
        notes=notes,
    )


@torch.no_grad()
def layer_sizes(net: nn.Module, example_input: Any) -> dict[str, LayerSize]:
    """Counts the sizes of the linear layers and convolutions of a network, by name.

    The multiply-adds are zero for a layer that no module call reaches.
    """
    net = copied(net).eval()
    layers = {name: module for name, module in net.named_modules() if isinstance(module, Layer)}
    positions = dict.fromkeys(layers.values(), 0)

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, Layer)
        positions[module] += output.numel() // max(1, len(module.weight))

    for layer in positions:
        layer.register_forward_hook(count)
    run_network(net, cloned(example_input))
    size = len(batch_tensor("example_input", example_input))
    return {
        name: LayerSize(
            units=len(layer.weight),
            parameters=sum(p.numel() for p in layer.parameters()),
            multiply_adds=positions[layer] * layer.weight.numel() // size,
        )
        for name, layer in layers.items()
    }


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,}"
