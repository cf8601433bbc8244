"""What is saved comes back, in a small file."""

import copy
import math
import os
import re

import numpy as np
import pytest
import torch
from lab.nets import lenet_5_caffe, lenet_300_100
from torch import nn

import pyro_sparsevd as svd
from problems import Tied
from pyro_sparsevd.storage import container, sparse_file
from pyro_sparsevd.storage.container import Entry
from pyro_sparsevd.storage.context_models import code_array
from pyro_sparsevd.storage.range_coder import Encoder
from pyro_sparsevd.storage.rounding import quantized
from pyro_sparsevd.storage.sparse_file import StorageError, load_sparse, register_architecture, save_sparse
from pyro_sparsevd.storage.tensors import decode_tensors, encode_tensors
from storable import assert_same_networks, normalised_mlp, opened_file, sparse_network


class Odd(nn.Module):
    """Scalars, empty tensors, every dtype, and buffers that are not finite."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(-1.5))
        self.nothing = nn.Parameter(torch.zeros(3, 0))
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            setattr(self, f"weight_{dtype}".replace(".", "_"), nn.Parameter(torch.randn(3, 4).to(dtype)))
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            info = torch.iinfo(dtype)
            self.register_buffer(
                f"buffer_{dtype}".replace(".", "_"), torch.tensor([info.min, info.max, 0, 1], dtype=dtype)
            )
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
        self.register_buffer("nan", torch.tensor(math.nan))


NETS = {
    "lenet-300-100": lenet_300_100,
    "lenet-5-caffe": lenet_5_caffe,
    "normalised": normalised_mlp,
    "grouped": lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose1d(3, 5, 3), nn.LayerNorm(5)),
    "recurrent": lambda: nn.LSTM(5, 6, num_layers=2),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "tied": Tied,
    "odd": Odd,
    "double": lambda: nn.Linear(30, 20).double(),
    "half": lambda: nn.Linear(30, 20).half(),
    "empty": nn.ReLU,
}


class TestRoundTrip:
    @pytest.mark.parametrize("make", NETS.values(), ids=NETS)
    @pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 1.0])
    def test_what_is_saved_comes_back(self, make, kept, path, device):
        net = sparse_network(make, kept).to(device)
        before = copy.deepcopy(net)
        save_sparse(net, path)
        assert_same_networks(net, before)
        other = make().to(device)
        assert load_sparse(path, other) is other
        assert_same_networks(other, net)

    def test_negative_zeros_count_as_zeros(self, path):
        net = nn.Linear(1000, 100, bias=False)
        net.weight.data *= 0
        assert torch.signbit(net.weight).any()
        save_sparse(net, path)
        assert len(opened_file(path.read_bytes())[1]) < 20
        assert torch.equal(load_sparse(path, nn.Linear(1000, 100, bias=False)).weight, net.weight)

    def test_a_tied_tensor_is_stored_once_and_stays_tied(self, path):
        net = sparse_network(Tied, kept=1.0)
        save_sparse(net, path)
        loaded = load_sparse(path, Tied())
        assert loaded.output.weight is loaded.embedding.weight
        loaded.output.weight = nn.Parameter(loaded.output.weight.detach().clone())
        tied = path.stat().st_size
        save_sparse(loaded, path)
        assert path.stat().st_size > tied + 18 * 3
        save_sparse(net, path)
        assert_same_networks(load_sparse(path, copy.deepcopy(loaded)), loaded)

    def test_a_file_loads_into_another_dtype(self, path):
        net = sparse_network(normalised_mlp)
        save_sparse(net, path)
        assert_same_networks(load_sparse(path, normalised_mlp().double()), copy.deepcopy(net).double())


class TestRounding:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("make", [NETS["normalised"], Tied, NETS["double"], NETS["half"]])
    def test_values_can_be_rounded_to_a_dtype(self, make, dtype, path):
        net = sparse_network(make)
        save_sparse(net, path, values=dtype)
        for p in net.parameters():
            p.data = p.data.to(dtype).to(p.dtype) if dtype.itemsize < p.dtype.itemsize else p.data
        assert_same_networks(load_sparse(path, make()), net)

    @pytest.mark.parametrize("make", [NETS["normalised"], lenet_5_caffe, NETS["double"], NETS["half"], Tied])
    def test_values_can_be_rounded_to_steps(self, make, path):
        net = sparse_network(make)
        steps = {name: 0.037 * (1 + i) for i, (name, _) in enumerate(net.named_parameters())}
        save_sparse(net, path, values=steps)
        assert_same_networks(load_sparse(path, make()), quantized(net, steps))

    def test_a_parameter_without_a_step_stays_as_it_is(self, path):
        net = sparse_network(normalised_mlp)
        save_sparse(net, path, values={"0.weight": 0.1})
        assert_same_networks(load_sparse(path, normalised_mlp()), quantized(net, {"0.weight": 0.1}))


STRUCTURED_BOUNDS = {"lenet-300-100": (lenet_300_100, 0.0116, 250), "lenet-5-caffe": (lenet_5_caffe, 0.0044, 450)}


class TestSize:
    @pytest.mark.parametrize(("make", "kept", "factor"), STRUCTURED_BOUNDS.values(), ids=STRUCTURED_BOUNDS)
    def test_files_are_small(self, make, kept, factor, path, tmp_path):
        # Weights of random positions within a quarter of the units, whose magnitudes lie between two and five steps.
        net = sparse_network(make, 0.0)
        with torch.no_grad():
            for p in net.parameters():
                if p.dim() > 1:
                    rows = torch.rand(len(p)) < 0.25
                    chosen = torch.rand(p.shape) * rows.reshape(-1, *(1 for _ in p.shape[1:])) > 1 - 4 * kept
                    p += chosen * torch.randint(2, 6, p.shape) * (2 * torch.randint(2, p.shape) - 1)
                else:
                    p += torch.randn(p.shape)
        save_sparse(net, path, values={name: 1.0 for name, _ in net.named_parameters()})
        torch.save(net.state_dict(), tmp_path / "dense.pt")
        payload = len(opened_file(path.read_bytes())[1])
        assert (tmp_path / "dense.pt").stat().st_size > factor * (payload + 90)
        assert path.stat().st_size < payload + 200 + 50 * len(net.state_dict())


class TestArchitectures:
    @pytest.mark.usefixtures("_registry")
    def test_a_registered_architecture_loads_alone(self, path):
        for name, make in (("lenet-300-100", lenet_300_100), ("lenet-5-caffe", lenet_5_caffe)):
            register_architecture(name, make)
            net = sparse_network(make)
            save_sparse(net, path, architecture=name)
            state = torch.get_rng_state()
            assert_same_networks(load_sparse(path), net)
            assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.usefixtures("_registry")
    def test_architectures_are_checked(self, path):
        register_architecture("mine", normalised_mlp)
        register_architecture("mine", normalised_mlp)
        with pytest.raises(ValueError, match="mine: expected a new name"):
            register_architecture("mine", Tied)
        with pytest.raises(ValueError, match="name: expected a printable name, but got ''"):
            register_architecture("", Tied)
        with pytest.raises(StorageError, match=r"expected a known architecture, of .*mine, but got 'yours'"):
            save_sparse(normalised_mlp(), path, architecture="yours")
        with pytest.raises(StorageError, match=r"0\.weight: expected the network's shape \(8, 9\), but got \(2, 9\)"):
            save_sparse(nn.Sequential(nn.Linear(9, 2), *normalised_mlp()[1:]), path, architecture="mine")
        assert not path.exists()
        save_sparse(normalised_mlp(), path, architecture="mine")
        del sparse_file._ARCHITECTURES["mine"]
        with pytest.raises(StorageError, match="but got 'mine'; pass a network, or call register_architecture"):
            load_sparse(path)
        save_sparse(normalised_mlp(), path)
        with pytest.raises(StorageError, match="but got ''; pass a network"):
            load_sparse(path)


def _with(value, name="0.weight"):
    net = normalised_mlp()
    net.get_parameter(name).data.view(-1)[1] = value
    return net


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}


BAD_NETS = {
    "nan": (lambda: _with(math.nan), {}, ValueError, r"0\.weight: expected finite weights, but 1 of 72 are not"),
    "inf": (lambda: _with(math.inf, "3.bias"), {}, ValueError, r"3\.bias: expected finite weights"),
    "large": (lambda: _with(1e6), {"values": torch.float16}, ValueError, r"0\.weight: expected values up to 65504"),
    "narrow": (lambda: _with(1e6), {"values": {"0.weight": 1e-3}}, ValueError, r"0\.weight: expected values below"),
    "step": (
        normalised_mlp,
        {"values": {"0.weight": -1.0}},
        ValueError,
        r"0\.weight: expected a positive and finite step",
    ),
    "zero step": (
        normalised_mlp,
        {"values": {"0.weight": 0.0}},
        ValueError,
        r"0\.weight: expected a positive and finite step",
    ),
    "tiny step": (
        normalised_mlp,
        {"values": {"0.weight": 1e-60}},
        ValueError,
        r"0\.weight: expected a positive and finite step",
    ),
    "huge step": (
        normalised_mlp,
        {"values": {"0.weight": 1e39}},
        ValueError,
        r"0\.weight: expected a positive and finite step",
    ),
    "steps": (normalised_mlp, {"values": {"weight": 1.0}}, ValueError, "steps: expected parameters of the network"),
    "tied": (
        Tied,
        {"values": {"output.weight": 1.0}},
        ValueError,
        r"of embedding\.weight, output\.bias, but got 'output\.weight'",
    ),
    "dtype": (
        normalised_mlp,
        {"values": torch.int8},
        TypeError,
        r"values: expected a floating-point dtype, .* torch\.int8",
    ),
    "narrow dtype": (
        normalised_mlp,
        {"values": torch.float8_e4m3fn},
        TypeError,
        r"values: expected .* of torch\.float32, .*torch\.bfloat16, steps or None, but got torch\.float8_e4m3fn",
    ),
    "word": (normalised_mlp, {"values": "half"}, TypeError, "values: expected a floating-point dtype, .* 'half'"),
    "extra": (lambda: Extra(2, 2), {}, TypeError, "_extra_state: expected a tensor, but .* has a dict"),
    "lazy": (lambda: nn.LazyLinear(3), {}, TypeError, "weight: expected a tensor of a known shape"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), {}, TypeError, "weight: expected a dense tensor"),
    "complex": (lambda: nn.Linear(2, 2, dtype=torch.complex64), {}, TypeError, "weight: expected a dense tensor"),
    "no network": (lambda: {"weight": torch.ones(2)}, {}, TypeError, "net: expected an nn.Module, but got dict"),
    "Bayesian": (
        lambda: svd.bayesianize(normalised_mlp()),
        {},
        TypeError,
        "net: expected a deterministic network, but it is Bayesian",
    ),
    "name": (lambda: nn.ModuleDict({"a\nb": nn.Linear(1, 1)}), {}, ValueError, "expected a printable name"),
}


class TestWhatCannotBeStored:
    @pytest.mark.parametrize(("make", "options", "error", "message"), BAD_NETS.values(), ids=BAD_NETS)
    def test_what_cannot_be_stored_is_refused(self, make, options, error, message, path):
        path.write_bytes(b"old")
        with pytest.raises(error, match=message):
            save_sparse(make(), path, **options)
        assert path.read_bytes() == b"old"
        assert os.listdir(path.parent) == [path.name]


MISMATCHES = {
    "shape": (
        lambda: nn.Sequential(nn.Linear(9, 7), *normalised_mlp()[1:]),
        r"0\.weight: expected the network's shape \(7, 9\)",
    ),
    "missing": (lambda: normalised_mlp()[:3], r"3\.weight: expected a tensor that the network has, but it has none"),
    "more": (
        lambda: nn.Sequential(*normalised_mlp(), nn.Linear(3, 2)),
        r"4\.bias: expected this tensor of the network, but it is not in the file",
    ),
    "kind": (
        lambda: nn.Sequential(*normalised_mlp()[:1], _integer(normalised_mlp()[1]), *normalised_mlp()[2:]),
        r"1\.running_mean: expected the network's torch.int64, but got torch.float32",
    ),
}


def _integer(module):
    module.running_mean = module.running_mean.long()
    return module


def _counted(*counts, dtype=torch.int64):
    net = nn.Linear(2, 2)
    net.register_buffer("counts", torch.tensor(counts, dtype=dtype))
    return net


class TestFilesThatDoNotFit:
    @pytest.mark.parametrize(("make", "message"), MISMATCHES.values(), ids=MISMATCHES)
    def test_another_network_is_refused_and_left_alone(self, make, message, path):
        save_sparse(sparse_network(normalised_mlp), path)
        other = make()
        before = copy.deepcopy(other)
        with pytest.raises(StorageError, match=f"^{re.escape(str(path))}: {message}"):
            load_sparse(path, other)
        assert_same_networks(other, before)

    def test_a_value_beyond_the_dtype_of_the_network_is_refused(self, path):
        net = normalised_mlp()
        net[3].weight.data[0, 0] = 1e6
        save_sparse(net, path)
        other = normalised_mlp().half()
        before = copy.deepcopy(other)
        with pytest.raises(StorageError, match=r"3\.weight: expected values of the network's torch\.float16, but some"):
            load_sparse(path, other)
        assert_same_networks(other, before)

    def test_a_file_of_tensors_that_are_one_in_the_network_is_refused(self, path, device):
        untied = Tied().to(device)
        untied.output.weight = nn.Parameter(untied.output.weight.detach() + 1)
        save_sparse(untied, path)
        net = Tied().to(device)
        before = copy.deepcopy(net)
        with pytest.raises(
            StorageError, match=r"output\.weight: expected the values of embedding\.weight, .* has others"
        ):
            load_sparse(path, net)
        assert_same_networks(net, before)
        untied.output.weight.data -= 1
        untied.embedding.weight.data = untied.output.weight.data.clone()
        save_sparse(untied, path)
        assert_same_networks(load_sparse(path, net), untied)
        assert net.output.weight is net.embedding.weight

    @pytest.mark.parametrize(
        ("value", "dtype"), [(300, torch.uint8), (-1, torch.uint8), (2**31, torch.int32), (2, torch.bool)], ids=str
    )
    def test_integers_beyond_the_dtype_of_the_network_are_refused(self, value, dtype, path, device):
        save_sparse(_counted(1, value).to(device), path)
        net = _counted(0, 1, dtype=dtype).to(device)
        before = copy.deepcopy(net)
        with pytest.raises(
            StorageError, match=r"counts: expected values of the network's torch\..*, but some are beyond"
        ):
            load_sparse(path, net)
        assert_same_networks(net, before)
        save_sparse(_counted(1, 0).to(device), path)
        assert load_sparse(path, net).counts.tolist() == [1, 0]

    def test_buffers_beyond_the_dtype_of_the_network_are_refused(self, path, device):
        net = nn.BatchNorm1d(3).to(device)
        net.running_var.copy_(torch.tensor([1.0, 1e6, math.inf]))
        save_sparse(net, path)
        assert load_sparse(path, nn.BatchNorm1d(3).to(device, torch.bfloat16)).running_var[2] == math.inf
        half = nn.BatchNorm1d(3).to(device, torch.float16)
        with pytest.raises(
            StorageError, match=r"running_var: expected values of the network's torch\.float16, but some"
        ):
            load_sparse(path, half)
        assert half.running_var.tolist() == [1.0, 1.0, 1.0]

    @pytest.mark.parametrize("name", ["crow_indices", "col_indices"])
    def test_indices_outside_of_a_sparse_layer_are_refused(self, name, path, device):
        net = svd.to_sparse(sparse_network(normalised_mlp, 0.5)).to(device)
        wrong = copy.deepcopy(net)
        wrong[3].get_buffer(name)[-1] = 10**6
        wrong[0].bias += 1
        save_sparse(wrong, path)
        before = copy.deepcopy(net)
        with pytest.raises(StorageError, match=rf"{path}: 3\.col_indices: expected indices within .*{name}"):
            load_sparse(path, net)
        assert_same_networks(net, before)
        save_sparse(before, path)
        assert_same_networks(load_sparse(path, net), before)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_file_with_weights_that_are_not_finite_is_refused(self, value, path):
        state = _with(value).state_dict()
        entries = [Entry(name, tensor.dtype, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()]
        container.write_file(path, "", entries, encode_tensors(state, entries))
        other = normalised_mlp()
        before = copy.deepcopy(other)
        with pytest.raises(StorageError, match=r"0\.weight: expected finite weights, but 1 of 72 are not"):
            load_sparse(path, other)
        assert_same_networks(other, before)

    @pytest.mark.parametrize(
        ("stored", "value"),
        [(torch.uint8, 256), (torch.int8, -129), (torch.bool, 2), (torch.int32, 2**31), (torch.float16, 2**15)],
        ids=str,
    )
    def test_values_beyond_their_dtype_are_refused(self, stored, value):
        encoder = Encoder()
        code_array(encoder, np.array([[value]]), (1, 1), 10 if stored == torch.float16 else 0)
        with pytest.raises(StorageError, match="x: expected values of"):
            decode_tensors(encoder.to_bytes(), [Entry("x", stored, (1,), stored)])

    def test_what_is_no_file_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            load_sparse(tmp_path / "none.svd", normalised_mlp())
        with pytest.raises(StorageError, match="expected a file, but it is a folder or a device"):
            load_sparse(tmp_path, normalised_mlp())
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(StorageError, match="expected a file"):
            load_sparse(tmp_path / "pipe", normalised_mlp())
        save_sparse(normalised_mlp(), tmp_path / "net.svd")
        with pytest.raises(TypeError, match=r"net: expected an nn\.Module, but got str"):
            load_sparse(tmp_path / "net.svd", "net")
