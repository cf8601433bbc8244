"""The guide: its parameters and their life, its sites, its densities, and what Pyro's tools make of it."""

import copy
import gc
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.distributions import biject_to, transform_to

import pyro_sparsevd as svd
from pyro_sparsevd import (
    AutoSparseNormal,
    ImproperPriorWarning,
    LogUniform,
    SparseNormal,
    SparseVD_ELBO,
    Supervised,
    bayesianize,
    init_to_weights,
)
from pyro_sparsevd.sparsity.summary import sparse_normal_parts

F64 = torch.float64
NUM_DATA = 20


class Case(NamedTuple):
    """A model, the arguments of its training, and the sites that have a log-uniform prior, of all its sites."""

    model: Callable
    data: tuple[Tensor, ...]
    sparse: tuple[str, ...]
    sites: tuple[str, ...]


def _network(device: torch.device, width: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1)).to(device).double()


def _supervised(device: torch.device, width: int = 3, **options: Any) -> Supervised:
    bnn = bayesianize(_network(device, width), **options)
    return Supervised(bnn, lambda output: dist.Normal(output.squeeze(-1), 0.1), NUM_DATA)


def _data(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(8, 4, generator=generator, dtype=F64)
    return x.to(device), torch.randn(8, generator=generator, dtype=F64).to(device)


def _module_case(device: torch.device) -> Case:
    sites = ("0.weight", "2.weight")
    return Case(_supervised(device), _data(device), sites, sites)


def _classification_case(device: torch.device) -> Case:
    torch.manual_seed(1)
    bnn = bayesianize(nn.Linear(4, 3).to(device).double())
    model = Supervised(bnn, lambda output: dist.Categorical(logits=output), NUM_DATA)
    x, y = _data(device)
    return Case(model, (x, (y > 0).double()), ("weight",), ("weight",))


def _function_case(device: torch.device) -> Case:
    zeros, ones = torch.zeros(4, dtype=F64, device=device), torch.ones((), dtype=F64, device=device)

    def model(x, y=None):
        w = pyro.sample("w", LogUniform(1e-6 * ones, ones).expand([4]).to_event(1))
        b = pyro.sample("b", dist.Normal(0 * ones, 1.0))
        scale = pyro.sample("net.scale", dist.LogNormal(zeros[0], 1.0))
        with pyro.plate("data", NUM_DATA, subsample=x):
            pyro.sample("y", dist.Normal(x @ w + b, scale), obs=y)

    return Case(model, _data(device), ("w",), ("w", "b", "net.scale"))


def _module_with_function_case(device: torch.device) -> Case:
    """A module whose sites are its attributes in part."""

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            ones = torch.ones(4, dtype=F64, device=device)
            self.w = PyroSample(LogUniform(1e-6 * ones, ones).to_event(1))
            self.scaled = PyroSample(lambda self: dist.Normal(ones[:2], 1.0).to_event(1))

        def forward(self, x, y=None):
            mean = x @ self.w + self.scaled.sum()
            scale = pyro.sample("scale", dist.Gamma(torch.tensor(2.0, dtype=F64, device=device), 1.0))
            with pyro.plate("data", NUM_DATA, subsample=x):
                pyro.sample("y", dist.Normal(mean, scale), obs=y)

    return Case(Model(), _data(device), ("w",), ("w", "scaled", "scale"))


CASES = [
    pytest.param(_module_case, id="module"),
    pytest.param(_function_case, id="function"),
    pytest.param(_module_with_function_case, id="both"),
]


def _train(model: Callable, guide: Callable, data: tuple, steps: int = 3) -> None:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), SparseVD_ELBO())
    for _ in range(steps):
        svi.step(*data)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _same(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _seeded(function: Callable, *args: Any) -> Any:
    pyro.set_rng_seed(5)
    return function(*args)


@pytest.fixture
def improper() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImproperPriorWarning)
        yield


# Initial values.


def test_initial_means_are_the_weights_of_the_network(device):
    net = _network(device)
    guide = AutoSparseNormal(_supervised(device))
    for name in ("0.weight", "2.weight"):
        assert torch.equal(guide.posteriors[name].loc, net.get_parameter(name))


def test_initial_means_survive_the_first_call(device):
    case = _module_case(device)
    guide = AutoSparseNormal(case.model)
    before = _state(guide)
    guide(*case.data)
    assert _same(_state(guide), before)


def test_initial_means_own_their_memory(device):
    net = _network(device)
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


@pytest.mark.parametrize("prior", [svd.nn.horseshoe(), svd.nn.group_normal_jeffreys()], ids=["horseshoe", "groups"])
def test_scales_that_are_latents_start_as_those_of_auto_normal_and_their_weights_sparse(prior):
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
    case = _function_case(device)
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
def test_initial_values_of_any_type_are_taken_as_numbers_of_the_priors_type(value, dtype, device):
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
def test_initial_values_that_are_no_numbers_of_the_shape_are_refused_by_name(value, came, device):
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
    case = _function_case(device)
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


# When parameters exist.


@pytest.mark.parametrize("make", [_supervised, lambda device: bayesianize(_network(device))], ids=["model", "network"])
def test_parameters_of_a_network_exist_right_after_construction(make, device):
    guide = AutoSparseNormal(make(device))
    assert {name: p.shape for name, p in guide.named_parameters()} == {
        f"{kind}.{name}_unconstrained": shape
        for kind in ("locs", "log_variances")
        for name, shape in (("0.weight", (3, 4)), ("2.weight", (1, 3)))
    }
    assert guide.sparse_sites == ("0.weight", "2.weight")


def test_parameters_of_a_function_exist_after_the_first_call(device):
    case = _function_case(device)
    guide = AutoSparseNormal(case.model)
    assert list(guide.parameters()) == []
    assert guide.posteriors == {}
    guide(*case.data)
    assert len(list(guide.parameters())) == 2 * len(case.sites)
    assert set(guide.posteriors) == set(case.sites)


def test_parameters_made_early_and_late_live_side_by_side(device):
    case = _module_with_function_case(device)
    guide = AutoSparseNormal(case.model)
    assert set(guide.posteriors) == {"w"}
    early = guide.posteriors["w"].loc
    guide(*case.data)
    assert set(guide.posteriors) == set(case.sites)
    assert guide.posteriors["w"].loc is early


@pytest.mark.parametrize("make", CASES)
def test_sparse_sites_are_those_with_a_log_uniform_prior(make, device):
    case = make(device)
    guide = AutoSparseNormal(case.model)
    guide(*case.data)
    assert guide.sparse_sites == case.sparse


def test_sparse_sites_of_a_function_are_unknown_before_the_first_call(device):
    with pytest.raises(RuntimeError, match="not known yet; call the guide once"):
        _ = AutoSparseNormal(_function_case(device).model).sparse_sites


def test_sites_with_another_prior_are_not_sparse(device):
    model = _supervised(device, prior={"0.*": dist.Normal(0.0, 1.0), "*": LogUniform(1e-4, 1.0)})
    assert AutoSparseNormal(model).sparse_sites == ("2.weight",)


@pytest.mark.parametrize("make", CASES)
def test_posteriors_are_the_normals_that_the_guide_samples(make, device):
    case = make(device)
    guide = AutoSparseNormal(case.model, init_log_variance=-1.0)
    guide(*case.data)
    values = _seeded(guide, *case.data)
    torch.manual_seed(5)
    for name in case.sites:
        q = guide.posteriors[name]
        assert isinstance(q, SparseNormal)
        z = q.rsample()
        is_positive = name in ("net.scale", "scale")
        torch.testing.assert_close(values[name], z.exp() if is_positive else z)


def test_num_parameters_counts_latents_and_the_parameters_of_the_model(device):
    assert AutoSparseNormal(_supervised(device)).num_parameters == 3 * 4 + 3 + 3 + 1


# Saving and loading.


