"""Uncertainty of predictions, against slow twins and cases whose answer is known."""

import math
import sys
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import nn

import pyro_sparsevd as svd
from pyro_sparsevd.evaluation.metrics import (
    Uncertainty,
    entropies,
    network_log_probs,
    ood_auroc,
    sampled_log_probs,
    uncertainty,
)
from pyro_sparsevd.training.loop import error, negative_log_likelihood
from pyro_sparsevd.training.split import Split


def slow_uncertainty(log_probs, labels, num_bins=15):
    """Every number by loops over plain Python floats."""
    probs = log_probs.double().exp().tolist()
    samples, (count, classes) = len(probs), log_probs.shape[1:]
    entropy = lambda p: -sum(x * math.log(x) for x in p if x > 0)  # noqa: E731
    found = dict.fromkeys(["error", "nll", "brier", "predictive_entropy", "mutual_information"], 0.0)
    bins = [[] for _ in range(num_bins)]
    for n, label in enumerate(labels.tolist()):
        mean = [sum(probs[s][n][c] for s in range(samples)) / samples for c in range(classes)]
        confidence = max(mean)
        found["error"] += (mean.index(confidence) != label) / count
        found["nll"] -= (math.log(mean[label]) if mean[label] > 0 else -math.inf) / count
        found["brier"] += sum((mean[c] - (c == label)) ** 2 for c in range(classes)) / count
        found["predictive_entropy"] += entropy(mean) / count
        found["mutual_information"] += (entropy(mean) - sum(entropy(p[n]) for p in probs) / samples) / count
        bins[min(int(confidence * num_bins), num_bins - 1)].append((confidence, mean.index(confidence) == label))
    gaps = [abs(sum(hit for _, hit in found) - sum(confidence for confidence, _ in found)) for found in bins]
    return Uncertainty(**found, calibration_error=sum(gaps) / count)


def slow_auroc(scores, ood_scores):
    pairs = [(a, b) for a in scores.tolist() for b in ood_scores.tolist()]
    return sum((b > a) + 0.5 * (b == a) for a, b in pairs) / len(pairs)


def _numbers(found):
    return {name: value for name, value in vars(found).items() if value is not None}


def _simulated(samples, count, classes, scale, device):
    logits = scale * torch.randn(samples, count, classes, device=device)
    return logits.log_softmax(-1), torch.randint(classes, (count,), device=device)


@pytest.mark.parametrize(
    ("samples", "count", "classes", "scale"),
    [(1, 200, 10, 1.0), (7, 200, 10, 3.0), (3, 1, 2, 1.0), (20, 50, 5, 30.0), (4, 300, 3, 100.0)],
)
def test_all_numbers_are_those_of_the_slow_twin(device, samples, count, classes, scale):
    log_probs, labels = _simulated(samples, count, classes, scale, device)
    found = uncertainty(log_probs, labels)
    assert _numbers(found) == pytest.approx(_numbers(slow_uncertainty(log_probs, labels)), rel=1e-4, abs=1e-6)


def test_labels_of_any_integer_type_count(device):
    log_probs, labels = _simulated(2, 30, 5, 1.0, device)
    assert uncertainty(log_probs, labels.to(torch.uint8)) == uncertainty(log_probs, labels)


# error, NLL, Brier score, calibration error, entropy
KNOWN = {
    "perfect": (torch.eye(10), [0.0, 0.0, 0.0, 0.0, 0.0]),
    "always wrong and sure": (torch.eye(10).roll(1, 0), [1.0, math.inf, 2.0, 1.0, 0.0]),
    "uniform": (torch.full((10, 10), 0.1), [0.9, math.log(10), 0.9, 0.0, math.log(10)]),
    "sure of the first": (torch.eye(10)[:1].expand(10, 10), [0.9, math.inf, 1.8, 0.9, 0.0]),
}


