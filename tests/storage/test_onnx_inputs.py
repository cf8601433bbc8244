"""ONNX files of networks with several inputs, and with outputs that are not one tensor."""

from functools import partial

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from inputs import KINDS, Output, TextClassifier, TwoInputs, moved
from pyro_sparsevd._modules import map_tensors, tensors_of
from pyro_sparsevd.storage.onnx import export_onnx

NAMES = {
    "tuple": {"a": "batch", "b": "batch"},
    "list": {"a": "batch", "b": "batch"},
    "names": {"b": "batch", "a": "batch"},
    "one dictionary": {"inputs_a": "batch", "inputs_b": "batch"},
    "encoding": {"input_ids": "batch", "attention_mask": "batch"},
    "nodes of a graph": {"x": "batch", "edge_index": ""},
}


def _run(path, tensors):
    """Returns the outputs by their names, for inputs in the order of the file."""
    session = onnxruntime.InferenceSession(path)
    inputs = [i.name for i in session.get_inputs()]
    names = [o.name for o in session.get_outputs()]
    found = session.run(names, {name: t.cpu().numpy() for name, t in zip(inputs, tensors, strict=True)})
    return {name: torch.from_numpy(output) for name, output in zip(names, found, strict=True)}


ROWS = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 5, 0]]


def _rows(rows, t):
    return t[rows] if len(t) == 6 else t


@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_any_kind_have_names_and_any_batch_size(name, tmp_path, device):
    kind = KINDS[name]
    net, x, path = kind.network().to(device), moved(kind.make(), device), tmp_path / "net.onnx"
    export_onnx(net, path, x)
    assert net.training
    graph = onnx.load(path).graph
    assert {i.name: i.type.tensor_type.shape.dim[0].dim_param for i in graph.input} == NAMES[name]
    folded = {"body.weight"}  # the exporter transposes it
    assert {n for n, _ in net.named_parameters()} - {i.name for i in graph.initializer} <= folded
    net.eval()
    for rows in ROWS if name == "nodes of a graph" else [*ROWS, [2]]:
        batch = map_tensors(partial(_rows, rows), x)
        expected = kind.logits(kind.by_hand(net, batch)).detach().cpu()
        (found,) = _run(path, tensors_of(batch)).values()
        torch.testing.assert_close(found, expected)


def test_an_example_may_be_the_same_tensor_twice(tmp_path):
    net, x = TwoInputs(), torch.randn(3, 4)
    net.right = nn.Linear(4, 8)
    export_onnx(net, tmp_path / "net.onnx", (x, x))
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(_run(tmp_path / "net.onnx", (a, b))["output"], net(a, b).detach())


class Heads(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.a, self.b, self.form = nn.Linear(4, 2), nn.Linear(4, 3), form

    def forward(self, x):
        return self.form(self.a(x), self.b(x))


FORMS = {
    "tuple": (lambda a, b: (a, b), ["output_0", "output_1"]),
    "dict": (lambda a, b: {"a": a, "b": b}, ["output_a", "output_b"]),
    "dataclass": (lambda a, b: Output(a, b), ["output_logits", "output_hidden"]),
    "of one": (lambda a, b: Output(a + b.sum(1, keepdim=True)), ["output_logits"]),
    "nested": (lambda a, b: (a, {"b": [b, None]}), ["output_0", "output_1_b_0"]),
    "one without a batch": (lambda a, b: (a, b.mean()), ["output_0", "output_1"]),
}


@pytest.mark.parametrize(("form", "names"), FORMS.values(), ids=FORMS)
def test_outputs_of_any_kind_have_names(form, names, tmp_path):
    net, path = Heads(form), tmp_path / "net.onnx"
    export_onnx(net, path, torch.randn(3, 4))
    for size in (1, 2, 5):
        x = torch.randn(size, 4)
        found = _run(path, [x])
        assert list(found) == names
        torch.testing.assert_close(list(found.values()), [t.detach() for t in tensors_of(net(x))])


class BranchOfTwo(nn.Module):
    def forward(self, a, b):
        return a, b if len(b) > 1 else -b


BAD = {
    "graphs": (KINDS["graphs"].network, KINDS["graphs"].make(), r"net: .* each of 12 inputs, but got \(2, 3\)"),
    "names": (TextClassifier, {"input_ids": torch.zeros(2, 3), "labels": None}, "the network fails on .*: x: expected"),
    "shapes": (
        TwoInputs,
        (torch.zeros(2, 4), torch.zeros(3, 5)),
        r"fails on torch.float32 of shape \(4, 4\) and torch.float32 of shape \(3, 5\): ",
    ),
    "one output of two": (BranchOfTwo, (torch.ones(2, 3), torch.ones(2, 3)), "net: .* batch(es)? of (one|any size)"),
}


@pytest.mark.parametrize(("make", "x", "message"), BAD.values(), ids=BAD)
def test_bad_inputs_are_refused_and_no_file_is_left(make, x, message, tmp_path):
    with pytest.raises((ValueError, RuntimeError), match=message):  # torch 2.9 cannot trace the last
        export_onnx(make(), tmp_path / "net.onnx", x)
    assert list(tmp_path.iterdir()) == []