@pytest.mark.parametrize("make", [*CASES, pytest.param(_classification_case, id="classification")])
class TestLoading:
    def _trained(self, case: Case) -> AutoSparseNormal:
        guide = AutoSparseNormal(case.model)
        guide(*case.data)
        with torch.no_grad():
            for p in guide.parameters():
                p.copy_(torch.randn_like(p))
        return guide

    def test_a_fresh_guide_takes_a_state_without_data(self, make, device):
        guide, fresh = self._trained(make(device)), AutoSparseNormal(make(device).model)
        assert str(fresh.load_state_dict(guide.state_dict())) == "<All keys matched successfully>"
        assert _same(fresh.state_dict(), guide.state_dict())

    def test_posteriors_are_equal_without_data(self, make, device):
        guide, fresh = self._trained(make(device)), AutoSparseNormal(make(device).model)
        fresh.load_state_dict(guide.state_dict())
        assert fresh.posteriors.keys() == guide.posteriors.keys()
        for name, q in guide.posteriors.items():
            assert torch.equal(fresh.posteriors[name].loc, q.loc)
            assert torch.equal(fresh.posteriors[name].log_variance, q.log_variance)

    def test_no_two_parameters_share_memory(self, make, device):
        guide, fresh = self._trained(make(device)), AutoSparseNormal(make(device).model)
        fresh.load_state_dict(guide.state_dict())
        addresses = {p.data_ptr() for p in [*fresh.parameters(), *guide.parameters()]}
        assert len(addresses) == 2 * len(list(guide.parameters()))

    def test_samples_and_predictions_are_equal(self, make, device, improper):
        case, other = make(device), make(device)
        guide, fresh = self._trained(case), AutoSparseNormal(other.model)
        fresh.load_state_dict(guide.state_dict())
        fresh(*case.data)
        assert _same(_seeded(fresh, *case.data), _seeded(guide, *case.data))
        x, _ = case.data
        predictions = [
            _seeded(Predictive(m, guide=g, num_samples=3), x) for m, g in ((case.model, guide), (other.model, fresh))
        ]
        assert _same(*predictions)

    def test_predictions_without_targets_come_first_and_are_equal(self, make, device, improper):
        case, other = make(device), make(device)
        guide, fresh = self._trained(case), AutoSparseNormal(other.model)
        fresh.load_state_dict(guide.state_dict())
        x, _ = case.data
        predictions = [
            _seeded(Predictive(m, guide=g, num_samples=3), x) for m, g in ((other.model, fresh), (case.model, guide))
        ]
        assert predictions[0].keys() == predictions[1].keys()
        assert {name: v.shape for name, v in predictions[0].items()} == {
            name: v.shape for name, v in predictions[1].items()
        }
        assert _same(_seeded(fresh, x), _seeded(guide, x))

    def test_training_goes_on_from_the_state(self, make, device):
        case = make(device)
        guide, fresh = self._trained(case), AutoSparseNormal(case.model)
        fresh.load_state_dict(guide.state_dict())
        before = _state(fresh)
        _train(case.model, fresh, case.data, steps=1)
        after = _state(fresh)
        assert before.keys() == after.keys()
        for name in before:
            # One step of Adam moves every number by its learning rate.
            torch.testing.assert_close((after[name] - before[name]).abs(), torch.full_like(before[name], 0.05))

    def test_the_state_of_a_loss_module_loads_too(self, make, device):
        case = make(device)
        guide, fresh = self._trained(case), AutoSparseNormal(make(device).model)
        state = nn.ModuleDict({"guide": guide}).state_dict()
        nn.ModuleDict({"guide": fresh}).load_state_dict(state)
        assert _same(fresh.state_dict(), guide.state_dict())

    def test_a_guide_in_use_takes_the_state_too(self, make, device):
        case = make(device)
        guide, other = self._trained(case), self._trained(make(device))
        other.load_state_dict(guide.state_dict())
        assert _same(other.state_dict(), guide.state_dict())
        assert _same(_seeded(other, *case.data), _seeded(guide, *case.data))


def test_loading_follows_the_dtype_and_device_of_the_guide(device):
    guide = AutoSparseNormal(_supervised(device))
    state = {name: value.float() for name, value in guide.state_dict().items()}
    fresh = AutoSparseNormal(_supervised(device))
    fresh.load_state_dict(state)
    assert {p.dtype for p in fresh.parameters()} == {F64}


def test_a_state_of_another_shape_is_an_error_that_names_the_site(device):
    state = AutoSparseNormal(_supervised(device)).state_dict()
    other = AutoSparseNormal(_supervised(device, width=5))

    def load_and_use():
        other.load_state_dict(state)
        other(*_data(device))

    with pytest.raises((RuntimeError, ValueError), match=r"0\.weight.*\(?\[?3, 4.*\(?\[?5, 4"):
        load_and_use()


@pytest.mark.parametrize("make", [_function_case, _module_case], ids=["function", "module"])
def test_a_state_of_another_model_is_an_error_that_names_its_sites(make, device):
    donor = AutoSparseNormal(lambda: pyro.sample("stranger", dist.Normal(torch.zeros(2), 1.0).to_event(1)))
    donor()
    case = make(device)
    guide = AutoSparseNormal(case.model)

    def load_and_use():
        guide.load_state_dict(donor.state_dict())
        guide(*case.data)

    with pytest.raises((RuntimeError, ValueError), match=r"stranger|0\.weight"):
        load_and_use()


def test_a_state_that_is_refused_leaves_the_guide_usable(device):
    donor = AutoSparseNormal(lambda: pyro.sample("stranger", dist.Normal(torch.zeros(2), 1.0).to_event(1)))
    donor()
    case = _module_case(device)
    guide = AutoSparseNormal(case.model)
    before = _state(guide)
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        guide.load_state_dict(donor.state_dict())
    assert _same(guide.state_dict(), before)
    assert set(guide(*case.data)) == set(case.sites)


def test_a_guide_with_a_wrong_state_fails_at_every_call(device):
    wrong = AutoSparseNormal(_supervised(device, width=5)).state_dict()
    guide = AutoSparseNormal(_supervised(device))

    def load_and_use():
        guide.load_state_dict(wrong)
        guide(*_data(device))

    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match=r"0\.weight"):
            load_and_use()


def test_a_function_guide_with_a_wrong_state_fails_at_every_call():
    def model(size):
        pyro.sample("other", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(torch.zeros(size), 1.0).to_event(1))

    donor, guide = AutoSparseNormal(model), AutoSparseNormal(model)
    donor(3)
    guide.load_state_dict(donor.state_dict())
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^w: the state loaded is of shape \(3,\), but the model's site needs \(4,\)"
        ):
            guide(4)


def test_the_right_state_loads_after_a_wrong_one(device):
    right = AutoSparseNormal(_supervised(device)).state_dict()
    wrong = AutoSparseNormal(_supervised(device, width=5)).state_dict()
    guide = AutoSparseNormal(_supervised(device))
    with pytest.raises((RuntimeError, ValueError), match=r"0\.weight"):
        guide.load_state_dict(wrong) and guide(*_data(device))
    guide.load_state_dict(right)
    guide(*_data(device))
    assert _same(guide.state_dict(), right)


# Moving and copying.


@pytest.mark.parametrize("first_call", ["before", "after"])
@pytest.mark.parametrize("make", CASES)
def test_a_guide_moves_to_another_dtype(make, first_call, device):
    case = make(device)
    guide = AutoSparseNormal(case.model)
    if first_call == "before":
        guide(*case.data)
    guide.to(torch.float32).to(F64)
    guide.to(torch.float32)
    if isinstance(case.model, nn.Module):
        case.model.to(torch.float32)
    if first_call == "after" and make is _module_case:
        values = guide(*(t.float() for t in case.data))
        assert {value.dtype for value in values.values()} == {torch.float32}
    assert {p.dtype for p in guide.parameters()} <= {torch.float32}
    assert {q.loc.dtype for q in guide.posteriors.values()} <= {torch.float32}


def test_model_and_guide_train_in_float64_after_to(device):
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).to(device)
    model = Supervised(bayesianize(net), lambda output: dist.Normal(output.squeeze(-1), 0.1), NUM_DATA)
    loss = SparseVD_ELBO()(model, AutoSparseNormal(model)).to(F64)
    value = loss(*_data(device))
    value.backward()
    assert value.dtype == F64
    assert {p.grad.dtype for p in loss.parameters()} == {F64}


def _deepcopy(guide: Any) -> Any:
    return copy.deepcopy(guide)


def _deepcopy_with_model(guide: Any) -> Any:
    return guide.copy_with_same_model()


def _pickle(guide: Any) -> Any:
    return pickle.loads(pickle.dumps(guide))


