"""The choice of the threshold by known likelihoods, and what the recipes refuse or warn of."""

import math
import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from lab import recipes
from torch import nn

from pyro_sparsevd import AutoSparseNormal, SparseVD_ELBO, Supervised, bayesianize, prune, sparsify
from pyro_sparsevd.sparsity import threshold as sparsity_threshold
from pyro_sparsevd.sparsity.threshold import choose_threshold, smoothed_threshold
from pyro_sparsevd.training.loop import error, fit_posterior, negative_log_likelihood
from pyro_sparsevd.training.split import Split

THRESHOLDS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)


def _quadratic(curvature, lowest=0.07, at=2.0):
    return {t: lowest * (1 + curvature * (t - at) ** 2) for t in THRESHOLDS}


@pytest.mark.parametrize(
    ("tolerance", "curvature", "expected"),
    [(0.05, 0.04, 1.0), (0.05, 0.021, 0.5), (0.05, 0.1, 1.5), (0.0, 0.04, 2.0), (0.11, 0.04, 0.5), (0.089, 0.04, 1.0)],
)
def test_the_smallest_threshold_within_the_tolerance_of_the_curve_is_chosen(tolerance, curvature, expected):
    assert smoothed_threshold(_quadratic(curvature), tolerance) == expected


def test_noise_moves_the_choice_less_than_that_of_the_likelihoods_themselves():
    generator = np.random.default_rng(0)
    smooth, single = [], []
    for _ in range(200):
        nlls = {t: nll + 0.001 * generator.standard_normal() for t, nll in _quadratic(0.04).items()}
        smooth.append(smoothed_threshold(nlls))
        single.append(next(t for t, nll in nlls.items() if nll <= 1.05 * min(nlls.values())))
    assert np.mean(smooth) == pytest.approx(1.0, abs=0.1)
    assert np.std(smooth) < 0.5 * np.std(single)


def test_the_order_of_the_thresholds_does_not_matter():
    nlls = _quadratic(0.04)
    assert smoothed_threshold(dict(reversed(nlls.items()))) == smoothed_threshold(nlls)


@pytest.mark.parametrize(
    ("nlls", "expected", "end"),
    [
        ({0.0: 0.30, 1.0: 0.20, 2.0: 0.10}, 2.0, "largest"),
        ({0.0: 0.10, 1.0: 0.20, 2.0: 0.30}, 0.0, "smallest"),
        ({0.0: 0.100, 1.0: 0.104}, 0.0, "smallest"),  # a line
        ({0.0: 0.20, 1.0: 0.35, 2.0: 0.19}, 0.0, "smallest"),  # no quadratic, which would bend downwards, but a line
        ({0.0: 2.3, 0.5: 2.3, 1.0: 0.9, 1.5: 0.1, 2.0: 0.05, 3.0: 0.05}, 3.0, "largest"),
    ],
)
def test_a_choice_at_the_end_of_those_tried_warns(nlls, expected, end):
    with pytest.warns(UserWarning, match=f"thresholds: chose {expected:g}, the {end} that was tried"):
        assert smoothed_threshold(nlls) == expected


def test_a_curve_with_a_minimum_below_0_is_taken_near_its_minimum():
    nlls = {-1.0: 50.0, -0.5: 2.3, 0.0: 0.3, 0.5: 0.2, 1.0: 0.2, 1.5: 0.2, 2.0: 0.2, 3.0: 0.2}
    assert smoothed_threshold(nlls) in (1.0, 1.5, 2.0)


@pytest.mark.parametrize("lost", [math.inf, math.nan])
def test_thresholds_without_a_finite_likelihood_are_left_out(lost):
    nlls = _quadratic(0.04)
    assert smoothed_threshold({-3.0: lost, **nlls, 2.0: lost}) == 1.0
    with pytest.raises(ValueError, match="thresholds: expected one with a finite negative log likelihood, but got"):
        smoothed_threshold({1.0: lost})


def test_no_threshold_and_an_infinite_one_are_refused():
    with pytest.raises(ValueError, match="thresholds: expected one with a finite negative log likelihood"):
        smoothed_threshold({})
    with pytest.raises(ValueError, match=r"thresholds: expected finite numbers, but got \[1.0, inf\]"):
        smoothed_threshold({1.0: 0.1, math.inf: 0.1})


@pytest.mark.parametrize("tolerance", [-0.01, math.nan, math.inf])
def test_a_tolerance_that_is_no_fraction_is_refused(tolerance):
    with pytest.raises(ValueError, match="tolerance: expected a fraction that is not negative, but got"):
        smoothed_threshold(_quadratic(0.04), tolerance)


