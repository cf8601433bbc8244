"""Uncertainty of predictions, against slow twins and cases whose answer is known."""

import math
import sys

import pyro.distributions as dist
import pytest
import torch
from torchmetrics.functional import regression

from pyro_sparsevd.evaluation import Predictions, entropies, ood_auroc, scores


def predictions(log_probs, labels):
    """Classes that several networks predict."""
    log_probs = log_probs.double()
    likelihoods = log_probs.gather(-1, labels.expand(len(log_probs), -1)[..., None])[..., 0]
    errors = (log_probs.logsumexp(0).argmax(-1) != labels).double()
    return Predictions(likelihoods, labels, errors, log_probs)


def uncertainty(log_probs, labels, ood_log_probs=None):
    none = torch.zeros(1 if ood_log_probs is None else ood_log_probs.shape[1], device=labels.device).long()
    return scores(predictions(log_probs, labels), None if ood_log_probs is None else predictions(ood_log_probs, none))


def slow_uncertainty(log_probs, labels, num_bins=15):
    """Every number by loops over plain Python floats."""
    probs = log_probs.double().exp().tolist()
    samples, (count, classes) = len(probs), log_probs.shape[1:]
    entropy = lambda p: -sum(x * math.log(x) for x in p if x > 0)  # noqa: E731
    found = dict.fromkeys(["error", "nll", "brier", "entropy", "mutual_information"], 0.0)
    bins = [[] for _ in range(num_bins)]
    for n, label in enumerate(labels.tolist()):
        mean = [sum(probs[s][n][c] for s in range(samples)) / samples for c in range(classes)]
        confidence = max(mean)
        found["error"] += (mean.index(confidence) != label) / count
        found["nll"] -= (math.log(mean[label]) if mean[label] > 0 else -math.inf) / count
        found["brier"] += sum((mean[c] - (c == label)) ** 2 for c in range(classes)) / count
        found["entropy"] += entropy(mean) / count
        found["mutual_information"] += (entropy(mean) - sum(entropy(p[n]) for p in probs) / samples) / count
        bins[min(int(confidence * num_bins), num_bins - 1)].append((confidence, mean.index(confidence) == label))
    gaps = [abs(sum(hit for _, hit in found) - sum(confidence for confidence, _ in found)) for found in bins]
    return found | {"calibration_error": sum(gaps) / count}


def slow_auroc(scores, ood_scores):
    pairs = [(a, b) for a in scores.tolist() for b in ood_scores.tolist()]
    return sum((b > a) + 0.5 * (b == a) for a, b in pairs) / len(pairs)


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
    assert found == pytest.approx(slow_uncertainty(log_probs, labels), rel=1e-4, abs=1e-6)


# NLL, error, Brier score, calibration error, entropy
KNOWN = {
    "perfect": (torch.eye(10), [0.0, 0.0, 0.0, 0.0, 0.0]),
    "always wrong and sure": (torch.eye(10).roll(1, 0), [math.inf, 1.0, 2.0, 1.0, 0.0]),
    "uniform": (torch.full((10, 10), 0.1), [math.log(10), 0.9, 0.9, 0.0, math.log(10)]),
    "sure of the first": (torch.eye(10)[:1].expand(10, 10), [math.inf, 0.9, 1.8, 0.9, 0.0]),
}


