"""Storage: what is saved comes back, in a small file; what is not such a file is refused, and changes nothing."""

import collections
import copy
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import tracemalloc
import zlib

import numpy as np
import pytest
import safetensors.numpy
import torch
from lab.nets import lenet_5_caffe, lenet_300_100
from torch import nn

import pyro_sparsevd as svd
from pyro_sparsevd import _files
from pyro_sparsevd.storage import container, sparse_file
from pyro_sparsevd.storage.container import Entry
from pyro_sparsevd.storage.context_models import code_array
from pyro_sparsevd.storage.range_coder import Encoder
from pyro_sparsevd.storage.rounding import quantized
from pyro_sparsevd.storage.sparse_file import StorageError, load_sparse, register_architecture, save_sparse
from pyro_sparsevd.storage.tensors import decode_tensors, encode_tensors


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.output = nn.Linear(4, 7, bias=False)
        self.output.weight = self.embedding.weight


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


def _mlp():
    return nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


NETS = {
    "lenet-300-100": lenet_300_100,
    "lenet-5-caffe": lenet_5_caffe,
    "normalised": _mlp,
    "grouped": lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose1d(3, 5, 3), nn.LayerNorm(5)),
    "recurrent": lambda: nn.LSTM(5, 6, num_layers=2),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "tied": Tied,
    "odd": Odd,
    "double": lambda: nn.Linear(30, 20).double(),
    "half": lambda: nn.Linear(30, 20).half(),
    "empty": nn.ReLU,
}


def _sparse(make, kept=0.1):
    torch.manual_seed(1)
    net = make()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d):
                module(torch.randn(10, module.num_features))
        for p in net.parameters():
            if p.dim() > 1:
                p *= torch.rand(p.shape) < kept
    return net


def _assert_same(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, x in a.state_dict().items():
        y = b.state_dict()[name]
        assert x.dtype == y.dtype, name
        assert torch.equal(x.nan_to_num(12345.0), y.nan_to_num(12345.0)), name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.svd"


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 1.0])
def test_what_is_saved_comes_back(make, kept, path, device):
    net = _sparse(make, kept).to(device)
    before = copy.deepcopy(net)
    save_sparse(net, path)
    _assert_same(net, before)
    other = make().to(device)
    assert load_sparse(path, other) is other
    _assert_same(other, net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("make", [NETS["normalised"], Tied, NETS["double"], NETS["half"]])
def test_values_can_be_rounded_to_a_dtype(make, dtype, path):
    net = _sparse(make)
    save_sparse(net, path, values=dtype)
    for p in net.parameters():
        p.data = p.data.to(dtype).to(p.dtype) if dtype.itemsize < p.dtype.itemsize else p.data
    _assert_same(load_sparse(path, make()), net)


@pytest.mark.parametrize("make", [NETS["normalised"], lenet_5_caffe, NETS["double"], NETS["half"], Tied])
def test_values_can_be_rounded_to_steps(make, path):
    net = _sparse(make)
    steps = {name: 0.037 * (1 + i) for i, (name, _) in enumerate(net.named_parameters())}
    save_sparse(net, path, values=steps)
    _assert_same(load_sparse(path, make()), quantized(net, steps))


def test_a_parameter_without_a_step_stays_as_it_is(path):
    net = _sparse(_mlp)
    save_sparse(net, path, values={"0.weight": 0.1})
    _assert_same(load_sparse(path, _mlp()), quantized(net, {"0.weight": 0.1}))


def test_negative_zeros_count_as_zeros(path):
    net = nn.Linear(1000, 100, bias=False)
    net.weight.data *= 0
    assert torch.signbit(net.weight).any()
    save_sparse(net, path)
    assert len(_open(path.read_bytes())[1]) < 20
    assert torch.equal(load_sparse(path, nn.Linear(1000, 100, bias=False)).weight, net.weight)


def test_a_tied_tensor_is_stored_once_and_stays_tied(path):
    net = _sparse(Tied, kept=1.0)
    save_sparse(net, path)
    loaded = load_sparse(path, Tied())
    assert loaded.output.weight is loaded.embedding.weight
    loaded.output.weight = nn.Parameter(loaded.output.weight.detach().clone())
    tied = path.stat().st_size
    save_sparse(loaded, path)
    assert path.stat().st_size > tied + 28 * 3
    save_sparse(net, path)
    _assert_same(load_sparse(path, copy.deepcopy(loaded)), loaded)


def test_a_file_of_tensors_that_are_one_in_the_network_is_refused(path, device):
    untied = Tied().to(device)
    untied.output.weight = nn.Parameter(untied.output.weight.detach() + 1)
    save_sparse(untied, path)
    net = Tied().to(device)
    before = copy.deepcopy(net)
    with pytest.raises(StorageError, match=r"output\.weight: expected the values of embedding\.weight, .* has others"):
        load_sparse(path, net)
    _assert_same(net, before)
    untied.output.weight.data -= 1
    untied.embedding.weight.data = untied.output.weight.data.clone()
    save_sparse(untied, path)
    _assert_same(load_sparse(path, net), untied)
    assert net.output.weight is net.embedding.weight


def _counted(*counts, dtype=torch.int64):
    net = nn.Linear(2, 2)
    net.register_buffer("counts", torch.tensor(counts, dtype=dtype))
    return net


@pytest.mark.parametrize(
    ("value", "dtype"), [(300, torch.uint8), (-1, torch.uint8), (2**31, torch.int32), (2, torch.bool)], ids=str
)
def test_integers_beyond_the_dtype_of_the_network_are_refused(value, dtype, path, device):
    save_sparse(_counted(1, value).to(device), path)
    net = _counted(0, 1, dtype=dtype).to(device)
    before = copy.deepcopy(net)
    with pytest.raises(StorageError, match=r"counts: expected values of the network's torch\..*, but some are beyond"):
        load_sparse(path, net)
    _assert_same(net, before)
    save_sparse(_counted(1, 0).to(device), path)
    assert load_sparse(path, net).counts.tolist() == [1, 0]


def test_floating_point_buffers_beyond_the_dtype_of_the_network_are_refused_but_not_infinite_ones(path, device):
    net = nn.BatchNorm1d(3).to(device)
    net.running_var.copy_(torch.tensor([1.0, 1e6, math.inf]))
    save_sparse(net, path)
    assert load_sparse(path, nn.BatchNorm1d(3).to(device, torch.bfloat16)).running_var[2] == math.inf
    half = nn.BatchNorm1d(3).to(device, torch.float16)
    with pytest.raises(StorageError, match=r"running_var: expected values of the network's torch\.float16, but some"):
        load_sparse(path, half)
    assert half.running_var.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["crow_indices", "col_indices"])