def _torch_save(guide: Any) -> Any:
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [_deepcopy, _deepcopy_with_model, _pickle, _torch_save]


@pytest.mark.parametrize("make_copy", COPIES)
@pytest.mark.parametrize("make", CASES)
class TestCopies:
    def test_after_the_first_call_original_and_copy_work_alike(self, make, make_copy, device):
        case = make(device)
        guide = AutoSparseNormal(case.model)
        guide(*case.data)
        new = make_copy(guide)
        assert _same(_seeded(new, *case.data), _seeded(guide, *case.data))
        assert _same(new.state_dict(), guide.state_dict())
        assert new.sparse_sites == guide.sparse_sites
        assert _same(new.median(), guide.median())

    def test_the_original_keeps_its_model(self, make, make_copy, device):
        case = make(device)
        guide = AutoSparseNormal(case.model)
        make_copy(guide)
        assert guide._model == (case.model,)
        assert callable(guide.model)
        assert set(guide(*case.data)) == set(case.sites)

    def test_training_the_copy_leaves_the_original_as_it_was(self, make, make_copy, device):
        case = make(device)
        guide = AutoSparseNormal(case.model)
        _train(case.model, guide, case.data, steps=1)
        new = make_copy(guide)
        before = _state(guide)
        _train(case.model, new, case.data, steps=1)
        assert _same(_state(guide), before)
        assert not _same(_state(new), before)

    def test_training_the_original_leaves_the_copy_as_it_was(self, make, make_copy, device):
        case = make(device)
        guide = AutoSparseNormal(case.model)
        _train(case.model, guide, case.data, steps=1)
        new = make_copy(guide)
        before = _state(new)
        _train(case.model, guide, case.data, steps=1)
        new(*case.data)
        assert _same(_state(new), before)
        assert not _same(_state(guide), before)


@pytest.mark.parametrize("make_copy", [_deepcopy, _deepcopy_with_model])
@pytest.mark.parametrize("make", CASES)
def test_a_deep_copy_before_the_first_call_works_alike(make, make_copy, device):
    case = make(device)
    guide = AutoSparseNormal(case.model)
    new = make_copy(guide)
    assert set(_seeded(new, *case.data)) == set(case.sites)
    assert set(guide(*case.data)) == set(case.sites)
    assert {p.data_ptr() for p in guide.parameters()}.isdisjoint(p.data_ptr() for p in new.parameters())


def test_a_deep_copy_has_its_own_model_unless_told_otherwise(device):
    guide = AutoSparseNormal(_supervised(device))
    assert copy.deepcopy(guide)._model[0] is not guide._model[0]
    assert guide.copy_with_same_model()._model[0] is guide._model[0]


@pytest.mark.parametrize("make_copy", [_pickle, _torch_save])
@pytest.mark.parametrize("make", [_module_case, _function_case], ids=["module", "function"])
def test_a_guide_pickled_before_its_first_call_says_that_it_has_no_model(make, make_copy, device):
    case = make(device)
    new = make_copy(AutoSparseNormal(case.model))
    with pytest.raises(RuntimeError, match="unpickled without its model; call a guide once before it is pickled"):
        new(*case.data)


# Pyro's parameter store.


def _store() -> dict[str, Tensor]:
    return dict(pyro.get_param_store().named_parameters())


@pytest.mark.parametrize("make", CASES)
class TestTwoGuides:
    def test_of_one_model_train_apart(self, make, device):
        case = make(device)
        first, second = AutoSparseNormal(case.model), AutoSparseNormal(case.model)
        _train(case.model, first, case.data)
        before = _state(first)
        _train(case.model, second, case.data)
        assert _same(_state(first), before)
        assert {p.data_ptr() for p in first.parameters()}.isdisjoint(p.data_ptr() for p in second.parameters())

    def test_that_were_called_before_either_is_trained_train_apart(self, make, device):
        case = make(device)
        first, second = AutoSparseNormal(case.model), AutoSparseNormal(case.model)
        first(*case.data)
        second(*case.data)
        _train(case.model, first, case.data)
        before = _state(first)
        _train(case.model, second, case.data)
        assert _same(_state(first), before)

    def test_train_apart_in_turns(self, make, device):
        case = make(device)
        guides = [AutoSparseNormal(case.model) for _ in range(2)]
        twins = [AutoSparseNormal(case.model) for _ in range(2)]
        for guide, twin in zip(guides, twins, strict=True):
            guide(*case.data)
            twin(*case.data)
            twin.load_state_dict(guide.state_dict())
        svis = [SVI(case.model, g, pyro.optim.SGD({"lr": 1e-4}), SparseVD_ELBO()) for g in guides]
        for _ in range(2):
            for svi in svis:
                before = [_state(g) for g in guides]
                svi.step(*case.data)
                changed = [not _same(_state(g), b) for g, b in zip(guides, before, strict=True)]
                assert changed == [svi is s for s in svis]

    def test_train_apart_after_the_store_was_cleared_between_them(self, make, device):
        case = make(device)
        first, second = AutoSparseNormal(case.model), AutoSparseNormal(case.model)
        _train(case.model, first, case.data)
        pyro.clear_param_store()
        _train(case.model, second, case.data)
        trained, other = _state(first), _state(second)
        _train(case.model, first, case.data, steps=1)
        assert _same(_state(second), other)
        for name, value in _state(first).items():
            # One step of Adam moves every number by its learning rate.
            torch.testing.assert_close((value - trained[name]).abs(), torch.full_like(value, 0.05))

    def test_have_names_of_their_own_in_the_store(self, make, device):
        case = make(device)
        guides = [AutoSparseNormal(case.model) for _ in range(3)]
        for guide in guides:
            _train(case.model, guide, case.data, steps=1)
        stored = {p.data_ptr(): name for name, p in _store().items()}
        names = [{stored[p.data_ptr()].split(".")[0] for p in guide.parameters()} for guide in guides]
        assert all(len(name) == 1 for name in names)
        assert len(set.union(*names)) == 3


@pytest.mark.parametrize("make", CASES)
@pytest.mark.parametrize("called", [False, True])
def test_a_store_that_was_loaded_is_the_guides(make, called, device, tmp_path):
    case = make(device)
    guide = AutoSparseNormal(case.model)
    _train(case.model, guide, case.data)
    pyro.get_param_store().save(tmp_path / "store.pt")
    new = AutoSparseNormal(case.model)
    pyro.clear_param_store()
    if called:
        new(*case.data)
    pyro.get_param_store().load(tmp_path / "store.pt")
    if called:
        pyro.poutine.trace(new).get_trace(*case.data)  # sees parameters, as SVI does
    else:
        new(*case.data)
    assert _same(_state(new), _state(guide))
    _train(case.model, new, case.data, steps=1)
    assert not _same(_state(new), _state(guide))
    assert {name.split(".")[0] for name in _store() if name.startswith("Auto")} == {"AutoSparseNormal"}


def test_what_a_guide_put_into_the_store_is_not_taken_for_loaded(device):
    model = _supervised(device)
    other = AutoSparseNormal(model)
    _train(model, other, _data(device))
    new = AutoSparseNormal(model)
    before = _state(new)
    new(*_data(device))
    assert _same(_state(new), before)


def test_a_store_that_was_loaded_with_another_shape_is_an_error(device, tmp_path):
    model, other = _supervised(device), _supervised(device, width=5)
    guide = AutoSparseNormal(model)
    _train(model, guide, _data(device), steps=1)
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    message = r"AutoSparseNormal.locs.0.weight: expected a parameter of shape \(5, 4\), but .* of \(3, 4\)"
    with pytest.raises(ValueError, match=message):
        AutoSparseNormal(other)(*_data(device))


@pytest.mark.parametrize("make", CASES)
def test_guides_and_models_that_are_gone_have_left_the_store(make, device):
    case = make(device)
    kept = AutoSparseNormal(case.model)
    _train(case.model, kept, case.data, steps=1)
    before = _store()
    for _ in range(3):
        new = make(device)
        guide = AutoSparseNormal(new.model)
        _train(new.model, guide, new.data, steps=1)
        assert len(_store()) > len(before)
        del new, guide
        gc.collect()
        assert _store().keys() == before.keys()
        assert all(_store()[name] is value for name, value in before.items())


