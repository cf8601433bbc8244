"""Likelihoods with parameters of their own: their densities by hand, and what is learnt of known data."""

import math

import pytest
import torch
from torch import nn

import pyro_sparsevd as svd
from pyro_sparsevd.nn.likelihoods import (
    GaussianLikelihood,
    HeteroscedasticGaussianLikelihood,
    NegativeBinomialLikelihood,
    StudentTLikelihood,
)


def _normal(y, mean, scale):
    return -0.5 * ((y - mean) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def _student_t(y, mean, scale, df):
    normalizer = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * (df * math.pi).log() - scale.log()
    return normalizer - (df + 1) / 2 * (1 + ((y - mean) / scale) ** 2 / df).log()


def _negative_binomial(y, mean, r):
    counts = torch.lgamma(y + r) - torch.lgamma(y + 1) - torch.lgamma(r)
    return counts + r * (r / (r + mean)).log() + y * (mean / (r + mean)).log()


def _number(value):
    return torch.tensor(value, dtype=torch.double)


# A likelihood, the outputs for a target, its log density by hand
BY_HAND = {
    "Gaussian": (GaussianLikelihood(0.5), 1, lambda f, y: _normal(y, f, _number(0.5))),
    "heteroscedastic": (
        HeteroscedasticGaussianLikelihood(0.1),
        2,
        lambda f, y: _normal(y, f[..., 0], 0.1 + (1 + f[..., 1].exp()).log()),
    ),
    "Student t": (StudentTLikelihood(0.5, 3.0), 1, lambda f, y: _student_t(y, f, _number(0.5), _number(3.0))),
    "negative binomial": (
        NegativeBinomialLikelihood(2.5),
        1,
        lambda f, y: _negative_binomial(y, f.exp(), _number(2.5)),
    ),
}


def _outputs_and_targets(likelihood, outputs, shape, scale, device):
    f = scale * torch.randn(*shape, *([2] if outputs == 2 else []), dtype=torch.double, device=device)
    y = torch.randn(shape, dtype=torch.double, device=device)
    return f.requires_grad_(), y.abs().mul(5).round() if isinstance(likelihood, NegativeBinomialLikelihood) else y


@pytest.mark.parametrize(("likelihood", "outputs", "by_hand"), BY_HAND.values(), ids=BY_HAND)
@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 2, 3)])
def test_the_density_is_that_of_the_formula(device, likelihood, outputs, by_hand, shape):
    likelihood = likelihood.to(device, torch.double)
    f, y = _outputs_and_targets(likelihood, outputs, shape, 1.0, device)
    found = likelihood(f)
    assert (found.batch_shape, found.event_shape) == ((6,), shape[1:])
    expected = by_hand(f, y).reshape(6, -1).sum(-1)
    torch.testing.assert_close(found.log_prob(y), expected, rtol=1e-6, atol=1e-6)  # the parameters are of float32


@pytest.mark.parametrize(("likelihood", "outputs", "by_hand"), BY_HAND.values(), ids=BY_HAND)
@pytest.mark.parametrize("size", [0.0, 1e-10, 1e2, 1e4, 1e8])
@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_gradients_are_finite_at_extreme_outputs(device, likelihood, outputs, by_hand, size, dtype):
    likelihood = likelihood.to(device, dtype)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=dtype, device=device)
    f = (size * (signs if outputs == 2 else signs[:, 0])).requires_grad_()
    for target in (0.0, 3.0, 1000.0):
        loss = -likelihood(f).log_prob(torch.full((4,), target, dtype=dtype, device=device)).sum()
        found = torch.autograd.grad(loss, [f, *likelihood.parameters()])
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in found)


def _fitted(likelihood, outputs, x, y, device, epochs=400):
    torch.manual_seed(0)
    network = nn.Linear(1, outputs) if outputs > 1 else nn.Sequential(nn.Linear(1, 1), nn.Flatten(0))
    bnn = svd.bayesianize(network.to(device))
    model = svd.Supervised(bnn, likelihood.to(device), num_data=len(x))
    guide = svd.AutoSparseNormal(model)
    history = svd.fit(model, guide, [(x.to(device), y.to(device))], epochs=epochs, lr=0.05)
    assert history[-1]["nll"] < history[0]["nll"]
    return model.likelihood, svd.prune(bnn, guide, svd.sparsify(guide))


def test_the_scale_of_a_regression_is_learnt(device):
    torch.manual_seed(0)
    x = torch.randn(2_000, 1)
    likelihood, _ = _fitted(GaussianLikelihood(), 1, x, x[:, 0] + 0.3 * torch.randn(2_000), device)
    standard_error = 0.3 / math.sqrt(2 * 2_000)
    assert abs(likelihood.scale.item() - 0.3) < 4 * standard_error + 0.005  # and the optimiser's noise


def test_the_scale_of_each_target_is_learnt(device):
    torch.manual_seed(0)
    x = torch.randn(2_000, 1)
    scale = 0.01 + nn.functional.softplus(x[:, 0] - 1)
    y = 2 * x[:, 0] + scale * torch.randn(2_000)
    _, network = _fitted(HeteroscedasticGaussianLikelihood(0.01), 2, x, y, device, epochs=1_500)
    line = network(torch.tensor([[0.0], [1.0]], device=device)).detach().cpu()
    torch.testing.assert_close(line, torch.tensor([[0.0, -1.0], [2.0, 0.0]]), rtol=0, atol=0.15)