def test_indices_outside_of_a_sparse_layer_are_refused(name, path, device):
    net = svd.to_sparse(_sparse(_mlp, 0.5)).to(device)
    wrong = copy.deepcopy(net)
    wrong[3].get_buffer(name)[-1] = 10**6
    wrong[0].bias += 1
    save_sparse(wrong, path)
    before = copy.deepcopy(net)
    with pytest.raises(StorageError, match=rf"{path}: 3\.col_indices: expected indices within .*{name}"):
        load_sparse(path, net)
    _assert_same(net, before)
    save_sparse(before, path)
    _assert_same(load_sparse(path, net), before)


def test_a_file_loads_into_another_dtype(path):
    net = _sparse(_mlp)
    save_sparse(net, path)
    _assert_same(load_sparse(path, _mlp().double()), copy.deepcopy(net).double())


STRUCTURED_BOUNDS = {"lenet-300-100": (lenet_300_100, 0.0116, 250), "lenet-5-caffe": (lenet_5_caffe, 0.0044, 450)}


@pytest.mark.parametrize(("make", "kept", "factor"), STRUCTURED_BOUNDS.values(), ids=STRUCTURED_BOUNDS)
def test_files_are_small(make, kept, factor, path, tmp_path):
    # Weights of random positions within a quarter of the units, whose magnitudes lie between two and five steps.
    net = _sparse(make, 0.0)
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
    payload = len(_open(path.read_bytes())[1])
    assert (tmp_path / "dense.pt").stat().st_size > factor * (payload + 90)
    assert path.stat().st_size < payload + 200 + 50 * len(net.state_dict())


def test_a_registered_architecture_loads_alone(path):
    for name, make in (("lenet-300-100", lenet_300_100), ("lenet-5-caffe", lenet_5_caffe)):
        net = _sparse(make)
        save_sparse(net, path, architecture=name)
        state = torch.get_rng_state()
        _assert_same(load_sparse(path), net)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def _registry(monkeypatch):
    monkeypatch.setattr(sparse_file, "_ARCHITECTURES", dict(sparse_file._ARCHITECTURES))


