"""The prior of each parameter."""

import re

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.distributions import constraints

import pyro_sparsevd as svd
from checks import matrices_of, random_values
from pyro_sparsevd.nn.sites import SitePrior, WeightPrior


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({"*.weight": 1.0, "*.bias": 10.0}, {}, r"^prior: expected '\*\.bias' to match a chosen .*, but body\.0\.bias"),
        ({"body.*": 1.0, "head.*": 1.0}, {"include": "head.*"}, r"^prior: expected 'body\.\*' to match a chosen"),
        ({"*": 1.0, "head.*": 2.0}, {}, r"^prior: expected 'head\.\*' before the globs that match more"),
    ],
    ids=["biases", "not included", "shadowed"],
)
def test_a_prior_that_would_be_of_no_use_is_refused(table, options, message, mlp):
    table = {glob: dist.Normal(0.0, scale) for glob, scale in table.items()}
    with pytest.raises(ValueError, match=message):
        svd.bayesianize(mlp, table, **options)


def test_a_prior_of_biases_is_used_where_they_are_included(mlp):
    table = {"*.bias": dist.Normal(0.0, 10.0), "*": dist.Normal(0.0, 1.0)}
    bnn = svd.bayesianize(mlp, table, include="*")
    assert bnn.head._pyro_samples["bias"].prior.stddev.unique() == 10
    assert bnn.head._pyro_samples["weight"].prior.stddev.unique() == 1


@pytest.mark.parametrize("prior", [svd.LogUniform, {"*": svd.LogUniform}, dist.Normal], ids=["own", "table", "Pyro's"])
def test_the_class_of_a_prior_is_refused_by_the_parameters_name(prior):
    with pytest.raises(
        TypeError, match=r"^weight: expected a distribution as its prior, but got the class; write \w+\("
    ):
        svd.bayesianize(nn.Linear(2, 2), prior)


@pytest.mark.parametrize("prior", [svd.horseshoe, svd.nn.fan_in_normal, lambda name: None])
def test_a_function_that_does_not_take_name_and_parameter_is_refused(prior):
    with pytest.raises(TypeError, match=r"^prior: expected a function of \(name, parameter\), but got <function"):
        svd.bayesianize(nn.Linear(2, 2), prior)


def priors_of(bnn, net, x):
    trace = poutine.trace(poutine.condition(bnn, data=random_values(net))).get_trace(x)
    return {name: trace.nodes[name]["fn"] for name in matrices_of(net)}


def assert_prior(prior, expected, shape):
    value = torch.rand(shape, device=prior.value.device) + 0.1
    assert prior.event_shape == shape
    torch.testing.assert_close(prior.log_prob(value), expected.log_prob(value).sum())


def test_one_distribution_is_the_prior_of_all(mlp, device):
    x = torch.randn(5, 2, 4, device=device)
    for name, prior in priors_of(svd.bayesianize(mlp, dist.Laplace(0.0, 2.0)), mlp, x).items():
        assert_prior(prior, dist.Laplace(0.0, 2.0), mlp.get_parameter(name).shape)


def test_first_pattern_that_matches_gives_the_prior(mlp, device):
    x = torch.randn(5, 2, 4, device=device)
    table = {"h*": dist.Normal(0.0, 3.0), "*t": svd.LogUniform(1e-4, 10.0)}
    priors = priors_of(svd.bayesianize(mlp, table), mlp, x)
    assert_prior(priors["head.weight"], dist.Normal(0.0, 3.0), (2, 12))
    assert_prior(priors["body.0.weight"], svd.LogUniform(1e-4, 10.0), (3, 2, 1))
    priors = priors_of(svd.bayesianize(mlp, dict(reversed(table.items()))), mlp, x)
    assert_prior(priors["head.weight"], svd.LogUniform(1e-4, 10.0), (2, 12))


def test_function_gives_the_prior_of_each_name_and_parameter(mlp, device):
    seen = {}

    def prior(name, parameter):
        seen[name] = parameter
        return dist.Normal(0.0, parameter[0].numel() ** -0.5)

    priors = priors_of(svd.bayesianize(mlp, prior), mlp, torch.randn(5, 2, 4, device=device))
    assert list(seen) == matrices_of(mlp)
    assert all(seen[name] is mlp.get_parameter(name) for name in seen)
    assert_prior(priors["head.weight"], dist.Normal(0.0, 12**-0.5), (2, 12))
    assert_prior(priors["body.0.weight"], dist.Normal(0.0, 2**-0.5), (3, 2, 1))


SHAPED_PRIORS = {
    "scalar": lambda d: dist.Normal(torch.zeros((), device=d), 2.0),
    "row": lambda d: dist.Normal(torch.arange(4.0, device=d), 2.0),
    "column": lambda d: dist.Normal(torch.arange(3.0, device=d).unsqueeze(-1), 2.0),
    "full": lambda d: dist.Normal(torch.randn(3, 4, device=d), 2.0),
    "event": lambda d: dist.Normal(torch.arange(4.0, device=d), 2.0).to_event(1),
    "full event": lambda d: dist.Normal(torch.randn(3, 4, device=d), 2.0).to_event(2),
    "multivariate": lambda d: dist.MultivariateNormal(torch.zeros(4, device=d), 2 * torch.eye(4, device=d)),
    "mixture": lambda d: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7], device=d)),
        dist.Normal(torch.zeros(2, device=d), torch.tensor([0.1, 1.0], device=d)),
    ),
    "masked": lambda d: dist.Normal(torch.zeros((), device=d), 1.0).mask(torch.tensor([True, False] * 2, device=d)),
    "transformed": lambda d: dist.LogNormal(torch.zeros((), device=d), 1.0),
    "inverse transform": lambda d: dist.Gumbel(torch.zeros((), device=d), 1.0),
    "bounded": lambda d: svd.LogUniform(torch.tensor([0.1, 0.2, 0.1, 0.1], device=d), 2.0),
    "positive": lambda d: dist.Gamma(torch.ones((), device=d), 1.0),
}


