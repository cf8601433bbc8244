"""What is no such file is refused, and no code of it runs."""

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
from lab.nets import lenet_300_100
from torch import nn

from pyro_sparsevd import _files
from pyro_sparsevd.storage import container
from pyro_sparsevd.storage.container import Entry
from pyro_sparsevd.storage.sparse_file import StorageError, load_sparse, register_architecture, save_sparse
from storable import assert_same_networks, normalised_mlp, opened_file, sparse_network

FAULTS = {"write": (os, "fsync"), "replace": (os, "replace"), "choice of a name": (_files.secrets, "token_hex")}

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


class TestFailedSaves:
    @pytest.mark.parametrize(("module", "name"), FAULTS.values(), ids=FAULTS)
    @pytest.mark.parametrize(
        "fault", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stop"]
    )
    def test_a_fault_leaves_the_old_file_and_nothing_else(self, module, name, fault, path, monkeypatch):
        def fail(*args):
            raise fault

        net = sparse_network(normalised_mlp)
        for old in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, fail)
                with pytest.raises(type(fault)):
                    save_sparse(normalised_mlp(), path)
            assert os.listdir(path.parent) == [path.name] * old
            save_sparse(net, path)
        assert_same_networks(load_sparse(path, normalised_mlp()), net)

    def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new(self, path, monkeypatch):
        old, new = sparse_network(normalised_mlp), sparse_network(normalised_mlp, kept=0.9)
        save_sparse(old, path)
        seen = []

        def look(function, *args):
            seen.append(load_sparse(path, normalised_mlp()))
            result = function(*args)
            seen.append(load_sparse(path, normalised_mlp()))
            return result

        for name in ("fsync", "replace"):
            monkeypatch.setattr(os, name, functools.partial(look, getattr(os, name)))
        save_sparse(new, path)
        assert len(seen) == 4
        for net, expected in zip(seen, (old, old, old, new), strict=True):
            assert_same_networks(net, expected)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
    def test_fifty_killed_saves_leave_the_old_file_or_the_new(self, path):
        run = [sys.executable, "-W", "ignore", "-c", KILLED, str(path)]
        seen, left_behind = map(int, subprocess.check_output(run, text=True).split())
        assert seen == 3  # both networks were found
        assert left_behind > 0  # so some were killed while they wrote

    def test_a_link_stays_a_link(self, path, tmp_path):
        link = tmp_path / "link.svd"
        path.write_bytes(b"")
        link.symlink_to(path)
        save_sparse(normalised_mlp(), link)
        assert link.is_symlink()
        assert path.stat().st_size > 0


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
        table, payload = opened_file(data)
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
            save_sparse(sparse_network(_small, kept), path, values=values, architecture=architecture)
            files.append(path.read_bytes())
    return files


def _load(path, data, net):
    path.unlink(missing_ok=True)  # some file systems wait for the disk where a file is overwritten
    path.write_bytes(data)
    return load_sparse(path, net)


class TestDamage:
    @pytest.mark.usefixtures("_registry")
    def test_ten_thousand_damaged_files_are_refused_or_harmless(self, originals, path):
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

    def test_each_flipped_bit_of_a_file_is_found(self, originals, path):
        data = originals[0]
        for bit in range(8 * len(data)):
            wrong = bytearray(data)
            wrong[bit // 8] ^= 1 << bit % 8
            with pytest.raises(StorageError):
                _load(path, bytes(wrong), _small())


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


class TestHostileFiles:
    @pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE)
    def test_hostile_files_are_refused(self, data, message, path):
        net = nn.Linear(3, 2, bias=False)
        before = net.weight.detach().clone()
        with pytest.raises(StorageError, match=message):
            _load(path, data, net)
        assert torch.equal(net.weight, before)

    def test_memory_is_bounded(self, path):
        net = sparse_network(lenet_300_100, 0.01)
        save_sparse(net, path)
        table, payload = opened_file(path.read_bytes())
        honest = _peak(lambda: load_sparse(path, net))
        generator = np.random.default_rng(0)
        hostile = [data for data, _ in HOSTILE.values()]
        hostile += [_seal(table, _mutated(payload[:500], generator)) for _ in range(3)]
        hostile += [_seal(table, b"\xff" * 4 + generator.bytes(1000))]
        hostile += [_seal(table, generator.bytes(size)) for size in (4, 4_000, 400_000)]
        for data in hostile:
            path.write_bytes(data)
            assert _peak(lambda: load_sparse(path, net)) < 10 * honest

    def test_no_file_runs_code(self, path, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("unpickled")

        net = sparse_network(normalised_mlp)
        save_sparse(net, path)
        monkeypatch.setattr("pickle.Unpickler", refuse)
        monkeypatch.setattr("pickle.loads", refuse)
        monkeypatch.setattr(torch, "load", refuse)
        assert all(
            map(torch.equal, load_sparse(path, normalised_mlp()).state_dict().values(), net.state_dict().values())
        )

    def test_a_table_too_long_is_refused(self, tmp_path):
        entries = [Entry("x" * 1000 + str(i), torch.float32, (1,)) for i in range(1100)]
        with pytest.raises(ValueError, match="names and shapes of at most 1048576 bytes, but got 1100 tensors"):
            container.write_file(tmp_path / "net.svd", "", entries, b"")
        with pytest.raises(ValueError, match="expected at most 32768 tensors"):
            container.write_file(tmp_path / "net.svd", "", [Entry("x", torch.float32, ())] * 40_000, b"")


class TestReading:
    def test_files_are_written_and_read_by_threads(self, tmp_path):
        nets = [sparse_network(normalised_mlp, 0.1 * i) for i in range(1, 9)]
        failed = []

        def work(i):
            for _ in range(5):
                save_sparse(nets[i], tmp_path / "shared.svd")
                save_sparse(nets[i], tmp_path / f"{i}.svd")
                loaded = load_sparse(tmp_path / f"{i}.svd", normalised_mlp())
                load_sparse(tmp_path / "shared.svd", normalised_mlp())
                if not torch.equal(loaded[0].weight, nets[i][0].weight):
                    failed.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert len(os.listdir(tmp_path)) == 9

    def test_a_file_of_version_2_is_read(self, path):
        net = nn.Linear(4, 2)
        path.write_bytes(VERSION_2)
        load_sparse(path, net)
        assert torch.equal(net.weight, torch.tensor([[0, 0, 0, 0.5], [0, -0.25, 0, 0]]))
        assert torch.equal(net.bias, torch.tensor([1.5, -3.0]))

    @pytest.mark.parametrize("name", ["constriction", "safetensors"])
    def test_the_optional_packages_are_named(self, name, path, monkeypatch):
        save_sparse(normalised_mlp(), path)
        for module in (name, "safetensors.numpy"):
            monkeypatch.setitem(sys.modules, module, None)
        for call in (lambda: save_sparse(normalised_mlp(), path), lambda: load_sparse(path, normalised_mlp())):
            with pytest.raises(ImportError, match=r'expected \w+; pip install "pyro-sparsevd\[storage\]" installs it'):
                call()


VERSION_2 = (
    b"\xd8" + bytes(7) + b'{"__metadata__":{"pyro_sparsevd":"{\\"version\\":2,\\"architecture\\":\\"\\",\\"tensors\\":['
    b'[\\"weight\\",\\"float32\\",[2,4],0.25],[\\"bias\\",\\"float32\\",[2]]]}"},'
    b'"payload":{"dtype":"U8","shape":[20],"data_offsets":[0,20]}}     '
) + bytes.fromhex("335c0282f6894cdf5c5a1ce48ed58c2abf65c5d0")
