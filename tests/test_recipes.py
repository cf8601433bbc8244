"""The choice of the threshold, among networks whose likelihoods are known."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_sparsevd import AutoSparseNormal, Supervised, bayesianize, recipes
from pyro_sparsevd.datasets import Split

NLLS = {-1.0: 0.9, 0.0: 0.23, 1.0: 0.204, 2.0: 0.2, 3.0: 0.21}


@pytest.fixture
def choose(monkeypatch, device):
    model = Supervised(bayesianize(nn.Linear(2, 2)).to(device), lambda x: dist.Categorical(logits=x), num_data=4)
    split = Split(torch.zeros(4, 2, device=device), torch.zeros(4, dtype=torch.long, device=device))
    monkeypatch.setattr(recipes, "sparsify", lambda guide, threshold: threshold)
    monkeypatch.setattr(recipes, "prune", lambda network, guide, threshold: threshold)
    monkeypatch.setattr(recipes, "fine_tune", lambda threshold, split, **options: threshold)
    monkeypatch.setattr(recipes, "negative_log_likelihood", lambda threshold, split: NLLS[threshold])
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


def test_the_default_tolerance_is_two_per_cent(choose):
    assert choose() == choose(tolerance=0.02)
    assert choose(thresholds=[3.0, 2.0]) == 2.0


@pytest.mark.parametrize("tolerance", [-0.01, math.nan])
def test_a_tolerance_below_0_is_refused(choose, tolerance):
    with pytest.raises(ValueError, match="tolerance: expected a fraction that is not negative, but got"):
        choose(tolerance=tolerance)


def test_no_threshold_is_refused(choose):
    with pytest.raises(ValueError, match="thresholds: expected at least one, but got none"):
        choose(thresholds=())
