"""The loss: values and parameters that are not valid for a distribution, which it learns of by one read."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch.distributions import Distribution

from problems import F64, NUM_DATA, model_and_guide, regression_data
from pyro_sparsevd import AutoSparseNormal, SparseVD_ELBO
from pyro_sparsevd.infer import elbo


@pytest.fixture(autouse=True)
def as_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(elbo, "is_waited_for", lambda *args: True)


def _rate(output):
    return output.squeeze(-1)


# The likelihood, targets for the sign of a number, and what is wrong: with a target, or with a parameter of any output.
INVALID = {
    "bernoulli": (lambda f: dist.Bernoulli(logits=_rate(f)), lambda y: 3 + 0 * y, "value argument"),
    "categorical": (lambda f: dist.Categorical(logits=torch.cat([f, -f], -1)), lambda y: 2 + 0 * y, "value argument"),
    "classes": (lambda f: dist.Categorical(logits=torch.cat([f, f], -1)), lambda y: y.long() - 9, "value argument"),
    "poisson": (lambda f: dist.Poisson(_rate(f).exp()), lambda y: 0.5 + 0 * y, "value argument"),
    "gamma": (lambda f: dist.Gamma(2.0, _rate(f).exp()), lambda y: -y.abs(), "value argument"),
    "rate": (lambda f: dist.Poisson(_rate(f)), lambda y: 1 + 0 * y, "parameter rate"),
    "scale": (lambda f: dist.Normal(_rate(f), -0.5), lambda y: y, "parameter scale"),
    "event": (lambda f: dist.Normal(f, -torch.ones_like(f)).to_event(1), lambda y: y[:, None], "parameter scale"),
    "probs": (lambda f: dist.Bernoulli(1.5 + 0 * _rate(f)), lambda y: 1 + 0 * y, "parameter probs"),
}
invalid = pytest.mark.parametrize(("likelihood", "targets", "what"), INVALID.values(), ids=INVALID)


@invalid
@pytest.mark.parametrize("way", ["loss", "svi"])
def test_the_first_step_and_a_later_one_name_the_site(likelihood, targets, what, way, device):
    model, guide = model_and_guide(device, likelihood=likelihood)
    with torch.no_grad():
        model.network[2].bias.fill_(-3.0)
    x, y = regression_data(device)
    elbo = SparseVD_ELBO()
    loss, svi = elbo(model, guide), SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), elbo)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^y: Expected {what}"):
            loss(x, targets(y)) if way == "loss" else svi.step(x, targets(y))
        assert all(p.grad is None for p in loss.parameters())
        elbo.terms = {"nll": torch.zeros(()), "kl": torch.zeros(())}  # as after a step
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    assert Distribution._validate_args is True


@invalid
def test_without_the_check_the_loss_is_nan(likelihood, targets, what, device):
    model, guide = model_and_guide(device, likelihood=likelihood)
    with torch.no_grad():
        model.network[2].bias.fill_(-3.0)
    x, y = regression_data(device)
    assert math.isnan(SparseVD_ELBO(check_finite=False).loss(model, guide, x, targets(y)))


@pytest.mark.parametrize("soft", ["argument", "default"])
def test_soft_targets_pass_where_nothing_is_to_be_validated(soft, device):
    options = {"validate_args": False} if soft == "argument" else {}
    model, guide = model_and_guide(device, 2.0, likelihood=lambda f: dist.Bernoulli(logits=0 * _rate(f), **options))
    x, y = regression_data(device)
    with pyro.validation_enabled(soft == "argument"):
        elbo = SparseVD_ELBO()
        elbo.loss(model, guide, x, y.sigmoid())
    torch.testing.assert_close(elbo.terms["nll"].item(), NUM_DATA * math.log(2))


@pytest.mark.parametrize("kl", ["exact", "monte_carlo"])
def test_a_guide_with_a_negative_scale_is_refused_by_name(kl, device):
    zero = torch.zeros((), dtype=F64, device=device)

    def model():
        pyro.sample("z", dist.Normal(zero, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(zero, pyro.param("scale", zero - 1.0)))

    with pytest.raises(ValueError, match=r"^z: Expected parameter scale"):
        SparseVD_ELBO(kl=kl).loss(model, guide)
    assert math.isnan(SparseVD_ELBO(kl=kl, check_finite=False).loss(model, guide))


def test_a_sample_of_the_guide_outside_the_prior_is_refused_by_name(device):
    zero = torch.zeros((), dtype=F64, device=device)

    def model():
        pyro.sample("z", dist.Gamma(zero + 2, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(zero - 9, 1.0))

    with pytest.raises(ValueError, match=r"^z: Expected value argument"):
        SparseVD_ELBO().loss(model, guide)


def test_what_is_not_finite_is_named_before_what_it_spoils(device):
    model, guide = model_and_guide(device, likelihood=lambda f: dist.Categorical(logits=torch.cat([f, -f], -1)))
    x, y = regression_data(device)
    x[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"^x: expected finite numbers"):
        SparseVD_ELBO().loss(model, guide, x, 2 + 0 * y)


def test_a_prior_that_was_made_before_validates_its_samples(device):
    prior = dist.Beta(torch.tensor(2.0, dtype=F64, device=device), 2.0).expand([3]).to_event(1)

    def model():
        pyro.sample("z", prior)

    with pytest.raises(ValueError, match=r"^z: Expected value argument"):
        SparseVD_ELBO().loss(model, lambda: pyro.sample("z", dist.Normal(9 + prior.mean, 1.0).to_event(1)))
    assert math.isfinite(SparseVD_ELBO().loss(model, AutoSparseNormal(model)))
