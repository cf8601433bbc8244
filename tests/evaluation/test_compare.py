"""Priors side by side: the numbers against what is known or found the slow way, and nothing else changed."""

import json
import math
import random
import time
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_sparsevd as svd
from pyro_sparsevd.evaluation.compare import compare_priors
from pyro_sparsevd.evaluation.report import PriorComparison, PriorResult
from pyro_sparsevd.nn import PRIOR_NAMES

PRIORS = {
    **{name: name for name in PRIOR_NAMES},
    "default": None,
    "group normal-Jeffreys, weights": svd.group_normal_jeffreys(),
    "by name": {"0.*": svd.LogUniform(), "*": dist.Normal(0.0, 1.0)},
}
UNTRAINED = {"epochs": 1, "lr": 1e-30, "init_log_variance": -60.0, "num_samples": 2}


def unit_noise(mean):
    return dist.Normal(mean, 1.0)


def categorical(logits):
    return dist.Categorical(logits=logits)


def linear():
    return nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))


def classifier():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def seeded(network, seed):
    torch.manual_seed(seed)
    return network()


class Data(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def regression(device, count=60, noise=0.3):
    x = torch.randn(count, 6)
    y = 2 * x[:, 0] - x[:, 1] + noise * torch.randn(count)
    return Data(x.to(device), y.to(device))


def classes(device, count=60):
    x = torch.randn(count, 6)
    return Data(x.to(device), x[:, :3].argmax(-1).to(device))


def batches(data, size=50):
    return list(zip(*(part.split(size) for part in data), strict=True))


def compared(network, priors, likelihood, *data, size=50, **options):
    """Compares priors on training, held-out and test data."""
    loader, held_out, *rest = (batches(part, size) for part in data)
    test = {"test": rest[0]} if rest else {}
    return compare_priors(network, likelihood, loader, held_out, priors=priors, **test, **options)


def of_one(*arguments, **options):
    (result,) = compared(*arguments, **options).results
    return result


# What is measured: with a learning rate and variances of nothing, all is known of the network.


def test_scores_of_a_regression_are_those_of_the_network(device):
    splits = [regression(device) for _ in range(3)]
    found = of_one(linear, {"a": None}, unit_noise, *splits, seeds=[7], **UNTRAINED)
    net = seeded(linear, 7).to(device)
    with torch.no_grad():
        validation, test = (net(split.x) - split.y for split in splits[1:])
    assert found.held_out_error == pytest.approx(float(validation.square().mean()), rel=1e-4)
    assert found.error == pytest.approx(float(test.square().mean()), rel=1e-4)
    exact = 0.5 * float(test.square().mean()) + 0.5 * math.log(2 * math.pi)
    assert found.scores["nll"] == pytest.approx(exact, rel=1e-4)
    assert found.scores["rmse"] == pytest.approx(math.sqrt(found.error), rel=1e-4)


def test_scores_of_a_classifier_are_those_of_the_network(device):
    splits = [classes(device, 200) for _ in range(3)]
    found = of_one(classifier, {"a": None}, categorical, *splits, seeds=[7], **UNTRAINED)
    with torch.no_grad():
        logits = seeded(classifier, 7).to(device)(splits[2].x)
    confidence, predicted = logits.softmax(-1).max(-1)
    right = (predicted == splits[2].y).float()
    gaps = [float((right - confidence)[(15 * confidence).floor() == b].sum().abs()) / len(right) for b in range(16)]
    assert found.error == pytest.approx(1 - float(right.mean()), abs=1e-6)
    assert found.scores["nll"] == pytest.approx(float(nn.functional.cross_entropy(logits, splits[2].y)), rel=1e-4)
    assert found.scores["calibration_error"] == pytest.approx(sum(gaps), abs=1e-4)


def test_the_likelihood_is_that_of_the_mean_prediction(device):
    # Of a linear model it is known: a Gaussian with the variance of noise and weights.
    test = regression(device, 200)
    options = {**UNTRAINED, "init_log_variance": 0.0, "num_samples": 1000}
    found = of_one(linear, {"a": None}, unit_noise, regression(device), regression(device), test, seeds=[3], **options)
    with torch.no_grad():
        mean = seeded(linear, 3).to(device)(test.x)
    scale = (1 + test.x.square().sum(-1)).sqrt()
    exact = -dist.Normal(mean, scale).log_prob(test.y).mean()
    assert found.scores["nll"] == pytest.approx(float(exact), abs=0.04)


def test_data_may_be_more_than_those_to_train_on(device):
    train, test = regression(device, 7), regression(device, 30)
    options = {**UNTRAINED, "size": 7}
    found = of_one(linear, {"a": None}, unit_noise, train, test, test, seeds=[1], **options)
    with torch.no_grad():
        expected = (seeded(linear, 1).to(device)(test.x) - test.y).square().mean()
    assert found.error == pytest.approx(float(expected), rel=1e-4)


def test_the_network_is_evaluated_in_evaluation_mode(device):
    split = regression(device)
    dropped = lambda: nn.Sequential(nn.Dropout(0.99), *linear())  # noqa: E731
    with_dropout, without = (
        of_one(network, {"a": None}, unit_noise, split, split, split, **UNTRAINED, seeds=[0])
        for network in (dropped, linear)
    )
    assert with_dropout.scores == pytest.approx(without.scores)


# Compression at equal error.


def test_the_compression_is_the_largest_at_the_level(device):
    # With equal variances the weights of the smallest magnitude go first.
    network = lambda: nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 1), nn.Flatten(0))  # noqa: E731
    net = seeded(network, 5).to(device)
    splits = [regression(device) for _ in range(3)]
    with torch.no_grad():
        splits = [Data(s.x, net(s.x) + 0.1 * torch.randn(60, device=device)) for s in splits]
    level = 0.05
    found = of_one(network, {"a": None}, unit_noise, *splits, seeds=[5], error_level=level, **UNTRAINED)
    weights = [p for p in net.parameters() if p.dim() > 1]
    order = torch.cat([w.detach().abs().flatten() for w in weights]).sort(descending=True).values
    errors = {}
    for kept in range(len(order) + 1):
        with torch.no_grad():
            for w in weights:
                w.mul_(w.abs() >= (order[kept - 1] if kept else math.inf))
            errors[kept] = [float((net(s.x) - s.y).square().mean()) for s in splits[1:]]
        net = seeded(network, 5).to(device)
        weights = [p for p in net.parameters() if p.dim() > 1]
    tried = {math.ceil(len(order) * 0.9**step) for step in range(60)}
    kept = min(kept for kept in tried if errors[kept][0] <= level)
    assert 1 < kept < len(order)
    assert found.compression == len(order) / kept
    assert found.sparse_error == pytest.approx(errors[kept][1], rel=1e-3)
    assert found.error_level == level


