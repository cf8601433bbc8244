"""Likelihoods with parameters of their own."""

import math

import pytest
import torch
from torch import nn

import pyro_sparsevd as svd


def test_its_density_is_that_of_the_normal_distribution(device):
    likelihood = svd.GaussianLikelihood(0.5).to(device)
    mean, y = torch.randn(4, device=device), torch.randn(4, device=device)
    expected = -0.5 * ((y - mean) / 0.5) ** 2 - math.log(0.5) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(likelihood(mean).log_prob(y), expected)
    assert likelihood.scale.item() == pytest.approx(0.5)


def test_its_scale_is_learnt_with_the_network(device):
    torch.manual_seed(0)
    x = torch.randn(2_000, 3, device=device)
    y = x[:, 0] + 0.3 * torch.randn(2_000, device=device)
    network = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).to(device)
    model = svd.Supervised(svd.bayesianize(network), svd.GaussianLikelihood(), num_data=2_000).to(device)
    loss = svd.SparseVD_ELBO()(model, svd.AutoSparseNormal(model))
    optimizer = torch.optim.Adam(loss.parameters(), 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()
    standard_error = 0.3 / math.sqrt(2 * 2_000)
    assert abs(model.likelihood.scale.item() - 0.3) < 4 * standard_error + 0.005  # and the optimiser's noise


def test_it_keeps_the_default_dtype_at_its_making_and_follows_to(device):
    likelihood = svd.GaussianLikelihood().to(device, torch.float64)
    assert likelihood(torch.zeros(2, dtype=torch.float64, device=device)).scale.dtype == torch.float64


def test_a_datum_may_have_several_targets(device):
    network = svd.bayesianize(nn.Linear(3, 2)).to(device)
    model = svd.Supervised(network, svd.GaussianLikelihood(), num_data=50).to(device)
    loss = svd.SparseVD_ELBO()(model, svd.AutoSparseNormal(model))
    assert loss(torch.randn(10, 3, device=device), torch.randn(10, 2, device=device)).isfinite()
    assert svd.GaussianLikelihood()(torch.zeros(10, 2)).batch_shape == (10,)


@pytest.mark.parametrize("scale", [1e-50, 1e39])
def test_a_scale_that_single_precision_has_not_is_kept_by_its_logarithm(scale):
    assert svd.GaussianLikelihood(scale).log_scale.item() == pytest.approx(math.log(scale))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match="init_scale: expected a positive number, but got"):
        svd.GaussianLikelihood(scale)
