"""Pyro's own tools around a sparse model, and what Pyro asks of AutoNormal, asked of both guides side by side."""

import io
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Importance,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    WeighedPredictive,
    config_enumerate,
    infer_discrete,
)
from pyro.infer.autoguide import (
    AutoCallable,
    AutoDelta,
    AutoDiagonalNormal,
    AutoDiscreteParallel,
    AutoGuide,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_feasible,
    init_to_generated,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.discrete import TraceEnumSample_ELBO
from pyro.infer.importance import psis_diagnostic, vectorized_importance_weights
from pyro.infer.inspect import get_dependencies, get_model_relations
from pyro.infer.reparam import LocScaleReparam, ProjectedNormalReparam, StudentTReparam, TransformReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_sparsevd import (
    AutoSparseNormal,
    ImproperPriorWarning,
    LogUniform,
    SparseVD_ELBO,
    Supervised,
    bayesianize,
    sparsify,
)

F64 = torch.float64
NUM_DATA = 20
SCALE = 0.1


# What both guides are given: the same mean, and the same spread, so that one seed draws the same numbers.


def _auto_normal(model: Callable, **options: Any) -> AutoNormal:
    return AutoNormal(model, init_scale=SCALE, **options)


def _auto_sparse_normal(model: Callable, **options: Any) -> AutoSparseNormal:
    return AutoSparseNormal(model, init_log_variance=2 * math.log(SCALE), **options)


GUIDES = [
    pytest.param(_auto_normal, id="AutoNormal"),
    pytest.param(_auto_sparse_normal, id="AutoSparseNormal"),
]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _on_device(device: torch.device) -> Iterator[None]:
    with torch.device(device) if device.type != "cpu" else nullcontext():  # the context slows every call of torch
        yield


@pytest.fixture
def improper() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImproperPriorWarning)
        yield


def _named(*values: Any) -> list[Any]:
    return [pytest.param(value, id=type(value).__name__) for value in values]


def _seeded(function: Callable, *args: Any, seed: int = 5, **kwargs: Any) -> Any:
    pyro.set_rng_seed(seed)
    return function(*args, **kwargs)


def _spread_of(guide: AutoGuide, name: str) -> Tensor:
    """Returns the standard deviation of a site in unconstrained space, as its parameter holds it."""
    if isinstance(guide, AutoSparseNormal):
        return guide.posteriors[name].scale
    return guide._get_loc_and_scale(name)[1]


def _mean_of(guide: AutoGuide, name: str) -> Tensor:
    if isinstance(guide, AutoSparseNormal):
        return guide.posteriors[name].loc
    return guide._get_loc_and_scale(name)[0]


def _set_posterior(guide: AutoGuide, name: str, loc: Any, scale: Any) -> None:
    """Writes mean and standard deviation of a site in unconstrained space into the parameters of a guide."""
    parameters = dict(guide.named_parameters())
    scale = torch.as_tensor(scale).expand(parameters[f"locs.{name}_unconstrained"].shape)
    with torch.no_grad():
        parameters[f"locs.{name}_unconstrained"].copy_(torch.as_tensor(loc))
        if isinstance(guide, AutoSparseNormal):
            parameters[f"log_variances.{name}_unconstrained"].copy_(2 * scale.log())
        else:
            unconstrained = biject_to(guide.scale_constraint).inv(scale)
            parameters[f"scales.{name}_unconstrained"].copy_(unconstrained)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _svi(model: Callable, guide: Callable, elbo: Any = None, rate: float = 0.05) -> SVI:
    return SVI(model, guide, pyro.optim.Adam({"lr": rate}), SparseVD_ELBO() if elbo is None else elbo)


def _stored() -> list[str]:
    return sorted(pyro.get_param_store().keys())


