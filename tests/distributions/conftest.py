"""Fixtures of the tests of this folder."""

import pytest
import torch

from pyro_sparsevd import SparseNormal

POSTERIOR_SHAPES = [((), ()), ((4,), (4,)), ((3, 1), (4,)), ((2, 3), ())]


@pytest.fixture(params=POSTERIOR_SHAPES, ids=str)
def posterior(request, device):
    loc, log_variance = (torch.randn(shape, dtype=torch.float64, device=device) for shape in request.param)
    return SparseNormal(loc.requires_grad_(), log_variance.requires_grad_())