def test_a_guide_that_goes_takes_nothing_that_was_loaded_meanwhile(device, tmp_path):
    case = _function_case(device)
    guide = AutoSparseNormal(case.model)
    _train(case.model, guide, case.data, steps=1)
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.get_param_store().load(tmp_path / "store.pt")
    names = _store().keys()
    del guide
    gc.collect()
    assert _store().keys() == names != set()


def test_the_store_may_be_read_while_a_guide_goes(device):
    case = _function_case(device)
    guide, kept = AutoSparseNormal(case.model), AutoSparseNormal(case.model)
    guide(*case.data)
    kept(*case.data)
    names = []
    for name in pyro.get_param_store():
        guide = None
        names.append(name)
    assert len(names) == 2 * len(_store()) > 0


def test_guides_that_share_the_name_of_one_site_train_apart_after_the_store_was_cleared():
    def model(name):
        pyro.sample(name, dist.Normal(1.0, 1.0))
        pyro.sample("w", dist.Normal(torch.ones(3), 1.0).to_event(1))

    first, second = AutoSparseNormal(model), AutoSparseNormal(model)
    _train(model, first, ("a",), steps=1)
    pyro.clear_param_store()
    _train(model, second, ("b",), steps=1)
    before = _state(second)
    _train(model, first, ("a",), steps=1)
    assert _same(_state(second), before)


def test_guides_of_models_of_other_shapes_live_side_by_side(device):
    models = [_supervised(device), _supervised(device, width=5)]
    guides = [AutoSparseNormal(model) for model in models]
    for model, guide in zip(models, guides, strict=True):
        _train(model, guide, _data(device), steps=1)
    assert [guide.posteriors["0.weight"].loc.shape[0] for guide in guides] == [3, 5]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda device: Case(_no_bias(device), _data(device), (), ()), id="network-without-bias"),
        *CASES,
    ],
)
def test_svi_trains_under_module_local_params(make, device):
    with pyro.settings.context(module_local_params=True):
        case = make(device)
        guide = AutoSparseNormal(case.model)
        guide(*case.data)
        before = _state(guide)
        _train(case.model, guide, case.data, steps=1)
        after = _state(guide)
        assert all((after[name] != before[name]).all() for name in before)
        assert _store() == {}


def _no_bias(device: torch.device) -> Supervised:
    torch.manual_seed(1)
    bnn = bayesianize(nn.Linear(4, 1, bias=False).to(device).double())
    return Supervised(bnn, lambda output: dist.Normal(output.squeeze(-1), 0.1), NUM_DATA)


@pytest.mark.parametrize("make", CASES)
def test_the_loss_module_trains_under_module_local_params(make, device):
    with pyro.settings.context(module_local_params=True):
        case = make(device)
        guide = AutoSparseNormal(case.model)
        loss = SparseVD_ELBO()(case.model, guide)
        loss(*case.data)
        before = _state(guide)
        optimizer = torch.optim.Adam(guide.parameters(), lr=0.1)
        loss(*case.data).backward()
        optimizer.step()
        assert all((value != before[name]).all() for name, value in _state(guide).items())
        assert _store() == {}


# Plates.


def test_sites_in_plates_have_a_posterior_for_each_element(device):
    zero = torch.zeros((), dtype=F64, device=device)

    def model():
        pyro.sample("outside", dist.Normal(zero, 1.0))
        rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1)
        with columns:
            pyro.sample("column", dist.Normal(zero, 1.0))
            pyro.sample("share", dist.Dirichlet(torch.ones(5, dtype=F64, device=device)))
        with rows, columns:
            pyro.sample("cell", dist.LogNormal(zero, 1.0))
        with rows:
            pyro.sample("row", LogUniform(1e-3 + zero, 1 + zero).expand([2]).to_event(1))

    guide = AutoSparseNormal(model)
    trace = poutine.trace(guide).get_trace()
    shapes = {"outside": (), "column": (4,), "share": (4, 5), "cell": (3, 4), "row": (3, 1, 2)}
    unconstrained = {**shapes, "share": (4, 4)}
    assert {name: trace.nodes[name]["value"].shape for name in shapes} == shapes
    assert {name: guide.posteriors[name].loc.shape for name in shapes} == unconstrained
    trace.compute_log_prob()
    assert {n: tuple(trace.nodes[n]["log_prob"].shape) for n in shapes} == {
        "outside": (), "column": (4,), "share": (4,), "cell": (3, 4), "row": (3, 1)
    }  # fmt: skip
    frames = {name: {frame.name for frame in trace.nodes[name]["cond_indep_stack"]} for name in shapes}
    assert frames == {
        "outside": set(), "column": {"columns"}, "share": {"columns"}, "cell": {"rows", "columns"}, "row": {"rows"}
    }  # fmt: skip


def _local_model(indices=None, *, device):
    """A latent of one dimension, one of two and a constrained one for each of 20 data."""
    zero = torch.zeros((), dtype=F64, device=device)
    plate = pyro.plate("data", 20, subsample_size=4) if indices is None else pyro.plate("data", 20, subsample=indices)
    with plate as indices:
        z = pyro.sample("z", dist.Normal(zero, 1.0))
        pyro.sample("v", dist.Normal(zero.expand(2), 1.0).to_event(1))
        pyro.sample("share", dist.Dirichlet(torch.ones(3, dtype=F64, device=device)))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.arange(20, dtype=F64, device=device)[indices])


LOCAL_SHAPES = {"z": (20,), "v": (20, 2), "share": (20, 2)}


def _spread(guide: AutoSparseNormal) -> None:
    """Gives every element a mean of its own, and no variance to speak of."""
    with torch.no_grad():
        for q in guide.posteriors.values():
            q.loc.copy_(torch.arange(q.loc.numel(), dtype=q.loc.dtype).reshape(q.loc.shape) / 100)
            q.log_variance.fill_(-80)


def test_local_latents_have_parameters_for_the_whole_plate_and_values_for_the_subsample(device):
    guide = AutoSparseNormal(lambda: _local_model(device=device))
    guide()
    assert {name: tuple(q.loc.shape) for name, q in guide.posteriors.items()} == LOCAL_SHAPES
    _spread(guide)
    trace = poutine.trace(guide).get_trace()
    indices = trace.nodes["data"]["value"]
    assert len(indices) == 4
    for name in ("z", "v"):
        torch.testing.assert_close(trace.nodes[name]["value"], guide.posteriors[name].loc[indices])
    expected = biject_to(constraints.simplex)(guide.posteriors["share"].loc[indices])
    torch.testing.assert_close(trace.nodes["share"]["value"], expected)


def test_only_the_subsample_of_local_parameters_is_trained(device):
    def model():
        _local_model(device=device)

    guide = AutoSparseNormal(model)
    guide()
    seen = torch.zeros(20, dtype=torch.bool, device=device)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), SparseVD_ELBO())
    for _ in range(3):
        before = guide.posteriors["z"].loc.clone()
        svi.step()
        changed = guide.posteriors["z"].loc != before
        assert changed.sum() == 4
        seen |= changed
    assert seen.sum() > 4


def test_medians_of_local_latents_are_of_the_whole_plate(device):
    guide = AutoSparseNormal(lambda: _local_model(device=device))
    guide()
    _spread(guide)
    medians = guide.median()
    assert torch.equal(medians["z"], guide.posteriors["z"].loc)
    assert medians["share"].shape == (20, 3)
    assert guide.quantiles([0.1, 0.9])["share"].shape == (2, 20, 3)


def test_the_plates_of_a_guide_without_local_latents_choose_the_data_of_the_model(device):
    def model(index):
        w = pyro.sample("w", dist.Normal(torch.zeros(3, device=device), 1.0).to_event(1))
        with pyro.plate("data", 10, subsample_size=3, device=device) as chosen:
            seen.append(chosen.tolist())
            pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=torch.arange(10.0, device=device)[chosen])

    guide = AutoSparseNormal(model, create_plates=lambda index: pyro.plate("data", 10, subsample=index))
    seen = []
    index = torch.tensor([7, 1, 4], device=device)
    guide(index)
    seen.clear()
    SparseVD_ELBO()(model, guide)(index)  # runs the model again where it samples a weight for the first time
    assert seen
    assert all(chosen == [7, 1, 4] for chosen in seen)


