"""Lists of guides, and how a guide starts, fails and is held, with AutoNormal and the guide."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive, Trace_ELBO
from pyro.infer.autoguide import (
    AutoCallable,
    AutoDelta,
    AutoDiagonalNormal,
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
from pyro.infer.reparam import LocScaleReparam, ProjectedNormalReparam, StudentTReparam, TransformReparam
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from checks import same_values, seeded, state_of, stored_names, svi_of
from pyro_models import (
    GUIDES,
    INIT_SCALE,
    auto_sparse_normal,
    factors_model,
    hierarchy_model,
    mixed_model,
    module_model,
)
from pyro_sparsevd import AutoSparseNormal, LogUniform, SparseVD_ELBO

pytestmark = pytest.mark.usefixtures("double", "on_device")


class TestLists:
    @pytest.mark.parametrize("kind", ["expose", "hide", "hide_fn", "expose_fn"])
    @pytest.mark.parametrize(
        "other", [AutoDelta, AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal]
    )
    def test_a_list_with_another_guide_has_one_loss_in_both_bounds_and_trains(self, other, kind):
        sparse = {
            "expose": {"expose": ["w"]},
            "hide": {"hide": ["b", "s"]},
            "hide_fn": {"hide_fn": lambda site: site["name"] in ("b", "s")},
            "expose_fn": {"expose_fn": lambda site: site["name"] == "w"},
        }[kind]
        y = torch.linspace(0.5, 1.5, 4)
        guide = AutoGuideList(mixed_model)
        guide.append(auto_sparse_normal(poutine.block(mixed_model, **sparse)))
        guide.append(other(poutine.block(mixed_model, hide=["w"])))
        assert {"w", "b", "s"} <= set(guide(y))
        ours = SparseVD_ELBO(kl="monte_carlo", local_reparam=False)
        losses = [seeded(elbo.loss, mixed_model, guide, y) for elbo in (Trace_ELBO(), ours)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
        before = state_of(guide)
        assert math.isfinite(svi_of(mixed_model, guide).step(y))
        after = state_of(guide)
        assert all((after[name] != before[name]).any() for name in before)
        assert {name: value.shape for name, value in guide.median(y).items()} == {"w": (3,), "b": (), "s": (2,)}

    def test_the_loss_of_a_list_with_a_point_estimate_is_the_hand_formula(self):
        y = torch.linspace(0.5, 1.5, 4)
        guide = AutoGuideList(mixed_model)
        guide.append(AutoSparseNormal(poutine.block(mixed_model, expose=["w"]), init_log_variance=-60.0))
        guide.append(AutoDelta(poutine.block(mixed_model, hide=["w"])))
        values = guide(y)
        q = guide[0].posteriors["w"]
        prior = LogUniform(1e-4, 10.0).expand([3])
        nll = -dist.Normal(values["w"].sum() + values["b"], values["s"].sum()).log_prob(y).sum()
        points = dist.Normal(0.0, 1.0).log_prob(values["b"]) + dist.LogNormal(0.0, 0.1).log_prob(values["s"]).sum()
        divergence = torch.distributions.kl_divergence(q, prior).sum()
        loss = SparseVD_ELBO(kl="exact").loss(mixed_model, guide, y)
        assert loss == pytest.approx((nll + divergence - points).item(), abs=1e-6)

    @pytest.mark.parametrize("make", GUIDES)
    @pytest.mark.parametrize("with_median", [False, True])
    def test_a_list_takes_a_function_of_the_users(self, make, with_median):
        def by_hand(y):
            loc = pyro.param("b_loc", lambda: torch.tensor(0.3))
            return {"b": pyro.sample("b", dist.Normal(loc, INIT_SCALE))}

        def median(y):
            return {"b": pyro.param("b_loc").detach()}

        guide = AutoGuideList(mixed_model)
        guide.append(make(poutine.block(mixed_model, hide=["b"])))
        guide.append(AutoCallable(mixed_model, by_hand, median) if with_median else by_hand)
        y = torch.linspace(0.5, 1.5, 4)
        svi = svi_of(mixed_model, guide, Trace_ELBO())
        losses = [svi.step(y) for _ in range(3)]
        assert all(map(math.isfinite, losses))
        assert pyro.param("b_loc") != 0.3
        assert set(guide(y)) == {"w", "b", "s"}
        assert set(guide.median(y)) == ({"w", "b", "s"} if with_median else {"w", "s"})
        assert math.isfinite(SparseVD_ELBO().loss(mixed_model, guide, y))

    @pytest.mark.parametrize("make", GUIDES)
    def test_a_part_belongs_to_one_list_and_takes_no_plates_of_its_own(self, make):
        part = make(poutine.block(mixed_model, expose=["w"]))
        AutoGuideList(mixed_model).append(part)
        with pytest.raises(RuntimeError, match="already added"):
            AutoGuideList(mixed_model).append(part)
        guide = AutoGuideList(mixed_model)
        guide.append(make(mixed_model, create_plates=lambda y: pyro.plate("data", len(y))))
        with pytest.raises(AssertionError, match="Cannot pass create_plates"):
            guide(torch.zeros(3))

    @pytest.mark.parametrize("make", GUIDES)
    def test_a_list_within_a_list_gives_what_a_flat_one_gives(self, make):
        def part(*names: str) -> AutoGuide:
            return make(poutine.block(mixed_model, expose=names), init_loc_fn=init_to_feasible)

        inner = AutoGuideList(poutine.block(mixed_model, hide=["s"]))
        inner.append(part("w"))
        inner.append(part("b"))
        nested, flat = AutoGuideList(mixed_model), AutoGuideList(mixed_model)
        for guide, parts in ((nested, [inner, part("s")]), (flat, [part("w"), part("b"), part("s")])):
            for each in parts:
                guide.append(each)
        y = torch.linspace(0.5, 1.5, 4)
        losses = []
        for guide in (nested, flat):
            pyro.clear_param_store()
            guide(y)
            losses.append(seeded(Trace_ELBO().loss, mixed_model, guide, y))
        assert losses[0] == pytest.approx(losses[1])


def _sequential() -> None:
    for i in pyro.plate("plate", 2):
        pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("make", GUIDES)
class TestStart:
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
    def test_every_initialisation_of_pyro_starts_in_the_support(self, make, init, known):
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

    @pytest.mark.parametrize(
        ("model", "error", "message"),
        [
            (_sequential, NotImplementedError, r"does not support sequential pyro\.plate"),
            (lambda: pyro.sample("k", dist.Bernoulli(0.5)), ValueError, "discrete sample site 'k'"),
            (lambda: pyro.sample("x", dist.ProjectedNormal(torch.ones(3))), ValueError, "spherical sample site 'x'"),
        ],
        ids=["sequential plate", "discrete", "sphere"],
    )
    def test_what_a_gaussian_cannot_be_is_refused_by_name(self, make, model, error, message):
        with pytest.raises(error, match=message):
            make(model)()

    def test_create_plates_that_returns_no_plate_is_refused(self, make):
        guide = make(hierarchy_model, create_plates=lambda: [3])
        with pytest.raises(AssertionError, match="non-plate"):
            guide()

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
    def test_a_reparameterised_model_has_auxiliary_latents_and_one_loss(
        self, make, prior, reparameterisation, auxiliary
    ):
        def model():
            x = pyro.sample("x", prior())
            pyro.sample("y", dist.Normal(x, 1.0).to_event(x.dim()), obs=torch.ones(x.shape))

        reparameterised = poutine.reparam(model, config={"x": reparameterisation})
        guide = make(reparameterised)
        assert set(guide()) == auxiliary
        ours = SparseVD_ELBO(kl="monte_carlo", local_reparam=False)
        losses = [seeded(elbo.loss, reparameterised, guide) for elbo in (Trace_ELBO(), ours)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
        assert "x" in Predictive(reparameterised, guide=guide, num_samples=2, return_sites=["x"])()

    def test_a_median_starts_a_markov_chain(self, make):
        guide = make(factors_model)
        guide()
        kernel = NUTS(factors_model, init_strategy=init_to_value(values=guide.median()))
        chain = MCMC(kernel, num_samples=5, warmup_steps=5, disable_progbar=True)
        chain.run()
        assert chain.get_samples()["w"].shape == (5, 3)


@pytest.mark.parametrize("make", GUIDES)
class TestWithinModules:
    @pytest.mark.parametrize("local", [False, True], ids=["one store", "module_local_params"])
    def test_a_guide_within_a_module_trains_with_it(self, make, local):
        class Whole(PyroModule):
            def __init__(self) -> None:
                super().__init__()
                self.inner = make(hierarchy_model)
                self.offset = PyroParam(torch.tensor(0.2))

            def forward(self) -> dict[str, Tensor]:
                values = self.inner()
                extra = pyro.sample("extra", dist.Normal(self.offset, 1.0), infer={"is_auxiliary": True})
                return {**values, "extra": extra}

        with pyro.settings.context(module_local_params=local):
            whole = Whole()
            assert set(whole()) == {"centre", "width", "group", "extra"}
            before = state_of(whole)
            svi = svi_of(hierarchy_model, whole, Trace_ELBO())
            for _ in range(2):
                svi.step()
            after = state_of(whole)
            assert all((after[name] != before[name]).all() for name in before if name != "offset_unconstrained")
            assert any(name.startswith("inner.locs.") for name in before)
            assert {name.split(".")[0] for name in stored_names()} == (set() if local else {"inner", "offset"})
            assert whole.inner.median().keys() == {"centre", "width", "group"}

    def test_a_guide_within_a_torch_module_moves_and_saves_with_it(self, make):
        model = module_model()
        whole = nn.ModuleDict({"guide": make(model), "model": model})
        whole["guide"]()
        whole.float()
        assert {p.dtype for p in whole.parameters()} == {torch.float32}
        state = state_of(whole)
        with torch.no_grad():
            for p in whole.parameters():
                p.add_(1.0)
        whole.load_state_dict(state)
        assert same_values(state_of(whole), state)

    def test_call_gives_the_values_in_the_order_of_their_names(self, make):
        guide = make(hierarchy_model)
        guide()
        values, ordered = seeded(guide), seeded(guide.call)
        assert all(torch.equal(values[name], value) for name, value in zip(sorted(values), ordered, strict=True))
