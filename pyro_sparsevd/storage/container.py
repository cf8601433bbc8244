"""The file of a sparse network: a safetensors file with a table of the network's tensors and their coded values.

The only metadata, ``pyro_sparsevd``, is the table as JSON: a version, an architecture, and for each tensor of the
network ``[name, dtype, shape]``, followed by the dtype that it is stored in or the step that it is a multiple of; or
``[name, index]`` for an earlier tensor under another name. The only tensor, ``payload``, holds the bytes of
:mod:`~.tensors`, then the CRC-32 of the table and that of these bytes. A checksum finds damage, not intent: every
number of the table is checked before memory is allocated for it.
"""

__all__ = ["DTYPES", "Entry", "open_file", "read_payload", "read_table", "write_file"]

import dataclasses
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._files import replacing
from .range_coder import StorageError, imported
from .rounding import as_float32

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DTYPES = (*_FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True)
class Entry:
    """A tensor of the network's state in the table."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: torch.dtype = torch.float32  # the dtype that its values are stored in; int32 for multiples of a step
    step: float = 0.0  # what the values are multiples of; else 0
    same_as: int = -1  # the index of the earlier tensor that this one is tied to, or -1

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def is_tied(self) -> bool:
        """Whether it is an earlier tensor under another name."""
        return self.same_as >= 0


def write_file(path: str | Path, architecture: str, entries: Sequence[Entry], payload: bytes) -> None:
    """Writes a file, complete or not at all; the payload is a multiple of four bytes."""
    table = _pack_table(architecture, entries)
    data = payload + _checksum(table.encode()) + _checksum(payload)
    tensors = {"payload": np.frombuffer(data, np.uint8)}
    with replacing(path) as new:
        new.write_bytes(imported("safetensors.numpy").save(tensors, {_KEY: table}))


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """Opens a file of :func:`write_file` with safetensors; only its header is read."""
    safetensors = imported("safetensors")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")  # of the header: the start of each safetensors file
    if length > _HEADER_LIMIT:
        raise StorageError(f"expected a file of save_sparse, with a header of at most {_HEADER_LIMIT} bytes")
    try:
        with safetensors.safe_open(path, framework="np") as opened:
            yield opened
    except safetensors.SafetensorError as error:
        raise StorageError(f"expected a file of save_sparse, but safetensors cannot read it: {error}") from error


def read_table(file: Any) -> tuple[str, list[Entry]]:
    """Returns the name of the architecture, or "", and the tensors of an open file."""
    table = (file.metadata() or {}).get(_KEY)
    if table is None or list(file.keys()) != ["payload"]:
        raise StorageError("expected a file of save_sparse, but it is another safetensors file")
    values = file.get_slice("payload")
    shape, dtype = values.get_shape(), values.get_dtype()
    if dtype != "U8" or len(shape) != 1 or shape[0] < 8 or shape[0] % 4:
        raise StorageError(f"expected values as words of four bytes, but got {dtype} of shape {shape}")
    if values[shape[0] - 8 : shape[0] - 4].tobytes() != _checksum(table.encode()):
        raise StorageError("expected the checksum of the table, but the file is damaged")
    return _unpack_table(table)


def read_payload(file: Any, limit: int) -> bytes:
    """Returns the payload of an open file, after :func:`read_table`; it may have at most so many bytes."""
    size = file.get_slice("payload").get_shape()[0] - 8
    if size > limit:
        raise StorageError(f"expected at most {limit} bytes of values for such tensors, but got {size}")
    data: bytes = file.get_tensor("payload").tobytes()
    payload = data[:size]
    if data[size + 4 :] != _checksum(payload):
        raise StorageError("expected the checksum of the values, but the file is damaged")
    return payload


_KEY, _VERSION = "pyro_sparsevd", 2
_TABLE_LIMIT = 2**20  # characters; a thousand tensors take some 50,000
_HEADER_LIMIT = 8 * _TABLE_LIMIT  # bytes; a character takes at most four, and quotes are escaped
_MOST_TENSORS, _MOST_DIMS, _MOST_ELEMENTS = 2**15, 16, 2**40
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")


def _pack_table(architecture: str, entries: Sequence[Entry]) -> str:
    for name in (architecture, *(entry.name for entry in entries)):
        if not name.isprintable():
            raise ValueError(f"{name!r}: expected a printable name, to store it")
    content = {"version": _VERSION, "architecture": architecture, "tensors": [_row(entry) for entry in entries]}
    table = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    if len(entries) > _MOST_TENSORS or len(table) > _TABLE_LIMIT:
        raise ValueError(
            f"expected at most {_MOST_TENSORS} tensors, with names and shapes of at most {_TABLE_LIMIT} bytes, but got "
            f"{len(entries)} tensors, which take {len(table)}"
        )
    return table


def _row(entry: Entry) -> list[Any]:
    if entry.is_tied:
        return [entry.name, entry.same_as]
    row = [entry.name, str(entry.dtype).removeprefix("torch."), list(entry.shape)]
    if entry.step:
        return [*row, float(str(np.float32(entry.step)))]  # the shortest number that is the step as float32
    return row if entry.stored == entry.dtype else [*row, str(entry.stored).removeprefix("torch.")]


def _unpack_table(table: str) -> tuple[str, list[Entry]]:
    if len(table) > _TABLE_LIMIT:
        raise StorageError(f"expected a table of at most {_TABLE_LIMIT} characters, but got {len(table)}")
    try:
        content = json.loads(table)
    except (ValueError, RecursionError) as error:
        raise StorageError("expected a table of tensors, but it cannot be unpacked") from error
    match content:
        case {"version": int(version)} if version != _VERSION:
            raise StorageError(f"expected format version {_VERSION}, but got {version}; use the release that wrote it")
        case {"version": int(), "architecture": str(architecture), "tensors": list(rows)} if len(content) == 3:
            pass
        case _:
            raise StorageError("expected a table with a version, an architecture and tensors, and nothing else")
    if len(rows) > _MOST_TENSORS:
        raise StorageError(f"expected at most {_MOST_TENSORS} tensors, but got {len(rows)}")
    entries: list[Entry] = []
    for row in rows:
        entries.append(_unpack_row(row, entries))
    if not architecture.isprintable():
        raise StorageError("expected printable names in the table")
    if len({entry.name for entry in entries}) < len(entries):
        raise StorageError("expected each name once, but the table has one of them twice")
    return architecture, entries


def _unpack_row(row: Any, earlier: Sequence[Entry]) -> Entry:
    if not (isinstance(row, list) and row and isinstance(row[0], str) and row[0].isprintable()):
        raise StorageError("expected printable names in the table")
    name, *fields = row
    match fields:
        case [int(index)]:
            if not (0 <= index < len(earlier) and not earlier[index].is_tied):
                raise StorageError(f"{name}: expected to be tied to an earlier tensor, but got number {index}")
            return dataclasses.replace(earlier[index], name=name, same_as=index)
        case [str(dtype_name), list(sizes)]:
            dtype, stored, step = _BY_NAME.get(dtype_name), _BY_NAME.get(dtype_name), 0.0
        case [str(dtype_name), list(sizes), str(stored_name)]:
            dtype, stored, step = _BY_NAME.get(dtype_name), _BY_NAME.get(stored_name), 0.0
        case [str(dtype_name), list(sizes), float(number)]:
            dtype, stored, step = _BY_NAME.get(dtype_name), torch.int32, as_float32(number)
            if not 0 < step < math.inf:
                raise StorageError(f"{name}: expected a positive step, but got {number}")
        case _:
            raise StorageError(f"{name}: expected a dtype, a shape and what is stored, or a number, but got others")
    if dtype is None or stored is None or len(sizes) > _MOST_DIMS:
        raise StorageError(f"{name}: expected dtypes and at most {_MOST_DIMS} dimensions in use, but got others")
    if (dtype not in _FLOATS) if step else (stored not in (_FLOATS if dtype in _FLOATS else (dtype,))):
        raise StorageError(f"{name}: expected values for {dtype}, but got {stored}")
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise StorageError(f"{name}: expected sizes in its shape, but got others")
    if math.prod(max(size, 1) for size in sizes) > _MOST_ELEMENTS:
        raise StorageError(f"{name}: expected at most {_MOST_ELEMENTS} elements, but its shape is {tuple(sizes)}")
    return Entry(name, dtype, tuple(sizes), stored, step)
