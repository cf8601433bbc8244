"""Fixtures of the tests of this folder."""

from typing import Any

import pytest

from pyro_sparsevd.poutine.unsampled_weight import _Noise


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The distribution of every weight that is sampled, once for each sample."""
    drawn = []
    draw = _Noise.draw

    def counted(self: _Noise) -> None:
        drawn.append(self.base_dist)
        draw(self)

    monkeypatch.setattr(_Noise, "draw", counted)
    return drawn