@pytest.mark.usefixtures("_registry")
def test_architectures_are_checked(path):
    register_architecture("mine", _mlp)
    register_architecture("mine", _mlp)
    with pytest.raises(ValueError, match="mine: expected a new name"):
        register_architecture("mine", Tied)
    with pytest.raises(ValueError, match="name: expected a printable name, but got ''"):
        register_architecture("", Tied)
    with pytest.raises(StorageError, match=r"expected a known architecture, of .*mine, but got 'yours'"):
        save_sparse(_mlp(), path, architecture="yours")
    with pytest.raises(StorageError, match=r"0\.weight: expected the network's shape \(8, 9\), but got \(2, 9\)"):
        save_sparse(nn.Sequential(nn.Linear(9, 2), *_mlp()[1:]), path, architecture="mine")
    assert not path.exists()
    save_sparse(_mlp(), path, architecture="mine")
    del sparse_file._ARCHITECTURES["mine"]
    with pytest.raises(StorageError, match="but got 'mine'; pass a network, or call register_architecture"):
        load_sparse(path)
    save_sparse(_mlp(), path)
    with pytest.raises(StorageError, match="but got ''; pass a network"):
        load_sparse(path)


def _with(value, name="0.weight"):
    net = _mlp()
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
    "step": (_mlp, {"values": {"0.weight": -1.0}}, ValueError, r"0\.weight: expected a positive and finite step"),
    "zero step": (_mlp, {"values": {"0.weight": 0.0}}, ValueError, r"0\.weight: expected a positive and finite step"),
    "tiny step": (_mlp, {"values": {"0.weight": 1e-60}}, ValueError, r"0\.weight: expected a positive and finite step"),
    "huge step": (_mlp, {"values": {"0.weight": 1e39}}, ValueError, r"0\.weight: expected a positive and finite step"),
    "steps": (_mlp, {"values": {"weight": 1.0}}, ValueError, "steps: expected parameters of the network"),
    "tied": (Tied, {"values": {"output.weight": 1.0}}, ValueError, "of embedding.weight, but got 'output.weight'"),
    "dtype": (_mlp, {"values": torch.int8}, TypeError, r"values: expected a floating-point dtype, .* torch\.int8"),
    "narrow dtype": (
        _mlp,
        {"values": torch.float8_e4m3fn},
        TypeError,
        r"values: expected .* of torch\.float32, .*torch\.bfloat16, steps or None, but got torch\.float8_e4m3fn",
    ),
    "word": (_mlp, {"values": "half"}, TypeError, "values: expected a floating-point dtype, .* 'half'"),
    "extra": (lambda: Extra(2, 2), {}, TypeError, "_extra_state: expected a tensor, but .* has a dict"),
    "lazy": (lambda: nn.LazyLinear(3), {}, TypeError, "weight: expected a tensor of a known shape"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), {}, TypeError, "weight: expected a dense tensor"),
    "complex": (lambda: nn.Linear(2, 2, dtype=torch.complex64), {}, TypeError, "weight: expected a dense tensor"),
    "no network": (lambda: {"weight": torch.ones(2)}, {}, TypeError, "net: expected an nn.Module, but got dict"),
    "Bayesian": (
        lambda: svd.bayesianize(_mlp()),
        {},
        TypeError,
        "net: expected a deterministic network, but it is Bayesian",
    ),
    "name": (lambda: nn.ModuleDict({"a\nb": nn.Linear(1, 1)}), {}, ValueError, "expected a printable name"),
}


@pytest.mark.parametrize(("make", "options", "error", "message"), BAD_NETS.values(), ids=BAD_NETS)
def test_what_cannot_be_stored_is_refused(make, options, error, message, path):
    path.write_bytes(b"old")
    with pytest.raises(error, match=message):
        save_sparse(make(), path, **options)
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]


MISMATCHES = {
    "shape": (lambda: nn.Sequential(nn.Linear(9, 7), *_mlp()[1:]), r"0\.weight: expected the network's shape \(7, 9\)"),
    "missing": (lambda: _mlp()[:3], r"3\.weight: expected a tensor that the network has, but it has none"),
    "more": (
        lambda: nn.Sequential(*_mlp(), nn.Linear(3, 2)),
        r"4\.bias: expected this tensor of the network, but it is not in the file",
    ),
    "kind": (
        lambda: nn.Sequential(*_mlp()[:1], _integer(_mlp()[1]), *_mlp()[2:]),
        r"1\.running_mean: expected the network's torch.int64, but got torch.float32",
    ),
}


