"""Predictive around a sparse model."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive, WeighedPredictive
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from checks import mean_of
from problems import regression_data, small_model, small_network
from pyro_models import GUIDES, IMPROPER, INIT_SCALE, PROPER, SMALL_WEIGHTS, Broadcasting, auto_sparse_normal
from pyro_sparsevd import LogUniform, sparsify

pytestmark = pytest.mark.usefixtures("double", "on_device")


def _draws_along_a_plate(guide: Callable, size: int, *args: Any) -> dict[str, Tensor]:
    """Draws from a guide in a plate to the left of that of the data, where Predictive expects draws of weights."""
    with torch.no_grad(), pyro.plate("draws", size, dim=-2):
        return guide(*args)


class TestParallel:
    @pytest.mark.parametrize("make", GUIDES)
    @pytest.mark.parametrize("prior", [PROPER, IMPROPER])
    def test_parallel_predictions_are_the_networks_outputs_at_each_draw(self, make, prior, improper):
        model = small_model(layer=Broadcasting, prior=prior)
        guide = make(model)
        x, y = regression_data()
        guide(x, y)
        draws = _draws_along_a_plate(guide, 6, x, y)
        assert draws["0.weight"].shape == (6, 1, 3, 4)
        samples = Predictive(model, posterior_samples=draws, parallel=True, return_sites=["y", "_RETURN"])(x)
        assert samples["y"].shape == (6, 8)
        assert samples["y"].std(0).all()
        net = small_network(layer=Broadcasting)
        for i in range(6):
            weights = {name: draws[name][i, 0] for name in SMALL_WEIGHTS}
            torch.testing.assert_close(samples["_RETURN"][i], torch.func.functional_call(net, weights, x))

    @pytest.mark.parametrize("make", GUIDES)
    def test_parallel_and_sequential_predictions_have_one_distribution(self, make):
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
            assert {name: value.flatten(1).shape[1] for name, value in samples.items()} == {
                "slope": 1,
                "scale": 1,
                "y": 5,
            }
            moments.append((samples["y"].mean(0), samples["y"].std(0)))
        torch.testing.assert_close(*(mean for mean, _ in moments), rtol=0, atol=5 * 0.6 * (2 / size) ** 0.5)
        torch.testing.assert_close(*(std for _, std in moments), rtol=0.25, atol=0)

    @pytest.mark.parametrize("make", GUIDES)
    def test_parallel_predictions_by_a_matrix_product_are_refused_by_torch(self, make):
        model = small_model(prior=dist.Normal(0.0, 1.0))
        guide = make(model)
        x, y = regression_data()
        guide(x, y)
        with pytest.raises(RuntimeError, match=r"t\(\) expects a tensor with <= 2 dimensions"):
            Predictive(model, guide=guide, num_samples=5, parallel=True)(x)
        assert Predictive(model, guide=guide, num_samples=5)(x)["y"].shape == (5, 8)

    def test_parallel_predictions_of_a_sparsified_posterior_have_all_zeros(self, improper):
        model = small_model(layer=Broadcasting)
        guide = auto_sparse_normal(model)
        x, y = regression_data()
        guide(x, y)
        summary = sparsify(guide, threshold=-3.0)
        assert 0 < summary.kept < summary.total
        draws = _draws_along_a_plate(guide.sparsified(summary), 5, x, y)
        for name in SMALL_WEIGHTS:
            assert torch.equal(draws[name] != 0, summary.masks[name].expand_as(draws[name]))
        assert Predictive(model, posterior_samples=draws, parallel=True)(x)["y"].shape == (5, 8)


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("parallel", [False, True])
class TestWhatPredictiveReturns:
    def test_predictive_of_a_guide_alone_draws_from_its_posterior(self, make, parallel):
        model = small_model(prior=dist.Normal(0.0, 1.0))
        guide = make(model)
        x, y = regression_data()
        guide(x, y)
        draws = Predictive(guide, num_samples=400, parallel=parallel, return_sites=SMALL_WEIGHTS)(x)
        for name in SMALL_WEIGHTS:
            loc = mean_of(guide, name)
            assert draws[name].shape == (400, *loc.shape)
            assert ((draws[name].mean(0) - loc).abs() < 5 * INIT_SCALE / 400**0.5).all()
            assert ((draws[name].std(0) / INIT_SCALE - 1).abs() < 0.25).all()

    def test_predictive_returns_deterministic_sites_and_a_vectorized_trace(self, make, parallel):
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

    def test_weighed_predictions_carry_the_log_ratio_of_model_and_guide(self, make, parallel):
        def model(y=None):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 3):
                return pyro.sample("y", dist.Normal(w, 1.0), obs=y)

        y = torch.tensor([0.3, 0.5, 1.1])
        guide = make(model)
        guide(y)
        result = WeighedPredictive(model, guide=guide, num_samples=9, parallel=parallel)(y, model_guide=model)
        w = result.samples["w"].flatten()
        q = dist.Normal(mean_of(guide, "w"), INIT_SCALE).log_prob(w)
        p = dist.Normal(0.0, 1.0).log_prob(w) + dist.Normal(w, 1.0).log_prob(y[:, None]).sum(0)
        torch.testing.assert_close(result.log_weights, (p - q).detach())