def test_create_plates_gives_the_subsample_of_the_data(device):
    indices = torch.tensor([3, 17, 5], device=device)
    guide = AutoSparseNormal(
        lambda i: _local_model(i, device=device), create_plates=lambda i: pyro.plate("data", 20, subsample=i)
    )
    guide(indices)
    _spread(guide)
    values = guide(indices)
    torch.testing.assert_close(values["z"], guide.posteriors["z"].loc[indices])
    shorter = guide(indices[:2])
    torch.testing.assert_close(shorter["v"], guide.posteriors["v"].loc[indices[:2]])


def _plates_of_the_model_alone(indices, *, device):
    zero = torch.zeros((), dtype=F64, device=device)
    w = pyro.sample("w", dist.Normal(zero, 1.0))
    with pyro.plate("data", 20, subsample=indices) as seen:
        pyro.sample("y", dist.Normal(w, 1.0), obs=seen.double())


@pytest.mark.parametrize("size", [3, 20])
def test_indices_that_the_model_gives_are_refused_where_latents_are_in_the_plate(size, device):
    def model(indices):
        _local_model(indices, device=device)

    guide = AutoSparseNormal(model)
    indices = torch.randperm(20, device=device)[:size]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^data: .* create_plates.* pyro\.plate\('data', 20, dim=-1, subsample="):
            SparseVD_ELBO()(model, guide)(indices)
    assert guide.median()["z"].shape == (20,)


def test_a_plate_that_create_plates_leaves_out_is_refused(device):
    guide = AutoSparseNormal(lambda i: _local_model(i, device=device), create_plates=lambda i: [])
    with pytest.raises(ValueError, match=r"^data: the model gives the subsample of this plate"):
        guide(torch.tensor([3, 17, 5], device=device))


@pytest.mark.parametrize("has_plates", [False, True])
def test_a_list_is_asked_for_the_plates_whose_indices_the_model_gives(has_plates, device):
    def model(indices):
        _local_model(indices, device=device)

    make = {"create_plates": lambda i: pyro.plate("data", 20, subsample=i)} if has_plates else {}
    guide = AutoGuideList(model, **make)
    guide.append(AutoSparseNormal(poutine.block(model, hide=["v", "share"])))
    guide.append(AutoSparseNormal(poutine.block(model, expose=["v", "share"])))
    indices = torch.tensor([3, 17, 5], device=device)
    if not has_plates:
        with pytest.raises(ValueError, match=r"^data: .* create_plates"):
            guide(indices)
        return
    guide(indices)
    for part in guide:
        _spread(part)
    torch.testing.assert_close(guide(indices)["z"], guide[0].posteriors["z"].loc[indices])


def test_indices_that_the_model_gives_are_its_own_where_no_latent_is_in_the_plate(device):
    def model(indices):
        _plates_of_the_model_alone(indices, device=device)

    guide = AutoSparseNormal(model)
    indices = torch.tensor([3, 17, 5], device=device)
    guide(indices)
    trace = poutine.trace(poutine.replay(model, poutine.trace(guide).get_trace(indices))).get_trace(indices)
    assert torch.equal(trace.nodes["data"]["value"], indices)


@pytest.mark.parametrize("make_copy", [lambda guide: guide, copy.deepcopy], ids=["itself", "deepcopy"])
def test_a_plate_without_a_size_is_one_of_the_guides(make_copy, device):
    zeros = torch.zeros(5, dtype=F64, device=device)

    def model():
        with pyro.plate("rows", dim=-1):
            z = pyro.sample("z", dist.Normal(zeros, 1.0))
            scale = pyro.sample("scale", dist.LogNormal(zeros, 1.0))
            pyro.sample("y", dist.Normal(z, scale), obs=zeros)

    guide = AutoSparseNormal(model)
    guide()
    trace = poutine.trace(make_copy(guide)).get_trace()
    assert trace.nodes["z"]["value"].shape == trace.nodes["scale"]["value"].shape == (5,)
    assert [frame.name for frame in trace.nodes["z"]["cond_indep_stack"]] == ["rows"]
    assert SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO()).step() > 0


@pytest.mark.parametrize("make_copy", COPIES)
def test_a_copy_keeps_its_plates(make_copy, device):
    guide = AutoSparseNormal(lambda: _local_model(device=device))
    guide()
    _spread(guide)
    assert _same(_seeded(make_copy(guide)), _seeded(guide))


def test_a_sequential_plate_is_refused():
    def model():
        for i in pyro.plate("plate", 2):
            pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError, match=r"sequential pyro\.plate"):
        AutoSparseNormal(model)()


# Supports.


def _lower_triangle(value: Tensor) -> Tensor:
    rows, columns = torch.tril_indices(*value.shape, offset=-1).unbind()
    return value[rows, columns]


def _full(*shape: int, value: float = 1.0) -> Tensor:
    return torch.full(shape, value, dtype=F64)


class Support(NamedTuple):
    prior: dist.TorchDistribution
    coordinates: Callable[[Tensor], Tensor] = lambda value: value.reshape(-1)
    real: bool = False


SUPPORTS = [
    pytest.param(Support(dist.Normal(_full(), 1.0), real=True), id="real-scalar"),
    pytest.param(Support(dist.Normal(_full(3), 1.0).to_event(1), real=True), id="real"),
    pytest.param(Support(LogUniform(_full(2, 3, value=0.1), 1.0).to_event(2), real=True), id="log-uniform"),
    pytest.param(Support(dist.LogNormal(_full(), 1.0)), id="positive-scalar"),
    pytest.param(Support(dist.Gamma(_full(3), 1.0).to_event(1)), id="positive"),
    pytest.param(Support(dist.HalfCauchy(_full(2))), id="nonnegative"),
    pytest.param(Support(dist.Beta(_full(2, 2), 1.0).to_event(2)), id="unit-interval"),
    pytest.param(Support(dist.Uniform(_full(2, value=-1.0), 2.0).to_event(1)), id="interval"),
    pytest.param(Support(dist.Pareto(_full(value=2.0), 1.0)), id="greater-than"),
    pytest.param(Support(dist.Dirichlet(_full(4)), lambda value: value[:-1]), id="simplex"),
    pytest.param(Support(dist.LKJCholesky(3, _full()), _lower_triangle), id="corr-cholesky"),
    pytest.param(Support(dist.ImproperUniform(constraints.ordered_vector, (), (3,))), id="ordered-vector"),
    pytest.param(Support(dist.MultivariateNormal(_full(3), torch.eye(3, dtype=F64)), real=True), id="multivariate"),
]
FEASIBLE = init_to_value(values={"x": torch.arange(3, dtype=F64)})


def _guide_of(support: Support, guide_class: type = AutoSparseNormal, **options: Any) -> Any:
    def model():
        return pyro.sample("x", support.prior)

    if isinstance(support.prior, dist.ImproperUniform):
        options["init_loc_fn"] = FEASIBLE
    guide = guide_class(model, **options)
    guide()
    return guide


def _randomise(guide: AutoSparseNormal) -> SparseNormal:
    q = guide.posteriors["x"]
    torch.manual_seed(4)
    with torch.no_grad():
        q.loc.copy_(0.5 * torch.randn_like(q.loc))
        q.log_variance.copy_(torch.randn_like(q.loc) - 1)
    return SparseNormal(q.loc.detach(), q.log_variance.detach())


@pytest.mark.parametrize("support", SUPPORTS)
def test_samples_lie_in_the_support_and_densities_are_those_of_the_change_of_variables(support):
    guide = _guide_of(support)
    q = _randomise(guide)
    transform = biject_to(support.prior.support)
    for seed in range(5):
        torch.manual_seed(seed)
        z = q.rsample()
        torch.manual_seed(seed)
        site = poutine.trace(guide).get_trace().nodes["x"]
        assert support.prior.support.check(site["value"]).all()
        torch.testing.assert_close(site["value"], transform(z))
        jacobian = torch.autograd.functional.jacobian(lambda z: support.coordinates(transform(z)), z)
        expected = q.log_prob(z).sum() - torch.linalg.slogdet(jacobian.reshape(z.numel(), z.numel()))[1]
        assert site["fn"].event_shape == support.prior.event_shape
        torch.testing.assert_close(site["fn"].log_prob(site["value"]).sum(), expected)


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_real_site_is_a_sparse_normal_and_a_constrained_one_a_transformed_normal(support):
    fn = poutine.trace(_guide_of(support)).get_trace().nodes["x"]["fn"]
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    assert isinstance(fn, SparseNormal if support.real else dist.TransformedDistribution)
    assert fn.has_rsample


