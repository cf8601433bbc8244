"""The choice of the threshold, among networks whose likelihoods are known."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_sparsevd import AutoSparseNormal, Supervised, bayesianize, recipes
from pyro_sparsevd.datasets import Split

NLLS = {threshold: torch.full((4,), nll) for threshold, nll in {-1: 0.9, 0: 0.23, 1: 0.204, 2: 0.2, 3: 0.21}.items()}


def _logits(nlls):
    """Returns logits of two classes that give the first one these negative log likelihoods."""
    return torch.stack([-nlls, torch.log(-torch.expm1(-nlls))], 1)


@pytest.fixture
def choose(monkeypatch, device):
    """Chooses among networks that are known by their thresholds."""

    def chosen(nlls, **options):
        size = len(next(iter(nlls.values())))
        split = Split(torch.zeros(size, 2, device=device), torch.zeros(size, dtype=torch.long, device=device))
        model = Supervised(bayesianize(nn.Linear(2, 2)).to(device), lambda x: dist.Categorical(logits=x), size)
        monkeypatch.setattr(recipes, "sparsify", lambda guide, threshold: threshold)
        monkeypatch.setattr(recipes, "prune", lambda network, guide, threshold: threshold)
        monkeypatch.setattr(recipes, "fine_tune", lambda threshold, split, **options: threshold)
        monkeypatch.setattr(recipes, "logits", lambda threshold, split: _logits(nlls[threshold]).to(device))
        options = {"validation": split, "epochs": 1, "batch_size": 4, "thresholds": tuple(nlls), **options}
        return recipes.choose_threshold(model, AutoSparseNormal(model), split, **options)

    return chosen


@pytest.mark.parametrize(
    ("tolerance", "expected"), [(0.0, 2), (0.019, 2), (0.021, 1), (0.16, 0), (3.6, -1), (math.inf, -1)]
)
def test_the_smallest_threshold_within_the_tolerance_is_chosen(choose, tolerance, expected):
    assert choose(NLLS, tolerance=tolerance) == expected


@pytest.mark.parametrize("spread", [0.01, 0.1])
@pytest.mark.parametrize(("standard_errors", "expected"), [(1.9, 1), (2.0, 2)])
def test_by_default_a_network_is_as_good_unless_a_paired_test_says_no(choose, spread, standard_errors, expected):
    torch.manual_seed(0)
    size = 10_000
    best = torch.rand(size, dtype=torch.float64) + 1  # whose own spread says nothing of that of a difference
    difference = torch.randn(size, dtype=torch.float64)
    difference = (difference - difference.mean()) / difference.std(correction=0) + standard_errors / math.sqrt(size)
    assert choose({2: best, 1: best + spread * difference}) == expected


@pytest.mark.parametrize(("more_errors", "expected"), [(3, 1), (4, 2)])
def test_by_default_a_network_that_errs_more_is_not_as_good_even_where_its_likelihood_is(choose, more_errors, expected):
    best = torch.full((1_000,), 0.1, dtype=torch.float64)
    best[:2] = torch.tensor([50.0, 90.0])
    other = best.clone()
    other[:2] = torch.tensor([90.0, 51.0])  # two data that decide nothing, and hide the rest
    other[2 : 2 + more_errors] = 0.8
    assert choose({2: best, 1: other}) == expected


def test_by_default_equal_networks_are_as_good_and_one_that_is_always_worse_is_not(choose):
    assert choose(NLLS) == 2
    assert choose({**NLLS, 0: NLLS[2]}) == 0


@pytest.mark.parametrize("tolerance", [-0.01, math.nan])
def test_a_tolerance_below_0_is_refused(choose, tolerance):
    with pytest.raises(ValueError, match="tolerance: expected a fraction that is not negative, but got"):
        choose(NLLS, tolerance=tolerance)


def test_no_threshold_is_refused(choose):
    with pytest.raises(ValueError, match="thresholds: expected at least one, but got none"):
        choose(NLLS, thresholds=())