@pytest.mark.parametrize(("probs", "expected"), KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("samples", [1, 3])
def test_known_predictions_have_known_numbers(device, probs, expected, samples):
    log_probs = probs.to(device).log().expand(samples, -1, -1)
    found = list(uncertainty(log_probs, torch.arange(10, device=device)).values())
    assert found == pytest.approx([*expected, 0.0], abs=2e-7)


def test_predictions_whose_labels_are_drawn_from_them_are_calibrated(device):
    logits = torch.randn(100_000, 5, device=device)
    labels = dist.Categorical(logits=logits).sample()
    assert uncertainty(logits.log_softmax(-1)[None], labels)["calibration_error"] < 0.01
    sharper = (3 * logits).log_softmax(-1)[None]
    assert uncertainty(sharper, labels)["calibration_error"] > 0.2


def test_a_confidence_of_one_shares_the_bin_of_those_that_are_nearly_one(device):
    # Two right at 1 - 1e-3, two wrong at 1: in bins of their own the gaps would be 0.0005 + 0.5.
    probs = torch.tensor([[0.999, 0.001], [0.999, 0.001], [1.0, 0.0], [1.0, 0.0]], device=device)
    labels = torch.tensor([0, 0, 1, 1], device=device)
    assert uncertainty(probs.log()[None], labels)["calibration_error"] == pytest.approx(0.4995, abs=1e-5)


def test_probabilities_rounded_above_one_are_not_taken_for_logits(device):
    log_probs = torch.tensor([[[1e-6, -30.0], [1e-6, -30.0]]], device=device)
    assert uncertainty(log_probs, torch.zeros(2, device=device).long())["calibration_error"] < 1e-5


def test_means_over_samples_do_not_underflow(device):
    tiny = -1e4
    log_probs = torch.tensor([[[0.0, tiny]], [[0.0, tiny + math.log(3)]]], device=device, dtype=torch.double)
    found = uncertainty(log_probs, torch.ones(1, device=device).long())
    assert found["nll"] == pytest.approx(-tiny - math.log(2))


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
    assert found["ood_auroc"] == pytest.approx(slow_auroc(*(-c for c in confidences)), abs=1e-6)
    assert "ood_auroc" not in uncertainty(log_probs, labels)


GOOD = torch.full((2, 3, 4), 0.25).log()
BAD = {
    "two dimensions": (GOOD[0], r"log_probs: expected the shape \(samples, data, classes\), but got \(3, 4\)"),
    "no samples": (GOOD[:0], r"log_probs: expected the shape .* but got \(0, 3, 4\)"),
    "logits": (GOOD * 2, "log_probs: expected log-probabilities that sum to 1, as logits.log_softmax"),
    "probabilities": (GOOD.exp(), "log_probs: expected log-probabilities that sum to 1"),
    "NaN": (GOOD * math.nan, "log_probs: expected log-probabilities that sum to 1"),
}


@pytest.mark.parametrize(("log_probs", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(log_probs, message):
    with pytest.raises(ValueError, match=message):
        entropies(log_probs)


def test_bad_scores_are_refused():
    for bad in (torch.zeros(0), torch.zeros(2, 2), torch.tensor([math.nan])):
        with pytest.raises(ValueError, match=r"ood_scores: expected numbers of shape \(data,\)"):
            ood_auroc(torch.zeros(3), bad)


def test_other_data_must_be_of_classes_too():
    of_classes = predictions(GOOD, torch.tensor([0, 1, 2]))
    of_counts = Predictions(torch.zeros(2, 3), torch.arange(3), torch.zeros(3))
    for pair in ((of_classes, of_counts), (of_counts, of_classes)):
        with pytest.raises(ValueError, match="ood: expected predictions of classes"):
            scores(*pair)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional", None)
    with pytest.raises(ImportError, match=r'scores: expected torchmetrics; pip install "pyro-sparsevd\[metrics\]"'):
        uncertainty(GOOD, torch.tensor([0, 1, 2]))


# Real targets.


def of_draws(draws, targets):
    """What is predicted of real targets, by samples of the mean prediction."""
    errors = (draws.mean(0) - targets).square()
    return Predictions(torch.zeros(1, len(targets)), targets, errors, draws=draws)


def slow_crps(draws, targets):
    """The distance of draws and target less half of that of different draws, by loops."""
    count, found = len(draws), 0.0
    for column, y in zip(draws.T.tolist(), targets.tolist(), strict=True):
        pairs = sum(abs(a - b) for a in column for b in column) / (count * (count - 1))
        found += sum(abs(a - y) for a in column) / count - pairs / 2
    return found / len(targets)


@pytest.mark.parametrize("count", [2, 3, 40])
def test_crps_is_that_of_the_slow_twin(device, count):
    draws, targets = torch.randn(count, 30, device=device).double(), torch.randn(30, device=device).double()
    assert scores(of_draws(draws, targets))["crps"] == pytest.approx(slow_crps(draws, targets))


@pytest.mark.skipif(not hasattr(regression, "continuous_ranked_probability_score"), reason="an older torchmetrics")
def test_crps_of_the_ensemble_is_that_of_torchmetrics(device):
    crps = regression.continuous_ranked_probability_score
    draws, targets = torch.randn(50, 30, device=device).double(), torch.randn(30, device=device).double()
    distance = (draws - targets).abs().mean()
    spread = 2 * (distance - crps(draws.T, targets))  # the mean over all pairs, equal ones among them
    assert scores(of_draws(draws, targets))["crps"] == pytest.approx(float(distance - spread * 50 / 49 / 2))


def test_crps_of_a_normal_prediction_is_the_closed_form(device):
    # Gneiting and Raftery (2007), equation 21
    targets = torch.linspace(-3, 3, 31, device=device, dtype=torch.double)
    draws = 2 * torch.randn(20_000, 31, device=device, dtype=torch.double) + 0.5
    z, unit = (targets - 0.5) / 2, dist.Normal(torch.tensor(0.0, device=device), 1.0)
    exact = 2 * (z * (2 * unit.cdf(z) - 1) + 2 * unit.log_prob(z).exp() - 1 / math.sqrt(math.pi))
    assert scores(of_draws(draws, targets))["crps"] == pytest.approx(float(exact.mean()), abs=0.03)


def test_coverage_is_the_fraction_in_the_central_interval(device):
    draws = torch.linspace(0, 1, 1001, device=device)[:, None].expand(-1, 5)
    targets = torch.tensor([0.01, 0.06, 0.5, 0.94, 0.96], device=device)
    assert scores(of_draws(draws, targets))["coverage"] == pytest.approx(3 / 5)


def test_rmse_is_the_root_of_the_mean_squared_error(device):
    found = of_draws(torch.zeros(4, 2, device=device), torch.tensor([3.0, -4.0], device=device))
    assert scores(found)["rmse"] == pytest.approx(math.sqrt(12.5))