@pytest.mark.parametrize(("level", "compression"), [(0.0, 1.0), (1e9, math.inf), (-1.0, math.nan)])
def test_levels_that_no_the_whole_or_the_empty_network_reaches(device, level, compression):
    split = regression(device)
    with torch.no_grad():
        net = seeded(linear, 2).to(device)
        exact = Data(split.x, net(split.x) + (0.1 if level < 0 else 0.0))
    found = of_one(
        linear, {"a": None}, unit_noise, exact, exact, exact, seeds=[2], error_level=max(level, 1e-12), **UNTRAINED
    )
    assert found.compression == pytest.approx(compression, nan_ok=True)
    assert math.isnan(found.sparse_error) == math.isnan(found.threshold) == math.isnan(compression)


def test_all_priors_of_a_seed_have_the_level_of_the_best(device):
    splits = [regression(device) for _ in range(3)]
    priors = {name: PRIORS[name] for name in ("log-uniform", "normal by fan-in", "student-t")}
    found = compared(linear, priors, unit_noise, *splits, epochs=5, size=20, seeds=(0, 1), tolerance=0.5)
    for seed in (0, 1):
        runs = [result for result in found.results if result.seed == seed]
        assert {run.error_level for run in runs} == {1.5 * min(run.held_out_error for run in runs)}


# Equal conditions.


def test_all_priors_start_from_the_same_weights_and_seeds_from_others(device):
    split = regression(device)
    found = compared(linear, {"a": None, **PRIORS}, unit_noise, split, split, split, seeds=(0, 1), **UNTRAINED)
    errors = {seed: {result.error for result in found.results if result.seed == seed} for seed in (0, 1)}
    assert len(errors[0]) == len(errors[1]) == 1
    assert errors[0] != errors[1]


