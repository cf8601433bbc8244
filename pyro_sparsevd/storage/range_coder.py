"""Entropy coding of integers by the range coder of constriction, which is an optional package.

A general compressor such as zstandard looks for repetitions, of which sparse weights have none, and codes whole bytes;
a range coder comes within a few bytes of the entropy of the model that it is given. Each function encodes the array
that it is given with an :class:`Encoder`; given ``None`` and a :class:`Decoder`, it returns that array.

References:
    | Range encoding: an algorithm for removing redundancy from a digitised message (Martin, 1979)
    | Understanding Entropy Coding With Asymmetric Numeral Systems (ANS): a Statistician's Perspective (Bamler, 2022)
    | https://arxiv.org/abs/2201.01741
"""

__all__ = [
    "WHOLE",
    "Coder",
    "Decoder",
    "Encoder",
    "Given",
    "StorageError",
    "code_choices",
    "code_symbols",
    "code_uniform",
    "growing_slices",
    "imported",
]

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np

Given: TypeAlias = np.ndarray | None  # what is to be encoded; None where a Decoder returns it
WHOLE = 2**16  # probabilities are multiples of 1 / WHOLE, and so exact as float32, and in sums


class StorageError(ValueError):
    """The file of a sparse network is damaged, of an unknown format, or does not match the network.

    Example:
        >>> issubclass(StorageError, ValueError)
        True
    """


class Encoder:
    """Writes integers with the probabilities of a model."""

    def __init__(self) -> None:
        self.models: Any = imported("constriction").stream.model
        self._coder = imported("constriction").stream.queue.RangeEncoder()

    def code(self, values: Given, count: int, model: Any, *parameters: np.ndarray) -> np.ndarray:
        """Writes integers by a model of constriction, or by a family of models with parameters for each integer."""
        if values is None:
            raise TypeError("values: expected an array to encode, but got None, which is for a Decoder")
        symbols = np.ascontiguousarray(values, dtype=np.int32)
        self._coder.encode(symbols, model, *parameters)
        return symbols

    def to_bytes(self) -> bytes:
        """Returns all that was written, a multiple of four bytes."""
        return self._coder.get_compressed().astype("<u4").tobytes()


class Decoder:
    """Reads what an :class:`Encoder` wrote."""

    def __init__(self, data: bytes) -> None:
        self.models: Any = imported("constriction").stream.model
        self._coder = imported("constriction").stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))

    def code(self, values: Given, count: int, model: Any, *parameters: np.ndarray) -> np.ndarray:
        """Reads so many integers, with the model and the parameters that they were written with."""
        try:
            return self._coder.decode(model, *parameters) if parameters else self._coder.decode(model, count)
        except AssertionError as error:  # constriction's, for bytes that no encoder writes
            raise StorageError("expected what an encoder wrote, but the bytes do not fit the model") from error

    def is_at_end(self) -> bool:
        """Returns whether nothing is left to read, as far as the coder can tell."""
        return self._coder.maybe_exhausted()


Coder = Encoder | Decoder


def code_uniform(coder: Coder, values: Given, sizes: np.ndarray) -> np.ndarray:
    """Codes integers of which each is as likely as every other, below ``sizes``, from 2 to 2^24 - 1 each."""
    return coder.code(values, len(sizes), coder.models.Uniform(), sizes.astype(np.int32))


def code_choices(coder: Coder, values: Given, chances: np.ndarray) -> np.ndarray:
    """Codes zeros and ones, given the chance of each to be 1 as a multiple of 1 / ``WHOLE``, not 0 or 1."""
    probabilities = (chances / WHOLE).astype(np.float32).ravel()
    given = None if values is None else values.ravel()
    model = coder.models.Bernoulli(perfect=False)
    return coder.code(given, chances.size, model, probabilities).reshape(chances.shape) != 0


def code_symbols(coder: Coder, values: Given, count: int, size: int) -> np.ndarray:
    """Codes integers below ``size``, at most 2^14: their range, and themselves with frequencies learnt so far."""
    if not count:
        return np.zeros(0, np.int32)
    ends = None if values is None else np.array([values.min(), values.max()])
    low, high = code_uniform(coder, ends, np.full(2, size)).tolist()
    if low > high:
        raise StorageError(f"expected the smallest symbol not above the largest, but got {low} and {high}")
    result = np.full(count, low, np.int32)
    if low < high:
        counts = np.zeros(high - low + 1, np.int64)
        for part in growing_slices(count, lambda start: max(8, start // 2)):
            model = coder.models.Categorical(_probabilities(2 * counts + 1), perfect=False)
            given = None if values is None else values[part].astype(np.int64) - low
            coded = coder.code(given, part.stop - part.start, model)
            counts += np.bincount(coded, minlength=len(counts))
            result[part] += coded
    return result


def _probabilities(frequencies: np.ndarray) -> np.ndarray:
    """Returns probabilities in proportion to frequencies; the most frequent gets what rounding leaves."""
    shares = 1 + frequencies * (WHOLE - len(frequencies)) // frequencies.sum()
    shares[shares.argmax()] += WHOLE - shares.sum()
    return (shares / WHOLE).astype(np.float32)


def growing_slices(count: int, length: Callable[[int], int]) -> Iterator[slice]:
    """Yields slices, the length of each a function of its start: frequencies change much at first, and little later."""
    start = 0
    while start < count:
        stop = min(count, start + length(start))
        yield slice(start, stop)
        start = stop


def imported(name: str) -> Any:
    """Imports a module of the packages that are optional."""
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f'storage: expected {package}; pip install "pyro-sparsevd[storage]" installs it') from error