def _integer(module):
    module.running_mean = module.running_mean.long()
    return module


@pytest.mark.parametrize(("make", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_another_network_is_refused_and_left_alone(make, message, path):
    save_sparse(_sparse(_mlp), path)
    other = make()
    before = copy.deepcopy(other)
    with pytest.raises(StorageError, match=f"^{re.escape(str(path))}: {message}"):
        load_sparse(path, other)
    _assert_same(other, before)


def test_a_value_beyond_the_dtype_of_the_network_is_refused(path):
    net = _mlp()
    net[3].weight.data[0, 0] = 1e6
    save_sparse(net, path)
    other = _mlp().half()
    before = copy.deepcopy(other)
    with pytest.raises(StorageError, match=r"3\.weight: expected values of the network's torch\.float16, but some"):
        load_sparse(path, other)
    _assert_same(other, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_file_with_weights_that_are_not_finite_is_refused(value, path):
    state = _with(value).state_dict()
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()]
    container.write_file(path, "", entries, encode_tensors(state, entries))
    other = _mlp()
    before = copy.deepcopy(other)
    with pytest.raises(StorageError, match=r"0\.weight: expected finite weights, but 1 of 72 are not"):
        load_sparse(path, other)
    _assert_same(other, before)


@pytest.mark.parametrize(
    ("stored", "value"),
    [(torch.uint8, 256), (torch.int8, -129), (torch.bool, 2), (torch.int32, 2**31), (torch.float16, 2**15)],
    ids=str,
)
def test_values_beyond_their_dtype_are_refused(stored, value):
    encoder = Encoder()
    code_array(encoder, np.array([[value]]), (1, 1), 10 if stored == torch.float16 else 0)
    with pytest.raises(StorageError, match="x: expected values of"):
        decode_tensors(encoder.to_bytes(), [Entry("x", stored, (1,), stored)])


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_sparse(tmp_path / "none.svd", _mlp())
    with pytest.raises(StorageError, match="expected a file, but it is a folder or a device"):
        load_sparse(tmp_path, _mlp())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="expected a file"):
        load_sparse(tmp_path / "pipe", _mlp())
    save_sparse(_mlp(), tmp_path / "net.svd")
    with pytest.raises(TypeError, match=r"net: expected an nn\.Module, but got str"):
        load_sparse(tmp_path / "net.svd", "net")


FAULTS = {"write": (os, "fsync"), "replace": (os, "replace"), "choice of a name": (_files.secrets, "token_hex")}


@pytest.mark.parametrize(("module", "name"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"])
def test_a_fault_leaves_the_old_file_and_nothing_else(module, name, fault, path, monkeypatch):
    def fail(*args):
        raise fault

    net = _sparse(_mlp)
    for old in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(type(fault)):
                save_sparse(_mlp(), path)
        assert os.listdir(path.parent) == [path.name] * old
        save_sparse(net, path)
    _assert_same(load_sparse(path, _mlp()), net)


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new(path, monkeypatch):
    old, new = _sparse(_mlp), _sparse(_mlp, kept=0.9)
    save_sparse(old, path)
    seen = []

    def look(function, *args):
        seen.append(load_sparse(path, _mlp()))
        result = function(*args)
        seen.append(load_sparse(path, _mlp()))
        return result

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, functools.partial(look, getattr(os, name)))
    save_sparse(new, path)
    assert len(seen) == 4
    for net, expected in zip(seen, (old, old, old, new), strict=True):
        _assert_same(net, expected)


KILLED = """
import os, random, signal, sys, time
import torch
from torch import nn
from pyro_sparsevd.storage.sparse_file import load_sparse, save_sparse

torch.set_num_threads(1)
path, nets = sys.argv[1], [nn.Linear(100, 100), nn.Linear(100, 100)]
start = time.perf_counter()
save_sparse(nets[0], path)
save_sparse(nets[0], path)
taken = time.perf_counter() - start
random.seed(0)
left_behind = seen = 0
for _ in range(50):
    child = os.fork()
    if child == 0:
        while True:
            for net in reversed(nets):
                save_sparse(net, path)
    time.sleep(random.uniform(0, 3 * taken))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    weight = load_sparse(path, nn.Linear(100, 100)).weight
    assert any(torch.equal(weight, net.weight) for net in nets)
    seen |= 1 << torch.equal(weight, nets[1].weight)
    left_behind = max(left_behind, len(os.listdir(os.path.dirname(path))) - 1)
print(seen, left_behind)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_fifty_killed_saves_leave_the_old_file_or_the_new(path):
    run = [sys.executable, "-W", "ignore", "-c", KILLED, str(path)]
    seen, left_behind = map(int, subprocess.check_output(run, text=True).split())
    assert seen == 3  # both networks were found
    assert left_behind > 0  # so some were killed while they wrote


def test_a_link_stays_a_link(path, tmp_path):
    link = tmp_path / "link.svd"
    path.write_bytes(b"")
    link.symlink_to(path)
    save_sparse(_mlp(), link)
    assert link.is_symlink()
    assert path.stat().st_size > 0


# Hostile files --------------------------------------------------------------------------------------------------------


def _small():
    return nn.Sequential(nn.Linear(9, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def _file(tensors, metadata):
    return safetensors.numpy.save(tensors, metadata)


def _seal(table, payload):
    """A file with right lengths and checksums, whatever is in it."""
    payload += bytes(-len(payload) % 4)
    checksums = [zlib.crc32(part).to_bytes(4, "little") for part in (table.encode(), payload)]
    data = np.frombuffer(b"".join([payload, *checksums]), np.uint8)
    return _file({"payload": data}, {"pyro_sparsevd": table})


def _open(data):
    """The table and the payload of a file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]["pyro_sparsevd"], data[8 + length : -8]


def _table(*rows, architecture="", version=2):
    return json.dumps({"version": version, "architecture": architecture, "tensors": rows})


def _mutated(data, generator):
    data = bytearray(data)
    for _ in range(generator.integers(1, 4)):
        kind, at = generator.integers(5), int(generator.integers(len(data) + 1))
        stop = at + int(generator.integers(1, 9))
        if kind == 0 and at < len(data):
            data[at] ^= 1 << generator.integers(8)
        elif kind == 1:
            data[at:stop] = generator.bytes(min(stop, len(data)) - at)
        elif kind == 2:
            data[at:stop] = bytes([[0, 0xFF][generator.integers(2)]]) * (min(stop, len(data)) - at)
        elif kind == 3:
            del data[at:stop]
        else:
            data[at:at] = generator.bytes(stop - at)
    return bytes(data)


ODD = (None, True, 0, -1, 2, 2**31, 2**64, 10**40, 1e-3, math.inf, math.nan, "", "int8", "float16", "\n", [], [[]], {})


def _altered(table, generator):
    """A table with one of its parts replaced, removed or repeated."""
    content = json.loads(table)
    part, places = content, []
    while isinstance(part, dict | list) and part and (not places or generator.random() < 0.8):
        keys = list(part) if isinstance(part, dict) else range(len(part))
        places.append((part, keys[generator.integers(len(keys))]))
        part = part[places[-1][1]]
    owner, key = places[-1]
    kind = generator.integers(4)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, list):
        owner.insert(key, owner[key])
    else:
        owner[key] = ODD[generator.integers(len(ODD))]
    return json.dumps(content)