def test_a_result_does_not_depend_on_the_other_priors(device):
    splits = [regression(device) for _ in range(3)]
    options = {"epochs": 2, "size": 20, "seeds": [0], "error_level": 10.0}
    both = compared(linear, {"a": svd.horseshoe(), "b": None}, unit_noise, *splits, **options).results[1]
    alone = of_one(linear, {"b": None}, unit_noise, *splits, **options)
    for name in ("error", "scores", "held_out_error", "compression", "threshold", "sparse_error"):
        assert getattr(both, name) == getattr(alone, name)


def test_all_priors_have_the_batches_of_a_generator_in_the_same_order(device):
    data = [regression(device) for _ in range(2)]
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(*data[0]), batch_size=20, shuffle=True, generator=generator)
    before = generator.get_state()
    options = {"epochs": 2, "seeds": [0], "error_level": 10.0}
    found = compare_priors(linear, unit_noise, loader, batches(data[1]), priors={"a": None, "b": None}, **options)
    assert found.results[0].error == found.results[1].error
    assert torch.equal(generator.get_state(), before)


def test_nothing_else_is_changed(device):
    net, noise, split = linear().to(device), svd.GaussianLikelihood().to(device), regression(device)
    pyro.param("mine", torch.ones(2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    compared(lambda: net, {"a": None, "b": svd.horseshoe()}, noise, split, split, split, epochs=2, size=20)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]  # noqa: NPY002
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert noise.log_scale == 0
    assert net.training


def test_nothing_is_changed_by_a_failure_either(device):
    split = regression(device)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="prior 'a', loader: x"):
        compared(linear, {"a": None}, _fail, split, split, split, **FAST)
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store().keys())


def _fail(mean):
    raise ValueError("x")


# Training.


@pytest.mark.parametrize("name", PRIORS)
def test_every_prior_learns(device, name):
    splits = [regression(device, count) for count in (100, 50, 200)]
    found = of_one(
        linear,
        {name: PRIORS[name]},
        svd.GaussianLikelihood(),
        *splits,
        epochs=30,
        size=20,
        lr=3e-2,
        seeds=[0],
        num_samples=10,
    )
    assert found.error < 1.0  # the targets have variance 5.1
    assert found.scores["nll"] < 1.5
    assert found.compression >= 1


def test_a_sparsifying_prior_finds_what_matters_a_normal_one_not(device):
    torch.manual_seed(0)
    x = torch.randn(300, 40, device=device)
    y = 2 * x[:, 0] - x[:, 1] + torch.randn(300, device=device)
    splits = [Data(x[part], y[part]) for part in (slice(80), slice(80, 140), slice(140, 300))]
    network = lambda: nn.Sequential(nn.Linear(40, 1), nn.Flatten(0))  # noqa: E731
    priors = {"log-uniform": None, "normal": dist.Normal(0.0, 1.0)}
    sparse, normal = compared(
        network, priors, svd.GaussianLikelihood(), *splits, epochs=60, size=20, lr=2e-2, seeds=[0]
    ).results
    assert sparse.compression == pytest.approx(20.0)
    assert sparse.sparse_error < sparse.error < normal.error
    assert sparse.scores["nll"] < normal.scores["nll"]


@pytest.mark.parametrize(
    ("likelihood", "targets", "error_name"),
    [
        (lambda out: dist.Bernoulli(logits=out), lambda y: (y > 0).float(), "error"),
        (lambda out: dist.Poisson(out.exp()), lambda y: y.abs().round(), "error"),
        (lambda out: dist.StudentT(3.0, out, 1.0), lambda y: y, "mean squared error"),
        (
            lambda out: dist.Normal(out[:, None].expand(-1, 2), 1.0).to_event(1),
            lambda y: y[:, None] + torch.ones(2),
            "mean squared error",
        ),
    ],
    ids=["Bernoulli", "Poisson", "StudentT", "event"],
)
def test_any_likelihood_will_do(device, likelihood, targets, error_name):
    split = regression(device)
    split = Data(split.x, targets(split.y.cpu()).to(device))
    found = compared(linear, {"a": None}, likelihood, split, split, split, seeds=[4], **UNTRAINED)
    with torch.no_grad():
        exact = -likelihood(seeded(linear, 4).to(device)(split.x)).log_prob(split.y).mean()
    assert found.error_name == error_name
    assert found.results[0].scores["nll"] == pytest.approx(float(exact), rel=1e-4)
    has_classes = isinstance(likelihood(torch.zeros(2)), dist.Bernoulli)
    assert ("calibration_error" in found.results[0].scores) is has_classes