def _split(size, device, seed=0):
    """Returns points in a plane, with the classes of "exclusive or"."""
    x = torch.randn(size, 2, generator=torch.Generator().manual_seed(seed))
    return Split(x.to(device), (x.prod(1) > 0).long().to(device))


def _model(device, num_data, hidden=30):
    net = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 2))
    model = Supervised(bayesianize(net.to(device)), lambda x: dist.Categorical(logits=x), num_data)
    return model, AutoSparseNormal(model, init_log_variance=-8.0)


def test_a_threshold_is_chosen_by_the_likelihoods_of_the_fine_tuned_networks(monkeypatch, device):
    tuned = {threshold: nn.Linear(2, 2) for threshold in THRESHOLDS}
    nlls = {tuned[threshold]: nll for threshold, nll in _quadratic(0.04).items()}
    monkeypatch.setattr(sparsity_threshold, "sparsify", lambda guide, threshold: threshold)
    monkeypatch.setattr(sparsity_threshold, "prune", lambda network, guide, threshold: threshold)
    monkeypatch.setattr(sparsity_threshold, "_negative_log_likelihood", lambda model, network, data: nlls[network])
    model, guide = _model(device, 4)
    assert choose_threshold(model, guide, [], iter(THRESHOLDS), fine_tune=tuned.__getitem__) == 1.0


def test_a_threshold_is_chosen_by_what_the_network_predicts_of_all_batches_in_evaluation_mode(monkeypatch, device):
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9)).to(device)
    model = Supervised(bayesianize(net), lambda x: dist.Categorical(logits=x), 100)
    guide, split, found = AutoSparseNormal(model), _split(100, device), {}
    monkeypatch.setattr(sparsity_threshold, "smoothed_threshold", lambda nlls, tolerance: found.update(nlls))
    choose_threshold(model, guide, iter(split.chunks(30)), [math.inf, 1.0], fine_tune=nn.Module.train, tolerance=0.1)
    networks = {threshold: prune(model.network, guide, sparsify(guide, threshold)) for threshold in found}
    assert found == pytest.approx({t: negative_log_likelihood(network, split) for t, network in networks.items()})
    with pytest.raises(ValueError, match="data: expected at least one batch, but got none"):
        choose_threshold(model, guide, [], [1.0], fine_tune=nn.Module.train)


def test_a_threshold_is_chosen_for_a_regression_with_several_inputs(device):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, a, b):
            return self.layer(a + b).squeeze(-1)

    model = Supervised(bayesianize(Sum().to(device)), lambda mean: dist.Normal(mean, 1.0), 8)
    data = [((torch.randn(4, 2, device=device), torch.randn(4, 2, device=device)), torch.randn(4, device=device))]
    assert choose_threshold(model, AutoSparseNormal(model), data, [3.0], fine_tune=nn.Module.train) == 3.0


def test_targets_of_a_regression_are_refused():
    split = Split(torch.randn(8, 3), torch.randn(8, 1))
    network = nn.Linear(3, 1)
    before = network.weight.clone()
    for train in (recipes.fine_tune, recipes.train_dense):
        with pytest.raises(TypeError, match=r"labels: expected the classes .* but got torch.float32; for a regression"):
            train(network, split, epochs=1, batch_size=4)
    for measure in (error, negative_log_likelihood):
        with pytest.raises(TypeError, match="labels: expected the classes of a classifier as integers"):
            measure(network, split)
    assert torch.equal(network.weight, before)


def test_a_data_set_of_another_size_than_the_model_was_given_is_refused(device):
    model, guide = _model(device, 16)
    with pytest.raises(ValueError, match="split: expected the num_data = 16 data of the model, but got 8"):
        fit_posterior(SparseVD_ELBO(), model, guide, _split(8, device), epochs=1, batch_size=4)


def _train(split, validation, device):
    torch.manual_seed(0)
    model, guide = _model(device, len(split))
    options = {"epochs": 60, "batch_size": 8, "lr": 3e-2, "warm_up": 0.03}
    return recipes.train_sparse(model, guide, split, validation=validation, **options)


def test_a_posterior_that_collapsed_though_there_was_something_to_learn_warns(device):
    with pytest.warns(UserWarning, match=r"the posterior collapsed: every weight is dropped, and the held-out error"):
        history = _train(_split(80, device), _split(1000, device, seed=1), device)
    assert history[-1]["sparsity"] == 1


def test_random_labels_lose_every_weight_without_a_warning(device):
    split, validation = _split(80, device), _split(1000, device, seed=1)
    shuffled = Split(split.images, split.labels[torch.randperm(80, generator=torch.Generator().manual_seed(2))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _train(shuffled, validation, device)[-1]["sparsity"] == 1
