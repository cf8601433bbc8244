"""Coding: arrays come back as they were, in about as many bits as their models say, and the same on every machine."""

import hashlib
import sys

import numpy as np
import pytest

from pyro_sparsevd.storage.context_models import code_array, code_numbers, code_positions
from pyro_sparsevd.storage.range_coder import (
    WHOLE,
    Decoder,
    Encoder,
    StorageError,
    code_choices,
    code_symbols,
    code_uniform,
)


def encoded(code, values, *args, **kwargs):
    encoder = Encoder()
    code(encoder, values, *args, **kwargs)
    return encoder.to_bytes()


def size_of(code, values, *args, **kwargs):
    return len(encoded(code, values, *args, **kwargs))


def come_back(code, values, *args, **kwargs):
    """Whether values that were coded come back, and use up all bytes."""
    decoder = Decoder(encoded(code, values, *args, **kwargs))
    return np.array_equal(code(decoder, None, *args, **kwargs), values) and decoder.is_at_end()


def _generator():
    return np.random.default_rng(0)


NUMBERS = {
    "none": np.zeros(0, np.int64),
    "one": np.array([-7]),
    "zeros": np.zeros(50, np.int64),
    "constant": np.full(50, -3),
    "every class": np.concatenate([np.arange(-300, 300), 2 ** np.arange(63), -(2 ** np.arange(63)) - 1]),
    "ends of int64": np.array([np.iinfo(np.int64).min, np.iinfo(np.int64).max, 0, -1]),
    "positive": _generator().integers(0, 9, 1000),
    "wide": _generator().integers(-(2**40), 2**40, 1000),
}


class TestNumbers:
    @pytest.mark.parametrize("values", NUMBERS.values(), ids=NUMBERS)
    def test_integers_come_back(self, values):
        assert come_back(code_numbers, values, len(values))

    @pytest.mark.parametrize("mantissa", [7, 10, 23, 52])
    def test_floating_point_numbers_come_back(self, mantissa):
        exponents = {7: 8, 10: 5, 23: 8, 52: 11}[mantissa]
        values = _generator().integers(-(2 ** (mantissa + exponents)) + 1, 2 ** (mantissa + exponents), 500)
        assert come_back(code_numbers, np.append(values, 0), 501, mantissa)

    def test_zeros_that_all_mantissas_end_with_cost_nothing(self):
        values = np.float32(_generator().normal(size=1000)).view(np.int32).astype(np.int64) & 0x7FFFFFFF
        short = values & -(2**13)
        assert come_back(code_numbers, values, 1000, 23)
        assert come_back(code_numbers, short, 1000, 23)
        saved = size_of(code_numbers, values, 1000, 23) - size_of(code_numbers, short, 1000, 23)
        assert saved == pytest.approx(1000 * 13 / 8, abs=8)

    @pytest.mark.parametrize("scale", [0.3, 1, 5, 100])
    def test_integers_take_little_more_than_their_entropy(self, scale):
        values = np.round(_generator().laplace(scale=scale, size=5000)).astype(np.int64)
        share = np.unique(values, return_counts=True)[1] / len(values)
        entropy = 5000 / 8 * -(share * np.log2(share)).sum()
        assert come_back(code_numbers, values, 5000)
        assert size_of(code_numbers, values, 5000) <= 1.03 * entropy + 40


SHAPES = [(1, 1), (1, 1000), (1000, 1), (7, 5), (300, 784), (2, 40_000), (20_000, 3)]


class TestPositions:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("density", [0, 0.001, 0.1, 0.5, 0.98, 1])
    def test_positions_come_back(self, shape, density):
        positions = _generator().random(shape) < density
        for width in (1, 5, 28):
            assert come_back(code_positions, positions, shape, width)

    def test_positions_take_little_more_than_their_entropy(self):
        positions = _generator().random((300, 784)) < 0.01
        entropy = 300 * 784 / 8 * -(0.01 * np.log2(0.01) + 0.99 * np.log2(0.99))
        assert come_back(code_positions, positions, (300, 784))
        assert size_of(code_positions, positions, (300, 784)) < 1.1 * entropy

    def test_structure_makes_positions_cheaper(self):
        generator = _generator()
        rows, columns = generator.random(300) < 0.2, generator.random(800) < 0.2
        positions = rows[:, None] & columns & (generator.random((300, 800)) < 0.3)
        shuffled = generator.permutation(positions.ravel()).reshape(300, 800)
        plain = size_of(code_positions, shuffled, (300, 800))
        units = size_of(code_positions, positions, (300, 800))
        assert units < 0.6 * plain
        assert size_of(code_positions, positions, (300, 800), expected=columns) < units - 60
        assert size_of(code_positions, positions, (300, 800), expected=~columns) < plain  # wrong, but not ruinous
        for expected in (None, columns, ~columns):
            assert come_back(code_positions, positions, (300, 800), expected=expected)

    def test_neighbours_make_positions_cheaper(self):
        seeds = _generator().random((200, 28, 28)) < 0.02
        images = seeds | np.roll(seeds, 1, 1) | np.roll(seeds, 1, 2)
        for width in (1, 28):
            assert come_back(code_positions, images.reshape(200, 784), (200, 784), width)
        sizes = {width: size_of(code_positions, images.reshape(200, 784), (200, 784), width) for width in (1, 28)}
        assert sizes[28] < 0.93 * sizes[1]


