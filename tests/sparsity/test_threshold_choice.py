"""The choice of one by known likelihoods, and by networks on data."""

import math
from collections import UserDict
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_sparsevd as svd
from pyro_sparsevd.evaluation import network_predictions, scores
from pyro_sparsevd.sparsity import threshold as sparsity_threshold
from pyro_sparsevd.sparsity.threshold import choose_threshold, smoothed_threshold

THRESHOLDS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)


def _quadratic(curvature, lowest=0.07, at=2.0):
    return {t: lowest * (1 + curvature * (t - at) ** 2) for t in THRESHOLDS}


@pytest.mark.parametrize(
    ("tolerance", "curvature", "expected"),
    [(0.05, 0.04, 1.0), (0.05, 0.021, 0.5), (0.05, 0.1, 1.5), (0.0, 0.04, 2.0), (0.11, 0.04, 0.5), (0.089, 0.04, 1.0)],
)
def test_the_smallest_threshold_within_the_tolerance_is_chosen(tolerance, curvature, expected):
    assert smoothed_threshold(_quadratic(curvature), tolerance) == expected


def test_noise_moves_the_choice_less_than_the_likelihoods_minimum():
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
    ],
)
def test_a_choice_at_the_end_of_those_tried_warns(nlls, expected, end):
    with pytest.warns(UserWarning, match=f"thresholds: chose {expected:g}, the {end} that was tried"):
        assert smoothed_threshold(nlls) == expected


def test_a_curve_with_a_minimum_below_0_is_taken_near_its_minimum():
    nlls = {-1.0: 50.0, -0.5: 2.3, 0.0: 0.3, 0.5: 0.2, 1.0: 0.2, 1.5: 0.2, 2.0: 0.2, 3.0: 0.2}
    assert smoothed_threshold(nlls) in (1.0, 1.5, 2.0)


@pytest.mark.parametrize(
    ("nlls", "expected"),
    [
        ({0.0: 2.3, 0.5: 2.3, 1.0: 0.9, 1.5: 0.1, 2.0: 0.05, 3.0: 0.05}, 2.0),
        ({t: 6.0 if t == -4 else 1.0 for t in range(-4, 5)}, -3),
        ({-3.0: 0.7, -2.0: 0.3, **_quadratic(0.04)}, 1.0),
    ],
)
def test_networks_that_are_broken_do_not_move_the_choice(nlls, expected):
    assert smoothed_threshold(nlls) == expected


@pytest.mark.parametrize("shift", [-5.0, -0.7, 0.0, 0.7, 5.0])
def test_the_choice_by_densities_does_not_depend_on_the_unit_of_the_targets(shift):
    nlls = {t: nll + shift for t, nll in _quadratic(0.04, lowest=1.0).items()}
    assert smoothed_threshold(nlls, unit=1.0) == 1.0
    assert smoothed_threshold({-2.0: 9.0 + shift, **nlls}, unit=1.0) == 1.0


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


def categorical(logits):
    return dist.Categorical(logits=logits)


class Constant(nn.Module):
    """A network whose every output is one number."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.double))

    def forward(self, x):
        return self.value.expand(len(x))


def test_a_threshold_is_chosen_by_the_likelihoods_of_the_tuned_networks():
    # The density of 0 is exp(-π m²) where the network returns m.
    scale = torch.tensor(1 / math.sqrt(2 * math.pi), dtype=torch.double)
    model = svd.Supervised(svd.bayesianize(nn.Linear(2, 1)), lambda mean: dist.Normal(mean, scale), 4)
    tuned = iter(Constant(math.sqrt(nll / math.pi)) for nll in _quadratic(0.04, lowest=1.0).values())
    data = [(torch.zeros(2, 2), torch.zeros(2, dtype=torch.double))]
    guide = svd.AutoSparseNormal(model)
    assert choose_threshold(model, guide, data, iter(THRESHOLDS), fine_tune=lambda network: next(tuned)) == 1.0


def test_a_choice_is_by_all_batches_in_evaluation_mode(monkeypatch, device):
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9)).to(device)
    model = svd.Supervised(svd.bayesianize(net), categorical, 100)
    x = torch.randn(100, 2, device=device)
    guide, found, y = svd.AutoSparseNormal(model), {}, (x.prod(1) > 0).long()
    monkeypatch.setattr(sparsity_threshold, "smoothed_threshold", lambda nlls, tolerance, unit: found.update(nlls))
    data = zip(x.split(30), y.split(30), strict=True)
    choose_threshold(model, guide, data, [math.inf, 1.0], fine_tune=nn.Module.train, tolerance=0.1)
    for threshold, nll in found.items():
        network = svd.prune(model.network, guide, svd.sparsify(guide, threshold)).eval()
        assert nll == pytest.approx(nn.functional.cross_entropy(network(x), y).item(), rel=1e-6)
        assert nll == pytest.approx(scores(network_predictions(network, categorical, [(x, y)]))["nll"], rel=1e-6)


class Sum(nn.Module):
    """A network of two inputs, by position or by name, whose output is an object with ``logits``."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, a, b=None):
        a, b = (a["a"], a["b"]) if isinstance(a, Mapping) else (a, b)
        return SimpleNamespace(logits=self.layer(a + b))


@pytest.mark.parametrize("form", [tuple, dict, UserDict])
def test_inputs_may_be_several_and_the_output_an_object(device, form):
    a, b = torch.randn(2, 4, 2, device=device)
    y = torch.randint(3, (4,), device=device)
    x = (a, b) if form is tuple else form({"a": a, "b": b})
    model = svd.Supervised(svd.bayesianize(Sum().to(device)), lambda out: dist.Categorical(logits=out.logits), 8)
    guide = svd.AutoSparseNormal(model)
    assert choose_threshold(model, guide, [(x, y)], [3.0], fine_tune=nn.Module.train) == 3.0
    (point,) = svd.threshold_sweep(model, guide, lambda: iter([(x, y)]), [3.0])
    logits = svd.prune(model.network, guide, svd.sparsify(guide, 3.0))(a, b).logits
    assert point.nll == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-5)


NO_PAIRS = {
    "no batch": ([], "data: expected at least one batch, but got none"),
    "inputs alone": ([torch.zeros(2, 2)], r"data: expected pairs \(x, y\) .* but got a Tensor"),
    "one of a tuple": ([(torch.zeros(2, 2),)], r"data: expected pairs \(x, y\) .* but got a tuple of 1"),
    "names": ([{"x": torch.zeros(2, 2), "y": torch.zeros(2)}], r"data: expected pairs \(x, y\) .* but got a dict of 2"),
}


@pytest.mark.parametrize(("data", "message"), NO_PAIRS.values(), ids=NO_PAIRS)
def test_what_is_no_pair_of_inputs_and_targets_is_refused(data, message):
    model = svd.Supervised(svd.bayesianize(nn.Linear(2, 3)), categorical, 8)
    guide = svd.AutoSparseNormal(model)
    with pytest.raises(ValueError, match=message):
        choose_threshold(model, guide, data, [3.0], fine_tune=nn.Module.train)
    with pytest.raises(ValueError, match=message):
        svd.threshold_sweep(model, guide, data, [3.0])
