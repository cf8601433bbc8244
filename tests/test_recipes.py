"""The choice of the threshold, among networks whose likelihoods are known."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_sparsevd import AutoSparseNormal, Supervised, bayesianize, recipes
from pyro_sparsevd.datasets import Split

# Means and standard errors.
NLLS = {-1.0: (0.9, 2.0), 0.0: (0.23, 0.04), 1.0: (0.204, 0.04), 2.0: (0.2, 0.02), 3.0: (0.21, 0.04)}


@pytest.fixture
def choose(monkeypatch, device):
    model = Supervised(bayesianize(nn.Linear(2, 2)).to(device), lambda x: dist.Categorical(logits=x), num_data=4)
    split = Split(torch.zeros(4, 2, device=device), torch.zeros(4, dtype=torch.long, device=device))
    monkeypatch.setattr(recipes, "sparsify", lambda guide, threshold: threshold)
    monkeypatch.setattr(recipes, "prune", lambda network, guide, threshold: threshold)
    monkeypatch.setattr(recipes, "fine_tune", lambda threshold, split, **options: threshold)
    monkeypatch.setattr(recipes, "_negative_log_likelihood", lambda threshold, split: NLLS[threshold])
    options = {"validation": split, "epochs": 1, "batch_size": 4}

    def chosen(thresholds=tuple(NLLS), **others):
        guide = AutoSparseNormal(model)
        return recipes.choose_threshold(model, guide, split, thresholds=thresholds, **options, **others)

    return chosen


@pytest.mark.parametrize(
    ("tolerance", "expected"), [(0.0, 2.0), (0.019, 2.0), (0.021, 1.0), (0.16, 0.0), (3.6, -1.0), (math.inf, -1.0)]
)
def test_the_smallest_threshold_within_the_tolerance_is_chosen(choose, tolerance, expected):
    assert choose(tolerance=tolerance) == expected


@pytest.mark.parametrize(("standard_error", "expected"), [(0.0, 2.0), (0.0039, 2.0), (0.0041, 1.0), (0.031, 0.0)])
def test_by_default_the_standard_error_of_the_best_is_allowed(choose, standard_error, expected, monkeypatch):
    monkeypatch.setitem(NLLS, 2.0, (0.2, standard_error))
    assert choose() == expected


def test_the_standard_error_is_that_of_a_mean(device):
    torch.manual_seed(0)
    network = nn.Linear(3, 4, dtype=torch.float64, device=device)
    images = torch.randn(2_500, 3, dtype=torch.float64, device=device)
    split = Split(images, torch.arange(2_500, device=device) % 4)
    mean, standard_error = recipes._negative_log_likelihood(network, split)
    parts = [recipes._negative_log_likelihood(network, Split(images[i::50], split.labels[i::50])) for i in range(50)]
    means = torch.tensor([of_part for of_part, _ in parts])
    assert mean == pytest.approx(means.mean().item())
    # The standard deviation of 50 means of 50 data is known to a tenth; 4 sigma.
    assert standard_error * math.sqrt(50) == pytest.approx(means.std().item(), rel=0.4)


@pytest.mark.parametrize("tolerance", [-0.01, math.nan])
def test_a_tolerance_below_0_is_refused(choose, tolerance):
    with pytest.raises(ValueError, match="tolerance: expected a fraction that is not negative, but got"):
        choose(tolerance=tolerance)


def test_no_threshold_is_refused(choose):
    with pytest.raises(ValueError, match="thresholds: expected at least one, but got none"):
        choose(thresholds=())
