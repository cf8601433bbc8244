"""Sparse linear layers: the outputs of the dense ones, whatever is done to the network."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from lab.nets import lenet_5_caffe, lenet_300_100
from torch import nn

import pyro_sparsevd as svd
from pyro_sparsevd.shrink.sparse_linear import SparseLinear, to_sparse


def _sparse(net, density=0.05):
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter *= torch.rand_like(parameter) < density
    return net


def _twice():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer)


def _tied():
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    net[1].weight = net[0].weight
    return net


class _Heads(nn.Module):
    """Views the output of a layer, which needs it contiguous."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x):
        return self.linear(x).view(len(x), 2, 4)


NETS = {
    "lenet-300-100": (lenet_300_100, lambda: torch.rand(9, 1, 28, 28)),
    "lenet-5": (lenet_5_caffe, lambda: torch.rand(3, 1, 28, 28)),
    "one layer": (lambda: nn.Linear(6, 4), lambda: torch.randn(5, 6)),
    "without bias": (lambda: nn.Linear(6, 4, bias=False), lambda: torch.randn(5, 6)),
    "nested": (lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 4)), nn.Tanh()), lambda: torch.randn(5, 6)),
    "used twice": (_twice, lambda: torch.randn(5, 6)),
    "tied": (_tied, lambda: torch.randint(7, (5, 3))),
    "views": (_Heads, lambda: torch.randn(5, 6)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda: torch.randn(3, 5, 8)),
    "layer normalisation": (lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)), lambda: torch.randn(5, 6)),
}


@pytest.fixture(params=NETS)
def case(request, device):
    """A network most of whose weights are zero, in evaluation mode, and inputs."""
    make, make_input = NETS[request.param]
    return _sparse(make(), 0.3).to(device).eval(), make_input().to(device)


@pytest.mark.parametrize("grad", [False, True])
def test_its_output_is_that_of_the_dense_network(case, grad):
    net, x = case
    with torch.set_grad_enabled(grad):
        sparse = to_sparse(net)
        found = sparse(x)
        torch.testing.assert_close(found, net(x), rtol=0, atol=1e-6)
    assert found.is_contiguous()
    assert not any(m.training for m in sparse.modules())


def test_it_is_copied_pickled_saved_and_converted(case):
    net, x = case
    sparse = to_sparse(net)
    file = io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    for other in (
        copy.deepcopy(sparse),
        pickle.loads(pickle.dumps(sparse)),
        torch.load(file, weights_only=False),
        copy.deepcopy(sparse).to(torch.float64).to(torch.float32),
    ):
        torch.testing.assert_close(other(x), net(x), rtol=0, atol=1e-6)
    x = x.double() if x.is_floating_point() else x
    torch.testing.assert_close(sparse.double()(x), copy.deepcopy(net).double()(x), rtol=0, atol=1e-12)


def test_a_state_loads_into_a_layer_with_as_many_weights_left(device):
    net, other = (_sparse(nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), 2.0).to(device) for _ in range(2))
    x = torch.randn(4, 8, device=device)
    for linear in (net[0], other[0]):
        linear.weight.data[:, torch.randperm(8)[:5]] = 0
    file = io.BytesIO()
    torch.save(to_sparse(net).state_dict(), file)
    file.seek(0)
    sparse = to_sparse(other)
    sparse.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(sparse(x), net(x), rtol=0, atol=1e-6)


def test_only_the_weights_left_are_stored(device):
    net = _sparse(lenet_300_100(), 0.02).to(device)
    sparse = to_sparse(net)
    assert not list(sparse.parameters())
    for dense, layer in zip(net, sparse, strict=True):
        if isinstance(dense, nn.Linear):
            kept = int((dense.weight != 0).sum())
            assert len(layer.values) == len(layer.col_indices) == kept
            assert torch.equal(layer.weight, dense.weight)
            assert f"kept={kept}" in repr(layer)
    size = sum(b.numel() * b.element_size() for b in sparse.buffers())
    assert size < 0.06 * sum(p.numel() * p.element_size() for p in net.parameters())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (2, 1, 4, 3), (0,), (2, 0)])
def test_inputs_may_have_any_leading_dimensions(device, shape, bias):
    linear = _sparse(nn.Linear(6, 4, bias=bias), 0.3).to(device)
    x = torch.randn(*shape, 6, device=device)
    torch.testing.assert_close(to_sparse(linear)(x), linear(x), rtol=0, atol=1e-6)


def test_inputs_may_be_strided(device):
    linear = _sparse(nn.Linear(6, 4), 0.3).to(device)
    for x in (
        torch.randn(6, 5, device=device).T,
        torch.randn(3, 6, 5, device=device).mT,
        torch.randn(6, device=device),
    ):
        x = x.expand(2, *x.shape)
        torch.testing.assert_close(to_sparse(linear)(x), linear(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 12), (3, 4), (24,)])
def test_inputs_of_another_size_are_refused(device, shape):
    with pytest.raises(RuntimeError):
        to_sparse(nn.Linear(6, 4).to(device))(torch.randn(*shape, device=device))


def test_a_layer_without_weights_left_gives_its_bias(device):
    linear = _sparse(nn.Linear(6, 4), 0.0).to(device)
    found = to_sparse(linear)(torch.randn(5, 6, device=device))
    assert torch.equal(found, linear.bias.expand(5, 4))


