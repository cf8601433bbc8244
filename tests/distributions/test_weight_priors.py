"""Priors of weights beside the log-uniform one: their divergences, and their way through guide, bound and summary."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive, Trace_ELBO
from torch import nn
from torch.distributions import kl_divergence

import pyro_sparsevd as svd
from pyro_sparsevd import EmpiricalBayesNormal, SparseNormal

PRIORS = {
    "log-uniform": lambda: svd.LogUniform(1e-6, 1e3),
    "normal": lambda: dist.Normal(0.0, 0.7),
    "fan-in": lambda: svd.nn.fan_in_normal(1.5),
    "layer": lambda: EmpiricalBayesNormal(()),
    "relevance": lambda: EmpiricalBayesNormal(),
    "units": lambda: EmpiricalBayesNormal((0,)),
    "laplace": lambda: dist.Laplace(0.1, 0.6),
    "student": lambda: dist.StudentT(3.0, 0.0, 0.5),
    "mixture": lambda: svd.nn.scale_mixture(0.3, 1.0, 0.1),
    "horseshoe": lambda: svd.horseshoe(0.5),
    "jeffreys": lambda: svd.group_normal_jeffreys((1,)),
}
OF_NETWORKS = {"fan-in", "horseshoe", "jeffreys"}  # these need a network's parameter
EMPIRICAL = ["layer", "relevance", "units"]
SPARSIFYING = {"log-uniform", "relevance", "units", "horseshoe", "jeffreys"}


def _net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def _model(prior, device):
    bnn = svd.bayesianize(_net().to(device), prior)
    return svd.Supervised(bnn, lambda out: dist.Categorical(logits=out), num_data=40)


def _data(device):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(20, 6, generator=generator), torch.randint(3, (20,), generator=generator)
    return x.to(device), y.to(device)


def _posterior(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    loc, log_variance = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    return SparseNormal(loc, log_variance - 1)


# Divergences.


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("centre", [0.0, -2.0])
def test_the_divergence_from_a_laplace_prior_is_the_integral(scale, centre):
    q, p = _posterior((7,)), dist.Laplace(torch.tensor(centre, dtype=torch.float64), scale)
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)[:, None]
    w = q.loc + q.scale * z
    integrand = q.log_prob(w).exp() * (q.log_prob(w) - p.log_prob(w)) * q.scale
    torch.testing.assert_close(kl_divergence(q, p), torch.trapezoid(integrand, z, dim=0), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("group_dims", [None, (), (0,), (1,), (0, 1), (2, 0)])
def test_the_scale_of_an_empirical_prior_is_the_best_of_each_group(group_dims):
    q = _posterior((3, 4, 2))
    prior = EmpiricalBayesNormal(group_dims).expand((3, 4, 2))
    pooled = [] if group_dims is None else [dim for dim in range(3) if dim not in group_dims]
    moment = q.loc**2 + q.variance
    best = (moment.mean(pooled, keepdim=True) if pooled else moment).sqrt()
    total = kl_divergence(q, prior).sum()
    torch.testing.assert_close(total, kl_divergence(q, dist.Normal(torch.zeros(()).double(), best)).sum())
    for factor in (0.9, 1.1):
        assert kl_divergence(q, dist.Normal(torch.zeros(()).double(), best * factor)).sum() > total


@pytest.mark.parametrize("group_dims", [None, (), (0,)])
def test_gradients_of_an_empirical_divergence_are_right_and_finite_at_0(group_dims):
    prior = EmpiricalBayesNormal(group_dims).expand((3, 4))
    q = _posterior((3, 4))
    inputs = q.loc.requires_grad_(), q.log_variance.requires_grad_()
    kl = lambda loc, log_variance: kl_divergence(SparseNormal(loc, log_variance), prior).sum()  # noqa: E731
    assert torch.autograd.gradcheck(kl, inputs)
    zeros = torch.zeros(3, 4, requires_grad=True), torch.full((3, 4), -20.0, requires_grad=True)
    value = kl(*zeros)
    assert value.abs() < 1e-5
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, zeros))


def test_automatic_relevance_is_the_divergence_of_that_name():
    q = _posterior((3, 4), torch.float32)
    expected = svd.divergence.kl_ard(q.loc, q.log_variance)
    torch.testing.assert_close(kl_divergence(q, EmpiricalBayesNormal().expand((3, 4))), expected)


# What the distributions are.


@pytest.mark.parametrize("group_dims", [None, (), (0,), (1, 0)])
def test_an_empirical_prior_has_shapes_samples_and_copies_but_no_density(group_dims):
    prior = EmpiricalBayesNormal(group_dims).expand([3, 4]).to_event(2)
    assert prior.sample((2,)).shape == (2, 3, 4)
    for twin in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):
        assert twin.base_dist.group_dims == group_dims
        assert twin.event_shape == (3, 4)
    assert f"group_dims={group_dims}, batch_shape: (3, 4)" in repr(prior.base_dist)
    with pytest.raises(NotImplementedError, match="EmpiricalBayesNormal has no density"):
        prior.log_prob(torch.zeros(3, 4))


def test_a_scale_mixture_has_the_density_of_its_formula():
    w = torch.linspace(-3, 3, 13)
    wide, narrow = (dist.Normal(0.0, s).log_prob(w).exp() for s in (2.0, 0.1))
    torch.testing.assert_close(svd.nn.scale_mixture(0.25, 2.0, 0.1).log_prob(w).exp(), 0.25 * wide + 0.75 * narrow)


@pytest.mark.parametrize(
    ("weight", "inputs"), [(nn.Linear(9, 4).weight, 9), (nn.Conv2d(3, 2, 5).weight, 75), (nn.Linear(1, 4).weight, 1)]
)
def test_the_fan_in_is_the_number_of_inputs_of_a_unit(weight, inputs):
    assert float(svd.nn.fan_in_normal(3.0)("w", weight).scale) == pytest.approx(3 / math.sqrt(inputs))


BAD = {
    "negative dimension": (
        lambda: EmpiricalBayesNormal((-1,)),
        r"group_dims: expected .* counted from 0.* got \(-1,\)",
    ),
    "same dimension": (lambda: EmpiricalBayesNormal((0, 0)), r"group_dims: expected distinct dimensions"),
    "missing dimension": (lambda: EmpiricalBayesNormal((2,)).expand([3, 4]), r"shape \(3, 4\), but got \(2,\)"),
    "fan-in": (lambda: svd.nn.fan_in_normal(0.0), "scale: expected a positive and finite number, but got 0.0"),
    "mixture": (lambda: svd.nn.scale_mixture(1.0), "scale_mixture: expected 0 < weight < 1"),
    "widths": (lambda: svd.nn.scale_mixture(0.5, 1.0, 2.0), "narrow < wide < inf, but got 0.5, 1.0, 2.0"),
    "of a network": (
        lambda: svd.bayesianize(_net(), EmpiricalBayesNormal((5,))),
        r"0\.weight: expected a prior .*\(5,\)",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Every prior, from the network to the pruned network.


@pytest.mark.parametrize("name", PRIORS)
def test_every_prior_trains_sparsifies_and_prunes(name, device):
    model, data = _model(PRIORS[name](), device), _data(device)
    guide = svd.AutoSparseNormal(model, init_log_variance=-6.0)
    loss = svd.SparseVD_ELBO()(model, guide)
    first = loss(*data).item()
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss(*data).backward()
        optimizer.step()
    assert loss(*data).item() < first
    weights = ("0.weight", "2.weight")
    assert guide.sparse_sites == (weights if name in SPARSIFYING else ())
    summary = svd.sparsify(guide, {"*weight": 0.0})
    assert [site.name for site in summary.sites] == list(weights)
    pruned = svd.prune(model.network, guide, summary)
    assert type(pruned) is nn.Sequential
    assert pruned.state_dict().keys() == _net().state_dict().keys()
    for site in weights:
        expected = torch.where(guide.site_log_alphas[site] > 0, 0, guide.posteriors[site].loc)
        torch.testing.assert_close(pruned.get_parameter(site).data, expected.data)


@pytest.mark.parametrize("name", [name for name in PRIORS if name not in EMPIRICAL])
def test_the_mean_loss_is_that_of_trace_elbo(name, device):
    model, data = _model(PRIORS[name](), device), _data(device)
    guide = svd.AutoSparseNormal(model, init_log_variance=-3.0)
    draws = 250
    with torch.no_grad():
        losses = [
            torch.tensor([elbo.loss(model, guide, *data) for _ in range(draws)], dtype=torch.float64)
            for elbo in (svd.SparseVD_ELBO(kl="exact"), Trace_ELBO())
        ]
    difference = losses[0].mean() - losses[1].mean()
    if name == "log-uniform":  # what the bounds cut off the posterior is ignored in closed form
        assert losses[1].isfinite().all()
    assert difference.abs() < 4 * math.hypot(*(loss.std().item() / math.sqrt(draws) for loss in losses))


@pytest.mark.parametrize("name", EMPIRICAL)
def test_a_sampled_divergence_from_an_empirical_prior_names_the_site(name, device):
    model, data = _model(PRIORS[name](), device), _data(device)
    guide = svd.AutoSparseNormal(model)
    with pytest.raises(ValueError, match=r"weight: EmpiricalBayesNormal has no density.*kl=\"approximate\""):
        svd.SparseVD_ELBO(kl="monte_carlo").loss(model, guide, *data)


@pytest.mark.parametrize("name", PRIORS)
def test_priors_follow_the_network_to_another_dtype_and_into_predictive(name, device):
    model, (x, y) = _model(PRIORS[name](), device).double(), _data(device)
    guide = svd.AutoSparseNormal(model)
    loss = svd.SparseVD_ELBO()(model, guide)(x.double(), y)
    assert loss.dtype == torch.float64
    with pyro.poutine.block(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # that a prior is improper is not the point
        samples = Predictive(model, guide=guide, num_samples=3)(x.double())
    assert samples["y"].shape == (3, 20)


@pytest.mark.parametrize("name", PRIORS)
def test_a_copy_of_model_and_guide_works_alike(name, device):
    model, data = _model(PRIORS[name](), device), _data(device)
    loss = svd.SparseVD_ELBO()(model, svd.AutoSparseNormal(model))
    loss(*data)
    values = []
    for module in (loss, copy.deepcopy(loss)):
        pyro.set_rng_seed(4)
        values.append(module(*data).item())
    assert values[0] == values[1]


@pytest.mark.parametrize("name", [name for name in PRIORS if name not in OF_NETWORKS])
def test_a_plain_model_takes_the_same_priors(name, device):
    prior = PRIORS[name]().expand([4]) if name != "units" else EmpiricalBayesNormal((0,)).expand([4])

    def model():
        w = pyro.sample("w", prior.to_event(1))
        pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=torch.tensor(1.0))

    guide = svd.AutoSparseNormal(model)
    assert math.isfinite(svd.SparseVD_ELBO().loss(model, guide))
    assert svd.sparsify(guide, {"w": math.inf}).kept == 4


def test_the_first_glob_that_matches_chooses_the_prior_of_a_site():
    guide = svd.AutoSparseNormal(svd.bayesianize(_net(), {"0.*": svd.LogUniform(), "*": dist.Normal(0.0, 1.0)}))
    assert [site.name for site in svd.sparsify(guide).sites] == ["0.weight"]
    summary = svd.sparsify(guide, {"2.*": -100.0, "*": 100.0})
    assert [(site.name, site.kept, site.threshold) for site in summary.sites] == [
        ("0.weight", 30, 100.0),
        ("2.weight", 0, -100.0),
    ]
    with pytest.raises(ValueError, match=r"threshold: expected sites of real numbers, of 0\.weight, .* got '\*\.bias'"):
        svd.sparsify(guide, {"*.bias": 3.0})


def test_each_part_of_a_plate_has_groups_of_its_own(device):
    q = SparseNormal(torch.randn(3, 4, 5, device=device), torch.randn(3, 4, 5, device=device))
    for group_dims in [(0,), (1,), ()]:
        prior = EmpiricalBayesNormal(group_dims).expand([4, 5])
        parts = [SparseNormal(*pair) for pair in zip(q.loc, q.log_variance, strict=True)]
        alone = torch.stack([kl_divergence(part, prior) for part in parts])
        torch.testing.assert_close(kl_divergence(q, prior.expand([3, 4, 5])), alone)


def _half_sparse(name, device):
    bnn = svd.bayesianize(_net().to(device), PRIORS[name]())
    model = svd.Supervised(bnn, lambda out: dist.Categorical(logits=out), 10)
    guide = svd.AutoSparseNormal(model, init_log_variance=-4.0)
    summary = svd.sparsify(guide, {"*weight": guide.posteriors["0.weight"].log_alpha.median().item()})
    data = torch.randn(5, 6, device=device), torch.zeros(5, device=device)
    guide(*data)
    return model, guide, summary, data


@pytest.mark.parametrize("name", ["log-uniform", "normal", "laplace"])
def test_weights_that_are_held_at_zero_cost_nothing(name, device):
    model, guide, summary, data = _half_sparse(name, device)
    elbo = svd.SparseVD_ELBO(kl="exact")
    elbo(model, guide.sparsified(summary))(*data)
    cost = 0
    for site, layer in (("0.weight", model.network[0]), ("2.weight", model.network[2])):
        prior = layer._pyro_samples["weight"].of(layer).base_dist
        cost = cost + kl_divergence(guide.posteriors[site], prior)[summary.masks[site]].sum()
    torch.testing.assert_close(elbo.terms["kl"], cost)


@pytest.mark.parametrize("kl", ["exact", "monte_carlo"])
@pytest.mark.parametrize("name", [name for name in PRIORS if name not in EMPIRICAL])
def test_training_with_weights_held_at_zero_has_finite_gradients(name, kl, device):
    model, guide, summary, data = _half_sparse(name, device)
    sparse = guide.sparsified(summary)
    svd.SparseVD_ELBO(kl=kl)(model, sparse)(*data).backward()
    assert all(p.grad.isfinite().all() for p in sparse.parameters() if p.grad is not None)
