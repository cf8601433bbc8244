"""Tensors of every dtype as entropy-coded bytes, and back."""

__all__ = ["decode_tensors", "encode_tensors"]

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .container import Entry
from .context_models import code_array
from .range_coder import Coder, Decoder, Encoder, Given, StorageError
from .rounding import from_multiples, to_multiples


def encode_tensors(state: Mapping[str, Tensor], entries: Sequence[Entry]) -> bytes:
    """Returns the tensors of a state as bytes, each stored as its entry says."""
    encoder = Encoder()
    for _ in _code(encoder, entries, lambda entry: _to_codes(entry, state[entry.name])):
        pass
    return encoder.to_bytes()


def decode_tensors(data: bytes, entries: Sequence[Entry]) -> dict[str, Tensor]:
    """Returns the tensors that :func:`encode_tensors` made the bytes of, by name; tied ones are one."""
    decoder = Decoder(data)
    tensors = {entry.name: _from_codes(entry, codes) for entry, codes in _code(decoder, entries, lambda entry: None)}
    if not decoder.is_at_end():
        raise StorageError("expected nothing after the last tensor, but there are more bytes")
    return {entry.name: tensors[entries[entry.same_as].name if entry.is_tied else entry.name] for entry in entries}


_MANTISSAS = {torch.float32: 23, torch.float64: 52, torch.float16: 10, torch.bfloat16: 7}
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _code(
    coder: Coder, entries: Sequence[Entry], given: Callable[[Entry], Given]
) -> Iterator[tuple[Entry, np.ndarray]]:
    units: np.ndarray | None = None  # which units of the layer before have weights
    for entry in entries:
        if entry.is_tied:
            continue
        shape = _matrix_shape(entry.shape)
        expected, size = None, shape[1]
        if units is not None and len(units) and shape[1] % len(units) == 0:
            size = shape[1] // len(units)
            expected = units.repeat(size)
        width = entry.shape[-1] if len(entry.shape) > 2 else _side(size)
        codes = code_array(coder, given(entry), shape, _MANTISSAS.get(entry.stored, 0), max(width, 1), expected)
        if len(entry.shape) > 1:
            units = np.asarray(codes.any(1))
        yield entry, codes


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _side(size: int) -> int:
    """Returns the side of a square image with one or three channels and so many numbers; 1 if there is none."""
    return next((side for c in (1, 3) if (side := math.isqrt(size // c)) ** 2 * c == size), 1)


def _to_codes(entry: Entry, tensor: Tensor) -> np.ndarray:
    """Returns a matrix of integers, zero where the tensor is."""
    tensor = tensor.detach().cpu()
    if entry.step:
        codes = to_multiples(entry.name, tensor, entry.step)
    elif entry.stored.is_floating_point:
        stored = tensor.to(entry.stored)
        if not torch.equal(stored.isfinite(), tensor.isfinite()):
            raise ValueError(
                f"{entry.name}: expected values up to {torch.finfo(entry.stored).max:g}, to store {entry.stored}, "
                f"but got {float(tensor.abs().max()):g}; use values=torch.bfloat16, or store the values as they are"
            )
        codes = _mirrored(stored.contiguous().view(_INTEGERS[entry.stored.itemsize]), entry.stored)
    else:
        codes = tensor.long()
    return codes.reshape(_matrix_shape(entry.shape)).numpy()


def _from_codes(entry: Entry, codes: np.ndarray) -> Tensor:
    low, high = _limits(entry.stored)
    if codes.size and not low <= codes.min() <= codes.max() <= high:
        raise StorageError(f"{entry.name}: expected values of {entry.stored}, but some are beyond it")
    integers = torch.from_numpy(codes).reshape(entry.shape)
    if entry.step:
        return from_multiples(integers, entry.step, entry.dtype)
    if entry.stored.is_floating_point:
        bits = _mirrored(integers, entry.stored).to(_INTEGERS[entry.stored.itemsize])
        return bits.view(entry.stored).to(entry.dtype)
    return integers.to(entry.dtype)


def _mirrored(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Turns the bits of floating-point numbers into integers of their sign, both zeros into 0; and back."""
    return torch.where(bits < 0, -(2 ** (8 * dtype.itemsize - 1)) - bits.long(), bits.long())


def _limits(dtype: torch.dtype) -> tuple[int, int]:
    if dtype == torch.bool:
        return 0, 1
    if dtype.is_floating_point:
        return 1 - 2 ** (8 * dtype.itemsize - 1), 2 ** (8 * dtype.itemsize - 1) - 1
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max