@pytest.mark.parametrize(("probs", "expected"), KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("samples", [1, 3])
def test_known_predictions_have_known_numbers(device, probs, expected, samples):
    log_probs = probs.to(device).log().expand(samples, -1, -1)
    found = list(_numbers(uncertainty(log_probs, torch.arange(10, device=device))).values())
    assert found == pytest.approx([*expected, 0.0], abs=2e-7)


def test_predictions_whose_labels_are_drawn_from_them_are_calibrated(device):
    logits = torch.randn(100_000, 5, device=device)
    labels = dist.Categorical(logits=logits).sample()
    assert uncertainty(logits.log_softmax(-1)[None], labels).calibration_error < 0.01
    sharper = (3 * logits).log_softmax(-1)[None]
    assert uncertainty(sharper, labels).calibration_error > 0.2


def test_a_confidence_of_one_shares_the_bin_of_those_that_are_nearly_one(device):
    # Two right at 1 - 1e-3, two wrong at 1: in bins of their own the gaps would be 0.0005 + 0.5.
    probs = torch.tensor([[0.999, 0.001], [0.999, 0.001], [1.0, 0.0], [1.0, 0.0]], device=device)
    labels = torch.tensor([0, 0, 1, 1], device=device)
    assert uncertainty(probs.log()[None], labels).calibration_error == pytest.approx(0.4995, abs=1e-5)


def test_probabilities_rounded_above_one_are_not_taken_for_logits(device):
    log_probs = torch.tensor([[[1e-6, -30.0], [1e-6, -30.0]]], device=device)
    assert uncertainty(log_probs, torch.zeros(2, device=device).long()).calibration_error < 1e-5


def test_means_over_samples_do_not_underflow(device):
    tiny = -1e4
    log_probs = torch.tensor([[[0.0, tiny]], [[0.0, tiny + math.log(3)]]], device=device, dtype=torch.double)
    found = uncertainty(log_probs, torch.ones(1, device=device).long())
    assert found.nll == pytest.approx(-tiny - math.log(2))


def test_mutual_information_is_the_mean_divergence_from_the_mixture(device):
    log_probs, _ = _simulated(6, 40, 4, 2.0, device)
    p = log_probs.double()
    mixture = p.exp().mean(0).log()
    expected = (p.exp() * (p - mixture)).sum(-1).mean(0)
    torch.testing.assert_close(entropies(log_probs)[1], expected)


def test_mutual_information_is_0_where_samples_agree_and_log_k_at_most(device):
    agreeing = torch.randn(1, 20, 5, device=device).log_softmax(-1).expand(8, -1, -1)
    assert (entropies(agreeing)[1] <= 1e-12).all()
    assert (entropies(agreeing)[1] >= 0).all()
    disagreeing = torch.eye(3, 5, device=device).log()[:, None]
    entropy, information = entropies(disagreeing)
    assert information.item() == pytest.approx(math.log(3))
    assert entropy.item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("spread", [0.0, 1.0, 1e-9, 1e6])
def test_auroc_is_the_fraction_of_pairs_in_order(device, spread):
    scores = spread * torch.randint(-5, 5, (40,), device=device).double()
    ood_scores = spread * torch.randint(-3, 8, (30,), device=device).double()
    assert ood_auroc(scores, ood_scores) == pytest.approx(slow_auroc(scores, ood_scores), abs=1e-6)


@pytest.mark.parametrize(
    ("scores", "ood_scores", "expected"),
    [
        ([0.0, 1.0], [2.0, 3.0], 1.0),
        ([2.0, 3.0], [0.0], 0.0),
        ([1.0], [1.0, 1.0], 0.5),
        ([0, math.inf], [math.inf], 0.75),
    ],
)
def test_auroc_of_known_scores(device, scores, ood_scores, expected):
    found = ood_auroc(torch.tensor(scores, device=device), torch.tensor(ood_scores, device=device))
    assert found == pytest.approx(expected)


def test_other_data_are_told_by_the_confidence(device):
    log_probs, labels = _simulated(4, 60, 5, 3.0, device)
    ood, _ = _simulated(2, 50, 5, 1.0, device)
    confidences = [p.double().exp().mean(0).amax(-1) for p in (log_probs, ood)]
    found = uncertainty(log_probs, labels, ood)
    assert found.ood_auroc == pytest.approx(slow_auroc(*(-c for c in confidences)), abs=1e-6)
    assert uncertainty(log_probs, labels).ood_auroc is None


def test_it_prints_a_table():
    found = Uncertainty(0.5, math.inf, 2.0, 0.25, 1.5, 0.125, ood_auroc=0.75)
    lines = str(found).splitlines()
    assert [line[:19].strip() for line in lines] == [name.replace("_", " ") for name in vars(found)]
    assert [float(line[19:]) for line in lines] == list(vars(found).values())
    assert len({len(line) for line in lines}) == 1


GOOD = torch.full((2, 3, 4), 0.25).log()
BAD = {
    "two dimensions": (
        GOOD[0],
        [0, 1, 2],
        r"log_probs: expected the shape \(samples, data, classes\), but got \(3, 4\)",
    ),
    "no samples": (GOOD[:0], [0, 1, 2], r"log_probs: expected the shape .* but got \(0, 3, 4\)"),
    "logits": (GOOD * 2, [0, 1, 2], "log_probs: expected log-probabilities that sum to 1, as logits.log_softmax"),
    "probabilities": (GOOD.exp(), [0, 1, 2], "log_probs: expected log-probabilities that sum to 1"),
    "NaN": (GOOD * math.nan, [0, 1, 2], "log_probs: expected log-probabilities that sum to 1"),
    "too few labels": (GOOD, [0, 1], r"labels: expected 3 integers from 0 to 3, but got torch.int64 of shape \(2,\)"),
    "float labels": (GOOD, [0.0, 1.0, 2.0], "labels: expected 3 integers from 0 to 3, but got torch.float32"),
    "a label too large": (GOOD, [0, 1, 4], "labels: expected 3 integers from 0 to 3"),
    "a label too small": (GOOD, [0, 1, -1], "labels: expected 3 integers from 0 to 3"),
}


@pytest.mark.parametrize(("log_probs", "labels", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(log_probs, labels, message):
    with pytest.raises(ValueError, match=message):
        uncertainty(log_probs, torch.tensor(labels))


def test_bad_other_data_and_scores_are_refused():
    with pytest.raises(ValueError, match="ood_log_probs: expected log-probabilities that sum to 1"):
        uncertainty(GOOD, torch.tensor([0, 1, 2]), torch.zeros(1, 3, 4))
    for bad in (torch.zeros(0), torch.zeros(2, 2), torch.tensor([math.nan])):
        with pytest.raises(ValueError, match=r"ood_scores: expected numbers of shape \(data,\)"):
            ood_auroc(torch.zeros(3), bad)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional", None)
    with pytest.raises(
        ImportError, match=r'uncertainty: expected torchmetrics; pip install "pyro-sparsevd\[metrics\]"'
    ):
        uncertainty(GOOD, torch.tensor([0, 1, 2]))


@pytest.fixture
def split(device):
    return Split(torch.randn(23, 1, 2, 2, device=device), torch.randint(3, (23,), device=device))


def _network(device):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).to(device)


@pytest.fixture
def bayesian(device):
    """A model of fewer data than there are to predict, and a guide whose samples differ much."""
    bnn = svd.bayesianize(_network(device))
    model = svd.Supervised(bnn, lambda logits: dist.Categorical(logits=logits), num_data=10)
    return model, svd.AutoSparseNormal(model, init_log_variance=-1.0)


def test_a_network_has_the_error_and_the_likelihood_that_training_finds(device, split):
    network = _network(device).train()
    log_probs = network_log_probs(network, split, batch_size=5)
    assert log_probs.shape == (1, 23, 3)
    assert network.training
    found = uncertainty(log_probs, split.labels)
    assert found.error == pytest.approx(error(network, split))
    assert found.nll == pytest.approx(negative_log_likelihood(network, split), rel=1e-6)
    assert found.mutual_information == 0


@pytest.mark.parametrize("sparsified", [False, True])
def test_samples_predict_as_the_network_given_the_latents_of_the_guide(bayesian, split, sparsified):
    model, guide = bayesian
    if sparsified:
        summary = svd.sparsify(guide, {"1.weight": -20.0})
        guide = guide.sparsified(summary)
    pyro.set_rng_seed(1)
    found = sampled_log_probs(model, guide, split, num_samples=4)
    pyro.set_rng_seed(1)
    model.eval()
    for log_probs in found:
        latents = guide()
        assert bool((latents["1.weight"] == 0).all()) is sparsified
        with torch.no_grad():
            logits = pyro.poutine.condition(model.network, data=latents)(split.images)
        torch.testing.assert_close(log_probs, logits.double().log_softmax(-1), rtol=1e-5, atol=1e-5)


def test_samples_are_distributed_as_those_of_predictive(bayesian, split):
    model, guide = bayesian
    split = Split(split.images[:10], split.labels[:10])
    found = sampled_log_probs(model, guide, split, num_samples=1_000).exp()
    predictive = Predictive(model.eval(), guide=guide, num_samples=1_000, return_sites=["_RETURN"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", svd.ImproperPriorWarning)
        expected = predictive(split.images)["_RETURN"].double().softmax(-1)
    # The standard error of each mean is about 0.01.
    torch.testing.assert_close(found.mean(0), expected.mean(0), rtol=0, atol=0.06)
    torch.testing.assert_close(found.std(0), expected.std(0), rtol=0, atol=0.06)


def test_the_samples_do_not_depend_on_the_size_of_the_batches(bayesian, split):
    model, guide = bayesian
    found = []
    for size in (1, 7, 1_000):
        pyro.set_rng_seed(2)
        found.append(sampled_log_probs(model, guide, split, num_samples=3, batch_size=size))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-5)


def test_a_model_is_left_as_it_was(bayesian, split):
    model, guide = bayesian
    model.train()
    model.network[3].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    log_probs = sampled_log_probs(model, guide, split, num_samples=2)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not log_probs.requires_grad


def test_the_labels_of_other_data_may_be_anything(bayesian, split):
    model, guide = bayesian
    other = Split(split.images, split.labels + 100)
    assert sampled_log_probs(model, guide, other, num_samples=2).isfinite().all()


def test_a_guide_that_lacks_a_latent_is_refused(bayesian, split, device):
    model, _ = bayesian
    smaller = svd.bayesianize(nn.Sequential(nn.Flatten(), nn.Linear(4, 6)).to(device))
    other = svd.AutoSparseNormal(svd.Supervised(smaller, lambda logits: dist.Categorical(logits=logits), num_data=10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", svd.ImproperPriorWarning)
        with pytest.raises(ValueError, match=r"4\.weight: expected this latent of the model in the guide"):
            sampled_log_probs(model, other, split)


def test_samples_need_a_positive_number(bayesian, split):
    with pytest.raises(ValueError, match="num_samples: expected a positive integer, but got 0"):
        sampled_log_probs(*bayesian, split, num_samples=0)
