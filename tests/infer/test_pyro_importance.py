"""Importance sampling with a sparse model, and the warning of the improper prior."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS, Importance, Predictive
from pyro.infer.autoguide import (
    AutoGuideList,
    AutoNormal,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
)
from pyro.infer.importance import psis_diagnostic, vectorized_importance_weights
from pyro.infer.inspect import get_dependencies
from torch import Tensor, nn

from checks import seeded, set_posterior
from problems import regression_data, small_model
from pyro_models import GUIDES, Broadcasting, auto_sparse_normal
from pyro_sparsevd import AutoSparseNormal, ImproperPriorWarning, LogUniform, Supervised, bayesianize, init_to_weights

pytestmark = pytest.mark.usefixtures("double", "on_device")


def _one_weight(prior: Any, y: float = 1.0, scale: float = 0.1) -> Callable:
    def model():
        w = pyro.sample("w", prior)
        pyro.sample("y", dist.Normal(w, scale), obs=torch.tensor(y))

    return model


def _fitted(model: Callable, loc: float = 1.0, scale: float = 0.1) -> AutoSparseNormal:
    guide = AutoSparseNormal(model)
    guide()
    set_posterior(guide, "w", loc, scale)
    return guide


class TestImportance:
    def test_importance_weights_of_a_proper_prior_average_to_the_evidence(self):
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

    def test_importance_weights_of_the_improper_prior_are_off_by_a_constant(self):
        proper, improper = _one_weight(LogUniform(1e-6, 1e3)), _one_weight(LogUniform())
        guides = [_fitted(model) for model in (proper, improper)]
        runs = [
            seeded(Importance(model, guide, num_samples=50).run)
            for model, guide in zip((proper, improper), guides, strict=True)
        ]
        difference = torch.stack(runs[1].log_weights) - torch.stack(runs[0].log_weights)
        torch.testing.assert_close(difference, torch.full((50,), math.log(2 * math.log(1e9))))
        torch.testing.assert_close(runs[0].get_normalized_weights(), runs[1].get_normalized_weights())
        torch.testing.assert_close(runs[0].get_ESS(), runs[1].get_ESS())

    def test_importance_sampling_from_the_improper_prior_itself_says_so(self):
        with pytest.warns(ImproperPriorWarning, match="improper and has no samples"):
            Importance(_one_weight(LogUniform()), num_samples=3).run()

    def test_samples_outside_a_proper_prior_have_no_weight(self):
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
    def test_the_pareto_diagnostic_sees_the_pole_of_the_prior_alone(self, prior, y, loc, fits):
        model = _one_weight(prior, y)
        # A little wider than the likelihood, as an optimum that reached it would not be further off.
        k = psis_diagnostic(model, _fitted(model, loc, 0.12), num_particles=4000, max_plate_nesting=0)
        assert (k < 0.5) == fits
        assert fits or k > 0.7  # 1/|w| has no mean under a density that is positive at 0: its index is 1

    def test_the_pareto_diagnostic_runs_on_a_network_that_broadcasts(self):
        model = small_model(layer=Broadcasting, prior=LogUniform(1e-4, 10.0))
        guide = auto_sparse_normal(model)
        x, y = regression_data()
        guide(x, y)
        k = psis_diagnostic(model, guide, x, y, num_particles=200, max_plate_nesting=1)
        assert math.isfinite(k)


_INITS = [init_to_feasible, init_to_mean, init_to_median, init_to_sample, init_to_uniform, init_to_weights]


@pytest.fixture
def unused() -> Callable:
    """A model of one prior for all passes, which has not warned yet."""
    prior = LogUniform().expand([3]).to_event(1)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", prior)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    return model


def _by_guide(model: Callable, guide: Callable) -> None:
    x = torch.ones(4, 3)
    guide(x, x[:, 0])
    Predictive(model, guide=guide, num_samples=2)(x)
    Predictive(model, guide=guide, num_samples=2, return_sites=("w", "y"), parallel=False)(x)
    trace = poutine.trace(guide).get_trace(x)
    poutine.replay(model, trace=trace)(x)
    poutine.condition(model, data={"w": torch.ones(3)})(x)


class TestImproperWarning:
    @pytest.mark.parametrize("init", _INITS, ids=lambda init: init.__name__)
    @pytest.mark.parametrize("make", [AutoSparseNormal, AutoNormal])
    def test_learning_shapes_and_replacing_samples_leaves_the_warning(self, make, init, unused):
        _by_guide(unused, make(unused, init_loc_fn=init))
        with pytest.warns(ImproperPriorWarning, match=r"improper and has no samples"):
            Predictive(unused, num_samples=2)(torch.ones(4, 3))

    @pytest.mark.parametrize("init", _INITS, ids=lambda init: init.__name__)
    def test_a_guide_of_a_network_starts_without_the_warning_and_leaves_it(self, init):
        model = Supervised(bayesianize(nn.Linear(3, 1).double()), lambda out: dist.Normal(out[:, 0], 1.0), 4)
        x = torch.ones(4, 3)
        guide = AutoSparseNormal(model, init_loc_fn=init)
        guide(x)
        Predictive(model, guide=guide, num_samples=2)(x)
        with pytest.warns(ImproperPriorWarning, match=r"improper and has no samples"):
            model(x)

    def test_a_list_and_the_drawing_of_a_model_warn_not(self, unused):
        guide = AutoGuideList(unused)
        guide.append(AutoSparseNormal(poutine.block(unused, expose=["w"])))
        _by_guide(unused, guide)
        get_dependencies(unused, (torch.ones(4, 3),))
        with pytest.warns(ImproperPriorWarning, match=r"improper and has no samples"):
            unused(torch.ones(4, 3))

    @pytest.mark.parametrize("make", GUIDES)
    def test_predictions_with_plates_and_linear_functions_by_replay(self, make):
        def model(x: Tensor, y: Tensor | None = None) -> Tensor:
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
            with pyro.plate("groups", 2, dim=-2):
                b = pyro.sample("b", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x), dim=-1):
                return pyro.sample("y", dist.Normal(nn.functional.linear(x, w).squeeze(-1) + b[0], 1.0), obs=y)

        x, guide = torch.randn(5, 3), make(model)
        guide(x, x[:, 0])
        with pytest.raises(RuntimeError, match=r"t\(\) expects a tensor with <= 2 dimensions"):
            Predictive(model, guide=guide, num_samples=2)(x)

        def predict(*args: Any) -> Tensor:  # as in docs/pyro-tools.md
            with torch.no_grad():
                latents = poutine.trace(guide).get_trace(*args)
                return poutine.replay(model, trace=latents)(*args)

        assert torch.stack([predict(x) for _ in range(4)]).shape == (4, 5)

    @pytest.mark.parametrize("options", [{}, {"max_plate_nesting": 1}], ids=["nesting found", "nesting given"])
    @pytest.mark.parametrize("kernel", [NUTS, HMC])
    def test_a_markov_chain_on_the_improper_prior_warns(self, kernel, options, unused):
        mcmc = MCMC(kernel(unused, **options), num_samples=1, warmup_steps=1, disable_progbar=True)
        with pytest.warns(ImproperPriorWarning, match=r"by a Markov chain"):
            mcmc.run(torch.ones(4, 3), torch.ones(4))