def _with_header(data, change):
    """A file with another header of safetensors, of a length that is right again."""
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _files_with_faults(originals, count):
    """Yields kinds and files: damaged, and damaged with checksums that are right again."""
    generator = np.random.default_rng(0)
    for i in range(count):
        data = originals[i % len(originals)]
        table, payload = _open(data)
        kind = ("damaged", "truncated", "payload", "text of the table", "table", "header")[i // len(originals) % 6]
        if kind == "damaged":
            new = _mutated(data, generator)
        elif kind == "truncated":
            new = data[: generator.integers(len(data))]
        elif kind == "payload":
            new = _seal(table, _mutated(payload, generator))
        elif kind == "text of the table":
            new = _seal(_mutated(table.encode(), generator).decode(errors="replace"), payload)
        elif kind == "table":
            new = _seal(_altered(table, generator), payload)
        else:
            new = _with_header(data, lambda header: _mutated(header, generator))
        if new != data:
            yield kind, new


@pytest.fixture
def originals(path):
    register_architecture("small", _small)
    files = []
    for values in (None, torch.float16, {"0.weight": 0.1, "0.bias": 0.1, "3.weight": 0.05}):
        for kept, architecture in ((0.15, None), (1.0, "small")):
            save_sparse(_sparse(_small, kept), path, values=values, architecture=architecture)
            files.append(path.read_bytes())
    return files


def _load(path, data, net):
    path.unlink(missing_ok=True)  # some file systems wait for the disk where a file is overwritten
    path.write_bytes(data)
    return load_sparse(path, net)


@pytest.mark.usefixtures("_registry")
def test_ten_thousand_damaged_files_are_refused_or_harmless(originals, path):
    loaded, refused = collections.Counter(), collections.Counter()
    net = _small()
    before = copy.deepcopy(net)
    for kind, data in itertools.islice(_files_with_faults(originals, 20_000), 10_000):
        try:
            _load(path, data, net)
            loaded[kind] += 1
            assert all(p.isfinite().all() for p in net.parameters())
            net.load_state_dict(before.state_dict())
        except StorageError as error:
            refused[kind, re.sub(r"[^a-z]+", " ", str(error).removeprefix(f"{path}: "))[:80]] += 1
            assert all(map(torch.equal, net.state_dict().values(), before.state_dict().values()))
    assert loaded.total() + refused.total() == 10_000
    assert loaded["damaged"] == loaded["truncated"] == 0  # a checksum tells
    assert refused.total() + loaded["table"] > 9_900  # 9,993 when this was written
    assert loaded["table"] < 150  # 93: other steps or buffers, that a file might have held
    assert loaded["payload"] > 0  # other values, that a file might have held
    assert len(refused) > 80  # kinds of damage and reasons to refuse
    for reason in ("bytes do not fit the model", "more bytes", "is not in the file"):
        assert any(reason in message for _, message in refused), reason


BYTES = np.zeros(8, np.uint8)
WEIGHT = _table(["weight", "float32", [2, 3]])
VERSION_1 = "89535644011400000003000000bf65c5d07acba84763e282f2c13c06562626160686063b0606462600335c0282f6894cdf5c5a1ce4"


def _weight(*fields):
    return _seal(_table(["weight", *fields]), b"")


HOSTILE = {
    "empty": (b"", "safetensors cannot read it"),
    "half a length": (b"\x08\x00\x00", "safetensors cannot read it"),
    "only a length": (b"\x08" + bytes(7), "safetensors cannot read it"),
    "another kind of file": (b"PK\x03\x04" + bytes([1] * 100), "a header of at most"),
    "a file of version 1": (bytes.fromhex(VERSION_1), "expected a file of save_sparse, with a header of at most"),
    "a length that overflows": (b"\xff" * 100, "a header of at most"),
    "a long header": (
        _with_header(_seal(WEIGHT, b""), lambda h: h + b" " * 2**23),
        "a header of at most 8388608 bytes",
    ),
    "a header that is no table": (_with_header(_seal(WEIGHT, b""), lambda h: b"[" * 64), "safetensors cannot read it"),
    "no metadata": (_file({"payload": BYTES}, None), "another safetensors file"),
    "other metadata": (_file({"payload": BYTES}, {"format": "pt"}), "another safetensors file"),
    "no payload": (_file({}, {"pyro_sparsevd": WEIGHT}), "another safetensors file|cannot read it"),
    "two payloads": (_file({"payload": BYTES, "x": BYTES}, {"pyro_sparsevd": WEIGHT}), "another safetensors file"),
    "a payload of floats": (
        _file({"payload": np.zeros(8, np.float32)}, {"pyro_sparsevd": WEIGHT}),
        r"words of four bytes, but got F32 of shape \[8\]",
    ),
    "a matrix of bytes": (_file({"payload": BYTES[None]}, {"pyro_sparsevd": WEIGHT}), "words of four bytes"),
    "no checksums": (_file({"payload": BYTES[:4]}, {"pyro_sparsevd": WEIGHT}), "words of four bytes"),
    "half a word": (_file({"payload": np.zeros(10, np.uint8)}, {"pyro_sparsevd": WEIGHT}), "words of four bytes"),
    "a wrong checksum": (_file({"payload": BYTES}, {"pyro_sparsevd": WEIGHT}), "the checksum of the table"),
    "a newer version": (_seal(_table(version=3), b""), "expected format version 2, but got 3"),
    "version 1": (_seal(_table(version=1), b""), "expected format version 2, but got 1"),
    "a version that is no number": (_seal(_table(version="2"), b""), "expected a table with a version"),
    "no version": (_seal('{"architecture":"","tensors":[]}', b""), "expected a table with a version"),
    "no table": (_seal("", b""), "cannot be unpacked"),
    "an empty table": (_seal("{}", b""), "expected a table with a version"),
    "a list": (_seal("[]", b""), "expected a table with a version"),
    "a number": (_seal("2", b""), "expected a table with a version"),
    "more in the table": (_seal(WEIGHT[:-1] + ',"more":1}', b""), "and nothing else"),
    "more after the table": (_seal(WEIGHT + "!", b""), "cannot be unpacked"),
    "a long table": (_seal(" " * 2**20 + WEIGHT, b""), "expected a table of at most 1048576 characters"),
    "a deep table": (_seal("[" * 2**20, b""), "cannot be unpacked"),
    "a deep tensor": (_seal(_table(json.loads("[" * 400 + "]" * 400)), b""), "expected printable names"),
    "an integer without end": (_seal(_table(["weight", "float32", [1]]).replace("1]", "9" * 10**5 + "]"), b""), "ed"),
    "many tensors": (_seal(_table(*[[]] * 40_000), b""), "at most 32768 tensors, but got 40000"),
    "a tensor that is none": (_seal(_table({"name": "weight"}), b""), "expected printable names"),
    "a name that is no text": (_seal(_table([1, "float32", [2, 3]]), b""), "expected printable names"),
    "a name that is not printable": (_seal(_table(["\x1b[2J", "float32", [1]]), b""), "expected printable names"),
    "an architecture that is not printable": (_seal(_table(architecture="\n"), b""), "expected printable names"),
    "a name twice": (_seal(_table(*[["a", "float32", [1]]] * 2), b""), "each name once"),
    "only a name": (_weight(), "weight: expected a dtype, a shape and what is stored"),
    "a shape that is a number": (_weight("float32", 6), "weight: expected a dtype, a shape and what is stored"),
    "a step that is an integer": (_weight("float32", [2, 3], 1), "weight: expected a dtype, a shape and"),
    "more of a tensor": (_weight("float32", [2, 3], 0.5, 1), "weight: expected a dtype, a shape and what is stored"),
    "an unknown dtype": (_weight("float8", [2, 3]), "weight: expected dtypes and at most 16 dimensions"),
    "an unknown stored dtype": (_weight("float32", [2, 3], "x"), "weight: expected dtypes and at most 16 dimensions"),
    "integers from floats": (_weight("int64", [2, 3], "float32"), r"weight: expected values for torch\.int64"),
    "floats from bytes": (_weight("float32", [2, 3], "int8"), r"weight: expected values for torch\.float32"),
    "floats from integers": (_weight("float32", [2, 3], "int32"), r"weight: expected values for torch\.float32"),
    "integers with a step": (_weight("int32", [2, 3], 0.5), r"weight: expected values for torch\.int32"),
    "many dimensions": (_weight("float32", [1] * 17), "weight: expected dtypes and at most 16 dimensions"),
    "a size that is no number": (_weight("float32", [2, "3"]), "weight: expected sizes in its shape"),
    "a size that is no integer": (_weight("float32", [2, 3.0]), "weight: expected sizes in its shape"),
    "a negative size": (_weight("float32", [-2, -3]), "weight: expected sizes in its shape"),
    "a shape that overflows": (_weight("float32", [2**32, 2**32]), "weight: expected at most 1099511627776 elements"),
    "a shape that is huge": (_weight("float32", [2**20, 2**20]), "weight: expected the network's shape"),
    "an empty shape that overflows": (_weight("float32", [0, 2**62, 2**62]), "weight: expected at most"),
    "a step of nan": (_weight("float32", [2, 3], math.nan), "weight: expected a positive step, but got nan"),
    "a step of infinity": (_weight("float32", [2, 3], math.inf), "weight: expected a positive step, but got inf"),
    "a step too large": (_weight("float32", [2, 3], 1e39), r"weight: expected a positive step, but got 1e\+39"),
    "a step too small": (_weight("float32", [2, 3], 1e-60), "weight: expected a positive step, but got 1e-60"),
    "a negative step": (_weight("float32", [2, 3], -1.0), "weight: expected a positive step"),
    "tied to itself": (_weight(0), "weight: expected to be tied to an earlier tensor, but got number 0"),
    "tied to nothing": (_weight(2**31), "weight: expected to be tied to an earlier tensor"),
    "tied to the last": (
        _seal(_table(["a", "float32", [1]], ["weight", -1]), b""),
        "weight: expected to be tied to an earlier tensor, but got number -1",
    ),
    "a long payload": (_seal(WEIGHT, bytes(2**17)), "expected at most 65632 bytes of values"),
    "more after the values": (_seal(WEIGHT, b"\x01" * 2000), "more bytes|do not fit|finite"),
}


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused(data, message, path):
    net = nn.Linear(3, 2, bias=False)
    before = net.weight.detach().clone()
    with pytest.raises(StorageError, match=message):
        _load(path, data, net)
    assert torch.equal(net.weight, before)


def test_each_flipped_bit_of_a_file_is_found(originals, path):
    data = originals[0]
    for bit in range(8 * len(data)):
        wrong = bytearray(data)
        wrong[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StorageError):
            _load(path, bytes(wrong), _small())


def _peak(function):
    tracemalloc.start()
    try:
        function()
    except StorageError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_memory_is_bounded(path):
    net = _sparse(lenet_300_100, 0.01)
    save_sparse(net, path)
    table, payload = _open(path.read_bytes())
    honest = _peak(lambda: load_sparse(path, net))
    generator = np.random.default_rng(0)
    hostile = [data for data, _ in HOSTILE.values()]
    hostile += [_seal(table, _mutated(payload[:500], generator)) for _ in range(3)]
    hostile += [_seal(table, b"\xff" * 4 + generator.bytes(1000))]
    hostile += [_seal(table, generator.bytes(size)) for size in (4, 4_000, 400_000)]
    for data in hostile:
        path.write_bytes(data)
        assert _peak(lambda: load_sparse(path, net)) < 10 * honest


def test_no_file_runs_code(path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    net = _sparse(_mlp)
    save_sparse(net, path)
    monkeypatch.setattr("pickle.Unpickler", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert all(map(torch.equal, load_sparse(path, _mlp()).state_dict().values(), net.state_dict().values()))


def test_files_are_written_and_read_by_threads(tmp_path):
    nets = [_sparse(_mlp, 0.1 * i) for i in range(1, 9)]
    failed = []

    def work(i):
        for _ in range(5):
            save_sparse(nets[i], tmp_path / "shared.svd")
            save_sparse(nets[i], tmp_path / f"{i}.svd")
            loaded = load_sparse(tmp_path / f"{i}.svd", _mlp())
            load_sparse(tmp_path / "shared.svd", _mlp())
            if not torch.equal(loaded[0].weight, nets[i][0].weight):
                failed.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(os.listdir(tmp_path)) == 9


def test_a_file_of_version_2_is_read(path):
    net = nn.Linear(4, 2)
    path.write_bytes(VERSION_2)
    load_sparse(path, net)
    assert torch.equal(net.weight, torch.tensor([[0, 0, 0, 0.5], [0, -0.25, 0, 0]]))
    assert torch.equal(net.bias, torch.tensor([1.5, -3.0]))


@pytest.mark.parametrize("name", ["constriction", "safetensors"])
def test_the_optional_packages_are_named(name, path, monkeypatch):
    save_sparse(_mlp(), path)
    for module in (name, "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    for call in (lambda: save_sparse(_mlp(), path), lambda: load_sparse(path, _mlp())):
        with pytest.raises(ImportError, match=r'expected \w+; pip install "pyro-sparsevd\[storage\]" installs it'):
            call()


def test_a_table_too_long_is_refused(tmp_path):
    entries = [Entry("x" * 1000 + str(i), torch.float32, (1,)) for i in range(1100)]
    with pytest.raises(ValueError, match="names and shapes of at most 1048576 bytes, but got 1100 tensors"):
        container.write_file(tmp_path / "net.svd", "", entries, b"")
    with pytest.raises(ValueError, match="expected at most 32768 tensors"):
        container.write_file(tmp_path / "net.svd", "", [Entry("x", torch.float32, ())] * 40_000, b"")


VERSION_2 = (
    b"\xd8" + bytes(7) + b'{"__metadata__":{"pyro_sparsevd":"{\\"version\\":2,\\"architecture\\":\\"\\",\\"tensors\\":['
    b'[\\"weight\\",\\"float32\\",[2,4],0.25],[\\"bias\\",\\"float32\\",[2]]]}"},'
    b'"payload":{"dtype":"U8","shape":[20],"data_offsets":[0,20]}}     '
) + bytes.fromhex("335c0282f6894cdf5c5a1ce48ed58c2abf65c5d0")
