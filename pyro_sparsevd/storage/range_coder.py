"""Integers with known probabilities as few bits: the range coder of constriction, which is an optional package.

At a few thousand weights every byte counts. A general compressor such as zstandard looks for repetitions, of which
there are none here, and codes whole bytes; a range coder comes within a few bytes of the entropy of whatever model it
is given. constriction is a maintained one, in Rust.

A function that takes a coder is its own inverse: with an :class:`Encoder` it codes the array that it is given, with a
:class:`Decoder`, which is given ``None`` instead, it returns that array.

References:
    | Range encoding: an algorithm for removing redundancy from a digitised message (Martin, 1979)
    | Understanding Entropy Coding With Asymmetric Numeral Systems (ANS): a Statistician's Perspective (Bamler, 2022)
    | https://arxiv.org/abs/2201.01741
"""

__all__ = ["WHOLE", "Coder", "Decoder", "Encoder", "StorageError", "code_choices", "code_symbols", "code_uniform"]

from collections.abc import Iterator
from typing import Any

import numpy as np

WHOLE = 2**16  # probabilities are multiples of 1 / WHOLE, and so exact as float32, and in sums


class StorageError(ValueError):
    """The file of a sparse network is damaged, of an unknown format, or does not match the network.

    Example:
        >>> issubclass(StorageError, ValueError)
        True
    """


class Encoder:
    """Writes integers.

    Raises:
        ImportError: If constriction is not installed.

    Example:
        >>> encoder = Encoder()
        >>> written = code_symbols(encoder, np.array([3, 1, 3, 3]), 4, size=10)
        >>> len(encoder.to_bytes())
        4
    """

    def __init__(self) -> None:
        self.models: Any = _stream().model
        self._coder = _stream().queue.RangeEncoder()

    def code(self, values: np.ndarray | None, count: int, model: Any, *parameters: np.ndarray) -> np.ndarray:
        """Writes integers.

        Args:
            values: The integers, of shape ``(count,)``.
            count: How many.
            model: A model of constriction, or a family of models if there are ``parameters``.
            *parameters: The parameters of the model of each integer.

        Returns:
            The integers.

        Raises:
            TypeError: If ``values`` is None.
        """
        if values is None:
            raise TypeError("values: expected an array to encode, but got None, which is for a Decoder")
        symbols = np.ascontiguousarray(values, dtype=np.int32)
        self._coder.encode(symbols, model, *parameters)
        return symbols

    def to_bytes(self) -> bytes:
        """Returns all that was written, a multiple of four bytes."""
        return self._coder.get_compressed().astype("<u4").tobytes()


class Decoder:
    """Reads what an :class:`Encoder` wrote.

    Args:
        data: The bytes.

    Raises:
        ImportError: If constriction is not installed.

    Example:
        >>> encoder = Encoder()
        >>> written = code_symbols(encoder, np.array([3, 1, 3, 3]), 4, size=10)
        >>> code_symbols(Decoder(encoder.to_bytes()), None, 4, size=10)
        array([3, 1, 3, 3], dtype=int32)
    """

    def __init__(self, data: bytes) -> None:
        self.models: Any = _stream().model
        self._coder = _stream().queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))

    def code(self, values: np.ndarray | None, count: int, model: Any, *parameters: np.ndarray) -> np.ndarray:
        """Reads integers.

        Args:
            values: None.
            count: How many.
            model: The model that they were written with.
            *parameters: Its parameters.

        Returns:
            The integers, of shape ``(count,)``.

        Raises:
            StorageError: If no encoder wrote these bytes.
        """
        try:
            return self._coder.decode(model, *parameters) if parameters else self._coder.decode(model, count)
        except AssertionError as error:  # constriction's, for bytes that no encoder writes
            raise StorageError("expected what an encoder wrote, but the bytes do not fit the model") from error

    def is_at_end(self) -> bool:
        """Returns whether nothing is left to read, as far as can be told."""
        return self._coder.maybe_exhausted()


