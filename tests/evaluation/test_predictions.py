"""What networks and samples of a posterior predict, against the same by hand."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import nn

import pyro_sparsevd as svd
from pyro_sparsevd.evaluation import network_predictions, sampled_predictions, scores
from pyro_sparsevd.poutine import observations


def categorical(logits):
    return dist.Categorical(logits=logits)


@pytest.fixture
def data(device):
    return torch.randn(23, 1, 2, 2, device=device), torch.randint(3, (23,), device=device)


def batches(data, size=5):
    return list(zip(*(part.split(size) for part in data), strict=True))


def _network(device):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).to(device)


@pytest.fixture
def bayesian(device):
    """A model of fewer data than there are to predict, and a guide whose samples differ much."""
    bnn = svd.bayesianize(_network(device))
    model = svd.Supervised(bnn, categorical, num_data=10)
    return model, svd.AutoSparseNormal(model, init_log_variance=-1.0)


def test_a_network_has_the_scores_of_its_logits(device, data):
    network = _network(device).train()
    found = network_predictions(network, categorical, iter(batches(data)))
    assert network.training
    with torch.no_grad():
        logits = network.eval()(data[0])
    assert found.log_probs.shape == (1, 23, 3)
    assert torch.equal(found.targets, data[1])
    numbers = scores(found)
    assert numbers["error"] == pytest.approx(float((logits.argmax(-1) != data[1]).float().mean()))
    assert numbers["nll"] == pytest.approx(float(nn.functional.cross_entropy(logits, data[1])), rel=1e-6)
    assert numbers["mutual_information"] == 0


@pytest.mark.parametrize("sparsified", [False, True])
def test_samples_predict_as_the_network_given_the_latents(bayesian, data, sparsified):
    model, guide = bayesian
    if sparsified:
        summary = svd.sparsify(guide, {"1.weight": -20.0})
        guide = guide.sparsified(summary)
    pyro.set_rng_seed(1)
    found = sampled_predictions(model, guide, batches(data), num_samples=4).log_probs
    pyro.set_rng_seed(1)
    model.eval()
    for log_probs in found:
        latents = guide()
        assert bool((latents["1.weight"] == 0).all()) is sparsified
        with torch.no_grad():
            logits = pyro.poutine.condition(model.network, data=latents)(data[0])
        torch.testing.assert_close(log_probs, logits.double().log_softmax(-1), rtol=1e-5, atol=1e-5)


def test_samples_are_distributed_as_those_of_predictive(bayesian, data):
    model, guide = bayesian
    x, y = (part[:10] for part in data)
    found = sampled_predictions(model, guide, [(x, y)], num_samples=1_000).log_probs.exp()
    predictive = Predictive(model.eval(), guide=guide, num_samples=1_000, return_sites=["_RETURN"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", svd.ImproperPriorWarning)
        expected = predictive(x)["_RETURN"].double().softmax(-1)
    # The standard error of each mean is about 0.01.
    torch.testing.assert_close(found.mean(0), expected.mean(0), rtol=0, atol=0.06)
    torch.testing.assert_close(found.std(0), expected.std(0), rtol=0, atol=0.06)


def test_the_samples_do_not_depend_on_the_size_of_the_batches(bayesian, data):
    found = []
    for size in (1, 7, 1_000):
        pyro.set_rng_seed(2)
        found.append(sampled_predictions(*bayesian, batches(data, size), num_samples=3).log_probs)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-5)


def test_a_model_is_left_as_it_was(bayesian, data):
    model, guide = bayesian
    model.train()
    model.network[3].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = sampled_predictions(model, guide, batches(data), num_samples=2)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not found.log_probs.requires_grad
    assert not found.log_likelihoods.requires_grad


def test_a_network_leaves_no_trace(device, data):
    likelihood = svd.GaussianLikelihood().to(device)
    network, y = _network(device), torch.randn(23, 3, device=device)
    first = network_predictions(network, likelihood, batches((data[0], y)))
    torch.rand(1)
    state = torch.get_rng_state()
    second = network_predictions(network, likelihood, batches((data[0], y)))
    assert scores(first) == scores(second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store().keys())


def test_a_network_whose_class_is_pyros_is_left_as_it_was(device, data):
    network = pyro.nn.PyroModule[nn.Sequential](nn.Flatten(), pyro.nn.PyroModule[nn.Linear](4, 3)).to(device)
    before = [dict(vars(module)) for module in network.modules()]
    network_predictions(network, categorical, batches(data))
    assert [vars(module) for module in network.modules()] == before


def test_probabilities_of_low_precision_sum_to_1(data):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).bfloat16()
    found = network_predictions(network, categorical, batches((data[0].cpu().bfloat16(), data[1].cpu())))
    assert (found.log_probs.logsumexp(-1).abs() < 1e-12).all()
    assert scores(found)["entropy"] > 0


# Likelihoods: a network that gives back its input, and two samples that are constants.


def of_two(likelihood, outputs, y):
    """Predictions of two samples of one latent, whose networks return ``outputs[0]`` and ``outputs[1]``."""

    class Either(pyro.nn.PyroModule):
        def forward(self, x):
            return outputs[int(pyro.sample("which", dist.Bernoulli(0.5)))]

    turns = iter([0.0, 1.0])
    model = svd.Supervised(Either(), likelihood, num_data=100)
    guide = lambda x, y: pyro.sample("which", dist.Delta(torch.tensor(next(turns))))  # noqa: E731
    return sampled_predictions(model, guide, [(torch.zeros(len(y)), y)], num_samples=2)


def test_the_likelihood_is_that_of_the_mixture(device):
    outputs, y = torch.randn(2, 7, device=device), torch.randn(7, device=device)
    found = of_two(lambda mean: dist.Normal(mean, 0.5), outputs, y)
    density = dist.Normal(outputs, 0.5).log_prob(y).exp().mean(0)
    numbers = scores(found)
    assert numbers["nll"] == pytest.approx(-float(density.log().mean()), rel=1e-6)
    assert numbers["rmse"] == pytest.approx(float((outputs.mean(0) - y).square().mean().sqrt()), rel=1e-6)
    assert len(found.draws) == 500


def test_coverage_and_crps_are_those_of_the_mixture(device):
    outputs = torch.tensor([-3.0, 3.0], device=device)[:, None].expand(2, 2000)
    half = torch.arange(2000, device=device) % 2
    y = outputs[half, torch.arange(2000, device=device)] + torch.randn(2000, device=device)
    found = scores(of_two(lambda mean: dist.Normal(mean, 1.0), outputs, y))
    assert found["coverage"] == pytest.approx(0.9, abs=0.03)
    # E|Y - Y'| / 2 of the mixture, as y is of it: half of the mean of E|N(0, 2)| and E|N(6, 2)|
    assert found["crps"] == pytest.approx((2 / math.sqrt(math.pi) + 6.0) / 4, abs=0.08)
    alone = scores(network_predictions(nn.Identity(), lambda x: dist.Normal(x, 1.0), [(outputs[0], y)]))
    assert alone["coverage"] < 0.5


@pytest.mark.parametrize(
    ("likelihood", "largest"),
    [
        (lambda f: dist.Poisson(f.exp()), 100),
        (lambda f: dist.NegativeBinomial(5.0, logits=f), 1000),
        (lambda f: dist.Geometric(logits=f), 100),
        (lambda f: dist.Bernoulli(logits=f), 1),
        (lambda f: dist.Binomial(10, logits=f), 10),
    ],
    ids=["Poisson", "negative binomial", "geometric", "Bernoulli", "binomial"],
)
def test_the_error_is_that_of_the_mode_of_the_mixture(likelihood, largest):
    outputs = 1.5 * torch.randn(2, 60, dtype=torch.double)
    parts, values = likelihood(outputs), torch.arange(largest + 1.0, dtype=torch.double)
    modes = parts.log_prob(values[:, None, None]).exp().mean(1).argmax(0).double()
    y = torch.where(torch.rand(60) < 0.5, modes, parts.sample()[0])
    found = scores(of_two(likelihood, outputs, y))
    assert found["error"] == pytest.approx(float((modes != y).double().mean()))
    assert found["nll"] == pytest.approx(-float(parts.log_prob(y).exp().mean(0).log().mean()), rel=1e-6)


def test_a_datum_may_have_several_targets(device):
    outputs, y = torch.randn(2, 9, 3, device=device), torch.randint(2, (9, 3), device=device).float()
    found = of_two(lambda f: dist.Bernoulli(logits=f).to_event(1), outputs, y)
    log_probs = dist.Bernoulli(logits=outputs).log_prob(y)
    assert (found.log_likelihoods.shape, found.log_probs.shape) == ((2, 9), (2, 27, 2))
    numbers = scores(found)
    assert numbers["nll"] == pytest.approx(-float((log_probs.sum(-1).logsumexp(0) - math.log(2)).mean()), rel=1e-5)
    wrong = (outputs.sigmoid().mean(0) > 0.5).float() != y
    assert numbers["error"] == pytest.approx(float(wrong.double().mean()))
    assert numbers["brier"] == pytest.approx(2 * float((outputs.sigmoid().mean(0) - y).square().mean()), rel=1e-5)


def test_masked_values_are_left_out_however_the_mask_is_written(device):
    output, y = torch.randn(9, 3, device=device), torch.randn(9, 3, device=device)
    seen = torch.arange(27, device=device).reshape(9, 3) % 4 > 0
    rows = torch.arange(9, device=device) > 2
    within = network_predictions(nn.Identity(), lambda f: dist.Normal(f, 1.0).mask(seen).to_event(1), [(output, y)])
    assert within.log_likelihoods.shape == (1, 9)
    assert scores(within)["rmse"] == pytest.approx(float((output - y)[seen].square().mean().sqrt()), rel=1e-6)
    of_rows = [
        lambda f: dist.Normal(f, 1.0).to_event(1).mask(rows),
        lambda f: dist.Normal(f, 1.0).mask(rows[:, None].expand(9, 3)).to_event(1),
    ]
    alone = network_predictions(nn.Identity(), lambda f: dist.Normal(f, 1.0).to_event(1), [(output[rows], y[rows])])
    for likelihood in of_rows:
        found = network_predictions(nn.Identity(), likelihood, [(output, y)])
        assert torch.equal(found.log_likelihoods, alone.log_likelihoods)
        assert torch.equal(found.targets, alone.targets)


def test_targets_that_are_all_masked_are_refused():
    none = torch.zeros(9, dtype=torch.bool)
    with pytest.raises(ValueError, match="batches: expected at least one target that is not masked, but got none"):
        network_predictions(nn.Identity(), lambda f: dist.Normal(f, 1.0).mask(none), [(torch.zeros(9), torch.zeros(9))])


def test_one_hot_targets_are_classes(device):
    logits, labels = torch.randn(20, 4, device=device), torch.randint(4, (20,), device=device)
    one_hot = nn.functional.one_hot(labels, 4).float()
    found = network_predictions(nn.Identity(), lambda f: dist.OneHotCategorical(logits=f), [(logits, one_hot)])
    expected = network_predictions(nn.Identity(), categorical, [(logits, labels)])
    assert torch.equal(found.targets, labels)
    assert scores(found) == pytest.approx(scores(expected))


def test_vectors_have_the_mean_error_of_their_elements(device):
    mean, y = torch.randn(20, 2, device=device), torch.randn(20, 2, device=device)
    covariance = torch.tensor([[1.0, 0.5], [0.5, 2.0]], device=device)
    found = network_predictions(nn.Identity(), lambda f: dist.MultivariateNormal(f, covariance), [(mean, y)])
    assert found.draws.shape == (500, 20, 2)
    numbers = scores(found)
    assert numbers["rmse"] == pytest.approx(float((mean - y).square().mean().sqrt()), rel=1e-6)
    assert set(numbers) == {"nll", "rmse", "crps", "coverage"}


def test_a_prediction_without_mean_or_mode_has_a_likelihood(device):
    x = torch.zeros(5, device=device)
    cauchy = scores(network_predictions(nn.Identity(), lambda f: dist.Cauchy(f, 1.0), [(x, x)]))
    assert math.isnan(cauchy["rmse"])
    assert math.isnan(cauchy["crps"])
    assert cauchy["nll"] == pytest.approx(math.log(math.pi))
    assert cauchy["coverage"] == 1.0
    counts = scores(
        network_predictions(nn.Identity(), lambda f: dist.ZeroInflatedPoisson(f.exp(), gate=0 * f), [(x, x)])
    )
    assert math.isnan(counts["error"])
    assert counts["nll"] == pytest.approx(1.0)


class Sum(nn.Module):
    """A network of two inputs, given one after the other or as a dictionary."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, a, b=None):
        a, b = (a["a"], a["b"]) if isinstance(a, dict) else (a, b)
        return self.layer(a + b)


