"""Effect handlers around a sparse model."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from checks import mean_of, named, same_values, seeded, set_posterior, spread_of, state_of, svi_of
from problems import NUM_DATA, regression_data, small_model, small_network
from pyro_models import GUIDES, IMPROPER, PROPER, SMALL_WEIGHTS, TWO_WEIGHTS_Y, auto_sparse_normal, two_weights
from pyro_sparsevd import AutoSparseNormal, LogUniform, SparseVD_ELBO, Supervised, bayesianize

pytestmark = pytest.mark.usefixtures("double", "on_device")


@pytest.mark.parametrize("make", GUIDES)
class TestScaleAndMask:
    @pytest.mark.parametrize(
        "elbo", named(Trace_ELBO(), SparseVD_ELBO(kl="monte_carlo", local_reparam=False), TraceGraph_ELBO())
    )
    @pytest.mark.parametrize("factor", [0.25, 3.0])
    def test_a_scale_around_model_and_guide_multiplies_the_loss(self, make, elbo, factor):
        y = torch.tensor(TWO_WEIGHTS_Y)
        guide = make(two_weights)
        guide(y)
        plain = seeded(elbo.loss, two_weights, guide, y)
        scaled = seeded(elbo.loss, poutine.scale(two_weights, factor), poutine.scale(guide, factor), y)
        assert scaled == pytest.approx(factor * plain)

    @pytest.mark.parametrize("elbo", named(Trace_ELBO(), SparseVD_ELBO(), TraceMeanField_ELBO()))
    def test_a_mask_around_model_and_guide_leaves_no_loss(self, make, elbo):
        y = torch.tensor(TWO_WEIGHTS_Y)
        guide = make(two_weights)
        guide(y)
        assert elbo.loss(poutine.mask(two_weights, mask=False), poutine.mask(guide, mask=False), y) == 0

    def test_a_mask_around_the_model_alone_leaves_the_entropy_of_the_guide(self, make):
        y = torch.tensor(TWO_WEIGHTS_Y)
        guide = make(two_weights)
        guide(y)
        trace = poutine.trace(guide)
        expected = seeded(trace.get_trace, y).log_prob_sum().item()
        loss = seeded(
            SparseVD_ELBO(kl="monte_carlo", local_reparam=False).loss, poutine.mask(two_weights, mask=False), guide, y
        )
        assert loss == pytest.approx(expected)


class TestHandledModels:
    @pytest.mark.parametrize("make", GUIDES)
    def test_a_guide_of_a_conditioned_model_has_the_other_latents(self, make):
        y = torch.tensor(TWO_WEIGHTS_Y)
        conditioned = poutine.condition(two_weights, data={"a": torch.ones(3)})
        guide = make(conditioned)
        assert set(guide(y)) == {"b"}
        losses = [seeded(elbo.loss, conditioned, guide, y) for elbo in (Trace_ELBO(), SparseVD_ELBO(kl="monte_carlo"))]
        assert losses[0] == pytest.approx(losses[1])

    @pytest.mark.parametrize("prior", [PROPER, IMPROPER])
    def test_a_network_that_is_conditioned_on_a_weight_trains_the_other(self, prior):
        model = small_model(prior=prior)
        x, y = regression_data()
        value = torch.full((3, 4), 0.5)
        conditioned = poutine.condition(model, data={"0.weight": value})
        guide = AutoSparseNormal(conditioned)
        assert set(guide(x, y)) == {"2.weight"}
        trace = poutine.trace(poutine.replay(conditioned, trace=poutine.trace(guide).get_trace(x, y))).get_trace(x, y)
        assert trace.nodes["0.weight"]["is_observed"]
        before = state_of(guide)
        assert math.isfinite(svi_of(conditioned, guide).step(x, y))
        assert all((value != before[name]).all() for name, value in state_of(guide).items())

    def test_a_guide_of_the_whole_model_serves_the_conditioned_one(self):
        y = torch.tensor(TWO_WEIGHTS_Y)
        whole = auto_sparse_normal(two_weights)
        whole(y)
        conditioned = poutine.condition(two_weights, data={"a": torch.ones(3)})
        part = auto_sparse_normal(conditioned)
        part(y)
        set_posterior(part, "b", *(f(whole, "b").detach() for f in (mean_of, spread_of)))
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
        ids=[
            "hide",
            "expose",
            "types",
            "do",
            "uncondition",
            "substitute",
            "lift",
            "infer",
            "seed",
            "broadcast",
            "reparam",
        ],
    )
    def test_a_guide_of_a_handled_model_has_its_latents(self, make, handle, sites):
        y = torch.tensor(TWO_WEIGHTS_Y)
        model = handle(two_weights)
        guide = make(model)
        assert set(guide(y)) == sites
        assert set(guide.median(y)) == sites
        assert set(guide.quantiles([0.1, 0.9], y)) == sites
        assert math.isfinite(seeded(Trace_ELBO().loss, model, guide, y))

    @pytest.mark.parametrize("make", GUIDES)
    def test_latents_that_are_made_equal_have_one_posterior(self, make):
        def model():
            a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("a", "b"))
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=torch.tensor(1.0))

        equal = poutine.equalize(model, ["a", "b"], "sample")
        guide = make(equal)
        assert set(guide()) == {"a"}
        losses = [seeded(elbo.loss, equal, guide) for elbo in (Trace_ELBO(), SparseVD_ELBO(kl="monte_carlo"))]
        assert losses[0] == pytest.approx(losses[1])


class TestLiftSeedReplay:
    @pytest.mark.parametrize("make", GUIDES)
    def test_parameters_of_a_guide_may_be_lifted_or_substituted_by_name(self, make):
        y = torch.tensor(TWO_WEIGHTS_Y)
        guide = make(two_weights)
        guide(y)
        name = f"{type(guide).__name__}.locs.a"
        lifted = poutine.trace(poutine.lift(guide, prior={name: dist.Normal(torch.full((3,), 40.0), 1e-3).to_event(1)}))
        trace = lifted.get_trace(y)
        assert trace.nodes[name]["type"] == "sample"
        assert ((trace.nodes["a"]["value"] - 40).abs() < 1).all()
        substituted = poutine.substitute(guide, data={name: torch.full((3,), -7.0)})
        assert ((substituted(y)["a"] + 7).abs() < 1).all()
        assert (guide(y)["a"].abs() < 1).all()

    def test_a_parameter_of_the_likelihood_may_be_lifted_to_a_latent(self):
        class Noise(PyroModule):
            def __init__(self) -> None:
                super().__init__()
                self.scale = PyroParam(torch.tensor(0.5), dist.constraints.positive)

            def forward(self, output: Tensor) -> dist.Normal:
                return dist.Normal(output.squeeze(-1), self.scale)

        model = Supervised(bayesianize(small_network(), LogUniform(1e-4, 10.0)), Noise(), NUM_DATA)
        x, y = regression_data()
        lifted = poutine.lift(model, prior={"likelihood.scale": dist.LogNormal(0.0, 1.0)})
        guide = AutoSparseNormal(lifted)
        assert set(guide(x, y)) == {*SMALL_WEIGHTS, "likelihood.scale"}
        assert guide.sparse_sites == SMALL_WEIGHTS
        guide_trace = poutine.trace(guide).get_trace(x, y)
        trace = poutine.trace(poutine.replay(lifted, trace=guide_trace)).get_trace(x, y)
        assert (trace.nodes["y"]["fn"].scale == guide_trace.nodes["likelihood.scale"]["value"]).all()
        before = state_of(guide)
        assert math.isfinite(svi_of(lifted, guide).step(x, y))
        assert all((value != before[name]).all() for name, value in state_of(guide).items())

    @pytest.mark.parametrize("make", GUIDES)
    def test_a_seeded_guide_repeats_itself_and_leaves_the_generator_alone(self, make):
        y = torch.tensor(TWO_WEIGHTS_Y)
        guide = make(two_weights)
        guide(y)
        seeded = poutine.seed(guide, rng_seed=3)
        first = seeded(y)
        state = torch.get_rng_state()
        assert same_values(first, seeded(y))
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("make", GUIDES)
    def test_a_replayed_model_takes_values_and_subsample_of_the_guide(self, make):
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