def test_a_likelihood_without_a_mean_has_no_error_and_no_compression(device):
    split = regression(device)
    cauchy = lambda out: dist.Cauchy(out, 1.0)  # noqa: E731
    comparison = compared(linear, {"a": None}, cauchy, split, split, split, seeds=[4], **UNTRAINED)
    assert all(math.isnan(getattr(comparison.results[0], name)) for name in ("error", "compression", "sparse_error"))
    assert math.isfinite(comparison.results[0].scores["nll"])
    assert "-" in str(comparison)


NUMBERS = ("error", "scores", "held_out_error", "compression", "threshold", "sparse_error")


def test_a_comparison_can_be_repeated(device):
    splits = [regression(device) for _ in range(3)]
    options = {"epochs": 4, "size": 20, "seeds": [0, 1]}
    first, second = (
        compared(linear, ["log-uniform", "horseshoe"], svd.GaussianLikelihood(), *splits, **options) for _ in range(2)
    )
    for one, other in zip(first.results, second.results, strict=True):
        assert [getattr(one, name) for name in NUMBERS] == [getattr(other, name) for name in NUMBERS]


def test_data_may_be_a_loader_of_any_structure(device):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 1)

        def forward(self, inputs):
            return self.layer(inputs["a"] + inputs["b"]).squeeze(-1)

    x, y = regression("cpu")
    rows = [({"a": 0.25 * x[n], "b": 0.75 * x[n]}, y[n]) for n in range(60)]
    loader = torch.utils.data.DataLoader(rows, batch_size=50)
    options = {"seeds": [7], "epochs": 2, "init_log_variance": -60.0}
    found = compare_priors(
        lambda: Sum().to(device), unit_noise, loader, lambda: iter(loader), priors=["normal"], **options
    ).results[0]
    expected = of_one(lambda: linear().to(device), ["normal"], unit_noise, (x, y), (x, y), **options)
    assert found.held_out_error == pytest.approx(expected.held_out_error, rel=1e-4)
    assert found.scores["nll"] == pytest.approx(expected.scores["nll"], rel=1e-4)


def test_the_held_out_data_are_reported_by_default(device):
    found = of_one(linear, ["normal"], unit_noise, regression(device), regression(device), seeds=[0], **UNTRAINED)
    assert found.error == found.held_out_error


def test_the_progress_bars_name_prior_and_seed(device, capsys):
    split = regression(device)
    compared(linear, ["ard", "normal"], unit_noise, split, split, seeds=[0, 5], epochs=2)
    printed = capsys.readouterr().err
    assert all(f"{prior}, seed {seed}:" in printed for prior in ("ard", "normal") for seed in (0, 5))


def test_the_time_is_that_of_a_step(device):
    class Slow(nn.Linear):
        def forward(self, x):
            time.sleep(0.02)
            return super().forward(x)[:, 0]

    data = regression(device)
    found = compare_priors(
        lambda: Slow(6, 1), unit_noise, batches(data, 5), [data], priors=["normal"], epochs=2, seeds=[0]
    ).results[0]
    assert 0.02 < found.seconds_per_step < 0.2


# The table.


def _result(prior, seed, compression=2.0, error=0.25):
    return PriorResult(prior, seed, error, {"nll": 0.5, "crps": 0.2}, 0.25, 0.3, compression, 1.0, 0.25, 2e-3)


TABLE = PriorComparison(
    (
        *(_result("a<b", seed, compression, error) for seed, compression, error in ((0, 2.0, 0.1), (1, 4.0, 0.3))),
        *(_result("some", seed, compression) for seed, compression in ((0, 2.0), (1, math.nan))),
        *(_result("none", seed, math.nan) for seed in (0, 1)),
        *(_result("all", seed, math.inf) for seed in (0, 1)),
    ),
    "mean squared error",
)


def test_the_table_has_means_deviations_and_seeds_at_the_level():
    header, *rows = str(TABLE).splitlines()
    assert [row.split()[0] for row in rows] == ["a<b", "some", "none", "all"]
    assert "mean squared error" in header
    assert "0.2000 ± 0.1414" in rows[0]
    assert "3.0 ± 1.4" in rows[0]
    assert "2.0 (1 of 2)" in rows[1]
    assert rows[2].split()[10] == "-"
    assert "inf" in rows[3]
    assert all("2.00 ± 0.00" in row for row in rows)


def test_the_table_is_escaped_html():
    table = TABLE._repr_html_()
    assert table.count("<tr>") == 5
    assert "a&lt;b" in table