def test_scale_and_degrees_of_freedom_are_learnt(device):
    torch.manual_seed(0)
    x = torch.randn(5_000, 1)
    noise = torch.distributions.StudentT(3.0).sample((5_000,))
    likelihood, network = _fitted(StudentTLikelihood(), 1, x, 2 * x[:, 0] + 0.3 * noise, device)
    assert likelihood.df.item() == pytest.approx(3.0, abs=0.6)  # four standard errors
    assert likelihood.scale.item() == pytest.approx(0.3, abs=0.03)
    assert network[0].weight.item() == pytest.approx(2.0, abs=0.03)


def test_the_dispersion_of_counts_is_learnt(device):
    torch.manual_seed(0)
    x = torch.randn(5_000, 1)
    rate = torch.distributions.Gamma(2.0, 2.0).sample((5_000,))  # of mean 1: with it, counts are negative binomial
    y = torch.poisson((1 + 0.5 * x[:, 0]).exp() * rate)
    likelihood, network = _fitted(NegativeBinomialLikelihood(), 1, x, y, device)
    assert likelihood.total_count.item() == pytest.approx(2.0, abs=0.25)
    assert network[0].weight.item() == pytest.approx(0.5, abs=0.06)
    assert network[0].bias.item() == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize(("likelihood", "outputs", "by_hand"), BY_HAND.values(), ids=BY_HAND)
def test_parameters_follow_to_and_the_state(device, likelihood, outputs, by_hand):
    likelihood = likelihood.to(device, torch.double)
    assert all(p.dtype == torch.double for p in likelihood.parameters())
    other = type(likelihood)().to(device)
    other.load_state_dict(likelihood.state_dict())
    for mine, theirs in zip(likelihood.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.double())


def test_a_datum_may_have_several_targets(device):
    network = svd.bayesianize(nn.Linear(3, 2)).to(device)
    model = svd.Supervised(network, GaussianLikelihood(), num_data=50).to(device)
    loss = svd.SparseVD_ELBO()(model, svd.AutoSparseNormal(model))
    assert loss(torch.randn(10, 3, device=device), torch.randn(10, 2, device=device)).isfinite()
    assert GaussianLikelihood()(torch.zeros(10, 2)).batch_shape == (10,)


@pytest.mark.parametrize("scale", [1e-50, 1e39])
def test_a_scale_that_single_precision_has_not_is_kept_by_its_logarithm(scale):
    assert GaussianLikelihood(scale).log_scale.item() == pytest.approx(math.log(scale))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    ("likelihood", "name"),
    [
        (GaussianLikelihood, "init_scale"),
        (HeteroscedasticGaussianLikelihood, "min_scale"),
        (StudentTLikelihood, "init_scale"),
        (NegativeBinomialLikelihood, "init_total_count"),
    ],
)
def test_a_parameter_that_is_not_positive_is_refused(likelihood, name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a positive number, but got {value}"):
        likelihood(**{name: value})


@pytest.mark.parametrize("df", [1.0, 0.5, math.nan, math.inf])
def test_degrees_of_freedom_without_a_mean_are_refused(df):
    with pytest.raises(ValueError, match=f"init_df: expected a number above 1, but got {df}"):
        StudentTLikelihood(init_df=df)


@pytest.mark.parametrize("shape", [(2,), (5, 3), (5, 2, 1)])
def test_a_network_without_two_outputs_is_refused(shape):
    with pytest.raises(ValueError, match=r"Heteroscedastic.*expected outputs of shape \(N, ..., 2\), mean and scale"):
        HeteroscedasticGaussianLikelihood()(torch.zeros(shape))


def test_counts_that_are_none_are_refused():
    model = svd.Supervised(svd.bayesianize(nn.Linear(3, 1)), NegativeBinomialLikelihood(), num_data=5)
    loss = svd.SparseVD_ELBO()(model, svd.AutoSparseNormal(model))
    for wrong in (-1.0, 0.5):
        with pytest.raises(ValueError, match="within the support"):
            loss(torch.zeros(5, 3), torch.full((5, 1), wrong))


@pytest.mark.parametrize("large", [1e4, 1e6, 1e8])
def test_at_their_limits_densities_and_gradients_are_the_poisson_and_the_gaussian_ones(large):
    f = torch.tensor([0.5], requires_grad=True)
    counts, reals = NegativeBinomialLikelihood(large), StudentTLikelihood(init_df=large)
    limits = torch.distributions.Poisson(f.exp()), torch.distributions.Normal(f, 1.0)
    for likelihood, limit, y in ((counts, limits[0], 3.0), (reals, limits[1], 1.5)):
        found = likelihood(f).log_prob(torch.tensor([y]))
        assert found.item() == pytest.approx(limit.log_prob(torch.tensor([y])).item(), abs=5e-4)
        found.backward()
        assert all(abs(p.grad.item()) < 1e-3 for name, p in likelihood.named_parameters() if name != "log_scale")


def test_the_degrees_of_freedom_stay_above_1():
    assert StudentTLikelihood(init_df=1 + 1e-9).df > 1