Coder = Encoder | Decoder


def code_uniform(coder: Coder, values: np.ndarray | None, sizes: np.ndarray) -> np.ndarray:
    """Codes integers of which each is as likely as every other.

    Args:
        coder: The coder.
        values: The integers, of shape ``(count,)``, or None to decode.
        sizes: What each is less than: from 2 to 2^24 - 1, of shape ``(count,)``.

    Returns:
        The integers.

    Raises:
        StorageError: If no encoder wrote this.

    Example:
        >>> code_uniform(Encoder(), np.array([0, 999]), np.array([2, 1000]))
        array([  0, 999], dtype=int32)
    """
    return coder.code(values, len(sizes), coder.models.Uniform(), sizes.astype(np.int32))


def code_choices(coder: Coder, values: np.ndarray | None, chances: np.ndarray) -> np.ndarray:
    """Codes zeros and ones.

    Args:
        coder: The coder.
        values: The zeros and ones, of the shape of ``chances``, or None to decode.
        chances: The probability that each is 1, as integer multiples of 1 / ``WHOLE``, not 0 or 1.

    Returns:
        Which are 1, as bool.

    Raises:
        StorageError: If no encoder wrote this.

    Example:
        >>> code_choices(Encoder(), np.array([0, 1]), np.array([20, 60_000]))
        array([False,  True])
    """
    probabilities = (chances / WHOLE).astype(np.float32).ravel()
    given = None if values is None else values.ravel()
    model = coder.models.Bernoulli(perfect=False)
    return coder.code(given, chances.size, model, probabilities).reshape(chances.shape) != 0


def code_symbols(coder: Coder, values: np.ndarray | None, count: int, size: int) -> np.ndarray:
    """Codes integers with frequencies that are learnt from those before, and their range, which comes first.

    Args:
        coder: The coder.
        values: The integers, of shape ``(count,)``, or None to decode.
        count: How many.
        size: What each is less than, from 2 to 2^14.

    Returns:
        The integers.

    Raises:
        StorageError: If no encoder wrote this.

    Example:
        >>> code_symbols(Encoder(), np.array([3, 1, 3, 3]), 4, size=10)
        array([3, 1, 3, 3], dtype=int32)
    """
    if not count:
        return np.zeros(0, np.int32)
    ends = None if values is None else np.array([values.min(), values.max()])
    low, high = code_uniform(coder, ends, np.full(2, size)).tolist()
    if low > high:
        raise StorageError(f"expected the smallest symbol not above the largest, but got {low} and {high}")
    result = np.full(count, low, np.int32)
    if low < high:
        counts = np.zeros(high - low + 1, np.int64)
        for part in _blocks(count):
            model = coder.models.Categorical(_probabilities(2 * counts + 1), perfect=False)
            given = None if values is None else values[part].astype(np.int64) - low
            coded = coder.code(given, part.stop - part.start, model)
            counts += np.bincount(coded, minlength=len(counts))
            result[part] += coded
    return result


def _probabilities(frequencies: np.ndarray) -> np.ndarray:
    """Returns probabilities in proportion to frequencies; the most frequent gets what rounding left."""
    shares = 1 + frequencies * (WHOLE - len(frequencies)) // frequencies.sum()
    shares[shares.argmax()] += WHOLE - shares.sum()
    return (shares / WHOLE).astype(np.float32)


def _blocks(count: int) -> Iterator[slice]:
    """Yields slices that grow with what came before: frequencies change much at first, and little later."""
    start = 0
    while start < count:
        stop = min(count, start + max(8, start // 2))
        yield slice(start, stop)
        start = stop


def _stream() -> Any:
    try:
        from constriction import stream
    except ImportError as error:
        raise ImportError('storage: expected constriction; pip install "pyro-sparsevd[storage]" installs it') from error
    return stream
