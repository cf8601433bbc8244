"""Adaptive probability models of the positions and the values of the weights of a sparse matrix, for the range coder.

The models adapt to what was coded before, so that nothing but the numbers is stored. Each function encodes the array
that it is given with an :class:`~.range_coder.Encoder`; given ``None`` and a :class:`~.range_coder.Decoder`, it returns
that array. Probabilities are computed from integers, by operations that IEEE 754 rounds exactly: they are the same on
every machine.
"""

__all__ = ["code_array", "code_numbers", "code_positions"]

import numpy as np

from .range_coder import WHOLE, Coder, Given, StorageError, code_choices, code_symbols, code_uniform, growing_slices


def code_array(
    coder: Coder,
    values: Given,
    shape: tuple[int, int],
    mantissa: int = 0,
    width: int = 1,
    expected: np.ndarray | None = None,
) -> np.ndarray:
    """Codes a matrix: the positions of what is not zero, if enough zeros make it worthwhile, and the numbers.

    The arguments are those of :func:`code_positions` and :func:`code_numbers`.
    """
    size = shape[0] * shape[1]
    has_zeros = None if values is None else np.array([8 * np.count_nonzero(values) < 7 * size])
    if not code_uniform(coder, has_zeros, np.array([2]))[0]:
        return code_numbers(coder, None if values is None else values.ravel(), size, mantissa).reshape(shape)
    positions = code_positions(coder, None if values is None else values != 0, shape, width, expected)
    result = np.zeros(shape, np.int64)
    count = int(np.count_nonzero(positions))
    result[positions] = code_numbers(coder, None if values is None else values[positions], count, mantissa)
    return result