@pytest.mark.parametrize("support", SUPPORTS)
def test_median_and_quantiles_are_those_of_auto_normal(support):
    guide, normal = _guide_of(support), _guide_of(support, AutoNormal)
    q = _randomise(guide)
    with torch.no_grad():
        normal.locs.x_unconstrained.copy_(q.loc)
        normal.scales.x_unconstrained.copy_(transform_to(normal.scale_constraint).inv(q.scale))
    torch.testing.assert_close(guide.median()["x"], normal.median()["x"])
    probabilities = [0.05, 0.5, 0.9]
    quantiles = guide.quantiles(probabilities)["x"]
    expected = normal.quantiles(probabilities)["x"]
    torch.testing.assert_close(quantiles, torch.stack(list(expected)) if isinstance(expected, list) else expected)
    torch.testing.assert_close(quantiles[1], guide.median()["x"])


@pytest.mark.parametrize("support", SUPPORTS)
def test_samples_are_those_of_auto_normal_from_the_same_noise(support):
    guide, normal = _guide_of(support), _guide_of(support, AutoNormal)
    q = _randomise(guide)
    with torch.no_grad():
        normal.locs.x_unconstrained.copy_(q.loc)
        normal.scales.x_unconstrained.copy_(transform_to(normal.scale_constraint).inv(q.scale))
    torch.testing.assert_close(_seeded(guide)["x"], _seeded(normal)["x"])
    sites = [poutine.trace(_seeded, graph_type="flat").get_trace(g) for g in (guide, normal)]
    torch.testing.assert_close(sites[0].log_prob_sum(), sites[1].log_prob_sum())


@pytest.mark.parametrize("make_copy", COPIES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_copy_keeps_its_supports(support, make_copy):
    guide = _guide_of(support)
    _randomise(guide)
    assert _same(_seeded(make_copy(guide)), _seeded(guide))


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_state_without_data_keeps_its_supports(support):
    guide = _guide_of(support)
    _randomise(guide)
    fresh = AutoSparseNormal(lambda: pyro.sample("x", support.prior), init_loc_fn=guide.init_loc_fn)
    fresh.load_state_dict(guide.state_dict())
    fresh()
    assert _same(_seeded(fresh), _seeded(guide))


def test_quantiles_of_a_scalar_and_a_tensor_of_probabilities_agree(device):
    case = _module_case(device)
    guide = AutoSparseNormal(case.model, init_log_variance=0.0)
    one = guide.quantiles(0.975)["0.weight"]
    many = guide.quantiles(torch.tensor([0.025, 0.975], dtype=F64, device=device))["0.weight"]
    assert many.shape == (2, 3, 4)
    torch.testing.assert_close(one.reshape(3, 4), many[1])
    torch.testing.assert_close(many[1], guide.posteriors["0.weight"].loc.detach() + 1.959963984540054)


@pytest.mark.parametrize(
    "ask", [lambda g, *a: g.median(*a), lambda g, *a: g.quantiles(0.5, *a)], ids=["median", "quantiles"]
)
@pytest.mark.parametrize("make", CASES)
def test_medians_and_quantiles_run_the_model_once_where_they_must(ask, make, device):
    case = make(device)
    guide = AutoSparseNormal(case.model)
    result = ask(guide, *case.data)
    assert set(result) == set(case.sites)
    assert not any(value.requires_grad for value in result.values())
    assert _same(ask(guide), result)


def test_a_median_is_no_view_of_a_parameter(device):
    guide = AutoSparseNormal(_supervised(device))
    guide.median()["0.weight"].zero_()
    assert guide.posteriors["0.weight"].loc.all()


@pytest.mark.parametrize(
    "prior",
    [dist.Bernoulli(0.5), dist.Categorical(torch.ones(3)), dist.Poisson(torch.ones(2)).to_event(1)],
    ids=lambda prior: type(prior).__name__,
)
def test_a_discrete_latent_is_an_error_that_names_the_site(prior):
    with pytest.raises(ValueError, match="discrete sample site 'coin'"):
        AutoSparseNormal(lambda: pyro.sample("coin", prior))()


@pytest.mark.parametrize("latent", [dist.Bernoulli(0.5), dist.Normal(0.0, 1.0)], ids=["discrete", "data"])
def test_a_first_call_that_failed_does_not_count(latent):
    def model(x=None):
        pyro.sample("first", dist.Normal(0.0, 1.0))
        pyro.sample("second", latent)
        return x.sum()

    guide = AutoSparseNormal(model)
    for _ in range(2):
        with pytest.raises((AttributeError, ValueError), match=r"second|sum"):
            guide(None if latent.has_rsample else torch.ones(()))


def test_a_hidden_discrete_latent_is_no_error():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("coin", dist.Bernoulli(0.5))

    assert set(AutoSparseNormal(poutine.block(model, hide=["coin"]))()) == {"x"}


# Parts of a list.


def test_two_parts_of_a_guide_list_train_together(device):
    case = _function_case(device)
    guide = AutoGuideList(case.model)
    guide.append(AutoSparseNormal(poutine.block(case.model, hide=["b", "net.scale"])))
    guide.append(AutoSparseNormal(poutine.block(case.model, expose=["net.scale"])))
    guide.append(AutoNormal(poutine.block(case.model, expose=["b"])))
    guide(*case.data)
    before = _state(guide)
    _train(case.model, guide, case.data, steps=1)
    after = _state(guide)
    assert all((after[name] != before[name]).all() for name in before)
    assert set(guide(*case.data)) == set(case.sites)
    assert set(guide.median(*case.data)) == set(case.sites)
    assert guide[0].sparse_sites == ("w",)
    assert sparse_normal_parts(guide) == [guide[0], guide[1]]


def test_parts_of_a_guide_list_share_its_plates(device):
    def model():
        _local_model(device=device)

    guide = AutoGuideList(model)
    guide.append(AutoSparseNormal(poutine.block(model, hide=["v", "share"])))
    guide.append(AutoSparseNormal(poutine.block(model, expose=["v", "share"])))
    guide()
    for part in guide:
        _spread(part)
    trace = poutine.trace(guide).get_trace()
    indices = trace.nodes["data"]["value"]
    torch.testing.assert_close(trace.nodes["z"]["value"], guide[0].posteriors["z"].loc[indices])
    torch.testing.assert_close(trace.nodes["v"]["value"], guide[1].posteriors["v"].loc[indices])


def test_parts_of_a_guide_list_count_the_parameters_of_their_model_once(device, improper):
    model = _supervised(device)
    guide = AutoGuideList(model)
    guide.append(AutoSparseNormal(poutine.block(model, hide=["2.weight"])))
    guide.append(AutoSparseNormal(poutine.block(model, expose=["2.weight"])))
    guide(*_data(device))
    assert svd.sparsify(guide).num_parameters == svd.sparsify(AutoSparseNormal(model)).num_parameters == 19


def test_setting_up_behind_a_handler_leaves_running_statistics_alone(device, improper):
    model = _with_batch_norm(device)
    before = _state(model)
    AutoSparseNormal(poutine.block(model, expose=["weight"]))(*_data(device))
    assert _same(_state(model), before)


def test_two_guide_lists_train_apart(device):
    case = _function_case(device)
    lists = []
    for _ in range(2):
        guide = AutoGuideList(case.model)
        guide.append(AutoSparseNormal(poutine.block(case.model, hide=["b"])))
        guide.append(AutoSparseNormal(poutine.block(case.model, expose=["b"])))
        lists.append(guide)
    first, second = lists
    _train(case.model, first, case.data, steps=1)
    before = _state(first)
    _train(case.model, second, case.data, steps=1)
    assert _same(_state(first), before)


def test_a_copied_guide_list_works_alike(device):
    case = _function_case(device)
    guide = AutoGuideList(case.model)
    guide.append(AutoSparseNormal(poutine.block(case.model, hide=["b"])))
    guide.append(AutoSparseNormal(poutine.block(case.model, expose=["b"])))
    guide(*case.data)
    new = copy.deepcopy(guide)
    assert _same(_seeded(new, *case.data), _seeded(guide, *case.data))


@pytest.mark.parametrize("guide", [AutoNormal(lambda: None), lambda: None], ids=["AutoNormal", "function"])
def test_the_parts_of_another_guide_are_an_error(guide):
    with pytest.raises(TypeError, match="guide: expected an AutoSparseNormal or a list with one, but got"):
        sparse_normal_parts(guide)


# The model is left alone.


def _with_batch_norm(device: torch.device) -> Supervised:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1)).to(device).double()
    return Supervised(bayesianize(net), lambda output: dist.Normal(output.squeeze(-1), 0.1), NUM_DATA)