def test_inputs_are_a_tensor_a_tuple_or_a_dictionary(device):
    network, y = Sum().to(device), torch.randint(3, (8,), device=device)
    a, b = torch.randn(2, 8, 4, device=device)
    expected = scores(network_predictions(network.layer, categorical, [(a + b, y)]))
    model = svd.Supervised(svd.bayesianize(network), categorical, num_data=8)
    guide = svd.AutoSparseNormal(model, init_log_variance=-60.0)
    loader = torch.utils.data.DataLoader([((a[i].cpu(), b[i].cpu()), y[i].cpu()) for i in range(8)], batch_size=3)
    for data in ([((a, b), y)], [[[a, b], y]], [({"a": a, "b": b}, y)], loader, lambda: iter(loader)):
        assert scores(network_predictions(network, categorical, data)) == pytest.approx(expected, rel=1e-5)
        found = scores(sampled_predictions(model, guide, data, num_samples=2))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


BAD = {
    "no batch": ([], ValueError, "batches: expected at least one batch, but got none"),
    "no batches": (3, TypeError, r"batches: expected batches \(x, y\), such as a DataLoader, but got int"),
    "one tensor": (torch.zeros(4, 4), TypeError, "batches: expected batches .* but got Tensor"),
    "inputs alone": ([torch.zeros(2, 4)], ValueError, r"batches: expected pairs \(x, y\) .* but got a Tensor"),
    "three": ([(1, 2, 3)], ValueError, r"batches: expected pairs \(x, y\) .* but got a tuple of 3"),
    "a dictionary": ([{"x": 1}], ValueError, r"batches: expected pairs \(x, y\) .* but got a dict of 1"),
    "no targets": ([(torch.zeros(2, 4), None)], ValueError, "batches: expected targets y in each batch, but got None"),
    "fewer": ([(torch.zeros(2, 4), torch.zeros(3))], ValueError, "expected as many targets as inputs, but got 2 and 3"),
    "a class too many": ([(torch.zeros(2, 4), torch.tensor([0, 3]))], ValueError, "within the support"),
    "scalars": ([(torch.zeros(2, 4), torch.zeros(2, 1))], ValueError, r"y: expected targets of shape \(2,\)"),
}


