"""Which units the output depends on: forwards for those that are constant, backwards for those that are not read."""

__all__ = ["LayerUnits", "Liveness", "liveness"]

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .._modules import cloned, run_network, tensors_of
from .flow import Layer, Operation, WeightedSum
from .graph import InputTracer, Recorder, WeightUses, operation_of, reads_batch_size, sources
from .units import UnionFind, Units


@dataclass(frozen=True, eq=False)
class LayerUnits:
    """Which units of a linear layer or a convolution are kept."""

    inputs: Tensor
    reads: Tensor  # which of the inputs the layer needs
    constants: Tensor  # the number of an input that can be folded into the bias; NaN for the others
    outputs: Tensor


@dataclass(frozen=True, eq=False)
class Liveness:
    """What :func:`liveness` found."""

    layers: dict[str, LayerUnits]
    norms: dict[str, Tensor]  # the channels of a batch normalisation that are kept
    notes: tuple[str, ...]  # what could not be followed, and why: its inputs and outputs stay whole


@torch.no_grad()
def liveness(net: nn.Module, example_input: Any) -> Liveness:
    """Finds the units that a network in evaluation mode can do without; it is left as it is.

    A unit can go if it is constant wherever it is read with a weight that is not zero, and can be folded into a bias
    there; or if it is not read. Units that meet in a sum, such as a residual one, go together or not at all. At least
    one unit of each tensor is kept.
    """
    try:
        graph = fx.GraphModule(net, InputTracer(example_input).trace(net))
        recorder = Recorder(graph)
        actual = recorder.run(*tensors_of(cloned(example_input)))
        expected = tensors_of(run_network(net, cloned(example_input)))
        if not expected:
            raise TypeError("it returns no tensor")
        torch.testing.assert_close(actual, expected, equal_nan=True)
    except Exception as error:  # the network's own code, run on proxies, may raise anything
        reason = str(error).strip().partition("\n")[0]
        return Liveness({}, {}, (f"the network: torch.fx cannot follow it ({reason}); all of it is left whole",))
    if recorder.stale:
        names = ", ".join(recorder.stale)
        return Liveness({}, {}, (f"{names}: reads a tensor changed in place; all of the network is left whole",))
    return _Walk(graph, recorder, tensors_of(example_input)[0].device).liveness()


class _Step(NamedTuple):
    node: fx.Node
    operation: Operation | None
    inputs: list[Units]
    output: Units | None


class _Walk:
    """Follows the units of a network, operation by operation, forwards and back."""

    def __init__(self, graph: fx.GraphModule, recorder: Recorder, device: torch.device) -> None:
        self._graph = graph
        self._shapes = recorder.shapes
        self._dtypes = recorder.dtypes
        self._device = device
        self._uses = WeightUses(graph)
        self._sets = UnionFind()
        self._units: dict[fx.Node, Units] = {}
        self._notes: list[str] = []
        self._steps = [self._forward(node) for node in graph.graph.nodes if not reads_batch_size(node)]
        for _, operation, inputs, output in reversed(self._steps):
            if operation is not None and output is not None:
                operation.backward(inputs, output)
            else:
                for units in inputs:
                    units.mark_live(torch.ones_like(units.live))

    def liveness(self) -> Liveness:
        """Returns what was found."""
        kept = self._kept()
        layers: dict[str, LayerUnits] = {}
        norms: dict[str, Tensor] = {}
        for node, operation, inputs, output in self._steps:
            if node.op != "call_module" or operation is None or output is None or output.dim is None:
                continue
            name, outputs = str(node.target), kept[self._sets.find(output.ids)]
            if isinstance(operation, WeightedSum):
                (units,) = inputs
                layers[name] = LayerUnits(
                    inputs=kept[self._sets.find(units.ids_along(operation.dim(units)))],
                    reads=operation.reads(units, output.live),
                    constants=operation.constants(units),
                    outputs=outputs,
                )
            elif isinstance(self._graph.get_submodule(name), nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                norms[name] = outputs
        return Liveness(layers, norms, tuple(self._notes))

    def _kept(self) -> Tensor:
        followed = [units for units in self._units.values() if units.dim is not None]
        roots = [self._sets.find(units.ids) for units in followed]
        kept = torch.zeros(1 + max((int(r.max()) for r in roots), default=0), dtype=torch.bool)
        kept[0] = True
        for r, units in zip(roots, followed, strict=True):
            kept[r[units.live]] = True
        for r in roots:
            if not kept[r].any():
                kept[r[0]] = True
        return kept

    def _forward(self, node: fx.Node) -> _Step:
        inputs = [self._units[i] for i in sources(node) if i in self._units]
        shape = self._shapes.get(node)
        module = self._graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        reason = "" if module is None else self._uses.reason_against(module)
        operation = None if reason else operation_of(node, module, self._shapes)
        output = None
        if operation is not None and shape is not None and len(inputs) == len(sources(node)):
            output = operation.forward(inputs, shape, self._sets)
        if output is None:
            operation = None
            self._leave_whole(node, module, inputs, reason or "units cannot be followed through it")
            output = None if shape is None else Units.whole(shape, self._device)
        if output is not None:
            # Numbers that overflow in the network's own precision may not do so in double precision.
            output.constant[output.constant.to(self._dtypes[node]).isinf()] *= torch.inf
            self._units[node] = output
        return _Step(node, operation, inputs, output)

    def _leave_whole(self, node: fx.Node, module: nn.Module | None, inputs: list[Units], reason: str) -> None:
        followed = [units for units in inputs if units.dim is not None]
        if node.op != "output" and (followed or isinstance(module, Layer)):
            name = node.name if module is None else f"{node.target} ({type(module).__name__})"
            self._notes.append(f"{name}: {reason}; left whole")