def test_setting_up_leaves_running_statistics_alone(device):
    model = _with_batch_norm(device)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    guide = AutoSparseNormal(model)
    guide(*_data(device))
    assert _same(dict(model.named_buffers()), before)
    assert model.network[1].training


def test_the_first_evaluation_updates_running_statistics_once(device):
    model = _with_batch_norm(device)
    SparseVD_ELBO()(model, AutoSparseNormal(model))(*_data(device))
    assert model.network[1].num_batches_tracked == 1


def test_setting_up_leaves_the_parameters_of_the_model_alone(device):
    model = _with_batch_norm(device)
    before = _state(model)
    AutoSparseNormal(model)(*_data(device))
    assert _same(_state(model), before)
    assert all(p.grad is None for p in model.parameters())


# Posterior predictive.


@pytest.mark.parametrize("make", CASES)
def test_predictive_samples_weights_from_the_guide_and_targets_from_the_model(make, device, improper):
    case = make(device)
    guide = AutoSparseNormal(case.model, init_log_variance=-2.0)
    guide(*case.data)
    x, _ = case.data
    samples = Predictive(case.model, guide=guide, num_samples=5, parallel=False)(x)
    assert samples.keys() == {*case.sites, "y"}
    assert samples["y"].shape == (5, 8)
    assert samples["y"].isfinite().all()
    assert samples["y"].std(0).all()
    for name in case.sites:
        q = guide.posteriors[name]
        assert samples[name].shape[0] == 5
        assert samples[name].numel() == 5 * q.loc.numel()
        assert samples[name].reshape(5, -1).std(0).all()


def test_predictive_warns_of_the_improper_prior_once_at_most(device):
    case = _module_case(device)
    guide = AutoSparseNormal(case.model)
    guide(*case.data)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            Predictive(case.model, guide=guide, num_samples=2)(case.data[0])
    assert {w.category for w in caught} <= {ImproperPriorWarning}
    assert len(caught) <= 1


def test_predictions_with_posterior_samples_are_those_of_the_guide(device, improper):
    case = _module_case(device)
    guide = AutoSparseNormal(case.model, init_log_variance=-2.0)
    guide(*case.data)
    samples = Predictive(case.model, guide=guide, num_samples=4, return_sites=["0.weight", "2.weight", "_RETURN"])(
        case.data[0]
    )
    net = _network(device)
    for i in range(4):
        weights = {n: samples[n][i].reshape(net.get_parameter(n).shape) for n in ("0.weight", "2.weight")}
        expected = torch.func.functional_call(net, weights, case.data[0])
        torch.testing.assert_close(samples["_RETURN"][i], expected, check_device=False)


# The sparsified posterior.


def _masks(device: torch.device) -> dict[str, Tensor]:
    first = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4], device=device)
    return {"0.weight": first, "2.weight": torch.tensor([[True, False, True]], device=device)}


class TestSparsified:
    def _guide(self, device: torch.device) -> AutoSparseNormal:
        guide = AutoSparseNormal(_supervised(device), init_log_variance=-1.0)
        guide(*_data(device))
        return guide

    def test_predictive_draws_zeros_exactly_where_weights_were_dropped(self, device, improper):
        guide, masks = self._guide(device), _masks(device)
        sparse = guide.sparsified(SimpleNamespace(masks=masks))
        samples = Predictive(guide._model[0], guide=sparse, num_samples=5)(_data(device)[0])
        for name, mask in masks.items():
            drawn = samples[name].reshape(5, *mask.shape)
            assert torch.equal(drawn != 0, mask.expand_as(drawn))
        assert samples["y"].shape == (5, 8)

    def test_kept_weights_are_drawn_as_before(self, device):
        guide, masks = self._guide(device), _masks(device)
        sparse = guide.sparsified(SimpleNamespace(masks=masks))
        dense, masked = _seeded(guide, *_data(device)), _seeded(sparse, *_data(device))
        for name, mask in masks.items():
            assert torch.equal(masked[name], torch.where(mask, dense[name], 0))

    def test_sites_without_a_mask_are_drawn_as_before(self, device):
        guide, masks = self._guide(device), _masks(device)
        sparse = guide.sparsified(SimpleNamespace(masks={"2.weight": masks["2.weight"]}))
        dense, masked = _seeded(guide, *_data(device)), _seeded(sparse, *_data(device))
        assert torch.equal(masked["0.weight"], dense["0.weight"])
        assert not masked["2.weight"][0, 1]

    def test_a_function_model_has_zeros_too(self, device):
        case = _function_case(device)
        guide = AutoSparseNormal(case.model, init_log_variance=-1.0)
        guide(*case.data)
        mask = torch.tensor([True, False, False, True], device=device)
        sparse = guide.sparsified(SimpleNamespace(masks={"w": mask}))
        samples = Predictive(case.model, guide=sparse, num_samples=4)(case.data[0])
        assert torch.equal(samples["w"].reshape(4, 4) != 0, mask.expand(4, 4))
        assert samples["net.scale"].all()

    def test_training_goes_on_with_the_original_alone(self, device):
        guide = self._guide(device)
        sparse = guide.sparsified(SimpleNamespace(masks=_masks(device)))
        before = _seeded(sparse, *_data(device))
        _train(guide._model[0], guide, _data(device))
        assert _same(_seeded(sparse, *_data(device)), before)

    @pytest.mark.parametrize("local_reparam", [True, False])
    @pytest.mark.parametrize("kl", ["approximate", "exact", "monte_carlo"])
    def test_training_goes_on_with_the_dropped_weights_out(self, kl, local_reparam, device, improper):
        guide, masks = self._guide(device), _masks(device)
        model = guide._model[0]
        sparse = guide.sparsified(SimpleNamespace(masks=masks))
        before = {name: q.loc.detach().clone() for name, q in sparse.guide.posteriors.items()}
        loss = svd.SparseVD_ELBO(kl=kl, local_reparam=local_reparam)(model, sparse)
        optimizer = torch.optim.Adam(loss.parameters(), 0.01)
        for _ in range(5):
            optimizer.zero_grad()
            loss(*_data(device)).backward()
            optimizer.step()
        for name, mask in masks.items():
            q = sparse.guide.posteriors[name]
            assert not q.loc[~mask].any()
            assert (q.loc != before[name])[mask].all()
        summary = svd.sparsify(sparse, 1e6)
        assert all(torch.equal(summary.masks[name], mask) for name, mask in masks.items())
        pruned = svd.prune(model.network, sparse, summary)
        assert all(torch.equal(pruned.get_parameter(name) != 0, mask) for name, mask in masks.items())

    def test_the_divergence_is_that_of_the_kept_weights(self, device):
        guide, masks = self._guide(device), _masks(device)
        elbo = svd.SparseVD_ELBO(kl="exact")
        elbo(guide._model[0], guide.sparsified(SimpleNamespace(masks=masks)))(*_data(device))
        expected = sum(
            svd.divergence.kl_log_uniform(q.loc, q.log_variance, "exact")[masks.get(name, ...)].sum()
            for name, q in guide.posteriors.items()
        )
        torch.testing.assert_close(elbo.terms["kl"], expected.detach())

    def test_it_moves_with_its_masks(self, device):
        sparse = self._guide(device).sparsified(SimpleNamespace(masks=_masks(device)))
        sparse.to(torch.float32)
        values = sparse(*(t.float() for t in _data(device)))
        assert {v.dtype for v in values.values()} == {torch.float32}
        assert {b.dtype for b in sparse.buffers()} == {torch.bool}

    def test_two_guides_of_one_model_do_not_meet_in_the_store(self, device, improper):
        guide = self._guide(device)
        model = guide._model[0]
        _train(model, guide, _data(device), steps=1)
        sparse = guide.sparsified(SimpleNamespace(masks=_masks(device)))
        Predictive(model, guide=sparse, num_samples=2)(_data(device)[0])
        before = _state(sparse)
        _train(model, guide, _data(device), steps=1)
        Predictive(model, guide=sparse, num_samples=2)(_data(device)[0])
        assert _same(_state(sparse), before)

    @pytest.mark.parametrize(
        ("masks", "message"),
        [
            (
                {"9.weight": torch.ones(3, 4).bool()},
                r"^9\.weight: the summary has this site, but the guide has 0\.weight",
            ),
            ({"0.weight": torch.ones(4, 3).bool()}, r"^0\.weight: expected a mask of shape \(3, 4\).*has \(4, 3\)"),
            ({"0.weight": torch.ones(()).bool()}, r"^0\.weight: expected a mask of shape \(3, 4\).*has \(\)"),
        ],
        ids=["site", "shape", "scalar"],
    )
    def test_masks_of_another_model_are_an_error_that_names_the_site(self, masks, message, device):
        guide = self._guide(device)
        with pytest.raises(ValueError, match=message):
            guide.sparsified(SimpleNamespace(masks=masks))

    def test_masks_of_a_guide_without_parameters_are_an_error(self, device):
        guide = AutoSparseNormal(_function_case(device).model)
        with pytest.raises(ValueError, match=r"^w: the summary has this site, but the guide has none"):
            guide.sparsified(SimpleNamespace(masks={"w": torch.ones(4).bool()}))