class _Broadcasting(nn.Module):
    """A linear layer whose weight may have dimensions in front, one of them against the data."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x.unsqueeze(-2)).sum(-1) + self.bias


def _network(layer: Callable = nn.Linear) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(layer(4, 3), nn.Tanh(), layer(3, 1))


def _supervised(layer: Callable = nn.Linear, prior: Any = None) -> Supervised:
    bnn = bayesianize(_network(layer), prior)
    return Supervised(bnn, lambda output: dist.Normal(output.squeeze(-1), 0.5), NUM_DATA)


def _data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(8, 4), torch.randn(8)


PROPER = pytest.param(LogUniform(1e-4, 10.0), id="proper")
IMPROPER = pytest.param(None, id="improper")
WEIGHTS = ("0.weight", "2.weight")


# Predictive.


def _draws_along_a_plate(guide: Callable, size: int, *args: Any) -> dict[str, Tensor]:
    """Draws from a guide in a plate to the left of that of the data, where Predictive expects draws of weights."""
    with torch.no_grad(), pyro.plate("draws", size, dim=-2):
        return guide(*args)


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("prior", [PROPER, IMPROPER])
def test_parallel_predictions_are_the_networks_outputs_at_each_draw(make, prior, improper):
    model = _supervised(_Broadcasting, prior)
    guide = make(model)
    x, y = _data()
    guide(x, y)
    draws = _draws_along_a_plate(guide, 6, x, y)
    assert draws["0.weight"].shape == (6, 1, 3, 4)
    samples = Predictive(model, posterior_samples=draws, parallel=True, return_sites=["y", "_RETURN"])(x)
    assert samples["y"].shape == (6, 8)
    assert samples["y"].std(0).all()
    net = _network(_Broadcasting)
    for i in range(6):
        weights = {name: draws[name][i, 0] for name in WEIGHTS}
        torch.testing.assert_close(samples["_RETURN"][i], torch.func.functional_call(net, weights, x))


@pytest.mark.parametrize("make", GUIDES)
def test_parallel_and_sequential_predictions_have_one_distribution(make):
    def model(x, y=None):
        slope = pyro.sample("slope", LogUniform(1e-3, 10.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(slope * x, scale), obs=y)

    guide = make(model, init_loc_fn=init_to_value(values={"slope": torch.tensor(2.0), "scale": torch.tensor(0.5)}))
    x = torch.linspace(-1, 1, 5)
    guide(x, x)
    size = 400
    moments = []
    for parallel in (False, True):
        samples = Predictive(model, guide=guide, num_samples=size, parallel=parallel)(x)
        assert {name: value.flatten(1).shape[1] for name, value in samples.items()} == {"slope": 1, "scale": 1, "y": 5}
        moments.append((samples["y"].mean(0), samples["y"].std(0)))
    torch.testing.assert_close(*(mean for mean, _ in moments), rtol=0, atol=5 * 0.6 * (2 / size) ** 0.5)
    torch.testing.assert_close(*(std for _, std in moments), rtol=0.25, atol=0)


@pytest.mark.parametrize("make", GUIDES)
def test_parallel_predictions_through_a_matrix_product_are_refused_by_torch_with_either_guide(make):
    model = _supervised(prior=dist.Normal(0.0, 1.0))
    guide = make(model)
    x, y = _data()
    guide(x, y)
    with pytest.raises(RuntimeError, match=r"t\(\) expects a tensor with <= 2 dimensions"):
        Predictive(model, guide=guide, num_samples=5, parallel=True)(x)
    assert Predictive(model, guide=guide, num_samples=5)(x)["y"].shape == (5, 8)


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_of_a_guide_alone_draws_from_its_posterior(make, parallel):
    model = _supervised(prior=dist.Normal(0.0, 1.0))
    guide = make(model)
    x, y = _data()
    guide(x, y)
    draws = Predictive(guide, num_samples=400, parallel=parallel, return_sites=WEIGHTS)(x)
    for name in WEIGHTS:
        loc = _mean_of(guide, name)
        assert draws[name].shape == (400, *loc.shape)
        assert ((draws[name].mean(0) - loc).abs() < 5 * SCALE / 400**0.5).all()
        assert ((draws[name].std(0) / SCALE - 1).abs() < 0.25).all()


def test_parallel_predictions_of_the_sparsified_posterior_have_zeros_in_every_draw(improper):
    model = _supervised(_Broadcasting)
    guide = _auto_sparse_normal(model)
    x, y = _data()
    guide(x, y)
    summary = sparsify(guide, threshold=-3.0)
    assert 0 < summary.kept < summary.total
    draws = _draws_along_a_plate(guide.sparsified(summary), 5, x, y)
    for name in WEIGHTS:
        assert torch.equal(draws[name] != 0, summary.masks[name].expand_as(draws[name]))
    assert Predictive(model, posterior_samples=draws, parallel=True)(x)["y"].shape == (5, 8)


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_returns_deterministic_sites_and_a_vectorized_trace(make, parallel):
    def model(y=None):
        v, w = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("v", "w"))
        total = pyro.deterministic("total", v + w)
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(total, 1.0), obs=y)

    guide = make(model)
    assert set(guide(torch.zeros(3))) == {"v", "w"}
    predictive = Predictive(model, guide=guide, num_samples=7, parallel=parallel)
    samples = predictive()
    torch.testing.assert_close(samples["total"], samples["v"] + samples["w"])
    assert samples["y"].shape == (7, 3)
    trace = predictive.get_vectorized_trace()
    assert trace.nodes["y"]["value"].shape == (7, 3)
    trace.compute_log_prob()


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("parallel", [False, True])
def test_weighed_predictions_carry_the_log_ratio_of_model_and_guide(make, parallel):
    def model(y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            return pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    y = torch.tensor([0.3, 0.5, 1.1])
    guide = make(model)
    guide(y)
    result = WeighedPredictive(model, guide=guide, num_samples=9, parallel=parallel)(y, model_guide=model)
    w = result.samples["w"].flatten()
    q = dist.Normal(_mean_of(guide, "w"), SCALE).log_prob(w)
    p = dist.Normal(0.0, 1.0).log_prob(w) + dist.Normal(w, 1.0).log_prob(y[:, None]).sum(0)
    torch.testing.assert_close(result.log_weights, (p - q).detach())


# Lists of guides.


def _mixed_model(y: Tensor) -> None:
    w = pyro.sample("w", LogUniform(1e-4, 10.0).expand([3]).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(torch.zeros(2), 0.1).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w.sum() + b, s.sum()), obs=y)


@pytest.mark.parametrize("kind", ["expose", "hide", "hide_fn", "expose_fn"])
@pytest.mark.parametrize(
    "other", [AutoDelta, AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal]
)
def test_a_list_with_another_guide_has_one_loss_in_both_bounds_and_trains(other, kind):
    sparse = {
        "expose": {"expose": ["w"]},
        "hide": {"hide": ["b", "s"]},
        "hide_fn": {"hide_fn": lambda site: site["name"] in ("b", "s")},
        "expose_fn": {"expose_fn": lambda site: site["name"] == "w"},
    }[kind]
    y = torch.linspace(0.5, 1.5, 4)
    guide = AutoGuideList(_mixed_model)
    guide.append(_auto_sparse_normal(poutine.block(_mixed_model, **sparse)))
    guide.append(other(poutine.block(_mixed_model, hide=["w"])))
    assert {"w", "b", "s"} <= set(guide(y))
    ours = SparseVD_ELBO(kl="monte_carlo", local_reparam=False)
    losses = [_seeded(elbo.loss, _mixed_model, guide, y) for elbo in (Trace_ELBO(), ours)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    before = _state(guide)
    assert math.isfinite(_svi(_mixed_model, guide).step(y))
    after = _state(guide)
    assert all((after[name] != before[name]).any() for name in before)
    assert {name: value.shape for name, value in guide.median(y).items()} == {"w": (3,), "b": (), "s": (2,)}


def test_the_loss_of_a_list_with_a_point_estimate_is_that_of_the_hand_formula():
    y = torch.linspace(0.5, 1.5, 4)
    guide = AutoGuideList(_mixed_model)
    guide.append(AutoSparseNormal(poutine.block(_mixed_model, expose=["w"]), init_log_variance=-60.0))
    guide.append(AutoDelta(poutine.block(_mixed_model, hide=["w"])))
    values = guide(y)
    q = guide[0].posteriors["w"]
    prior = LogUniform(1e-4, 10.0).expand([3])
    nll = -dist.Normal(values["w"].sum() + values["b"], values["s"].sum()).log_prob(y).sum()
    points = dist.Normal(0.0, 1.0).log_prob(values["b"]) + dist.LogNormal(0.0, 0.1).log_prob(values["s"]).sum()
    divergence = torch.distributions.kl_divergence(q, prior).sum()
    loss = SparseVD_ELBO(kl="exact").loss(_mixed_model, guide, y)
    assert loss == pytest.approx((nll + divergence - points).item(), abs=1e-6)


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("with_median", [False, True])
def test_a_list_takes_a_function_of_the_users(make, with_median):
    def by_hand(y):
        loc = pyro.param("b_loc", lambda: torch.tensor(0.3))
        return {"b": pyro.sample("b", dist.Normal(loc, SCALE))}

    def median(y):
        return {"b": pyro.param("b_loc").detach()}

    guide = AutoGuideList(_mixed_model)
    guide.append(make(poutine.block(_mixed_model, hide=["b"])))
    guide.append(AutoCallable(_mixed_model, by_hand, median) if with_median else by_hand)
    y = torch.linspace(0.5, 1.5, 4)
    svi = _svi(_mixed_model, guide, Trace_ELBO())
    losses = [svi.step(y) for _ in range(3)]
    assert all(map(math.isfinite, losses))
    assert pyro.param("b_loc") != 0.3
    assert set(guide(y)) == {"w", "b", "s"}
    assert set(guide.median(y)) == ({"w", "b", "s"} if with_median else {"w", "s"})
    assert math.isfinite(SparseVD_ELBO().loss(_mixed_model, guide, y))


@pytest.mark.parametrize("make", GUIDES)
def test_a_part_belongs_to_one_list_and_takes_no_plates_of_its_own(make):
    part = make(poutine.block(_mixed_model, expose=["w"]))
    AutoGuideList(_mixed_model).append(part)
    with pytest.raises(RuntimeError, match="already added"):
        AutoGuideList(_mixed_model).append(part)
    guide = AutoGuideList(_mixed_model)
    guide.append(make(_mixed_model, create_plates=lambda y: pyro.plate("data", len(y))))
    with pytest.raises(AssertionError, match="Cannot pass create_plates"):
        guide(torch.zeros(3))


@pytest.mark.parametrize("make", GUIDES)
def test_a_list_within_a_list_gives_what_a_flat_one_gives(make):
    def part(*names: str) -> AutoGuide:
        return make(poutine.block(_mixed_model, expose=names), init_loc_fn=init_to_feasible)

    inner = AutoGuideList(poutine.block(_mixed_model, hide=["s"]))
    inner.append(part("w"))
    inner.append(part("b"))
    nested, flat = AutoGuideList(_mixed_model), AutoGuideList(_mixed_model)
    for guide, parts in ((nested, [inner, part("s")]), (flat, [part("w"), part("b"), part("s")])):
        for each in parts:
            guide.append(each)
    y = torch.linspace(0.5, 1.5, 4)
    losses = []
    for guide in (nested, flat):
        pyro.clear_param_store()
        guide(y)
        losses.append(_seeded(Trace_ELBO().loss, _mixed_model, guide, y))
    assert losses[0] == pytest.approx(losses[1])


# Effect handlers.


def _two_weights(y: Tensor) -> Tensor:
    a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
    scale = pyro.param("scale", lambda: torch.tensor(0.7), constraint=dist.constraints.positive)
    with pyro.plate("data", len(y)):
        return pyro.sample("y", dist.Normal(a.sum() + b, scale), obs=y)


Y = [0.3, 0.9, 1.4, 1.1]


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize(
    "elbo", _named(Trace_ELBO(), SparseVD_ELBO(kl="monte_carlo", local_reparam=False), TraceGraph_ELBO())
)
@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_a_scale_around_model_and_guide_multiplies_the_loss(make, elbo, factor):
    y = torch.tensor(Y)
    guide = make(_two_weights)
    guide(y)
    plain = _seeded(elbo.loss, _two_weights, guide, y)
    scaled = _seeded(elbo.loss, poutine.scale(_two_weights, factor), poutine.scale(guide, factor), y)
    assert scaled == pytest.approx(factor * plain)


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("elbo", _named(Trace_ELBO(), SparseVD_ELBO(), TraceMeanField_ELBO()))
def test_a_mask_around_model_and_guide_leaves_no_loss(make, elbo):
    y = torch.tensor(Y)
    guide = make(_two_weights)
    guide(y)
    assert elbo.loss(poutine.mask(_two_weights, mask=False), poutine.mask(guide, mask=False), y) == 0


@pytest.mark.parametrize("make", GUIDES)
def test_a_mask_around_the_model_alone_leaves_the_entropy_of_the_guide(make):
    y = torch.tensor(Y)
    guide = make(_two_weights)
    guide(y)
    trace = poutine.trace(guide)
    expected = _seeded(trace.get_trace, y).log_prob_sum().item()
    loss = _seeded(
        SparseVD_ELBO(kl="monte_carlo", local_reparam=False).loss, poutine.mask(_two_weights, mask=False), guide, y
    )
    assert loss == pytest.approx(expected)


@pytest.mark.parametrize("make", GUIDES)
def test_a_guide_of_a_conditioned_model_has_the_other_latents(make):
    y = torch.tensor(Y)
    conditioned = poutine.condition(_two_weights, data={"a": torch.ones(3)})
    guide = make(conditioned)
    assert set(guide(y)) == {"b"}
    losses = [_seeded(elbo.loss, conditioned, guide, y) for elbo in (Trace_ELBO(), SparseVD_ELBO(kl="monte_carlo"))]
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize("prior", [PROPER, IMPROPER])
def test_a_network_that_is_conditioned_on_a_weight_trains_the_other(prior):
    model = _supervised(prior=prior)
    x, y = _data()
    value = torch.full((3, 4), 0.5)
    conditioned = poutine.condition(model, data={"0.weight": value})
    guide = AutoSparseNormal(conditioned)
    assert set(guide(x, y)) == {"2.weight"}
    trace = poutine.trace(poutine.replay(conditioned, trace=poutine.trace(guide).get_trace(x, y))).get_trace(x, y)
    assert trace.nodes["0.weight"]["is_observed"]
    before = _state(guide)
    assert math.isfinite(_svi(conditioned, guide).step(x, y))
    assert all((value != before[name]).all() for name, value in _state(guide).items())


def test_a_guide_of_the_whole_model_serves_the_conditioned_one_with_the_same_loss():
    y = torch.tensor(Y)
    whole = _auto_sparse_normal(_two_weights)
    whole(y)
    conditioned = poutine.condition(_two_weights, data={"a": torch.ones(3)})
    part = _auto_sparse_normal(conditioned)
    part(y)
    _set_posterior(part, "b", *(f(whole, "b").detach() for f in (_mean_of, _spread_of)))
    elbo = SparseVD_ELBO(num_particles=200)
    losses = [elbo.loss(conditioned, guide, y) for guide in (whole, part)]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize(
    ("handle", "sites"),
    [
        (lambda model: poutine.block(model, hide=["a"]), {"b"}),
        (lambda model: poutine.block(model, expose=["a"]), {"a"}),
        (lambda model: poutine.block(model, hide_types=["param"]), {"a", "b"}),
        (lambda model: poutine.do(model, data={"b": torch.tensor(2.0)}), {"a", "b"}),
        (lambda model: poutine.uncondition(model), {"a", "b", "y"}),
        (lambda model: poutine.substitute(model, data={"scale": torch.tensor(2.0)}), {"a", "b"}),
        (lambda model: poutine.lift(model, prior={"scale": dist.LogNormal(0.0, 1.0)}), {"a", "b", "scale"}),
        (lambda model: poutine.infer_config(model, config_fn=lambda site: {}), {"a", "b"}),
        (lambda model: poutine.seed(model, rng_seed=1), {"a", "b"}),
        (lambda model: poutine.broadcast(model), {"a", "b"}),
        (lambda model: poutine.reparam(model, config={"a": LocScaleReparam()}), {"a_decentered", "b"}),
    ],
    ids=["hide", "expose", "types", "do", "uncondition", "substitute", "lift", "infer", "seed", "broadcast", "reparam"],
)
def test_a_guide_of_a_handled_model_has_its_latents(make, handle, sites):
    y = torch.tensor(Y)
    model = handle(_two_weights)
    guide = make(model)
    assert set(guide(y)) == sites
    assert set(guide.median(y)) == sites
    assert set(guide.quantiles([0.1, 0.9], y)) == sites
    assert math.isfinite(_seeded(Trace_ELBO().loss, model, guide, y))


@pytest.mark.parametrize("make", GUIDES)
def test_latents_that_are_made_equal_have_one_posterior(make):
    def model():
        a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("a", "b"))
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=torch.tensor(1.0))

    equal = poutine.equalize(model, ["a", "b"], "sample")
    guide = make(equal)
    assert set(guide()) == {"a"}
    losses = [_seeded(elbo.loss, equal, guide) for elbo in (Trace_ELBO(), SparseVD_ELBO(kl="monte_carlo"))]
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize("make", GUIDES)
def test_parameters_of_a_guide_may_be_lifted_or_substituted_by_name(make):
    y = torch.tensor(Y)
    guide = make(_two_weights)
    guide(y)
    name = f"{type(guide).__name__}.locs.a"
    lifted = poutine.trace(poutine.lift(guide, prior={name: dist.Normal(torch.full((3,), 40.0), 1e-3).to_event(1)}))
    trace = lifted.get_trace(y)
    assert trace.nodes[name]["type"] == "sample"
    assert ((trace.nodes["a"]["value"] - 40).abs() < 1).all()
    substituted = poutine.substitute(guide, data={name: torch.full((3,), -7.0)})
    assert ((substituted(y)["a"] + 7).abs() < 1).all()
    assert (guide(y)["a"].abs() < 1).all()


def test_a_parameter_of_the_likelihood_may_be_lifted_to_a_latent_beside_the_sparse_weights():
    class Noise(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = PyroParam(torch.tensor(0.5), dist.constraints.positive)

        def forward(self, output: Tensor) -> dist.Normal:
            return dist.Normal(output.squeeze(-1), self.scale)

    model = Supervised(bayesianize(_network(), LogUniform(1e-4, 10.0)), Noise(), NUM_DATA)
    x, y = _data()
    lifted = poutine.lift(model, prior={"likelihood.scale": dist.LogNormal(0.0, 1.0)})
    guide = AutoSparseNormal(lifted)
    assert set(guide(x, y)) == {*WEIGHTS, "likelihood.scale"}
    assert guide.sparse_sites == WEIGHTS
    guide_trace = poutine.trace(guide).get_trace(x, y)
    trace = poutine.trace(poutine.replay(lifted, trace=guide_trace)).get_trace(x, y)
    assert (trace.nodes["y"]["fn"].scale == guide_trace.nodes["likelihood.scale"]["value"]).all()
    before = _state(guide)
    assert math.isfinite(_svi(lifted, guide).step(x, y))
    assert all((value != before[name]).all() for name, value in _state(guide).items())


@pytest.mark.parametrize("make", GUIDES)
def test_a_seeded_guide_repeats_itself_and_leaves_the_generator_alone(make):
    y = torch.tensor(Y)
    guide = make(_two_weights)
    guide(y)
    seeded = poutine.seed(guide, rng_seed=3)
    first = seeded(y)
    state = torch.get_rng_state()
    assert _same(first, seeded(y))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", GUIDES)
def test_a_replayed_model_takes_values_and_subsample_of_the_guide(make):
    full = torch.arange(20.0)

    def model():
        with pyro.plate("data", 20, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=full[index])
        return index

    guide = make(model)
    guide()
    seen = set()
    for _ in range(10):
        guide_trace = poutine.trace(guide).get_trace()
        replayed = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
        index = replayed.nodes["_RETURN"]["value"]
        assert torch.equal(index, guide_trace.nodes["data"]["value"])
        assert torch.equal(replayed.nodes["z"]["value"], guide_trace.nodes["z"]["value"])
        assert torch.equal(replayed.nodes["y"]["value"], full[index])
        seen.add(tuple(index.tolist()))
    assert len(seen) > 1


# Pictures of models.


def test_relations_of_a_network_are_weights_to_targets_in_the_plate_of_the_data(improper):
    x, y = _data()
    relations = get_model_relations(_supervised(), (x, y))
    assert relations["sample_sample"] == {"0.weight": [], "2.weight": [], "y": list(WEIGHTS)}
    assert relations["sample_dist"] == {"0.weight": "LogUniform", "2.weight": "LogUniform", "y": "Normal"}
    assert relations["plate_sample"] == {"data": ["y"]}
    assert relations["observed"] == ["y"]


def test_relations_of_the_guide_are_its_parameters_to_its_sites():
    guide = AutoSparseNormal(_supervised())
    relations = get_model_relations(guide, _data())
    assert relations["sample_dist"] == dict.fromkeys(WEIGHTS, "SparseNormal")
    assert relations["sample_sample"] == {name: [] for name in WEIGHTS}
    assert relations["sample_param"] == {
        name: [f"AutoSparseNormal.{kind}.{name}" for kind in ("locs", "log_variances")] for name in WEIGHTS
    }
    assert relations["observed"] == []


def test_looking_at_relations_leaves_guide_and_model_usable(improper):
    model = _supervised()
    guide = AutoSparseNormal(model)
    x, y = _data()
    get_model_relations(model, (x, y))
    get_model_relations(guide, (x, y))
    assert {type(p) for p in (*guide.parameters(), *model.parameters())} == {nn.Parameter}
    before = _state(guide)
    _svi(model, guide).step(x, y)
    assert all((value != before[name]).all() for name, value in _state(guide).items())


def test_every_weight_depends_on_every_other_in_the_posterior(improper):
    dependencies = get_dependencies(_supervised(), _data())
    assert dependencies["prior_dependencies"] == {
        "0.weight": {"0.weight": set()},
        "2.weight": {"2.weight": set()},
        "y": {"y": set(), "0.weight": set(), "2.weight": set()},
    }
    assert dependencies["posterior_dependencies"]["0.weight"].keys() == {"0.weight", "2.weight", "y"}


class _Drawing:
    """What ``graphviz.Digraph`` is to Pyro: a record of what was drawn."""

    def __init__(self, name: str = "") -> None:
        self.name, self.nodes, self.edges, self.parts = name, [], [], []

    def node(self, name: str, **style: str) -> None:
        self.nodes.append((name, style.get("fillcolor")))

    def edge(self, source: str, target: str) -> None:
        self.edges.append((source, target))

    def attr(self, **style: str) -> None:
        pass

    def subgraph(self, part: "_Drawing") -> None:
        self.parts.append(part)


@pytest.mark.parametrize("params", [False, True])
def test_a_network_is_drawn(params, improper, monkeypatch):
    monkeypatch.setitem(sys.modules, "graphviz", types.SimpleNamespace(Digraph=_Drawing))
    drawing = pyro.render_model(_supervised(), _data(), render_distributions=True, render_params=params)
    assert {("0.weight", "white"), ("2.weight", "white")} <= set(drawing.nodes)
    assert [(part.name, part.nodes) for part in drawing.parts] == [("cluster_data", [("y", "gray")])]
    assert {("0.weight", "y"), ("2.weight", "y")} <= set(drawing.edges)


def test_a_guide_is_drawn_with_its_parameters(monkeypatch):
    monkeypatch.setitem(sys.modules, "graphviz", types.SimpleNamespace(Digraph=_Drawing))
    drawing = pyro.render_model(AutoSparseNormal(_supervised()), _data(), render_params=True)
    assert set(drawing.edges) == {
        (f"AutoSparseNormal.{kind}.{name}", name) for kind in ("locs", "log_variances") for name in WEIGHTS
    }


# Discrete latents beside sparse ones.


@config_enumerate
def _mixture(y: Tensor) -> None:
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", LogUniform(1e-3, 10.0))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("y", dist.Normal(loc[..., k], 0.5), obs=y)


MIXTURE_Y = [-2.0, 2.0, 2.1, -1.9, 2.2]


@pytest.mark.parametrize("make", GUIDES)
def test_enumerated_latents_beside_the_guide_are_inferred(make):
    y = torch.tensor(MIXTURE_Y)
    start = init_to_value(values={"loc": torch.tensor([-1.0, 1.0])})
    guide = make(poutine.block(_mixture, hide=["k"]), init_loc_fn=start)
    svi = _svi(_mixture, guide, TraceEnum_ELBO(max_plate_nesting=1), rate=0.1)
    for _ in range(60):
        svi.step(y)
    assert set(guide(y)) == {"loc"}
    torch.testing.assert_close(guide.median()["loc"], torch.tensor([-1.95, 2.1]), rtol=0, atol=0.4)
    expected = [0, 1, 1, 0, 1]
    for temperature in (0, 1):
        for known in (
            poutine.condition(_mixture, data=guide.median()),
            poutine.replay(_mixture, trace=poutine.trace(guide).get_trace(y)),
        ):
            inferred = infer_discrete(known, first_available_dim=-2, temperature=temperature)
            assert poutine.trace(inferred).get_trace(y).nodes["k"]["value"].tolist() == expected


@pytest.mark.parametrize("make", GUIDES)
def test_discrete_latents_are_sampled_with_the_enumerating_bound(make):
    y = torch.tensor(MIXTURE_Y)
    start = init_to_value(values={"loc": torch.tensor([-2.0, 2.0])})
    guide = make(poutine.block(_mixture, hide=["k"]), init_loc_fn=start)
    elbo = TraceEnumSample_ELBO(max_plate_nesting=1)
    assert math.isfinite(elbo.loss(_mixture, guide, y))
    elbo.sample_saved()


@pytest.mark.parametrize("hidden", [True, False], ids=["no part of the guide", "a part of the guide"])
def test_the_sparse_bound_refuses_enumerated_latents_by_name(hidden):
    y = torch.tensor(MIXTURE_Y)
    guide: Any = AutoSparseNormal(poutine.block(_mixture, hide=["k"]))
    if not hidden:
        part, guide = guide, AutoGuideList(_mixture)
        guide.append(part)
        guide.append(AutoDiscreteParallel(poutine.block(_mixture, expose=["k"])))
    guide(y)
    assert math.isfinite(TraceEnum_ELBO(max_plate_nesting=1).loss(_mixture, guide, y))
    with pytest.raises(ValueError, match=r"^k: expected"):
        SparseVD_ELBO().loss(_mixture, guide, y)


def test_the_sparse_bound_takes_the_model_once_its_discrete_latents_are_known():
    y = torch.tensor(MIXTURE_Y)
    known = poutine.condition(_mixture, data={"k": torch.tensor([0, 1, 1, 0, 1])})
    guide = AutoSparseNormal(known, init_loc_fn=init_to_value(values={"loc": torch.tensor([-1.0, 1.0])}))
    svi = _svi(known, guide, rate=0.1)
    for _ in range(60):
        svi.step(y)
    torch.testing.assert_close(guide.median()["loc"], torch.tensor([-1.95, 2.1]), rtol=0, atol=0.4)


# Importance sampling.


def _one_weight(prior: Any, y: float = 1.0, scale: float = 0.1) -> Callable:
    def model():
        w = pyro.sample("w", prior)
        pyro.sample("y", dist.Normal(w, scale), obs=torch.tensor(y))

    return model


def _fitted(model: Callable, loc: float = 1.0, scale: float = 0.1) -> AutoSparseNormal:
    guide = AutoSparseNormal(model)
    guide()
    _set_posterior(guide, "w", loc, scale)
    return guide


def test_importance_weights_of_a_proper_prior_average_to_the_evidence():
    low, high = 0.01, 10.0
    model = _one_weight(LogUniform(low, high))
    guide = _fitted(model, scale=0.12)
    magnitudes = torch.linspace(math.log(low), math.log(high), 200_001).exp()
    w = torch.cat([-magnitudes.flip(0), magnitudes])
    density = LogUniform(low, high).log_prob(w).exp() * dist.Normal(w, 0.1).log_prob(torch.tensor(1.0)).exp()
    evidence = torch.trapezoid(torch.where(w.abs() < low * 0.999, 0, density), w).item()
    slow = Importance(model, guide, num_samples=300).run()
    weights, _, _ = vectorized_importance_weights(model, guide, num_samples=20_000, max_plate_nesting=0)
    for log_weights, estimate in (
        (torch.stack(slow.log_weights), slow.get_log_normalizer()),
        (weights, weights.exp().mean().log()),
    ):
        error = log_weights.exp().std() / len(log_weights) ** 0.5 / evidence
        assert abs(estimate.item() - math.log(evidence)) < 4 * error.item()
    assert slow.get_ESS() > 250


def test_weights_of_the_improper_prior_are_those_of_a_proper_one_up_to_a_constant():
    proper, improper = _one_weight(LogUniform(1e-6, 1e3)), _one_weight(LogUniform())
    guides = [_fitted(model) for model in (proper, improper)]
    runs = [
        _seeded(Importance(model, guide, num_samples=50).run)
        for model, guide in zip((proper, improper), guides, strict=True)
    ]
    difference = torch.stack(runs[1].log_weights) - torch.stack(runs[0].log_weights)
    torch.testing.assert_close(difference, torch.full((50,), math.log(2 * math.log(1e9))))
    torch.testing.assert_close(runs[0].get_normalized_weights(), runs[1].get_normalized_weights())
    torch.testing.assert_close(runs[0].get_ESS(), runs[1].get_ESS())


def test_importance_sampling_from_the_improper_prior_itself_says_so():
    with pytest.warns(ImproperPriorWarning, match="improper and has no samples"):
        Importance(_one_weight(LogUniform()), num_samples=3).run()


def test_samples_outside_a_proper_prior_have_no_weight():
    model = _one_weight(LogUniform(0.5, 1.0))
    weights, trace, _ = vectorized_importance_weights(
        model, _fitted(model, scale=0.3), num_samples=200, max_plate_nesting=0
    )
    magnitude = trace.nodes["w"]["value"].flatten().abs()
    assert torch.equal(weights == -math.inf, (magnitude < 0.5) | (magnitude > 1))
    assert 0 < weights.isinf().sum() < 200


@pytest.mark.parametrize(
    ("prior", "y", "loc", "fits"),
    [
        pytest.param(LogUniform(1e-4, 10.0), 1.0, 1.0, True, id="proper, kept"),
        pytest.param(LogUniform(), 1.0, 1.0, True, id="improper, kept"),
        pytest.param(LogUniform(), 0.0, 0.0, False, id="improper, at the pole"),
        pytest.param(LogUniform(1e-6, 10.0), 0.0, 0.0, False, id="proper, at the pole"),
        pytest.param(dist.Normal(0.0, 10.0), 0.0, 0.0, True, id="Normal"),
    ],
)
def test_the_pareto_diagnostic_sees_the_pole_of_the_prior_and_nothing_else(prior, y, loc, fits):
    model = _one_weight(prior, y)
    # A little wider than the likelihood, as an optimum that reached it would not be further off.
    k = psis_diagnostic(model, _fitted(model, loc, 0.12), num_particles=4000, max_plate_nesting=0)
    assert (k < 0.5) == fits
    assert fits or k > 0.7  # 1/|w| has no mean under a density that is positive at 0: its index is 1


def test_the_pareto_diagnostic_runs_on_a_network_that_broadcasts():
    model = _supervised(_Broadcasting, LogUniform(1e-4, 10.0))
    guide = _auto_sparse_normal(model)
    x, y = _data()
    guide(x, y)
    k = psis_diagnostic(model, guide, x, y, num_particles=200, max_plate_nesting=1)
    assert math.isfinite(k)


# Pyro's parameter store and settings.


def _trained_in_turns(models: list[Supervised], makes: list[Callable], turns: list[int]) -> list[dict[str, Tensor]]:
    guides = [make(model) for make, model in zip(makes, models, strict=True)]
    for guide in guides:
        _seeded(guide, *_data())
    svis = [_svi(model, guide, Trace_ELBO()) for model, guide in zip(models, guides, strict=True)]
    for number, turn in enumerate(turns):
        _seeded(svis[turn].step, *_data(), seed=turns[:number].count(turn))
    assert bool(_stored()) != pyro.settings.get("module_local_params")
    return [_state(guide) for guide in guides]


@pytest.mark.parametrize("local", [False, True], ids=["one store", "module_local_params"])
@pytest.mark.parametrize("second", GUIDES)
def test_two_models_trained_in_turns_do_what_they_do_alone(second, local):
    def models() -> list[Supervised]:
        return [_supervised(prior=LogUniform(1e-4, 10.0)), _supervised(prior=dist.Normal(0.0, 1.0))]

    makes = [_auto_sparse_normal, second]
    with pyro.settings.context(module_local_params=local):
        together = _trained_in_turns(models(), makes, [0, 1, 1, 0, 1, 0])
        for number in (0, 1):
            pyro.clear_param_store()
            alone = _trained_in_turns([models()[number]], [makes[number]], [0, 0, 0])[0]
            for name, value in alone.items():
                torch.testing.assert_close(together[number][name], value)


@pytest.mark.parametrize("local", [False, True], ids=["one store", "module_local_params"])
def test_lists_predictions_and_importance_weights_work_with_either_setting(local):
    y = torch.tensor(Y)
    with pyro.settings.context(module_local_params=local):
        guide = AutoGuideList(_mixed_model)
        guide.append(_auto_sparse_normal(poutine.block(_mixed_model, expose=["w"])))
        guide.append(AutoNormal(poutine.block(_mixed_model, hide=["w"])))
        guide(y)
        before = _state(guide)
        svi = _svi(_mixed_model, guide, rate=0.01)
        for _ in range(2):
            svi.step(y)
        assert all((value != before[name]).all() for name, value in _state(guide).items())
        draws = Predictive(_mixed_model, guide=guide, num_samples=3)(y)
        assert draws["w"].reshape(3, 3).std(0).all()
        assert all(map(math.isfinite, Importance(_mixed_model, guide, num_samples=3).run(y).log_weights))
        assert (_stored() == []) == local


@pytest.mark.parametrize("local", [False, True], ids=["one store", "module_local_params"])
@pytest.mark.parametrize("make", GUIDES)
def test_the_store_may_be_cleared_in_the_middle_of_training(make, local):
    with pyro.settings.context(module_local_params=local):
        model = _supervised(prior=LogUniform(1e-4, 10.0))
        guide = make(model)
        _svi(model, guide, Trace_ELBO()).step(*_data())
        parameters = [*guide.parameters(), *model.parameters()]
        before = [p.detach().clone() for p in parameters]
        pyro.clear_param_store()
        guide(*_data())
        _svi(model, guide, Trace_ELBO()).step(*_data())
        now = [*guide.parameters(), *model.parameters()]
        assert all(new is old for new, old in zip(now, parameters, strict=True))
        for old, new in zip(before, now, strict=True):
            torch.testing.assert_close((new - old).abs(), torch.full_like(old, 0.05))  # Adam's first step


def test_a_name_is_free_again_after_the_store_was_cleared():
    for _ in range(2):
        model = _supervised(prior=LogUniform(1e-4, 10.0))
        guide = AutoSparseNormal(model)
        _svi(model, guide).step(*_data())
        expected = [f"AutoSparseNormal.{kind}.{name}" for kind in ("locs", "log_variances") for name in WEIGHTS]
        assert _stored() == sorted([*expected, "0.bias", "2.bias"])
        pyro.clear_param_store()


@pytest.mark.parametrize("make", GUIDES)
def test_a_scope_of_the_store_keeps_two_trainings_apart(make):
    store = pyro.get_param_store()
    model = _supervised(prior=LogUniform(1e-4, 10.0))
    guide = make(model)
    svi = _svi(model, guide, Trace_ELBO())
    svi.step(*_data())
    names, before = _stored(), _state(guide)
    with store.scope() as scope:
        other = _supervised(prior=LogUniform(1e-4, 10.0))
        inner = make(other)
        _svi(other, inner, Trace_ELBO()).step(*_data())
        assert _stored() == names
    assert sorted(scope["params"]) == names
    assert _same(_state(guide), before)
    trained = _state(inner)
    svi.step(*_data())
    assert _stored() == names
    assert not _same(_state(guide), before)
    with store.scope(scope):
        inner(*_data())
        assert _same(_state(inner), trained)
        assert _stored() == names


@pytest.mark.parametrize("make", GUIDES)
def test_a_value_written_to_the_store_is_the_guides(make):
    y = torch.tensor(Y)
    guide = make(_two_weights)
    poutine.trace(guide).get_trace(y)
    name = f"{type(guide).__name__}.locs.a"
    pyro.get_param_store()[name] = torch.full((3,), 5.0)
    assert ((poutine.trace(guide).get_trace(y).nodes["a"]["value"] - 5).abs() < 1).all()
    assert torch.equal(guide.median()["a"], torch.full((3,), 5.0))
    assert torch.equal(pyro.param(name), torch.full((3,), 5.0))


@pytest.mark.parametrize("make", GUIDES)
def test_an_earlier_state_of_the_store_brings_an_earlier_guide_back(make):
    y = torch.tensor(Y)
    store = pyro.get_param_store()
    guide = make(_two_weights)
    svi = _svi(_two_weights, guide, Trace_ELBO())
    svi.step(y)
    state = {name: value.detach().clone().requires_grad_() for name, value in store.get_state()["params"].items()}
    kept = {"params": state, "constraints": store.get_state()["constraints"]}
    before = _state(guide)
    svi.step(y)
    assert not _same(_state(guide), before)
    store.set_state(kept)
    poutine.trace(guide).get_trace(y)
    assert _same(_state(guide), before)
    svi.step(y)
    assert not _same(_state(guide), before)


def test_store_and_optimizer_saved_together_go_on_as_if_never_stopped(tmp_path):
    y = torch.tensor(Y)

    def run(stop: bool) -> dict[str, Tensor]:
        pyro.clear_param_store()
        guide, optimizer = _auto_sparse_normal(_two_weights), pyro.optim.Adam({"lr": 0.05})
        svi = SVI(_two_weights, guide, optimizer, SparseVD_ELBO())
        for step in range(6):
            if stop and step == 3:
                pyro.get_param_store().save(tmp_path / "store.pt")
                optimizer.save(tmp_path / "optimizer.pt")
                pyro.clear_param_store()
                guide, optimizer = _auto_sparse_normal(_two_weights), pyro.optim.Adam({"lr": 0.05})
                pyro.get_param_store().load(tmp_path / "store.pt")
                optimizer.load(tmp_path / "optimizer.pt")
                guide(y)
                svi = SVI(_two_weights, guide, optimizer, SparseVD_ELBO())
            _seeded(svi.step, y, seed=step)
        return {**_state(guide), "scale": pyro.param("scale").detach().clone()}

    whole, resumed = run(stop=False), run(stop=True)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value)


@pytest.mark.parametrize("make", GUIDES)
def test_an_optimizer_may_treat_parameters_by_name(make):
    y = torch.tensor(Y)
    guide = make(_two_weights)
    guide(y)
    before = _state(guide)

    def options(name: str) -> dict[str, float]:
        return {"lr": 0.05 if ".locs." in name else 0.0}

    SVI(_two_weights, guide, pyro.optim.Adam(options), Trace_ELBO()).step(y)
    for name, value in _state(guide).items():
        assert (value != before[name]).all() == name.startswith("locs.")


@pytest.mark.parametrize("make", GUIDES)
def test_clipping_and_schedules_of_pyros_optimizers_work(make):
    y = torch.tensor(Y)
    guide = make(_two_weights)
    guide(y)
    schedule = pyro.optim.ExponentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "gamma": 0.0})
    svi = SVI(_two_weights, guide, schedule, Trace_ELBO())
    svi.step(y)
    schedule.step()
    before = _state(guide)
    svi.step(y)  # at a rate of 0
    assert _same(_state(guide), before)
    SVI(_two_weights, guide, pyro.optim.ClippedAdam({"lr": 0.05, "clip_norm": 1e-3}), Trace_ELBO()).step(y)
    assert all((value != before[name]).any() for name, value in _state(guide).items())


# What AutoNormal does, the guide does: models of every kind.


def _shapes() -> None:
    pyro.sample("scalar", dist.Normal(0.5, 1.0))
    pyro.sample("vector", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("matrix", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1)
    with rows:
        pyro.sample("row", dist.Normal(0.0, 1.0))
    with columns:
        pyro.sample("column", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with rows, columns:
        pyro.sample("cell", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))


def _supports() -> None:
    pyro.sample("positive", dist.LogNormal(0.0, 1.0))
    pyro.sample("gamma", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
    pyro.sample("unit", dist.Beta(2.0, 3.0))
    pyro.sample("interval", dist.Uniform(-1.0, 3.0))
    pyro.sample("heavy", dist.HalfCauchy(torch.tensor(1.0)))
    pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    pyro.sample("cholesky", dist.LKJCholesky(3))
    with pyro.plate("plate", 2):
        pyro.sample("rate", dist.Exponential(1.0))
        pyro.sample("shares", dist.Dirichlet(torch.ones(4)))


def _log_uniforms() -> None:
    pyro.sample("bounded", LogUniform(1e-6, 1e3).expand([2, 3]).to_event(2))
    pyro.sample("free", LogUniform(1e-6, 1e3))
    with pyro.plate("plate", 4):
        pyro.sample("each", LogUniform(1e-6, 1e3))


def _hierarchy() -> None:
    centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
    width = pyro.sample("width", dist.LogNormal(0.0, 1.0))
    with pyro.plate("groups", 3, dim=-2):
        group = pyro.sample("group", dist.Normal(centre, width))
        with pyro.plate("data", 4, dim=-1):
            pyro.sample("y", dist.Normal(group, 1.0), obs=torch.arange(12.0).reshape(3, 4) / 6)


def _subsampled() -> None:
    with pyro.plate("data", 12, subsample_size=5) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.arange(12.0)[index])


def _subsampled_twice() -> None:
    rows = pyro.plate("rows", 6, subsample_size=3, dim=-2)
    columns = pyro.plate("columns", 4, subsample_size=2, dim=-1)
    with rows:
        row = pyro.sample("row", dist.Normal(0.0, 1.0))
    with columns:
        column = pyro.sample("column", dist.Normal(0.0, 1.0))
    with rows as i, columns as j:
        cell = pyro.sample("cell", dist.Normal(row + column, 1.0))
        pyro.sample("y", dist.Normal(cell, 1.0), obs=torch.arange(24.0).reshape(6, 4)[i][:, j] / 12)


def _masked_and_scaled() -> None:
    with pyro.plate("plate", 3), poutine.mask(mask=torch.tensor([True, False, True])):
        pyro.sample("part", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=2.5):
        pyro.sample("heavy", dist.LogNormal(0.0, 1.0))
    with poutine.mask(mask=False):
        pyro.sample("free", dist.Normal(0.0, 1.0))


def _markov() -> None:
    x: Any = 0.0
    for t in pyro.markov(range(3)):
        x = pyro.sample(f"x{t}", dist.Normal(x, 1.0))
        pyro.sample(f"y{t}", dist.Normal(x, 1.0), obs=torch.tensor(float(t)))


def _factors() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("once", -(z**2))
    with pyro.plate("plate", 3):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.factor("each", -w.abs())


def _partly_observed() -> None:
    with pyro.plate("plate", 3):
        mask = torch.tensor([True, False, True])
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.ones(3), obs_mask=mask)


def _module() -> PyroModule:
    class Layer(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = PyroSample(dist.Normal(torch.zeros(2), 1.0).to_event(1))
            self.width = PyroSample(lambda self: dist.LogNormal(0.0, 1.0))

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()
            self.scale = PyroParam(torch.tensor(0.8), dist.constraints.positive)

        def forward(self) -> None:
            mean = self.layer.weight.sum(-1) + self.layer.width
            pyro.sample("y", dist.Normal(mean, self.scale), obs=torch.tensor(1.0))

    return Model()


ZOO = [
    pytest.param(lambda model=model: model, id=model.__name__.strip("_"))
    for model in (
        _shapes, _supports, _log_uniforms, _hierarchy, _subsampled, _subsampled_twice, _masked_and_scaled, _markov,
        _factors, _partly_observed,
    )
] + [pytest.param(_module, id="module")]  # fmt: skip


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("make_model", ZOO)
def test_samples_medians_and_quantiles_have_the_shapes_plates_and_supports_of_the_model(make, make_model):
    model = make_model()
    guide = make(model)
    guide()
    trace = poutine.trace(guide).get_trace()
    expected = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
    latents = [name for name in expected.stochastic_nodes if not site_is_subsample(expected.nodes[name])]
    assert set(guide.median()) == set(guide.quantiles([0.1, 0.9])) == set(latents)
    full = {"rows": 6, "columns": 4, "data": 12}
    for name in latents:
        q, p = trace.nodes[name], expected.nodes[name]
        assert q["value"].shape == p["fn"].shape()
        assert {f.name for f in q["cond_indep_stack"]} == {f.name for f in p["cond_indep_stack"]} & set(guide.plates)
        assert p["fn"].support.check(q["value"]).all()
        median = guide.median()[name]
        assert guide.quantiles([0.1, 0.9])[name].shape == (2, *median.shape)
        sizes = dict(zip(range(-1, -1 - median.dim(), -1), reversed(p["fn"].shape()), strict=True))
        for frame in p["cond_indep_stack"]:
            if frame.full_size not in (None, frame.size):
                sizes[frame.dim - p["fn"].event_dim] = full[frame.name]
        assert median.shape == tuple(sizes[dim] for dim in sorted(sizes))


BOUNDS = [
    pytest.param(Trace_ELBO, id="Trace_ELBO"),
    pytest.param(TraceGraph_ELBO, id="TraceGraph_ELBO"),
    pytest.param(lambda: TraceEnum_ELBO(strict_enumeration_warning=False), id="TraceEnum_ELBO"),
    pytest.param(lambda: RenyiELBO(alpha=0.5, num_particles=2), id="RenyiELBO"),
    pytest.param(
        lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=2), id="vectorized particles"
    ),
    pytest.param(lambda: SparseVD_ELBO(kl="monte_carlo", local_reparam=False), id="SparseVD_ELBO"),
]


@pytest.mark.parametrize("make_elbo", BOUNDS)
@pytest.mark.parametrize("make_model", ZOO)
def test_one_seed_gives_both_guides_one_loss_and_one_gradient(make_model, make_elbo):
    model, losses, gradients = make_model(), [], []
    for make in (_auto_normal, _auto_sparse_normal):
        guide = make(model, init_loc_fn=init_to_feasible)
        guide()
        losses.append(_seeded(make_elbo().loss_and_grads, model, guide))
        gradients.append({n: p.grad for n, p in guide.named_parameters() if n.startswith("locs.")})
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("make_model", ZOO)
def test_the_sparse_bound_by_sampling_is_pyros(make, make_model):
    model = make_model()
    guide = make(model)
    guide()
    ours = SparseVD_ELBO(kl="monte_carlo", local_reparam=False)
    losses = [_seeded(elbo.loss, model, guide) for elbo in (Trace_ELBO(), ours)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


@pytest.mark.parametrize("make", GUIDES)
def test_a_wake_sleep_loss_takes_the_guide(make):
    guide = make(_hierarchy)
    guide()
    elbo = ReweightedWakeSleep(num_particles=4)
    before = _state(guide)
    losses = _svi(_hierarchy, guide, elbo).step()
    assert all(map(math.isfinite, losses))
    assert all((value != before[name]).any() for name, value in _state(guide).items())


# Scores.


PLAIN_BOUNDS = _named(
    Trace_ELBO(),
    TraceMeanField_ELBO(),
    TraceGraph_ELBO(),
    TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    SparseVD_ELBO(),
)


@pytest.mark.parametrize("make", GUIDES)
def test_the_density_of_a_guide_is_that_of_its_posterior_in_the_models_space(make):
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("s", dist.LogNormal(0.0, 1.0))

    guide = make(model)
    guide()
    _set_posterior(guide, "z", 0.4, 0.7)
    _set_posterior(guide, "s", -0.2, 0.3)
    trace = poutine.trace(guide).get_trace()
    z, s = (trace.nodes[name]["value"] for name in ("z", "s"))
    expected = dist.Normal(0.4, 0.7).log_prob(z) + dist.LogNormal(-0.2, 0.3).log_prob(s)
    torch.testing.assert_close(trace.log_prob_sum(), expected)


@pytest.mark.parametrize("make", GUIDES)
def test_the_density_in_a_subsample_counts_for_the_whole_plate(make):
    guide = make(_subsampled)
    guide()
    _set_posterior(guide, "z", torch.arange(12.0), 0.5)
    trace = poutine.trace(poutine.block(guide, hide_fn=lambda site: "share" in site["name"])).get_trace()
    index = trace.nodes["data"]["value"]
    expected = 12 / 5 * dist.Normal(index.double(), 0.5).log_prob(trace.nodes["z"]["value"]).sum()
    torch.testing.assert_close(trace.log_prob_sum(lambda name, site: name != "data"), expected)


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("elbo", PLAIN_BOUNDS)
def test_a_factor_shifts_the_loss_by_its_value(make, elbo):
    def model(factor):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("once", factor)
        with pyro.plate("plate", 3):
            pyro.factor("each", factor)
            pyro.sample("w", dist.Normal(0.0, 1.0))

    guide = make(model)
    guide(torch.tensor(0.0))
    losses = [_seeded(elbo.loss, model, guide, torch.tensor(factor)) for factor in (0.0, 2.0)]
    assert losses[0] - losses[1] == pytest.approx(8.0)


# Posteriors that are known.


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize(
    "elbo", _named(Trace_ELBO(), TraceGraph_ELBO(), SparseVD_ELBO(kl="monte_carlo", local_reparam=False))
)
def test_at_the_exact_posterior_every_draw_has_the_evidence_as_its_loss(make, elbo):
    y = torch.tensor([1.0, -0.5, 2.0])

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 2.0), obs=y)

    guide = make(model)
    guide()
    _set_posterior(guide, "z", y / 5, math.sqrt(4 / 5))
    evidence = dist.Normal(0.0, math.sqrt(5)).log_prob(y).sum().item()
    for seed in range(3):
        assert _seeded(elbo.loss, model, guide, seed=seed) == pytest.approx(-evidence)


def _tree() -> None:
    root = pyro.sample("root", dist.Normal(0.0, 1.0))
    for name, y in (("left", 1.0), ("right", 2.0)):
        leaf = pyro.sample(name, dist.Normal(root, 1.0))
        pyro.sample(f"y_{name}", dist.Normal(leaf, 1.0), obs=torch.tensor(y))


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize(
    "make_elbo",
    [
        pytest.param(lambda n: Trace_ELBO(n, max_plate_nesting=0, vectorize_particles=True), id="Trace_ELBO"),
        pytest.param(lambda n: TraceGraph_ELBO(n, max_plate_nesting=0, vectorize_particles=True), id="TraceGraph_ELBO"),
        pytest.param(lambda n: SparseVD_ELBO(num_particles=n), id="SparseVD_ELBO"),
    ],
)
def test_the_mean_gradient_vanishes_at_the_best_factorised_posterior_of_a_tree_alone(make, make_elbo):
    precision = torch.tensor([[3.0, -1.0, -1.0], [-1.0, 2.0, 0.0], [-1.0, 0.0, 2.0]])
    mean = torch.linalg.solve(precision, torch.tensor([0.0, 1.0, 2.0]))
    guide = make(_tree)
    guide()
    for shift in (0.0, 2.0):
        for number, name in enumerate(("root", "left", "right")):
            _set_posterior(guide, name, mean[number] + shift, precision[number, number] ** -0.5)
        gradients = []
        for seed in range(10):
            guide.zero_grad()
            _seeded(make_elbo(10).loss_and_grads, _tree, guide, seed=seed)
            gradients.append(torch.stack([p.grad for p in guide.parameters()]))
        standard_errors = torch.stack(gradients).mean(0) / (torch.stack(gradients).std(0) / 10**0.5)
        assert (standard_errors.abs() < 5).all() == (shift == 0)


def _train(model: Callable, guide: Callable, elbo: Any, *args: Any, steps: int = 80) -> None:
    settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.1 ** (1.5 / steps)}
    optimizer = pyro.optim.ExponentialLR(settings)
    svi = SVI(model, guide, optimizer, elbo)
    for _ in range(steps):
        svi.step(*args)
        optimizer.step()


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize(
    "make_elbo",
    [
        pytest.param(lambda: Trace_ELBO(16, max_plate_nesting=0, vectorize_particles=True), id="Trace_ELBO"),
        pytest.param(SparseVD_ELBO, id="SparseVD_ELBO"),
    ],
)
def test_training_without_data_finds_medians_and_quantiles_of_the_prior(make, make_elbo):
    def model():
        pyro.sample("real", dist.Normal(1.0, 2.0))
        pyro.sample("positive", dist.LogNormal(0.5, 1.0))
        pyro.sample("unit", dist.Beta(3.0, 3.0))

    guide = make(model)
    guide()
    for name in ("real", "positive", "unit"):
        _set_posterior(guide, name, -0.3, 0.6)
    _train(model, guide, make_elbo())
    medians, quantiles = guide.median(), guide.quantiles([0.5, 0.8])
    for name, prior in (("real", dist.Normal(1.0, 2.0)), ("positive", dist.LogNormal(0.5, 1.0))):
        torch.testing.assert_close(medians[name], quantiles[name][0])
        torch.testing.assert_close(medians[name], prior.icdf(torch.tensor(0.5)), rtol=0.15, atol=0.2)
        torch.testing.assert_close(quantiles[name][1], prior.icdf(torch.tensor(0.8)), rtol=0.2, atol=0.1)
    torch.testing.assert_close(medians["unit"], torch.tensor(0.5), rtol=0, atol=0.05)


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("prior", [dist.Normal(0.0, 1.0), LogUniform(1e-6, 10.0)], ids=["Normal", "LogUniform"])
def test_a_linear_regression_finds_its_line(make, prior):
    torch.manual_seed(0)
    x = torch.randn(50, 2)
    y = x @ torch.tensor([1.5, -0.5]) + 0.7 + 0.1 * torch.randn(50)
    bnn = bayesianize(nn.Linear(2, 1), prior, include=["weight", "bias"])
    model = Supervised(bnn, lambda output: dist.Normal(output.squeeze(-1), 0.1), 50)
    guide = make(model)
    _train(model, guide, Trace_ELBO(), x, y, steps=120)
    torch.testing.assert_close(guide.median()["weight"], torch.tensor([[1.5, -0.5]]), rtol=0, atol=0.1)
    torch.testing.assert_close(guide.median()["bias"], torch.tensor([0.7]), rtol=0, atol=0.1)
    samples = Predictive(model, guide=guide, num_samples=20)(x)
    assert (samples["y"].mean(0) - y).abs().mean() < 0.15


# Subsamples.


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("plates", ["one", "several"])
def test_create_plates_trains_the_rows_of_a_batch_and_leaves_the_rest(make, plates):
    def model(index, y):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + shift, 1.0), obs=y)

    def create_plates(index, y):
        plate = pyro.plate("data", 10, subsample=index)
        return plate if plates == "one" else [plate]

    guide = make(model, create_plates=create_plates)
    index, y = torch.tensor([7, 2, 4]), torch.tensor([1.0, 2.0, 3.0])
    guide(index, y)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), Trace_ELBO())
    for batch in (slice(0, 3), slice(0, 2), slice(2, 3)):
        before = _mean_of(guide, "z").detach().clone()
        assert before.shape == (10,)
        svi.step(index[batch], y[batch])
        changed = (_mean_of(guide, "z") != before).nonzero().flatten().tolist()
        assert changed == sorted(index[batch].tolist())


@pytest.mark.parametrize("make", GUIDES)
def test_one_seed_gives_one_loss_in_batches_of_different_sizes(make):
    def model(index, y):
        with pyro.plate("data", 10, subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    index, y = torch.tensor([7, 2, 4]), torch.tensor([1.0, 2.0, 3.0])
    guide = make(model, create_plates=lambda index, y: pyro.plate("data", 10, subsample=index))
    guide(index, y)
    _set_posterior(guide, "z", torch.arange(10.0) / 10, 0.3)
    for size in (3, 1, 2):
        pyro.set_rng_seed(size)
        z = torch.arange(10.0)[index[:size]] / 10 + 0.3 * torch.randn(size)
        q = dist.Normal(torch.arange(10.0)[index[:size]] / 10, 0.3)
        log_ratio = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(y[:size]) - q.log_prob(z)
        loss = _seeded(Trace_ELBO().loss, model, guide, index[:size], y[:size], seed=size)
        assert loss == pytest.approx(-10 / size * log_ratio.sum().item())


@pytest.mark.parametrize("make", GUIDES)
def test_global_latents_go_with_an_encoder_of_the_local_ones(make):
    encoder = nn.Linear(1, 2)

    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def local(y):
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(y[:, None]).unbind(-1)
        with guide.plates["data"]:
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    guide = AutoGuideList(model)
    guide.append(make(poutine.block(model, expose=["scale"])))
    guide.append(local)
    y = torch.linspace(-2, 2, 6)
    guide(y)
    before, layer = _state(guide), encoder.weight.detach().clone()
    for elbo in (Trace_ELBO(), SparseVD_ELBO()):
        assert math.isfinite(_svi(model, guide, elbo).step(y))
    assert all((value != before[name]).all() for name, value in _state(guide).items())
    assert (encoder.weight != layer).all()


# How a guide starts, fails and is held.


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize(
    ("init", "known"),
    [
        (init_to_feasible, False),
        (init_to_mean, False),
        (init_to_median, False),
        (init_to_sample, False),
        (init_to_uniform, False),
        (init_to_uniform(radius=0.1), False),
        (init_to_mean(fallback=init_to_median), False),
        (init_to_value(values={"positive": torch.tensor(2.0)}), True),
        (init_to_value(values={"positive": torch.tensor(2.0)}, fallback=init_to_sample), True),
        (init_to_generated(generate=lambda: init_to_value(values={"positive": torch.tensor(2.0)})), True),
    ],
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_every_initialisation_of_pyro_starts_in_the_support(make, init, known):
    def model():
        pyro.sample("positive", dist.LogNormal(0.0, 1.0))
        pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        pyro.sample("heavy", dist.Cauchy(0.0, 1.0))
        pyro.sample("weight", LogUniform(1e-3, 1.0).expand([2]).to_event(1))

    guide = make(model, init_loc_fn=init)
    guide()
    trace = poutine.trace(model).get_trace()
    for name, value in guide.median().items():
        assert value.isfinite().all()
        assert value.shape == trace.nodes[name]["value"].shape
        assert trace.nodes[name]["fn"].support.check(value).all()
    assert (guide.median()["positive"] == 2.0) == known


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("elbo", PLAIN_BOUNDS)
def test_a_model_without_latents_has_an_empty_guide_and_the_likelihood_as_its_loss(make, elbo):
    def model():
        scale = pyro.param("scale", lambda: torch.tensor(2.0), constraint=dist.constraints.positive)
        pyro.sample("y", dist.Normal(0.0, scale), obs=torch.tensor(1.0))

    guide = make(model)
    assert guide() == guide.median() == guide.quantiles([0.5]) == {}
    assert elbo.loss(model, guide) == pytest.approx(-dist.Normal(0.0, 2.0).log_prob(torch.tensor(1.0)).item())
    _svi(model, guide, elbo).step()
    assert pyro.param("scale") < 2.0


def _sequential() -> None:
    for i in pyro.plate("plate", 2):
        pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (_sequential, NotImplementedError, r"does not support sequential pyro\.plate"),
        (lambda: pyro.sample("k", dist.Bernoulli(0.5)), ValueError, "discrete sample site 'k'"),
        (lambda: pyro.sample("x", dist.ProjectedNormal(torch.ones(3))), ValueError, "spherical sample site 'x'"),
    ],
    ids=["sequential plate", "discrete", "sphere"],
)
def test_what_a_gaussian_cannot_be_is_refused_by_name(make, model, error, message):
    with pytest.raises(error, match=message):
        make(model)()


@pytest.mark.parametrize("make", GUIDES)
def test_create_plates_that_returns_no_plate_is_refused(make):
    guide = make(_hierarchy, create_plates=lambda: [3])
    with pytest.raises(AssertionError, match="non-plate"):
        guide()


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize(
    ("prior", "reparameterisation", "auxiliary"),
    [
        (lambda: dist.Normal(1.0, 2.0), LocScaleReparam(), {"x_decentered"}),
        (lambda: dist.Normal(1.0, 2.0), LocScaleReparam(centered=0.4), {"x_decentered"}),
        (lambda: dist.StudentT(3.0, 1.0, 2.0), StudentTReparam(), {"x_gamma", "x"}),
        (lambda: dist.LogNormal(1.0, 2.0), TransformReparam(), {"x_base"}),
        (lambda: dist.ProjectedNormal(torch.ones(3)), ProjectedNormalReparam(), {"x_normal"}),
    ],
    ids=["decentred", "partly decentred", "StudentT", "transform", "sphere"],
)
def test_a_reparameterised_model_has_auxiliary_latents_and_one_loss(make, prior, reparameterisation, auxiliary):
    def model():
        x = pyro.sample("x", prior())
        pyro.sample("y", dist.Normal(x, 1.0).to_event(x.dim()), obs=torch.ones(x.shape))

    reparameterised = poutine.reparam(model, config={"x": reparameterisation})
    guide = make(reparameterised)
    assert set(guide()) == auxiliary
    ours = SparseVD_ELBO(kl="monte_carlo", local_reparam=False)
    losses = [_seeded(elbo.loss, reparameterised, guide) for elbo in (Trace_ELBO(), ours)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert "x" in Predictive(reparameterised, guide=guide, num_samples=2, return_sites=["x"])()


@pytest.mark.parametrize("local", [False, True], ids=["one store", "module_local_params"])
@pytest.mark.parametrize("make", GUIDES)
def test_a_guide_within_a_module_trains_with_it(make, local):
    class Whole(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make(_hierarchy)
            self.offset = PyroParam(torch.tensor(0.2))

        def forward(self) -> dict[str, Tensor]:
            values = self.inner()
            extra = pyro.sample("extra", dist.Normal(self.offset, 1.0), infer={"is_auxiliary": True})
            return {**values, "extra": extra}

    with pyro.settings.context(module_local_params=local):
        whole = Whole()
        assert set(whole()) == {"centre", "width", "group", "extra"}
        before = _state(whole)
        svi = _svi(_hierarchy, whole, Trace_ELBO())
        for _ in range(2):
            svi.step()
        after = _state(whole)
        assert all((after[name] != before[name]).all() for name in before if name != "offset_unconstrained")
        assert any(name.startswith("inner.locs.") for name in before)
        assert {name.split(".")[0] for name in _stored()} == (set() if local else {"inner", "offset"})
        assert whole.inner.median().keys() == {"centre", "width", "group"}


@pytest.mark.parametrize("make", GUIDES)
def test_a_guide_within_a_torch_module_moves_and_saves_with_it(make):
    model = _module()
    whole = nn.ModuleDict({"guide": make(model), "model": model})
    whole["guide"]()
    whole.float()
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    state = _state(whole)
    with torch.no_grad():
        for p in whole.parameters():
            p.add_(1.0)
    whole.load_state_dict(state)
    assert _same(_state(whole), state)


@pytest.mark.parametrize("make", GUIDES)
def test_call_gives_the_values_in_the_order_of_their_names(make):
    guide = make(_hierarchy)
    guide()
    values, ordered = _seeded(guide), _seeded(guide.call)
    assert all(torch.equal(values[name], value) for name, value in zip(sorted(values), ordered, strict=True))


@pytest.mark.parametrize("make", GUIDES)
def test_a_median_starts_a_markov_chain(make):
    guide = make(_factors)
    guide()
    kernel = NUTS(_factors, init_strategy=init_to_value(values=guide.median()))
    chain = MCMC(kernel, num_samples=5, warmup_steps=5, disable_progbar=True)
    chain.run()
    assert chain.get_samples()["w"].shape == (5, 3)


# torch.jit, which torch deprecates and Pyro's JitTrace_ELBO uses, traces a guide, and what predicts with it, into a
# file that needs no Pyro.

traces_with_jit = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:`torch.jit", "ignore:The .grad attribute:UserWarning"
)


def _traced(module: nn.Module, *args: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace_module(module, {"call": args}, check_trace=False), file)
    file.seek(0)
    return torch.jit.load(file)


def _traceable_supports() -> None:
    pyro.sample("positive", dist.LogNormal(0.0, 1.0))
    with pyro.plate("plate", 2):
        pyro.sample("unit", dist.Beta(2.0, 2.0))
        pyro.sample("shares", dist.Dirichlet(torch.ones(3)))


TRACEABLE = [param for param in ZOO if param.id not in ("supports", "subsampled", "subsampled_twice")]


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("make_model", [*TRACEABLE, pytest.param(lambda: _traceable_supports, id="supports")])
@traces_with_jit
def test_a_traced_guide_is_saved_with_its_parameters_and_samples_alike(make, make_model):
    guide = make(make_model())
    guide()
    loaded = _traced(guide)
    assert _same(_state(loaded), _state(guide))
    for value, expected in zip(_seeded(loaded.call), _seeded(guide.call), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("make", GUIDES)
@traces_with_jit
def test_traced_predictions_are_those_of_the_posterior(make):
    model, (x, y) = _supervised(prior=LogUniform(1e-4, 10.0)), _data()
    guide = make(model)
    guide(x, y)
    for name in WEIGHTS:  # Predictive draws more numbers than its trace does, so that seeds do not compare
        _set_posterior(guide, name, _mean_of(guide, name), 1e-9)
    predictive = Predictive(model, guide=guide, num_samples=5, return_sites=["_RETURN"])
    torch.testing.assert_close(_seeded(_traced(predictive, x).call, x), _seeded(predictive.call, x))


@pytest.mark.parametrize("make", GUIDES)
@traces_with_jit
def test_a_traced_bound_takes_the_guide(make):
    model, data = _supervised(prior=LogUniform(1e-4, 10.0)), _data()
    guide = make(model)
    guide(*data)
    bound = JitTrace_ELBO()
    bound.loss_and_grads(model, guide, *data)  # which traces it, with samples of its own
    expected = _seeded(Trace_ELBO().loss_and_grads, model, guide, *data)
    assert _seeded(bound.loss_and_grads, model, guide, *data) == pytest.approx(expected)
