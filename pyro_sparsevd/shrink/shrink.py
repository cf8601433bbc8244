"""Removes the units of a sparse network that make no difference: smaller, dense, and of the same classes.

:mod:`~.graph` traces the network and knows which node is which operation, :mod:`~.flow` how units pass through one,
:mod:`~.liveness` finds the units that matter, and this module cuts the layers.
"""

__all__ = ["SelectFeatures", "shrink", "shrink_with_notes"]

import math
from typing import Any

import torch
from torch import Tensor, nn

from .._modules import batch_tensor, check_finite, cloned, copied, named_leaves, run_network, tensors_of
from .flow import Layer, by_group, folded
from .liveness import LayerUnits, Liveness, liveness


def shrink(net: nn.Module, example_input: Any) -> nn.Module:
    """Returns a smaller network with the outputs of a sparse one.

    Hidden features and channels are removed if all their incoming weights are zero, so that they are constant, or if
    all their outgoing weights are; and so on, until there are none. A constant is taken through activations, pooling
    and batch normalisation, exactly, and added to the bias of the layer that reads it, which gets a bias if it had
    none. Outputs of the network stay, and so do its inputs: :class:`SelectFeatures` skips those that a layer does not
    read where this costs less than it saves.

    Units are followed through ``nn.Linear``, convolutions (groups are removed whole; of the last group, channels),
    batch normalisation, pooling, elementwise activations and arithmetic, dropout, concatenation, means over positions,
    and flattening by ``nn.Flatten``, ``torch.flatten``, or ``view`` and ``reshape`` with ``-1`` last. A unit that would
    be constant but for zero padding at the border stays, unless it is flattened. Whatever else a network has, such as
    layer normalisation, attention or weights used twice, stays whole, with all units that go into it and come out of
    it; so does all of a network that ``torch.fx`` cannot trace. At least one unit of every layer stays. What was
    removed and what was left whole is said by :func:`~.report.shrink_report`.

    Args:
        net: A deterministic network, such as :func:`~.pruning.prune` returns; it is taken as it is in evaluation mode.
        example_input: An input that it accepts, with a batch first, on the device and of the dtype of the network;
            several are a tuple or a mapping, as for :class:`~.supervised.Supervised`. Arguments that it leaves out, and
            those that are no tensors, are taken to be what they are here.

    Returns:
        A network of the same classes, in the mode, on the device and of the dtype of ``net``, with outputs that are
        the same up to rounding in evaluation mode, also for inputs of other sizes than that of the example. Names of
        parameters are the same but for a layer that reads a selection.

    Raises:
        TypeError: If ``net`` is not a module, or ``example_input`` no tensor and no tuple or mapping of tensors.
        ValueError: If a parameter or a statistic of a normalisation is not finite, another buffer has NaN, or the
            network does not accept the example input.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> net[0].weight.data[0] = 0
        >>> net[2].weight.data[:, 1] = 0
        >>> shrink(net, torch.rand(5, 2))
        Sequential(
          (0): Linear(in_features=2, out_features=1, bias=True)
          (1): ReLU()
          (2): Linear(in_features=1, out_features=1, bias=True)
        )
    """
    return shrink_with_notes(net, example_input)[0]


class SelectFeatures(nn.Module):
    """A layer on some of the features or channels of its input, at the positions ``index`` (int64)."""

    index: Tensor

    def __init__(self, index: Tensor, layer: Layer) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.layer = layer
        self.dim = -1 if isinstance(layer, nn.Linear) else 1

    def forward(self, x: Tensor) -> Tensor:
        """Returns the outputs of the layer for the selected features."""
        output: Tensor = self.layer(x.index_select(self.dim, self.index))
        return output


# The cost of copying a feature and of calling one more module, in multiply-adds, measured with torch's CPU kernels.
_COPY_COST, _CALL_COST = 8, 4_000