def test_a_state_that_does_not_fit_leaves_the_one_that_was_loaded(device):
    case = _function_case(device)
    trained = AutoSparseNormal(case.model)
    trained(*case.data)
    good = trained.state_dict()
    guide = AutoSparseNormal(case.model)
    guide.load_state_dict(good)
    bad = {
        name: value if name.startswith("locs") else value[..., None].expand(*value.shape, 2)
        for name, value in good.items()
    }
    with pytest.raises(RuntimeError):
        guide.load_state_dict(bad)
    assert guide.posteriors.keys() == trained.posteriors.keys()


@pytest.mark.parametrize("kl", ["approximate", "exact"])
def test_both_parameterizations_are_one_posterior_with_one_loss(kl, device):
    case = _module_case(device)
    additive, multiplicative = (
        AutoSparseNormal(case.model, parameterization=p) for p in ("additive", "multiplicative")
    )
    losses = []
    for guide in (additive, multiplicative):
        pyro.set_rng_seed(0)
        losses.append(SparseVD_ELBO(kl=kl)(case.model, guide)(*case.data))
    torch.testing.assert_close(losses[0], losses[1])
    for name, q in multiplicative.posteriors.items():
        torch.testing.assert_close(q.log_variance, additive.posteriors[name].log_variance)
    assert {name.split(".")[0] for name, _ in multiplicative.named_parameters()} == {"locs", "log_alphas"}


def test_gradients_of_the_multiplicative_parameterization_are_those_of_its_formula(device):
    loc, log_alpha = (torch.tensor([v], dtype=torch.float64, device=device, requires_grad=True) for v in (0.7, -2.0))
    model = lambda: pyro.sample("w", LogUniform().expand([1]).to_event(1))  # noqa: E731
    guide = AutoSparseNormal(model, init_loc_fn=lambda site: loc.detach().clone(), parameterization="multiplicative")
    guide()
    with torch.no_grad():
        guide.log_alphas.w_unconstrained.fill_(-2.0)
    pyro.set_rng_seed(3)
    weight = guide()["w"]
    pyro.set_rng_seed(3)
    noise = torch.randn(1, dtype=torch.float64, device=device)
    expected = loc * (1 + (0.5 * log_alpha).exp() * noise)
    gradients = torch.autograd.grad(weight.sum(), [guide.locs.w_unconstrained, guide.log_alphas.w_unconstrained])
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), [loc, log_alpha]))


def test_the_multiplicative_parameterization_is_finite_at_a_mean_of_0(device):
    model = lambda: pyro.sample("w", LogUniform().expand([2]).to_event(1))  # noqa: E731
    zeros = torch.zeros(2, device=device)
    guide = AutoSparseNormal(model, init_loc_fn=lambda site: zeros, parameterization="multiplicative")
    loss = SparseVD_ELBO(kl="exact")(model, guide)()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in guide.parameters())


def test_an_unknown_parameterization_is_refused():
    with pytest.raises(
        ValueError, match="parameterization: expected 'additive' or 'multiplicative', but got 'divided'"
    ):
        AutoSparseNormal(lambda: None, parameterization="divided")


# What was found by trying.


def test_an_optimizer_that_has_the_early_parameters_trains_them_in_a_plate(device):
    class Groups(PyroModule):
        def __init__(self):
            super().__init__()
            self.z = PyroSample(dist.Normal(torch.tensor(0.0, device=device), 1.0))

        def forward(self, y):
            with pyro.plate("groups", 3):
                pyro.sample("y", dist.Normal(self.z, 0.1), obs=y)

    model = Groups()
    guide = AutoSparseNormal(model)
    loss = SparseVD_ELBO()(model, guide)
    optimizer = torch.optim.Adam(loss.parameters(), 0.1)
    y = torch.tensor([1.0, 2.0, 3.0], device=device)
    for _ in range(200):
        optimizer.zero_grad()
        loss(y).backward()
        optimizer.step()
    torch.testing.assert_close(guide.median()["z"], y / 1.01, rtol=0, atol=0.2)


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


def test_what_was_first_called_in_inference_mode_trains(device):
    def model(x, y=None):
        w = pyro.sample("w", LogUniform().expand([1, 4]).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x @ w.mT)[:, 0], 1.0), obs=y)

    x = torch.randn(5, 4)
    guide = AutoSparseNormal(model)
    with torch.inference_mode():
        guide(x, x[:, 0])
    loss = SparseVD_ELBO()(model, guide)
    before = guide.median()["w"]
    optimizer = torch.optim.Adam(loss.parameters())
    loss(x, x[:, 0]).backward()
    optimizer.step()
    assert not torch.equal(guide.median()["w"], before)


def test_a_prior_that_moved_in_inference_mode_trains(device):
    model = Supervised(bayesianize(nn.Linear(4, 1)).double(), lambda mean: dist.Normal(mean[:, 0], 1.0), 10)
    guide = AutoSparseNormal(model)
    x = torch.randn(5, 4, dtype=torch.float64)
    elbo = SparseVD_ELBO(local_reparam=False, kl="monte_carlo")
    with torch.inference_mode():
        elbo.loss(model, guide, x, x[:, 0])
    elbo(model, guide)(x, x[:, 0]).backward()
    assert all(p.grad is not None for p in guide.parameters())


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


def test_the_masks_of_a_summary_are_not_those_of_a_sparsified_guide():
    guide = AutoSparseNormal(bayesianize(nn.Linear(4, 3)))
    masks = {"weight": torch.ones(3, 4, dtype=torch.bool)}
    sparse = guide.sparsified(SimpleNamespace(masks=masks))
    state = {name: torch.zeros_like(value) for name, value in sparse.state_dict().items()}
    sparse.load_state_dict(state)
    assert masks["weight"].all()


@pytest.mark.parametrize(
    "likelihood",
    [lambda out: dist.Categorical(logits=out), lambda out: dist.Normal(out, 1.0).to_event(1)],
    ids=["classes", "numbers"],
)
def test_a_prediction_before_training_leaves_the_targets_of_a_supervised_model_open(likelihood, device):
    model = Supervised(bayesianize(nn.Linear(4, 3).to(device), LogUniform(1e-4, 1e2)), likelihood, 10)
    guide = AutoSparseNormal(model)
    x = torch.randn(5, 4, device=device)
    samples = Predictive(model, guide=guide, num_samples=2)(x)
    assert set(samples) == {"weight", "y"}
    assert list(guide.posteriors) == ["weight"]
    y = samples["y"][0]
    SparseVD_ELBO()(model, guide)(x, y).backward()
    with pytest.raises(ValueError, match=r"^y: expected this latent of the model in the guide"):
        SparseVD_ELBO()(model, guide)(x)


def test_initial_values_of_another_shape_are_refused_by_the_name_of_their_site(device):
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


def test_an_initialisation_sees_the_sites_of_a_network_as_pyro_records_them(device):
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
def test_a_guide_after_one_whose_first_pass_failed_starts_at_its_own_weights(outputs, device):
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
