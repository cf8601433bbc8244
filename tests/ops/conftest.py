"""Fixtures of the tests of this folder."""

import pytest

from pyro_sparsevd.ops import blocks


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 7 weights, in memory of the test's own."""
    caches = blocks._kept_scratch, blocks._kept_memory
    monkeypatch.setattr(blocks, "_BLOCK", 7)
    for kept in caches:
        kept.cache_clear()
    yield 7
    for kept in caches:
        kept.cache_clear()
