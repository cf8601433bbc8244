"""Fixtures of the tests of this folder."""

import pytest

from pyro_sparsevd.storage import sparse_file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.svd"


@pytest.fixture
def _registry(monkeypatch):
    monkeypatch.setattr(sparse_file, "_ARCHITECTURES", dict(sparse_file._ARCHITECTURES))