def test_the_numbers_go_through_a_file():
    read = json.loads(json.dumps(TABLE.to_dict()))
    assert read["error_name"] == "mean squared error"
    assert [row["prior"] for row in read["results"]] == ["a<b", "a<b", "some", "some", "none", "none", "all", "all"]
    assert read["results"][1]["compression"] == 4.0


# What does not fit.

FAST = {"epochs": 1, "seeds": [0]}
PAIR = [(torch.zeros(2, 6), torch.zeros(2))]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"make_network": linear()}, TypeError, "make_network: expected a function .* new network, but got Sequential"),
        ({"make_network": lambda: 3}, TypeError, "prior 'a': .*expected an nn.Module, but got int"),
        ({"priors": svd.LogUniform()}, TypeError, r"priors: expected names such as .* but got LogUniform\(\)"),
        ({"priors": "normal"}, TypeError, "priors: expected names such as .* but got 'normal'"),
        ({"priors": [svd.LogUniform()]}, TypeError, r"priors: expected names such as .* but got \[LogUniform\(\)\]"),
        ({"priors": {}}, ValueError, "priors: expected at least one"),
        ({"priors": ["normal", "normal"]}, ValueError, "priors: expected at least one, and each once"),
        ({"priors": ["gaussian"]}, ValueError, "prior: expected one of 'log-uniform', 'ard', .* but got 'gaussian'"),
        ({"priors": {"mine": "gaussian"}}, ValueError, "prior: expected one of .* but got 'gaussian'"),
        ({"priors": {"a": None, "odd": 3.0}}, TypeError, "prior 'odd': 0.weight: expected a distribution"),
        ({"priors": {"a": None, "flat": dist.Uniform(-1.0, 1.0)}}, ValueError, "prior 'flat': expected weights"),
        ({"priors": {"a": {"1.*": svd.LogUniform()}}}, ValueError, "prior 'a': .*'1.*'"),
        ({"likelihood": dist.Normal(0.0, 1.0)}, TypeError, "prior 'a': Supervised: expected a callable likelihood"),
        ({"likelihood": lambda out: dist.Normal(out.sum(), 1.0)}, ValueError, "one distribution per datum"),
        (
            {"loader": torch.ones(3)},
            TypeError,
            r"loader: expected batches \(x, y\), .* but got Tensor",
        ),
        ({"loader": iter(PAIR)}, ValueError, "loader: expected batches that can be gone through .* list_iterator"),
        ({"held_out": iter(PAIR)}, ValueError, "held_out: expected batches that can be gone through"),
        ({"test": []}, ValueError, "test: expected at least one batch, but got none"),
        ({"held_out": []}, ValueError, "held_out: expected at least one batch, but got none"),
        ({"held_out": [torch.ones(2, 6)]}, ValueError, r"held_out: expected pairs \(x, y\)"),
        ({"test": [(torch.ones(2, 6), torch.ones(3))]}, ValueError, "prior 'a', test: x and y: expected as many"),
        ({"seeds": ()}, ValueError, "seeds: expected at least one"),
        ({"seeds": [1, 1]}, ValueError, "seeds: expected at least one, and each once"),
        ({"seeds": 3}, TypeError, "seeds: expected a sequence of integers"),
        ({"seeds": [0.5]}, TypeError, "seeds: expected a sequence of integers"),
        ({"epochs": 0}, ValueError, "epochs: expected a positive integer, but got 0"),
        ({"num_samples": 0}, ValueError, "num_samples: expected a positive integer, but got 0"),
        ({"lr": -1.0}, ValueError, "lr: expected a positive and finite number, but got -1.0"),
        ({"tolerance": -0.1}, ValueError, "tolerance: expected a finite number, at least 0, but got -0.1"),
        ({"error_level": math.nan}, ValueError, "error_level: expected a finite number, at least 0, but got nan"),
        ({"init_log_variance": 100.0}, ValueError, "prior 'a': init_log_variance"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused_before_any_training(changed, error, message, monkeypatch):
    if "lr" not in changed:  # that is fit's to refuse
        monkeypatch.setattr("pyro_sparsevd.evaluation.compare.fit", lambda *a, **k: pytest.fail("trained"))
    data = batches(regression("cpu"))
    arguments = {"make_network": linear, "priors": {"a": None}, "likelihood": unit_noise}
    arguments.update(loader=data, held_out=data, test=data, **FAST)
    with pytest.raises(error, match=message):
        compare_priors(**{**arguments, **changed})