def test_the_network_is_left_alone(case):
    net, _ = case
    before = {name: value.clone() for name, value in net.state_dict().items()}
    classes = [type(m) for m in net.modules()]
    sparse = to_sparse(net.train())
    assert all(m.training for m in sparse.modules())
    for buffer in sparse.buffers():
        buffer.zero_()
    for parameter in sparse.parameters():
        parameter.data.zero_()
    assert [type(m) for m in net.modules()] == classes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_layer_used_twice_stays_one(device):
    sparse = to_sparse(_sparse(_twice()).to(device))
    assert sparse[0] is sparse[2]


def test_what_is_no_plain_linear_layer_stays_as_it_is(device):
    class Derived(nn.Linear):
        pass

    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, x, y: y + 1)
    net = nn.Sequential(nn.Linear(4, 4), Derived(4, 4), hooked, nn.Bilinear(4, 4, 4), nn.Conv1d(4, 4, 1)).to(device)
    classes = [type(layer) for layer in to_sparse(net)]
    assert classes == [SparseLinear, Derived, nn.Linear, nn.Bilinear, nn.Conv1d]
    x = torch.randn(2, 4, device=device)
    torch.testing.assert_close(to_sparse(net[:3])(x), net[:3](x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["crow_indices", "col_indices"])
def test_a_state_that_points_outside_of_the_weight_is_refused(device, name):
    sparse = to_sparse(_sparse(nn.Linear(6, 4), 0.5).to(device))
    state = {key: value.clone() for key, value in sparse.state_dict().items()}
    state[name][-1] = 10**6
    before = {key: value.clone() for key, value in sparse.state_dict().items()}
    with pytest.raises(RuntimeError, match=name):
        sparse.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in sparse.state_dict().items())


def test_a_state_with_more_weights_left_is_refused_and_changes_nothing(device):
    linear = _sparse(nn.Linear(6, 4), 0.5).to(device)
    sparse = to_sparse(linear)
    linear.weight.data[0] += 1
    before = {key: value.clone() for key, value in sparse.state_dict().items()}
    with pytest.raises(RuntimeError, match="col_indices: expected shape"):
        sparse.load_state_dict(to_sparse(linear).state_dict())
    assert all(torch.equal(value, before[key]) for key, value in sparse.state_dict().items())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_it_multiplies_in_half_precision(device, dtype, bias):
    linear = _sparse(nn.Linear(6, 4, bias=bias), 0.3).to(device, dtype)
    x = torch.randn(5, 6, device=device, dtype=dtype)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(to_sparse(linear)(x), linear(x), rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("layer_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_it_multiplies_under_autocast_as_the_dense_layer_does(device, dtype, layer_dtype):
    linear = _sparse(nn.Linear(6, 4), 0.3).to(device, layer_dtype)
    x = torch.randn(5, 6, device=device, dtype=layer_dtype)
    tolerance = torch.finfo(dtype).eps
    with torch.autocast(device.type, dtype):
        torch.testing.assert_close(to_sparse(linear)(x), linear(x), rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)])
def test_empty_layers_multiply(device, sizes):
    linear = nn.Linear(*sizes).to(device)
    for shape in ((), (2,), (2, 3), (0,)):
        x = torch.rand(*shape, sizes[0], device=device)
        assert torch.equal(to_sparse(linear)(x), linear(x))


def test_a_network_that_keeps_what_it_computed_is_copied(device):
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).to(device)
    net.layers = [net[0]]
    net.last = net(torch.randn(5, 6, device=device))
    sparse = to_sparse(net)
    assert torch.equal(sparse.last, net.last)
    assert sparse.layers[0] is sparse[0]


BAD = {
    "no module": (torch.relu, "csr", TypeError, "net: expected an nn.Module, but got builtin_function"),
    "Bayesian": (
        svd.bayesianize(nn.Linear(2, 2)),
        "csr",
        TypeError,
        "net: expected a deterministic network, but it is Bayes",
    ),
    "layout": (nn.Linear(2, 2), "coo", ValueError, "layout: expected \"csr\", but got 'coo'"),
}


@pytest.mark.parametrize(("net", "layout", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(net, layout, kind, message):
    with pytest.raises(kind, match=message):
        to_sparse(net, layout)


FRESH = {
    "made": "net = to_sparse(nn.Linear(3, 2))",
    "unpickled": "import sys, pickle; from pathlib import Path; net = pickle.loads(Path(sys.argv[1]).read_bytes())",
}


@pytest.mark.parametrize("statement", FRESH.values(), ids=FRESH)
def test_nothing_is_said_in_a_fresh_process_and_the_filters_stay(tmp_path, statement):
    """Torch warns of CSR once per process, so only a fresh one can show that it does not."""
    (tmp_path / "net").write_bytes(pickle.dumps(to_sparse(nn.Linear(3, 2))))
    code = f"""
import warnings
import torch
from torch import nn
from pyro_sparsevd.shrink.sparse_linear import to_sparse
warnings.simplefilter("error")
before = list(warnings.filters)
{statement}
net(torch.zeros(1, 3))
net.weight
print(warnings.filters == before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "net")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("True\n", "")