@torch.inference_mode(False)  # tensors of inference mode do not count their changes in place
@torch.no_grad()
def shrink_with_notes(net: nn.Module, example_input: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """Returns what :func:`shrink` does, and notes on what was left whole."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"net: expected a torch module, but got {type(net).__name__}")
    batch_tensor("example_input", example_input)
    check_finite(net)
    reference = copied(net).eval()
    try:
        run_network(reference, cloned(example_input))
    except Exception as error:  # a network's forward may raise anything
        given = " and ".join(f"shape {tuple(t.shape)}, {t.dtype}, on {t.device}" for t in tensors_of(example_input))
        raise ValueError(
            f"example_input: expected an input that the network accepts, but got one of {given}: {error}"
        ) from error
    found = liveness(reference, example_input)
    notes, smaller = found.notes, copied(net)
    if not found.layers:
        return smaller, notes
    while _leaves_one_group(smaller, found):
        _cut(smaller, found, select=False)
        # Once a single group is left, its channels can be removed one by one.
        found = liveness(copied(smaller).eval(), example_input)
    _cut(smaller, found, select=True)
    if _agree(reference, smaller, example_input):
        return smaller, notes
    note = "the network: its own code depends on the sizes of layers; all of it is left whole"
    return copied(net), (*notes, note)


def _agree(reference: nn.Module, smaller: nn.Module, x: Any) -> bool:
    """Tells whether two networks have the same output; what is no tensor must be equal."""
    expected = list(named_leaves("output", run_network(reference, cloned(x))))
    try:
        actual = list(named_leaves("output", run_network(copied(smaller).eval(), cloned(x))))
        for (_, a), (_, b) in zip(actual, expected, strict=True):
            if isinstance(b, Tensor):
                # Rounding errors are far below this bound; a wrong structure makes errors far above it.
                tolerance = math.sqrt(torch.finfo(b.dtype if b.is_floating_point() else torch.float32).eps)
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
            elif a != b:
                return False
    except Exception:  # the network's own code again, or an output that cannot be compared
        return False
    return True


def _leaves_one_group(net: nn.Module, found: Liveness) -> bool:
    for name, units in found.layers.items():
        layer = net.get_submodule(name)
        assert isinstance(layer, Layer)
        groups = len(by_group(layer))
        if groups > 1 and units.inputs.view(groups, -1)[:, 0].sum() == 1:
            return True
    return False


def _cut(net: nn.Module, found: Liveness, select: bool) -> None:
    for name, channels in found.norms.items():
        norm = net.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
        _cut_norm(norm, channels)
    for name, units in found.layers.items():
        layer = net.get_submodule(name)
        assert isinstance(layer, Layer)
        inputs = _inputs_to_take(layer, units) if select else units.inputs
        _cut_layer(layer, units, inputs)
        if not torch.equal(inputs, units.inputs):
            parent, _, attribute = name.rpartition(".")
            index = inputs[units.inputs].nonzero().flatten().to(layer.weight.device)
            selection = SelectFeatures(index, layer).train(layer.training)
            setattr(net.get_submodule(parent), attribute, selection)


def _inputs_to_take(layer: Layer, units: LayerUnits) -> Tensor:
    reads = units.reads & units.inputs
    if not reads.any():
        reads = units.inputs & (units.inputs.cumsum(0) == 1)
    weights, stride = by_group(layer), 1 if isinstance(layer, nn.Linear) else math.prod(layer.stride)
    saved = int((units.inputs & ~reads).sum()) * int(units.outputs.sum()) * weights.shape[-1] / stride
    pays = len(weights) == 1 and saved > _COPY_COST * int(reads.sum()) + _CALL_COST
    return reads if pays else units.inputs


def _cut_layer(layer: Layer, units: LayerUnits, inputs: Tensor) -> None:
    """Keeps the columns of ``inputs``, with zeros for those that are not read, and the rows of the outputs."""
    weight, kernel = by_group(layer), layer.weight.shape[2:]
    groups = len(weight)
    weight = torch.where(units.reads.to(weight.device).view(groups, 1, -1, 1), weight, 0)
    bias: Tensor = folded(layer, units.constants).to(weight.dtype)
    if groups == 1:
        weight = weight[:, units.outputs][:, :, inputs]
    else:
        weight = weight[inputs.view(groups, -1)[:, 0]]
        layer.groups = len(weight)
    if layer.bias is not None or bias.any():
        trained = layer.weight if layer.bias is None else layer.bias
        layer.bias = nn.Parameter(bias[units.outputs], requires_grad=trained.requires_grad)
    columns = weight.shape[2]
    layer.weight = nn.Parameter(weight.reshape(-1, columns, *kernel), requires_grad=layer.weight.requires_grad)
    outputs = len(layer.weight)
    if isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = columns, outputs
    else:
        layer.in_channels, layer.out_channels = columns * layer.groups, outputs


def _cut_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, channels: Tensor) -> None:
    for name, parameter in norm.named_parameters():
        setattr(norm, name, nn.Parameter(parameter[channels], requires_grad=parameter.requires_grad))
    for name, statistic in norm.named_buffers():
        if statistic.dim():
            setattr(norm, name, statistic[channels])
    norm.num_features = int(channels.sum())