@pytest.mark.parametrize(("data", "error", "message"), BAD.values(), ids=BAD)
def test_bad_batches_are_refused(data, error, message):
    network = nn.Linear(4, 3)
    model = svd.Supervised(svd.bayesianize(network), categorical, num_data=10)
    with pytest.raises(error, match=message):
        network_predictions(network, categorical, data)
    with pytest.raises(error, match=message):
        sampled_predictions(model, svd.AutoSparseNormal(model), data)


def test_a_bayesian_network_is_no_deterministic_one():
    with pytest.raises(TypeError, match="net: expected a deterministic network, but it is Bayesian; prune it first"):
        network_predictions(svd.bayesianize(nn.Linear(4, 3)), categorical, [])


def test_a_guide_that_lacks_a_latent_is_refused(bayesian, data, device):
    model, _ = bayesian
    smaller = svd.bayesianize(nn.Sequential(nn.Flatten(), nn.Linear(4, 6)).to(device))
    other = svd.AutoSparseNormal(svd.Supervised(smaller, categorical, num_data=10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", svd.ImproperPriorWarning)
        with pytest.raises(ValueError, match=r"4\.weight: expected this latent of the model in the guide"):
            sampled_predictions(model, other, batches(data))


@pytest.mark.parametrize("number", [0, -1, 2.0, True])
def test_samples_need_a_positive_number(bayesian, data, number):
    with pytest.raises(ValueError, match=f"num_samples: expected a positive integer, but got {number}"):
        sampled_predictions(*bayesian, batches(data), num_samples=number)


def test_targets_that_are_no_classes_are_refused(device):
    soft = lambda f: dist.Bernoulli(logits=f.squeeze(-1), validate_args=False)  # noqa: E731
    found = network_predictions(nn.Linear(2, 1).to(device), soft, [(torch.zeros(3, 2), torch.tensor([0.0, 1.0, 1.0]))])
    assert found.targets.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="targets: expected classes of the likelihood, but some are none of them"):
        network_predictions(nn.Linear(2, 1), soft, [(torch.zeros(2, 2), torch.tensor([0.0, 0.9]))])


def test_modes_far_apart_are_searched_in_a_bounded_time(device):
    rates = torch.tensor([[10.0, 1e6], [2e6, 1e6]], device=device)
    parts = tuple(dist.Poisson(rate) for rate in rates)
    assert observations._mode(parts).tolist() == [10.0, 1e6]
    with pytest.raises(NotImplementedError):
        observations._mode((dist.Poisson(torch.tensor([math.inf]), validate_args=False),))