def code_positions(
    coder: Coder, positions: Given, shape: tuple[int, int], width: int = 1, expected: np.ndarray | None = None
) -> np.ndarray:
    r"""Codes which elements of a matrix are not zero.

    Zeros fill whole rows, and what is left of a row is close together. A class for the number of elements in each row,
    two classes to an octave, is coded first. The odds of the positions in a row with :math:`n` elements are
    proportional to a weight of each column, and scaled to :math:`n` expected elements. The weight is

    .. math:: v_j = e_j (10 c_j + 3 c_{j-1} + 3 c_{j+1} + 2)

    with the numbers :math:`c` of elements above, and :math:`e_j` 32 for a column that is ``expected``, else 1. That may
    be wrong; it says, for example, that the layer before has this unit. Each row is an image of ``width`` columns, such
    as a convolution's kernel: its pixels of even row and column are coded first, then those between, whose odds are
    multiplied by how much more often than expected an element was found where as many neighbours were.
    """
    rows, columns = shape
    per_row = None if positions is None else positions.sum(1)
    classes = code_symbols(coder, None if per_row is None else _bit_length(per_row * per_row), rows, 65)
    if (classes > (columns * columns).bit_length()).any():
        raise StorageError(f"expected at most {columns} elements in each row, but got more")
    if columns == 1:
        return classes[:, None] != 0
    used_rows = np.flatnonzero(classes)
    density = np.sqrt(np.sqrt(2.0 ** (2 * classes - 1)))
    confidence = np.ones(columns, np.int64) if expected is None else np.where(expected, 32, 1)
    result = np.zeros(shape, bool)
    above = np.zeros(columns, np.int64)
    phases = _phases(columns, width)
    for part in growing_slices(len(used_rows), lambda start: max(1, min(start // 4, 2**16 // columns))):
        index = used_rows[part]
        weights = 10 * above + 2
        weights[1:] += 3 * above[:-1]
        weights[:-1] += 3 * above[1:]
        odds = _odds(weights * confidence, density[index, None])
        block = np.zeros((len(index), columns + 2 * width), bool)  # with a margin on either side
        for phase in phases:
            given = None if positions is None else positions[np.ix_(index, phase.columns)]
            block[:, width + phase.columns] = phase.code(coder, given, odds, block)
        result[index] = block[:, width : width + columns]
        above += result[index].sum(0)
    return result


def code_numbers(coder: Coder, values: Given, count: int, mantissa: int = 0) -> np.ndarray:
    """Codes integers, or floating-point numbers with a ``mantissa`` of so many bits.

    An integer is a class (itself where it is small; else its length and its three bits after the first), the other
    bits, and a sign. A floating-point number is given as its bits without the sign, negated for a negative one, and
    coded as an exponent, a mantissa and a sign. The frequencies of classes and signs are learnt, the other bits are
    taken to be random; zeros that all mantissas end with cost nothing.
    """
    magnitudes = None if values is None else np.abs(values).view(np.uint64)
    result = _floats(coder, magnitudes, count, mantissa) if mantissa else _integers(coder, magnitudes, count)
    signed = np.flatnonzero(result)
    negative = code_symbols(coder, None if values is None else values[signed] < 0, len(signed), 2)
    decoded = result.view(np.int64)
    decoded[signed[negative != 0]] *= -1
    return decoded


_LEADING = 3  # the bits after the first in the class of an integer
_FIRST = 1 << _LEADING
_CHUNK = 20  # the model for random bits takes fewer than 24
_POWERS = np.uint64(1) << np.arange(64, dtype=np.uint64)


def _integers(coder: Coder, magnitudes: Given, count: int) -> np.ndarray:
    classes = None
    if magnitudes is not None:
        shift = np.maximum(_bit_length(magnitudes) - _LEADING - 1, 0).astype(np.uint64)
        classes = (magnitudes >> shift) + (shift << np.uint64(_LEADING))
    found = code_symbols(coder, classes, count, 496).astype(np.int64)
    widths = np.maximum((found >> _LEADING) - 1, 0)
    leading = np.where(found < 2 * _FIRST, found, found % _FIRST + _FIRST).astype(np.uint64)
    return leading << widths.astype(np.uint64) | _random_bits(coder, magnitudes, widths)


def _floats(coder: Coder, magnitudes: Given, count: int, mantissa: int) -> np.ndarray:
    width = np.uint64(mantissa)
    exponents = None if magnitudes is None else magnitudes >> width
    found = code_symbols(coder, exponents, count, 2048).astype(np.uint64) << width
    ending = None
    if magnitudes is not None:
        used = int(np.bitwise_or.reduce(magnitudes, initial=0)) | 1 << mantissa
        ending = np.array([(used & -used).bit_length() - 1])
    zeros = int(code_uniform(coder, ending, np.array([mantissa + 1]))[0]) if count else 0
    rest = None if magnitudes is None else magnitudes >> np.uint64(zeros)
    return found | _random_bits(coder, rest, np.full(count, mantissa - zeros)) << np.uint64(zeros)


def _random_bits(coder: Coder, values: Given, widths: np.ndarray) -> np.ndarray:
    """Codes the lowest bits of each value, as many as its width."""
    result = np.zeros(len(widths), np.uint64)
    for start in range(0, int(widths.max(initial=0)), _CHUNK):
        index = np.flatnonzero(widths > start)
        sizes = 1 << np.minimum(widths[index] - start, _CHUNK)
        shift = np.uint64(start)
        given = None if values is None else (values[index] >> shift) & (sizes - 1).astype(np.uint64)
        result[index] |= code_uniform(coder, given, sizes).astype(np.uint64) << shift
    return result


class _Phase:
    """Columns that are coded together, with what is known of the columns beside them."""

    def __init__(self, columns: np.ndarray, shifts: tuple[int, ...], width: int) -> None:
        self.columns = columns
        self._beside = [width + columns + shift for shift in shifts]
        # Both start as if four elements had been found, as expected.
        self._found: np.ndarray = np.full(len(shifts) + 1, 4.0 * WHOLE)
        self._expected: np.ndarray = np.full(len(shifts) + 1, 4.0 * WHOLE)

    def code(self, coder: Coder, given: Given, odds: np.ndarray, block: np.ndarray) -> np.ndarray:
        odds = odds[:, self.columns]
        if not self._beside:
            return code_choices(coder, given, _chances(odds))
        neighbours = np.stack([block[:, beside] for beside in self._beside]).sum(0)
        coded = code_choices(coder, given, _chances(odds * (self._found / self._expected)[neighbours]))
        self._found += WHOLE * np.bincount(neighbours[coded], minlength=len(self._found))
        self._expected += np.bincount(neighbours.ravel(), _chances(odds).ravel(), len(self._found))
        return coded


def _phases(columns: int, width: int) -> list[_Phase]:
    index = np.arange(columns)
    row, column = index // width % 2, index % width % 2
    shifts = {(0, 0): (), (0, 1): (-1, 1), (1, 0): (-width, width), (1, 1): (-1, 1, -width, width)}
    phases = [_Phase(index[(row == r) & (column == c)], beside, width) for (r, c), beside in shifts.items()]
    return [phase for phase in phases if len(phase.columns)]


def _odds(weights: np.ndarray, density: np.ndarray) -> np.ndarray:
    """Returns odds in proportion to the weights of the columns, whose probabilities sum to the densities."""
    odds = weights * (density / weights.sum())
    for _ in range(3):
        odds *= density * WHOLE / np.maximum(np.floor(WHOLE * (odds / (1 + odds))).sum(1, keepdims=True), 1)
    return odds


def _chances(odds: np.ndarray) -> np.ndarray:
    """Returns the probabilities as integer multiples of 1 / WHOLE, whose sums are exact."""
    return np.minimum(np.maximum(np.floor(WHOLE * (odds / (1 + odds))), 1), WHOLE - 1)


def _bit_length(values: np.ndarray) -> np.ndarray:
    return np.searchsorted(_POWERS, values.astype(np.uint64), side="right")
