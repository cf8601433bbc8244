"""ONNX files: the same outputs as the network in onnxruntime, for batches of any size, and nothing else changed."""

import logging
import sys
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from lab.nets import lenet_5_caffe, lenet_300_100, vgg_like
from torch import nn

import pyro_sparsevd as svd
from pyro_sparsevd.storage.onnx import export_onnx


def _residual():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(2, 4, 3, padding=1)
            self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.first(x)
            return torch.cat([x, self.norm(self.second(x.relu()) + x)], 1).mean((2, 3))

    return Residual()


NETS = {
    "lenet-300-100": (lenet_300_100, (1, 28, 28)),
    "lenet-5": (lenet_5_caffe, (1, 28, 28)),
    "vgg-like": (lambda: vgg_like(0.05), (3, 32, 32)),
    "residual": (_residual, (2, 8, 8)),
    "mlp with dropout": (
        lambda: nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Dropout(0.9), nn.Linear(7, 2)),
        (5,),
    ),
}


def _sparse_(net):
    """Drops most weights, and gives normalisation layers statistics unlike those they start with."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter *= 3 * (torch.rand_like(parameter) < 0.2)
        for name, buffer in net.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
    return net


def _run(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["output"], {"input": x.cpu().numpy()})[0])


@pytest.mark.parametrize(("make", "shape"), NETS.values(), ids=NETS)
def test_onnxruntime_finds_what_the_network_does_for_batches_of_any_size(device, tmp_path, make, shape):
    net = _sparse_(make()).to(device).train()
    path = tmp_path / "net.onnx"
    export_onnx(net, path, torch.rand(1, *shape, device=device))
    assert net.training
    net.eval()
    for size in (1, 3, 17):
        x = torch.randn(size, *shape, device=device)
        torch.testing.assert_close(_run(path, x), net(x).detach().cpu(), rtol=1e-5, atol=1e-5)


def test_a_pruned_network_is_written(device, tmp_path):
    bnn = svd.bayesianize(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).to(device))
    guide = svd.AutoSparseNormal(bnn)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.uniform_(-1, 1)
    small = svd.prune(bnn, guide, svd.sparsify(guide, 0.0))
    export_onnx(small, tmp_path / "net.onnx", torch.zeros(1, 6, device=device))
    x = torch.randn(4, 6, device=device)
    torch.testing.assert_close(_run(tmp_path / "net.onnx", x), small(x).detach().cpu(), rtol=0, atol=1e-5)


def test_the_file_is_valid_whole_and_the_only_one(device, tmp_path):
    net = nn.Linear(4, 3).to(device)
    (tmp_path / "net.onnx").write_text("an old file")
    export_onnx(net, str(tmp_path / "net.onnx"), torch.zeros(1, 4, device=device))
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    model = onnx.load(tmp_path / "net.onnx", load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [(i.name, i.type.tensor_type.shape.dim[0].dim_param) for i in model.graph.input] == [("input", "batch")]
    assert [(o.name, o.type.tensor_type.shape.dim[0].dim_param) for o in model.graph.output] == [("output", "batch")]
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer}
    assert any(np.array_equal(w.reshape(-1, 4), net.weight.detach().cpu()) for w in weights.values() if w.size == 12)


def test_the_network_is_not_changed(device, tmp_path):
    net = _sparse_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())).to(device).train()
    net[2].eval()
    net[0].weight.requires_grad_(False)
    modes = [module.training for module in net.modules()]
    before = {
        name: (value, value.clone(), value.requires_grad) for name, value in net.state_dict(keep_vars=True).items()
    }
    keys = [sorted(module.__dict__) for module in net.modules()]
    export_onnx(net, tmp_path / "net.onnx", torch.rand(2, 3, 5, 5, device=device))
    assert [module.training for module in net.modules()] == modes
    assert [sorted(module.__dict__) for module in net.modules()] == keys
    for name, value in net.state_dict(keep_vars=True).items():
        same, clone, requires_grad = before[name]
        assert value is same, name
        assert torch.equal(value, clone), name
        assert value.requires_grad == requires_grad, name


def _global_state():
    return {
        "filters": list(warnings.filters),
        "levels": [logging.getLogger(name).level for name in ("", "torch", "torch.onnx", "onnxscript")],
        "handlers": [len(logging.getLogger(name).handlers) for name in ("", "torch", "torch.onnx", "onnxscript")],
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "generator": torch.get_rng_state().tolist(),
    }


def test_it_is_silent_and_changes_nothing_global(device, tmp_path, capfd, caplog):
    net, example = nn.Linear(4, 3).to(device), torch.zeros(1, 4, device=device)
    with caplog.at_level(logging.INFO, "torch.onnx"), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        before = _global_state()
        export_onnx(net, tmp_path / "net.onnx", example)
        after = _global_state()
    assert not found
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert after == before


class _Forward(nn.Module):
    """A network of one function; one with a weight of its own, that the graph has an initialiser."""

    def __init__(self, forward):
        super().__init__()
        self.token, self.function = nn.Parameter(torch.randn(1, 2, 3)), forward

    def forward(self, x):
        return self.function(torch.cat([self.token.expand_as(x[:, :2]), x], 1))


SIZES = {  # of a batch, as people write them
    "shape": lambda x: x.view(x.shape[0], -1),
    "size": lambda x: x.reshape(x.size(0), -1),
    "unpacked": lambda x: x.view((lambda count, *_: count)(*x.shape), -1),
    "len": lambda x: x.view(len(x), -1),
    "int": lambda x: x.view(int(x.shape[0]), -1),
    "new": lambda x: torch.cat([x.new_ones(len(x), 1, 3), x], 1),
    "arange": lambda x: x[torch.arange(len(x), device=x.device)],
    "mean": lambda x: x.sum(1) / len(x),
}


@pytest.mark.parametrize("forward", SIZES.values(), ids=SIZES)
def test_networks_that_ask_for_the_size_of_the_batch_are_written_for_any(device, tmp_path, forward):
    net = _Forward(forward).to(device)
    validates = torch.distributions.Distribution._validate_args
    export_onnx(net, tmp_path / "net.onnx", torch.zeros(1, 2, 3, device=device))
    assert torch.distributions.Distribution._validate_args is validates
    (dimension, *_), *_ = [i.type.tensor_type.shape.dim for i in onnx.load(tmp_path / "net.onnx").graph.input]
    assert dimension.dim_param == "batch"
    for size in (1, 2, 5):
        x = torch.randn(size, 2, 3, device=device)
        torch.testing.assert_close(_run(tmp_path / "net.onnx", x), net(x).detach().cpu())


class _Text(nn.Module):
    def forward(self, x):
        return "text"


class _FixedSize(nn.Module):
    def forward(self, x):
        return x.reshape(3, 4)


class _Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def _bad_buffer():
    net = nn.BatchNorm1d(4)
    net.running_mean[2] = float("inf")
    return net


def _bad_weight():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight.data[2, 1] = float("nan")
    return net


def _sparse_weight():
    net = nn.Linear(4, 4, bias=False)
    net.weight = nn.Parameter(net.weight.detach().to_sparse_coo())
    return net


X = torch.ones(3, 4)
BAD = {
    "no module": (lambda: torch.relu, X, TypeError, "net: expected an nn.Module, but got builtin_function"),
    "Bayesian": (
        lambda: nn.Sequential(svd.bayesianize(nn.Linear(4, 4))),
        X,
        TypeError,
        "net: expected a deterministic network, but 0 is Bayesian; prune it first",
    ),
    "weight": (_bad_weight, X, ValueError, r"1\.weight: expected finite numbers, but 1 of 16"),
    "buffer": (_bad_buffer, X, ValueError, "running_mean: expected finite numbers"),
    "layout": (_sparse_weight, X, ValueError, r"weight: expected dense weights, but got torch\.sparse_coo"),
    "sparse layer": (
        lambda: svd.to_sparse(nn.Linear(4, 4)),
        X,
        ValueError,
        "net: expected dense weights, but got a SparseLinear; export the dense network",
    ),
    "sparse layers": (
        lambda: svd.to_sparse(nn.Sequential(nn.ReLU(), nn.Linear(4, 4))),
        X,
        ValueError,
        "1: expected dense weights, but got a SparseLinear",
    ),
    "no tensor": (nn.Identity, "x", TypeError, "example_input: expected a tensor, or a tuple or .*, but got str"),
    "numbers": (nn.Identity, [1.0], ValueError, r"example_input: expected at least one tensor, but got \[1.0\]"),
    "no batch": (nn.Identity, torch.tensor(1.0), ValueError, r"example_input: .* shape \(M, ...\), but got a scalar"),
    "empty": (nn.Identity, X[:0], ValueError, "example_input: expected at least one datum, but got an empty batch"),
    "shape": (
        lambda: nn.Linear(5, 4),
        X,
        ValueError,
        r"example_input: the network fails on torch.float32 of shape \(6, 4\): mat1 and mat2",
    ),
    "type": (lambda: nn.Linear(4, 4), X.long(), ValueError, "example_input: the network fails on torch.int64"),
    "no output": (_Text, X, TypeError, "net: expected a network that returns tensors, but got str"),
    "fixed size": (_FixedSize, X, ValueError, "example_input: the network fails on"),
    "no batch in output": (
        lambda: nn.Flatten(0),
        X,
        ValueError,
        r"net: expected an output for each of 6 inputs, but got \(24,\)",
    ),
    "branch": (_Branch, X, RuntimeError, "torch.export"),
    "loop": (
        lambda: _Forward(lambda x: torch.stack([2 * row for row in x])),
        torch.ones(1, 2, 3),
        RuntimeError,
        r"net: expected a network that torch.export can trace for batches of any size; take that",
    ),
    "branch on the size": (
        lambda: _Forward(lambda x: x - x.mean(0) if len(x) > 1 else x),
        torch.zeros(1, 2, 3),
        ValueError,
        "net: expected a network that treats a batch of one as it does larger ones",
    ),
}


@pytest.mark.parametrize(("make", "example", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_and_an_old_file_is_kept(tmp_path, make, example, kind, message):
    path = tmp_path / "net.onnx"
    path.write_text("an old file")
    net = make()
    with pytest.raises(kind, match=message):
        export_onnx(net, path, example)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert path.read_text() == "an old file"
    if isinstance(net, nn.Module):
        assert net.training


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: expected a file in a folder that is there, but .*none is not"):
        export_onnx(nn.Linear(4, 3), tmp_path / "none" / "net.onnx", X)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'expected onnxscript; pip install "pyro-sparsevd\[export\]" installs it'):
        export_onnx(nn.Linear(4, 3), tmp_path / "net.onnx", X)