@pytest.mark.parametrize("make", SHAPED_PRIORS.values(), ids=SHAPED_PRIORS)
def test_prior_broadcasts_to_the_parameter_and_follows_the_network(make, device):
    net = nn.Linear(4, 3).to(device)
    prior = make(device)
    bnn = svd.bayesianize(net, prior).double()
    trace = poutine.trace(bnn).get_trace(torch.zeros(1, 4, dtype=torch.float64, device=device))
    site = trace.nodes["weight"]
    assert site["value"].shape == (3, 4)
    assert site["value"].dtype == torch.float64
    assert (site["fn"].batch_shape, site["fn"].event_shape) == ((), (3, 4))
    expected = prior.expand((3, 4)[: 2 - prior.event_dim]).log_prob(site["value"].float()).sum()
    torch.testing.assert_close(site["fn"].log_prob(site["value"]).float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "batch", "event"),
    [
        (lambda: svd.LogUniform(torch.full((3,), 0.1), 1.0), (3,), ()),
        (lambda: dist.Normal(torch.zeros(3, 4, 1), 1.0), (3, 4, 1), ()),
        (lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1), (), (3,)),
        (lambda: dist.Normal(torch.zeros(1, 2, 12), 1.0).to_event(3), (), (1, 2, 12)),
        (lambda: dist.MultivariateNormal(torch.zeros(5), torch.eye(5)), (), (5,)),
        (lambda: dist.Normal(torch.zeros(2, 1), 1.0).to_event(1), (2,), (1,)),
    ],
    ids=["batch", "too many dimensions", "event", "too many event dimensions", "multivariate", "event of one"],
)
def test_prior_that_does_not_broadcast_is_refused_by_the_parameters_name(make, batch, event, mlp):
    expected = (
        f"head.weight: expected a prior that broadcasts to shape (2, 12), but got batch shape {batch} "
        f"and event shape {event}"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        svd.bayesianize(mlp, make(), include="head.*")


@pytest.mark.parametrize("prior", [3.0, torch.ones(2, 12), "normal", {"*": 1.0}, lambda name, p: None])
def test_prior_that_is_no_distribution_is_refused_by_the_parameters_name(prior, mlp):
    with pytest.raises(TypeError, match=r"head\.weight: expected a distribution as its prior, but got"):
        svd.bayesianize(mlp, prior, include="head.*")


def test_parameter_without_a_prior_is_refused_by_name(mlp):
    with pytest.raises(ValueError, match=r"body\.0\.weight: expected a prior, but .*'head\.\*'"):
        svd.bayesianize(mlp, {"head.*": dist.Normal(0.0, 1.0)})
    assert svd.bayesianize(mlp, {"head.*": dist.Normal(0.0, 1.0)}, include="head.*") is not None


def test_prior_with_parameters_of_its_own_gets_their_gradient(device):
    scale = torch.tensor(2.0, device=device, requires_grad=True)
    bnn = svd.bayesianize(nn.Linear(4, 3).to(device), dist.Normal(torch.zeros((), device=device), scale))
    weight = torch.full((3, 4), 0.5, device=device)
    model = poutine.condition(bnn, data={"weight": weight})
    poutine.trace(model).get_trace(torch.zeros(1, 4, device=device)).log_prob_sum().backward()
    assert scale.grad.item() == pytest.approx(12 * (0.25 / 8 - 1 / 2), rel=1e-6)


def test_site_prior_is_made_anew_only_where_the_module_has_moved(device):
    bnn = svd.bayesianize(nn.Linear(4, 3).to(device))
    site = bnn._pyro_samples["weight"]
    assert isinstance(site, SitePrior)
    prior = site.of(bnn)
    assert site.of(bnn) is prior
    assert site.of(bnn.double()) is not prior
    assert site.of(bnn).value.dtype == torch.float64


def test_weight_prior_expands_without_its_value(device):
    prior = WeightPrior(svd.LogUniform(0.1, 1.0).expand([3, 4]), 2, torch.zeros(3, 4, device=device))
    wide = prior.expand([5])
    assert (wide.batch_shape, wide.event_shape) == ((5,), (3, 4))
    assert wide.sample().shape == (5, 3, 4)
    assert wide.support.base_constraint is constraints.real


def test_a_name_is_a_new_prior_each_time():
    assert svd.nn.named_prior("horseshoe") is not svd.nn.named_prior("horseshoe")
    assert svd.nn.named_prior("laplace").mean == 0


def test_an_unknown_name_lists_those_that_are_known():
    with pytest.raises(ValueError, match=r"prior: expected one of 'log-uniform', 'ard', .*, but got 'gauss'"):
        svd.nn.named_prior("gauss")