MATRICES = {
    "dense": lambda shape: _generator().integers(1, 5, shape),
    "sparse": lambda shape: _generator().integers(-9, 9, shape) * (_generator().random(shape) < 0.1),
    "empty": lambda shape: np.zeros(shape, np.int64),
}


class TestMatricesAndStreams:
    @pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES)
    @pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (1, 1), (5, 70)], ids=str)
    def test_matrices_come_back(self, make, shape):
        assert come_back(code_array, make(shape), shape)

    def test_several_arrays_in_one_stream_come_back(self):
        encoder = Encoder()
        for values in NUMBERS.values():
            code_numbers(encoder, values, len(values))
        decoder = Decoder(encoder.to_bytes())
        for values in NUMBERS.values():
            np.testing.assert_array_equal(code_numbers(decoder, None, len(values)), values)

    def test_the_bytes_are_those_of_every_machine_and_release(self):
        # Made up without random numbers, so that a change of a model or of a library shows.
        index = np.arange(1200)
        weight = np.where(index * index % 17 < 2, index % 23 - 11, 0).reshape(30, 40)
        data = encoded(code_array, weight, (30, 40), width=8, expected=np.arange(40) % 3 > 0)
        assert hashlib.sha256(data).hexdigest() == GOLDEN


class TestRangeCoder:
    def test_probabilities_are_kept_to(self):
        chances = np.full((100, 100), WHOLE // 50)
        ones = _generator().random((100, 100)) < 1 / 50
        assert come_back(code_choices, ones, chances)
        assert size_of(code_choices, ones, chances) == pytest.approx(10_000 / 8 * 0.1414, rel=0.1)
        numbers, sizes = np.arange(1000) % 7, np.full(1000, 7)
        assert come_back(code_uniform, numbers, sizes)
        assert size_of(code_uniform, numbers, sizes) == pytest.approx(1000 / 8 * 2.807, abs=8)

    def test_an_alphabet_of_thousands_comes_back(self):
        assert come_back(code_symbols, np.concatenate([np.arange(2**14), np.zeros(50, int)]), 2**14 + 50, 2**14)

    @pytest.mark.parametrize("shape", [(20, 30), (30, 1), (5, 0), (0, 5), (0, 0)], ids=str)
    def test_foreign_bytes_are_refused_or_read_never_a_crash(self, shape):
        generator, refused = _generator(), 0
        for length in [0, 1, 2, 5, 50] * 40:
            data = generator.integers(0, 2**32, length, dtype=np.uint32).tobytes()
            try:
                assert code_array(Decoder(data), None, shape).shape == shape
            except StorageError:
                refused += 1
        assert refused > 10 or shape[0] == 0

    def test_a_range_that_is_upside_down_is_refused(self):
        data = encoded(code_uniform, np.array([5, 3]), np.full(2, 10))
        with pytest.raises(StorageError, match="smallest symbol not above the largest, but got 5 and 3"):
            code_symbols(Decoder(data), None, 4, 10)

    def test_an_encoder_needs_values(self):
        with pytest.raises(TypeError, match="values: expected an array to encode"):
            code_numbers(Encoder(), None, 3)

    def test_the_optional_package_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "constriction", None)
        for make in (Encoder, lambda: Decoder(b"")):
            with pytest.raises(ImportError, match=r'pip install "pyro-sparsevd\[storage\]"'):
                make()


GOLDEN = "bbd2a0b449d46b5307ecb68a69d2e42d8055c82e744ce7997ce2b9ca2b0c4fd6"
