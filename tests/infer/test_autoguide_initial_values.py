"""The guide: initial values."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import nn

import pyro_sparsevd as svd
from checks import same_values, state_of
from problems import CASES, F64, function_case, module_case, precise_likelihood, small_model, small_network
from pyro_sparsevd import AutoSparseNormal, LogUniform, Supervised, bayesianize, init_to_weights


def test_initial_means_are_the_weights_of_the_network(device):
    net = small_network(device)
    guide = AutoSparseNormal(small_model(device, precise_likelihood))
    for name in ("0.weight", "2.weight"):
        assert torch.equal(guide.posteriors[name].loc, net.get_parameter(name))


def test_initial_means_survive_the_first_call(device):
    case = module_case(device)
    guide = AutoSparseNormal(case.model)
    before = state_of(guide)
    guide(*case.data)
    assert same_values(state_of(guide), before)


def test_initial_means_own_their_memory(device):
    net = small_network(device)
    bnn = bayesianize(net)
    first, second = AutoSparseNormal(bnn), AutoSparseNormal(bnn)
    with torch.no_grad():
        first.posteriors["0.weight"].loc.zero_()
    assert torch.equal(second.posteriors["0.weight"].loc, net[0].weight)
    assert net[0].weight.all()


@pytest.mark.parametrize("log_variance", [-10.0, -3.0, 0.0])
@pytest.mark.parametrize("make", CASES)
def test_initial_variances_are_those_given_for_sparse_and_for_other_sites(make, log_variance, device):
    case = make(device)
    guide = AutoSparseNormal(case.model, init_log_variance=log_variance, init_scale=0.5)
    guide(*case.data)
    expected = {name: log_variance if name in case.sparse else 2 * math.log(0.5) for name in case.sites}
    assert {name: q.log_variance.unique().item() for name, q in guide.posteriors.items()} == expected


@pytest.mark.parametrize(
    "prior", [dist.Normal(0.0, 1.0), svd.nn.fan_in_normal(), svd.EmpiricalBayesNormal(()), svd.nn.scale_mixture()]
)
def test_weights_whose_prior_is_not_sparse_start_as_those_of_auto_normal(prior):
    bnn = bayesianize(nn.Linear(4, 3), prior)
    ours, of_pyro = AutoSparseNormal(bnn), AutoNormal(bnn)
    of_pyro(torch.zeros(1, 4))
    torch.testing.assert_close(ours.posteriors["weight"].scale, of_pyro.scales.weight)


@pytest.mark.parametrize("prior", [svd.horseshoe(), svd.group_normal_jeffreys()], ids=["horseshoe", "groups"])
def test_latent_scales_start_as_those_of_auto_normal_and_weights_sparse(prior):
    guide = AutoSparseNormal(bayesianize(nn.Linear(4, 3), prior))
    starts = {name: q.log_variance.unique().item() for name, q in guide.posteriors.items()}
    assert starts.pop("weight") == -10
    assert all(start == pytest.approx(2 * math.log(0.1)) for start in starts.values())
    assert starts


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_positive_number_is_refused(scale):
    with pytest.raises(ValueError, match=r"init_scale: expected a number from exp\(-40\) to exp\(40\), but got"):
        AutoSparseNormal(lambda: None, init_scale=scale)


@pytest.mark.parametrize("log_variance", [float("nan"), float("inf"), -float("inf"), 81.0, -104.0])
def test_a_log_variance_whose_exponential_is_no_float32_is_refused(log_variance):
    with pytest.raises(ValueError, match=r"init_log_variance: expected a number from -80 to 80, but got"):
        AutoSparseNormal(lambda: None, init_log_variance=log_variance)


@pytest.mark.parametrize("make", CASES)
def test_init_loc_fn_gives_the_initial_value_of_every_site(make, device):
    case = make(device)
    guide = AutoSparseNormal(case.model, init_loc_fn=lambda site: torch.full(site["fn"].shape(), 0.5, dtype=F64))
    guide(*case.data)
    assert set(guide.median()) == set(case.sites)
    assert all((value - 0.5).abs().max() < 1e-12 for value in guide.median().values())


def test_init_to_value_of_pyro_starts_where_it_says(device):
    case = function_case(device)
    values = {"w": torch.arange(4, dtype=F64, device=device), "net.scale": torch.tensor(3.0, dtype=F64, device=device)}
    guide = AutoSparseNormal(case.model, init_loc_fn=init_to_value(values=values))
    guide(*case.data)
    assert torch.equal(guide.median()["w"], values["w"])
    torch.testing.assert_close(guide.median()["net.scale"], values["net.scale"])
    torch.testing.assert_close(guide.posteriors["net.scale"].loc, values["net.scale"].log())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    "value",
    [2, 2.0, True + 1, np.float32(2), np.full((3, 4), 2.0), [[2.0] * 4] * 3, torch.full((3, 4), 2)],
    ids=["int", "float", "bool", "NumPy number", "array", "list", "integers"],
)
def test_initial_values_of_any_type_are_converted_to_that_of_the_prior(value, dtype, device):
    zeros = torch.zeros(3, 4, dtype=dtype, device=device)
    inputs = torch.ones(1, 4, dtype=dtype, device=device)

    def model():
        weight = pyro.sample("weight", dist.Normal(zeros, 1.0).to_event(2))
        nn.functional.linear(inputs, weight)

    network = bayesianize(nn.Linear(4, 3, device=device, dtype=dtype))
    for of, args in ((model, ()), (network, (inputs,))):
        guide = AutoSparseNormal(of, init_loc_fn=init_to_value(values={"weight": value}))
        assert torch.equal(guide(*args)["weight"].new_full((3, 4), 2.0), guide.posteriors["weight"].loc)
        assert guide.posteriors["weight"].loc.dtype == dtype


@pytest.mark.parametrize(
    ("value", "came"), [("two", "str"), (None, "NoneType"), ([2.0, "a"], "list"), (np.ones((4, 3)), r"\(4, 3\)")]
)
def test_initial_values_that_are_not_such_numbers_are_refused_by_name(value, came, device):
    def model():
        pyro.sample("w", dist.Normal(torch.zeros(3, 4, device=device), 1.0).to_event(2))

    guide = AutoSparseNormal(model, init_loc_fn=lambda site: value)
    with pytest.raises(ValueError, match=rf"^w: expected an initial value of shape \(3, 4\), but .* gave {came}"):
        guide()


def test_log_uniform_sites_of_a_function_start_small_and_uniform():
    shape = (300, 25)
    guide = AutoSparseNormal(lambda: pyro.sample("w", LogUniform().expand(shape).to_event(2)))
    guide()
    loc = guide.posteriors["w"].loc
    bound = 1 / 25**0.5
    assert loc.abs().max() <= bound
    # The mean of n squares of U(-b, b) has mean b²/3 and standard deviation b² √(4 / 45 n).
    error = loc.square().mean() - bound**2 / 3
    assert error.abs() < 5 * bound**2 * (4 / 45 / loc.numel()) ** 0.5


@pytest.mark.parametrize("name", ["half", "float", "type", "train", "T_destination"])
def test_a_site_may_have_the_name_of_an_attribute_of_a_module(name):
    model = lambda: pyro.sample(name, dist.Normal(torch.zeros(3), 1.0).to_event(1))  # noqa: E731
    guide = AutoSparseNormal(model)
    assert guide()[name].shape == (3,)
    assert poutine.trace(guide).get_trace().nodes[name]["value"].shape == (3,)
    new = AutoSparseNormal(model)
    new.load_state_dict(guide.state_dict())
    assert torch.equal(new.median()[name], guide.median()[name])


def test_the_fallback_of_init_to_weights_starts_the_other_sites(device):
    case = function_case(device)
    other = torch.tensor(0.3, dtype=F64, device=device)
    guide = AutoSparseNormal(case.model, init_loc_fn=init_to_weights(fallback=lambda site: other))
    guide(*case.data)
    medians = guide.median()
    torch.testing.assert_close((medians["b"], medians["net.scale"]), (other, other))
    assert medians["w"].unique().numel() == 4


def test_setting_up_draws_no_sample_of_an_improper_prior(device):
    # An ImproperPriorWarning would be an error here.
    bnn = bayesianize(nn.LSTM(4, 3).to(device).double())
    guide = AutoSparseNormal(bnn)
    guide(torch.randn(5, 2, 4, dtype=F64, device=device))
    assert set(guide.posteriors) == {"weight_ih_l0", "weight_hh_l0"}


def test_learning_the_shapes_of_a_model_draws_no_random_numbers(device):
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.Linear(3, 2)).to(device)
    model = Supervised(bayesianize(net), lambda logits: dist.Categorical(logits=logits), 10)
    x = torch.randn(5, 4, device=device)
    draws = []
    for call in (lambda: None, lambda: AutoSparseNormal(model)._setup_prototype(x, x[:, 0] > 0)):
        torch.manual_seed(1)
        call()
        draws.append(torch.rand(()))
    assert draws[0] == draws[1]


def test_an_initial_weight_outside_the_support_of_its_prior_is_named():
    net = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"^weight: expected initial values inside the support of the prior"):
        AutoSparseNormal(bayesianize(net, dist.HalfNormal(1.0)))


def test_an_error_while_the_model_is_looked_at_is_raised_again():
    def model():
        for i in pyro.plate("plate", 2):
            pyro.sample(f"x{i}", dist.Normal(0.0, 1.0))

    guide = AutoSparseNormal(model)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="sequential"):
            guide()


def test_initial_values_of_another_shape_are_refused_by_site_name(device):
    def model():
        pyro.sample("w", dist.Normal(torch.zeros(3, 4, device=device), 1.0).to_event(2))

    guide = AutoSparseNormal(model, init_loc_fn=lambda site: torch.zeros(1, 4, device=device))
    with pytest.raises(
        ValueError, match=r"^w: expected an initial value of shape \(3, 4\), but init_loc_fn gave \(1, 4\)"
    ):
        guide()
    with pytest.raises(
        ValueError, match=r"^weight: expected an initial value of shape \(2, 3\), but init_loc_fn gave \(\)"
    ):
        AutoSparseNormal(bayesianize(nn.Linear(3, 2)), init_loc_fn=lambda site: torch.zeros(()))


def test_an_initialisation_sees_the_sites_that_pyro_records(device):
    bnn = bayesianize(nn.Linear(3, 2).to(device))
    seen = []

    def init(site):
        seen.append(site)
        return site["fn"].value

    AutoSparseNormal(bnn, init_loc_fn=init)
    with pyro.poutine.trace() as trace, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bnn(torch.zeros(1, 3, device=device))
    recorded = trace.trace.nodes["weight"]
    assert all(seen[0][key] == recorded[key] for key in ("name", "type", "is_observed", "infer", "scale", "mask"))


def test_a_masked_log_uniform_prior_still_makes_its_site_sparse(device):
    mask = torch.tensor([True, False, True], device=device)
    guide = AutoSparseNormal(lambda: pyro.sample("w", LogUniform().expand([3]).mask(mask).to_event(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guide()
    assert guide.sparse_sites == ("w",)


@pytest.mark.parametrize("outputs", [3, 1], ids=["same-shape", "other-shape"])
def test_a_guide_after_a_failed_one_starts_at_its_own_weights(outputs, device):
    def model_and_guide(network, likelihood):
        model = svd.Supervised(svd.bayesianize(network.to(device)), likelihood, num_data=60)
        return model, svd.AutoSparseNormal(model)

    x, y = torch.randn(60, 4, device=device), torch.zeros(60, device=device)
    failed, guide_of_failed = model_and_guide(nn.Linear(4, 3), lambda logits: dist.Categorical(logit=logits))
    with pytest.raises(TypeError):
        svd.SparseVD_ELBO()(failed, guide_of_failed)(x, y)
    network = nn.Linear(4, outputs)
    model, guide = model_and_guide(network, lambda logits: dist.Categorical(logits=logits))
    svd.SparseVD_ELBO()(model, guide)(x, y)
    assert torch.equal(guide.posteriors["weight"].loc, network.weight)
