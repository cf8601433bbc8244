"""The file of a sparse network: a preamble, a table of its tensors, and bytes; written whole or not at all.

All integers are little-endian. The preamble is ``magic, version, table length, payload words, payload CRC-32, CRC-32 of
all before and of the table``; the table is compressed by zlib, the payload is left to
:mod:`~.context_models`. A checksum finds
damage, not intent: every number in the table is checked against a limit before anything is made of it.
"""

__all__ = ["DTYPES", "Entry", "read_payload", "read_table", "write_file"]

import dataclasses
import math
import os
import secrets
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from .range_coder import StorageError

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DTYPES = (*_FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True)
class Entry:
    """A tensor in the table.

    Args:
        name: Its name in the network's state.
        dtype: Its dtype in the network.
        shape: Its shape.
        stored: The dtype that its values were stored in; of a quantised one, an integer dtype.
        step: What the integers of a quantised tensor are multiples of; else 0.
        same_as: The index of the earlier tensor that this one is tied to, or -1.

    Example:
        >>> Entry("weight", torch.float32, (3, 4)).size
        12
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: torch.dtype = torch.float32
    step: float = 0.0
    same_as: int = -1

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def is_tied(self) -> bool:
        """Whether it is an earlier tensor under another name."""
        return self.same_as >= 0


def write_file(path: str | Path, architecture: str, entries: Sequence[Entry], payload: bytes) -> None:
    """Writes a file. The path holds what it held before or all of the new file, whenever the process ends.

    Args:
        path: Where; links are followed.
        architecture: The name of the architecture, or "".
        entries: The tensors.
        payload: Their values, a multiple of four bytes.

    Raises:
        ValueError: If there are more values, or more, longer or stranger names, than a file can hold.
        OSError: If the file cannot be written; nothing is left behind.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_file(f"{folder}/net.svd", "", [Entry("weight", torch.float32, (3, 4))], bytes(8))
        ...     with open(f"{folder}/net.svd", "rb") as file:
        ...         architecture, entries = read_table(file)
        ...         data = read_payload(file, limit=100)
        >>> entries[0].name, len(data)
        ('weight', 8)
    """
    table = _pack_table(architecture, entries)
    if len(payload) >= 2**34:
        raise ValueError(f"expected values that take less than 16 GiB in a file, but they take {len(payload)} bytes")
    start = _PREAMBLE.pack(_MAGIC, _VERSION, len(table), len(payload) // 4, zlib.crc32(payload))
    checksum = zlib.crc32(table, zlib.crc32(start))
    target = Path(os.path.realpath(path))
    new = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}")
    try:
        with new.open("xb") as file:
            file.write(start + _CHECKSUM.pack(checksum) + table + payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, target)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def read_table(file: BinaryIO) -> tuple[str, list[Entry]]:
    r"""Reads all but the payload.

    Args:
        file: A file, open at its start.

    Returns:
        The name of the architecture, or "", and the tensors.

    Raises:
        StorageError: If it is not such a file, of another version, or damaged.

    Example:
        >>> import io
        >>> read_table(io.BytesIO(b"GIF89a"))
        Traceback (most recent call last):
        ...
        pyro_sparsevd.storage.range_coder.StorageError: expected a file of save_sparse, which begins with b'\x89SVD'
    """
    start = file.read(_PREAMBLE.size + _CHECKSUM.size)
    if start[:4] != _MAGIC:
        raise StorageError(f"expected a file of save_sparse, which begins with {_MAGIC!r}")
    if len(start) > 4 and start[4] != _VERSION:
        raise StorageError(f"expected format version {_VERSION}, but got {start[4]}; use the release that wrote it")
    if len(start) < _PREAMBLE.size + _CHECKSUM.size:
        raise StorageError(f"expected a preamble, but the file ends after {len(start)} bytes")
    _, _, table_length, words, _ = _PREAMBLE.unpack_from(start)
    length = file.seek(0, os.SEEK_END)
    expected = len(start) + table_length + 4 * words
    if length != expected or table_length > _TABLE_LIMIT:
        raise StorageError(f"expected {expected} bytes, as the file says, but it has {length}: it is damaged")
    file.seek(len(start))
    table = file.read(table_length)
    if zlib.crc32(table, zlib.crc32(start[: _PREAMBLE.size])) != _CHECKSUM.unpack_from(start, _PREAMBLE.size)[0]:
        raise StorageError("expected the checksum of the table, but the file is damaged")
    return _unpack_table(table)


def read_payload(file: BinaryIO, limit: int) -> bytes:
    """Reads the payload, after :func:`read_table`.

    Args:
        file: The file.
        limit: The largest number of bytes that may be right.

    Returns:
        The payload.

    Raises:
        StorageError: If it is longer, or damaged.

    Example:
        See :func:`write_file`.
    """
    file.seek(0)
    _, _, table_length, words, checksum = _PREAMBLE.unpack(file.read(_PREAMBLE.size))
    if 4 * words > limit:
        raise StorageError(f"expected at most {limit} bytes of values for such tensors, but got {4 * words}")
    file.seek(_PREAMBLE.size + _CHECKSUM.size + table_length)
    payload = file.read(4 * words)
    if zlib.crc32(payload) != checksum:
        raise StorageError("expected the checksum of the values, but the file is damaged")
    return payload


_MAGIC, _VERSION = b"\x89SVD", 1
_PREAMBLE, _CHECKSUM = struct.Struct("<4sBIII"), struct.Struct("<I")
_STEP = struct.Struct("<f")
_TABLE_LIMIT = 2**20  # bytes, packed or not; a thousand tensors take some 50,000
_MOST_TENSORS, _MOST_DIMS, _MOST_ELEMENTS = 2**15, 16, 2**40
_TIED = 255
# What zlib looks for before there is anything else; part of the format.
_DICTIONARY = (
    b"embeddings.conv.encoder.layers.layer.downsample.attention.in_proj_out_proj.norm.running_mean\nrunning_var\n"
    b"num_batches_tracked\nfeatures.classifier.fc.0.weight\n1.weight\n1.bias\n"
)


def _pack_table(architecture: str, entries: Sequence[Entry]) -> bytes:
    lines = [architecture, *(entry.name for entry in entries)]
    for line in lines:
        if not line.isprintable():
            raise ValueError(f"{line!r}: expected a printable name, to store it")
    names = "".join(f"{line}\n" for line in lines).encode()
    plain = b"".join([_pack_size(len(entries)), names, *map(_pack_entry, entries)])
    packer = zlib.compressobj(9, wbits=-15, zdict=_DICTIONARY)
    table = packer.compress(plain) + packer.flush()
    if len(entries) > _MOST_TENSORS or max(len(plain), len(table)) > _TABLE_LIMIT:
        raise ValueError(
            f"expected at most {_MOST_TENSORS} tensors, with names and shapes of at most {_TABLE_LIMIT} bytes, but got "
            f"{len(entries)} tensors, which take {max(len(plain), len(table))}"
        )
    return table


def _pack_entry(entry: Entry) -> bytes:
    if entry.is_tied:
        return bytes([_TIED]) + _pack_size(entry.same_as)
    kinds = bytes([DTYPES.index(entry.dtype), DTYPES.index(entry.stored), len(entry.shape)])
    return kinds + b"".join(map(_pack_size, entry.shape)) + (_STEP.pack(entry.step) if entry.step else b"")


def _pack_size(size: int) -> bytes:
    """Returns an integer as groups of seven bits, the lowest first, each but the last with a high bit set."""
    result = bytearray()
    while size >= 128:
        result.append(size & 127 | 128)
        size >>= 7
    return bytes([*result, size])


def _unpack_table(table: bytes) -> tuple[str, list[Entry]]:
    unpacker = zlib.decompressobj(wbits=-15, zdict=_DICTIONARY)
    try:
        fields = _Fields(unpacker.decompress(table, _TABLE_LIMIT))
        if not unpacker.eof or unpacker.unused_data:
            raise StorageError(f"expected a table of at most {_TABLE_LIMIT} bytes, and nothing after it")
        if (count := fields.size()) > _MOST_TENSORS:
            raise StorageError(f"expected at most {_MOST_TENSORS} tensors, but got {count}")
        architecture, *names = (fields.line() for _ in range(count + 1))
    except (zlib.error, UnicodeDecodeError) as error:
        raise StorageError("expected a table of tensors, but it cannot be unpacked") from error
    if not all(map(str.isprintable, [architecture, *names])):
        raise StorageError("expected printable names in the table")
    if len(set(names)) < len(names):
        raise StorageError("expected each name once, but the table has one of them twice")
    entries: list[Entry] = []
    for name in names:
        entries.append(_unpack_entry(name, entries, fields))
    if fields.left:
        raise StorageError(f"expected nothing after the table, but there are {fields.left} bytes")
    return architecture, entries


def _unpack_entry(name: str, earlier: Sequence[Entry], fields: "_Fields") -> Entry:
    number = fields.take(1)[0]
    if number == _TIED:
        index = fields.size()
        if not (index < len(earlier) and not earlier[index].is_tied):
            raise StorageError(f"{name}: expected to be tied to an earlier tensor, but got number {index}")
        return dataclasses.replace(earlier[index], name=name, same_as=index)
    stored_number, dims = fields.take(2)
    if max(number, stored_number) >= len(DTYPES) or dims > _MOST_DIMS:
        raise StorageError(f"{name}: expected dtypes and dimensions in use, but got {number, stored_number, dims}")
    dtype, stored = DTYPES[number], DTYPES[stored_number]
    if stored not in ((*_FLOATS, torch.int32) if dtype in _FLOATS else (dtype,)):
        raise StorageError(f"{name}: expected values for {dtype}, but got {stored}")
    shape = tuple(fields.size() for _ in range(dims))
    if math.prod(max(size, 1) for size in shape) > _MOST_ELEMENTS:
        raise StorageError(f"{name}: expected at most {_MOST_ELEMENTS} elements, but its shape is {shape}")
    if dtype == stored or stored in _FLOATS:
        return Entry(name, dtype, shape, stored)
    (step,) = _STEP.unpack(fields.take(_STEP.size))
    if not 0 < step < math.inf:
        raise StorageError(f"{name}: expected a positive step, but got {step}")
    return Entry(name, dtype, shape, stored, step)


class _Fields:
    """What is left of a table."""

    def __init__(self, data: bytes) -> None:
        self._data, self._start = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._start

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise StorageError(f"expected {count} more bytes in the table, but there are {self.left}")
        self._start += count
        return self._data[self._start - count : self._start]

    def line(self) -> str:
        stop = self._data.find(b"\n", self._start)
        if stop < 0:
            raise StorageError("expected one more name in the table, but there is none")
        return self.take(stop + 1 - self._start)[:-1].decode()

    def size(self) -> int:
        result = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            result |= (byte & 127) << shift
            if byte < 128:
                return result
        raise StorageError("expected an integer below 2^63 in the table")
