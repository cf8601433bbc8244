"""The loss: numbers that are not finite."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from checks import seeded, stored_values, values_of
from problems import (
    F64,
    NUM_DATA,
    Twin,
    model_and_guide,
    model_and_guide_of,
    network_twin,
    regression_data,
    trained_once,
)
from pyro_sparsevd import AutoSparseNormal, LogUniform, SparseVD_ELBO, Supervised, bayesianize
from pyro_sparsevd.poutine.trace import log_prob


def _function_of_data_twin(device: torch.device) -> Twin:
    zeros = torch.zeros(4, dtype=F64, device=device)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(zeros, 1.0).to_event(1))
        with pyro.plate("data", NUM_DATA, subsample=x):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    return Twin(model, AutoSparseNormal(model, init_log_variance=-1.0), regression_data(device))


def _bits(tensors: Any) -> list[bytes]:
    return [t.detach().cpu().numpy().tobytes() for t in tensors]


NAN_OR_INF = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("way", ["svi", "loss"])
@pytest.mark.parametrize("value", NAN_OR_INF)
@pytest.mark.parametrize(("position", "name"), [(0, "x"), (1, "y")])
@pytest.mark.parametrize("task", ["regression", "classification"])
def test_data_that_are_not_finite_raise_before_anything_changes(task, position, name, value, way, device):
    p = trained_once(device, task)
    p.data[position].view(-1)[-1] = value
    state, store, terms = _bits(values_of(p.model, p.guide)), stored_values(), p.svi.loss
    for parameter in p.loss.parameters():
        parameter.grad = None
    with pytest.raises(ValueError, match=rf"^{name}: expected finite numbers, but it holds NaN or infinities"):
        p.svi.step(*p.data) if way == "svi" else p.loss(*p.data).backward()
    assert _bits(values_of(p.model, p.guide)) == state
    assert stored_values().keys() == store.keys()
    assert all(torch.equal(stored_values()[key], store[key]) for key in store)
    assert all(parameter.grad is None for parameter in p.loss.parameters())
    assert p.svi.loss is terms


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_an_error_comes_without_a_warning(task, device):
    p = trained_once(device, task)
    with torch.no_grad():
        p.guide.posteriors["2.weight"].log_variance.fill_(-math.inf)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else torch warns once in a process
    try:
        with pytest.raises(ValueError, match=r"^log_variances\.2\.weight_unconstrained: expected finite"):
            p.loss(*p.data)
    finally:
        torch.set_warn_always(always)


@pytest.mark.parametrize("way", ["svi", "loss"])
@pytest.mark.parametrize("value", NAN_OR_INF)
@pytest.mark.parametrize("owner", ["locs", "log_variances", "bias"])
@pytest.mark.parametrize("task", ["regression", "classification"])
def test_parameters_that_are_not_finite_raise_before_anything_changes(task, owner, value, way, device):
    p = trained_once(device, task)
    with torch.no_grad():
        parameter, name = {
            "locs": lambda: (p.guide.posteriors["2.weight"].loc, r"locs\.2\.weight"),
            "log_variances": lambda: (p.guide.posteriors["2.weight"].log_variance, r"log_variances\.2\.weight"),
            "bias": lambda: (p.model.network[2].bias, r"2\.bias"),
        }[owner]()
        parameter.view(-1)[0] = value
    state = _bits(values_of(p.model, p.guide))
    with pytest.raises(ValueError, match=rf"^\S*{name}\S*: expected finite numbers, but it holds NaN or infinities"):
        p.svi.step(*p.data) if way == "svi" else p.loss(*p.data).backward()
    assert _bits(values_of(p.model, p.guide)) == state


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("make", [network_twin, _function_of_data_twin], ids=["network", "function"])
def test_bad_data_at_the_very_first_step_do_no_harm(make, position, device):
    twin, other = make(device), make(device)
    bad = [t.clone() for t in twin.args]
    bad[position][0] = math.nan
    svi = SVI(twin.model, twin.guide, pyro.optim.SGD({"lr": 0.0}), SparseVD_ELBO())
    with pytest.raises(ValueError, match=r"expected finite numbers"):
        svi.step(*bad)
    for guide in (twin.guide, other.guide):
        guide(*twin.args)
    loss = seeded(svi.step, *twin.args)
    assert loss == seeded(SparseVD_ELBO().loss, other.model, other.guide, *other.args)


@pytest.mark.parametrize("value", NAN_OR_INF)
def test_bad_data_do_not_reach_running_statistics(value, device):
    class Normalised(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 1)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x))

    model, guide = model_and_guide_of(Normalised, device)
    x, y = regression_data(device)
    loss = SparseVD_ELBO()(model, guide)
    loss(x, y)
    before = [b.clone() for b in model.buffers()]
    bad = x.clone()
    bad[0, 0] = value
    with pytest.raises(ValueError, match=r"^x: expected finite numbers"):
        loss(bad, y)
    assert all(torch.equal(b, kept) for b, kept in zip(model.buffers(), before, strict=True))


def test_a_keyword_argument_is_named(device):
    p = trained_once(device, "regression")
    x, y = p.data
    y[0] = math.nan
    with pytest.raises(ValueError, match=r"^y: expected finite numbers"):
        p.loss(x, y=y)


def test_an_argument_of_a_function_is_named(device):
    def model(inputs, *targets):
        w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=F64, device=device), 1.0))
        with pyro.plate("data", len(inputs)):
            pyro.sample("y", dist.Normal(w * inputs, 1.0), obs=targets[-1])

    guide = AutoSparseNormal(model)
    x, bad = torch.ones(2, 3, dtype=F64, device=device)
    guide(x, x, x)
    bad = bad * math.nan
    with pytest.raises(ValueError, match=r"^inputs: expected finite numbers"):
        SparseVD_ELBO().loss(model, guide, bad, x, x)
    with pytest.raises(ValueError, match=r"^argument 2: expected finite numbers"):
        SparseVD_ELBO().loss(model, guide, x, x, bad)


def test_a_loss_that_overflows_from_finite_numbers_shows_its_terms(device):
    model, guide = model_and_guide(device, likelihood=lambda output: dist.Normal(output.squeeze(-1), 1e-200))
    with pytest.raises(
        ValueError, match=r"^loss: expected .*, but got nll inf and kl [\d.]+; not finite are the terms of y$"
    ):
        SparseVD_ELBO().loss(model, guide, *regression_data(device))


def test_a_sampled_divergence_that_is_infinite_names_its_site(device):
    prior = LogUniform(torch.tensor(1e-2, device=device), 1e-1)  # which draws of unit means are out of
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(device)
    nn.init.ones_(net[1].weight)
    model = Supervised(
        bayesianize(net, {"0.*": LogUniform(), "1.*": prior}), lambda out: dist.Normal(out, 1.0).to_event(1), 9
    )
    with pytest.raises(ValueError, match=r"^loss: expected .* and kl inf; not finite are the terms of 1\.weight$"):
        SparseVD_ELBO(kl="monte_carlo", num_particles=2).loss(
            model, AutoSparseNormal(model), torch.ones(5, 4, device=device), torch.ones(5, 2, device=device)
        )


def test_terms_of_the_last_good_evaluation_survive_an_error(device):
    p = trained_once(device, "regression")
    p.loss(*p.data)
    terms = dict(p.loss.elbo.terms)
    p.data[0][0] = math.nan
    with pytest.raises(ValueError, match=r"^x: expected finite"):
        p.loss(*p.data)
    assert p.loss.elbo.terms == terms


def test_a_gradient_step_is_possible_after_an_error(device):
    p = trained_once(device, "regression")
    bad = p.data[0].clone()
    bad[0] = math.nan
    with pytest.raises(ValueError, match=r"^x: expected finite"):
        p.svi.step(bad, p.data[1])
    assert math.isfinite(p.svi.step(*p.data))


@pytest.mark.parametrize(("position", "value"), [(0, math.nan), (1, math.nan), (1, math.inf)])
def test_without_the_check_a_loss_that_is_not_finite_is_returned(position, value, device):
    def likelihood(output):
        return dist.Normal(output.squeeze(-1), 0.5, validate_args=False)

    model, guide = model_and_guide(device, likelihood=likelihood)
    data = regression_data(device)
    guide(*data)
    data[position].view(-1)[0] = value
    loss = SparseVD_ELBO(check_finite=False)(model, guide)(*data)
    assert not loss.isfinite()
    with pytest.raises(ValueError, match=rf"^{'xy'[position]}: expected finite"):
        SparseVD_ELBO()(model, guide)(*data)


def test_an_error_of_the_model_itself_passes_unchanged(device):
    def model(x):
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine"):
        SparseVD_ELBO().loss(model, lambda x: None, torch.ones(1))


def test_a_target_outside_the_support_passes_the_error_of_the_likelihood(device):
    p = trained_once(device, "classification")
    x, y = p.data
    with pytest.raises(ValueError, match="Expected value argument"):
        p.loss(x, y + 7)


def test_a_draw_of_exactly_0_has_a_finite_density_and_gradient(device):
    value = torch.tensor([0.0, 1.0], device=device, requires_grad=True)
    site = {"name": "w", "fn": LogUniform().expand([2]).to_event(1), "value": value, "scale": 1.0, "mask": None}
    site["cond_indep_stack"] = ()
    density = log_prob(site)
    density.backward()
    assert density.isfinite()
    assert value.grad.tolist() == [0.0, -1.0]


def test_a_sum_that_overflows_of_finite_data_is_no_error(device):
    model, guide = model_and_guide(device, likelihood=lambda output: dist.Normal(output.squeeze(-1).tanh(), 1.0))
    x, y = regression_data(device)
    x = torch.full_like(x, 1e308)
    assert math.isfinite(SparseVD_ELBO().loss(model, guide, x, y))


@pytest.mark.parametrize("same", [True, False])
def test_a_subsample_of_the_guide_replaces_none_that_the_model_gives(same):
    def model(index):
        with pyro.plate("rows", 10, subsample=index):
            pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))

    plates = (lambda index: pyro.plate("rows", 10, subsample=index.clone())) if same else None
    guide = AutoNormal(model, create_plates=plates)
    if same:
        assert math.isfinite(SparseVD_ELBO().loss(model, guide, torch.tensor([1, 4, 2])))
    else:
        with pytest.raises(ValueError, match=r"^rows: the model gives this plate its subsample, .*create_plates"):
            SparseVD_ELBO().loss(model, guide, torch.tensor([1, 4, 2]))
