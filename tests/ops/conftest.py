"""Fixtures of the tests of this folder."""

import pytest

from pyro_sparsevd.ops import memory


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 7 weights, in memory of the test's own."""
    caches = memory._kept_scratch, memory._kept_memory
    monkeypatch.setattr(memory, "_BLOCK", 7)
    for kept in caches:
        kept.cache_clear()
    yield 7
    for kept in caches:
        kept.cache_clear()
