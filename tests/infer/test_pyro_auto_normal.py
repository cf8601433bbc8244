"""What AutoNormal does with models of every kind, the guide does."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import init_to_feasible
from pyro.poutine.util import site_is_subsample

from checks import named, seeded, set_posterior, state_of, svi_of
from pyro_models import GUIDES, ZOO, auto_normal, auto_sparse_normal, hierarchy_model, subsampled_model
from pyro_sparsevd import SparseVD_ELBO

pytestmark = pytest.mark.usefixtures("double", "on_device")

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


class TestEveryModel:
    @pytest.mark.parametrize("make", GUIDES)
    @pytest.mark.parametrize("make_model", ZOO)
    def test_samples_medians_and_quantiles_fit_shapes_plates_and_supports(self, make, make_model):
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
            assert {f.name for f in q["cond_indep_stack"]} == {f.name for f in p["cond_indep_stack"]} & set(
                guide.plates
            )
            assert p["fn"].support.check(q["value"]).all()
            median = guide.median()[name]
            assert guide.quantiles([0.1, 0.9])[name].shape == (2, *median.shape)
            sizes = dict(zip(range(-1, -1 - median.dim(), -1), reversed(p["fn"].shape()), strict=True))
            for frame in p["cond_indep_stack"]:
                if frame.full_size not in (None, frame.size):
                    sizes[frame.dim - p["fn"].event_dim] = full[frame.name]
            assert median.shape == tuple(sizes[dim] for dim in sorted(sizes))

    @pytest.mark.parametrize("make_elbo", BOUNDS)
    @pytest.mark.parametrize("make_model", ZOO)
    def test_one_seed_gives_both_guides_one_loss_and_one_gradient(self, make_model, make_elbo):
        model, losses, gradients = make_model(), [], []
        for make in (auto_normal, auto_sparse_normal):
            guide = make(model, init_loc_fn=init_to_feasible)
            guide()
            losses.append(seeded(make_elbo().loss_and_grads, model, guide))
            gradients.append({n: p.grad for n, p in guide.named_parameters() if n.startswith("locs.")})
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient)

    @pytest.mark.parametrize("make", GUIDES)
    @pytest.mark.parametrize("make_model", ZOO)
    def test_the_sparse_bound_by_sampling_is_pyros(self, make, make_model):
        model = make_model()
        guide = make(model)
        guide()
        ours = SparseVD_ELBO(kl="monte_carlo", local_reparam=False)
        losses = [seeded(elbo.loss, model, guide) for elbo in (Trace_ELBO(), ours)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)

    @pytest.mark.parametrize("make", GUIDES)
    def test_a_wake_sleep_loss_takes_the_guide(self, make):
        guide = make(hierarchy_model)
        guide()
        elbo = ReweightedWakeSleep(num_particles=4)
        before = state_of(guide)
        losses = svi_of(hierarchy_model, guide, elbo).step()
        assert all(map(math.isfinite, losses))
        assert all((value != before[name]).any() for name, value in state_of(guide).items())


PLAIN_BOUNDS = named(
    Trace_ELBO(),
    TraceMeanField_ELBO(),
    TraceGraph_ELBO(),
    TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
    SparseVD_ELBO(),
)


@pytest.mark.parametrize("make", GUIDES)
class TestScores:
    def test_the_density_of_a_guide_is_its_posterior_in_the_models_space(self, make):
        def model():
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("s", dist.LogNormal(0.0, 1.0))

        guide = make(model)
        guide()
        set_posterior(guide, "z", 0.4, 0.7)
        set_posterior(guide, "s", -0.2, 0.3)
        trace = poutine.trace(guide).get_trace()
        z, s = (trace.nodes[name]["value"] for name in ("z", "s"))
        expected = dist.Normal(0.4, 0.7).log_prob(z) + dist.LogNormal(-0.2, 0.3).log_prob(s)
        torch.testing.assert_close(trace.log_prob_sum(), expected)

    def test_the_density_in_a_subsample_counts_for_the_whole_plate(self, make):
        guide = make(subsampled_model)
        guide()
        set_posterior(guide, "z", torch.arange(12.0), 0.5)
        trace = poutine.trace(poutine.block(guide, hide_fn=lambda site: "share" in site["name"])).get_trace()
        index = trace.nodes["data"]["value"]
        expected = 12 / 5 * dist.Normal(index.double(), 0.5).log_prob(trace.nodes["z"]["value"]).sum()
        torch.testing.assert_close(trace.log_prob_sum(lambda name, site: name != "data"), expected)

    @pytest.mark.parametrize("elbo", PLAIN_BOUNDS)
    def test_a_factor_shifts_the_loss_by_its_value(self, make, elbo):
        def model(factor):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.factor("once", factor)
            with pyro.plate("plate", 3):
                pyro.factor("each", factor)
                pyro.sample("w", dist.Normal(0.0, 1.0))

        guide = make(model)
        guide(torch.tensor(0.0))
        losses = [seeded(elbo.loss, model, guide, torch.tensor(factor)) for factor in (0.0, 2.0)]
        assert losses[0] - losses[1] == pytest.approx(8.0)

    @pytest.mark.parametrize("elbo", PLAIN_BOUNDS)
    def test_a_model_without_latents_has_an_empty_guide_and_its_nll_as_loss(self, make, elbo):
        def model():
            scale = pyro.param("scale", lambda: torch.tensor(2.0), constraint=dist.constraints.positive)
            pyro.sample("y", dist.Normal(0.0, scale), obs=torch.tensor(1.0))

        guide = make(model)
        assert guide() == guide.median() == guide.quantiles([0.5]) == {}
        assert elbo.loss(model, guide) == pytest.approx(-dist.Normal(0.0, 2.0).log_prob(torch.tensor(1.0)).item())
        svi_of(model, guide, elbo).step()
        assert pyro.param("scale") < 2.0
