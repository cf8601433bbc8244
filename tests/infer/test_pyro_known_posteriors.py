"""Posteriors that are known, and training in subsamples, with AutoNormal and the guide."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoGuideList
from torch import nn

from checks import mean_of, named, seeded, set_posterior, state_of, svi_of
from pyro_models import GUIDES
from pyro_sparsevd import LogUniform, SparseVD_ELBO, Supervised, bayesianize

pytestmark = pytest.mark.usefixtures("double", "on_device")


def _tree() -> None:
    root = pyro.sample("root", dist.Normal(0.0, 1.0))
    for name, y in (("left", 1.0), ("right", 2.0)):
        leaf = pyro.sample(name, dist.Normal(root, 1.0))
        pyro.sample(f"y_{name}", dist.Normal(leaf, 1.0), obs=torch.tensor(y))


def _train(model: Callable, guide: Callable, elbo: Any, *args: Any, steps: int = 80) -> None:
    settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.1 ** (1.5 / steps)}
    optimizer = pyro.optim.ExponentialLR(settings)
    svi = SVI(model, guide, optimizer, elbo)
    for _ in range(steps):
        svi.step(*args)
        optimizer.step()


@pytest.mark.parametrize("make", GUIDES)
class TestKnownPosteriors:
    @pytest.mark.parametrize(
        "elbo", named(Trace_ELBO(), TraceGraph_ELBO(), SparseVD_ELBO(kl="monte_carlo", local_reparam=False))
    )
    def test_at_the_exact_posterior_every_draw_has_the_evidence_as_its_loss(self, make, elbo):
        y = torch.tensor([1.0, -0.5, 2.0])

        def model():
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(z, 2.0), obs=y)

        guide = make(model)
        guide()
        set_posterior(guide, "z", y / 5, math.sqrt(4 / 5))
        evidence = dist.Normal(0.0, math.sqrt(5)).log_prob(y).sum().item()
        for seed in range(3):
            assert seeded(elbo.loss, model, guide, seed=seed) == pytest.approx(-evidence)

    @pytest.mark.parametrize(
        "make_elbo",
        [
            pytest.param(lambda n: Trace_ELBO(n, max_plate_nesting=0, vectorize_particles=True), id="Trace_ELBO"),
            pytest.param(
                lambda n: TraceGraph_ELBO(n, max_plate_nesting=0, vectorize_particles=True), id="TraceGraph_ELBO"
            ),
            pytest.param(lambda n: SparseVD_ELBO(num_particles=n), id="SparseVD_ELBO"),
        ],
    )
    def test_the_mean_gradient_of_a_tree_vanishes_at_the_best_posterior_alone(self, make, make_elbo):
        precision = torch.tensor([[3.0, -1.0, -1.0], [-1.0, 2.0, 0.0], [-1.0, 0.0, 2.0]])
        mean = torch.linalg.solve(precision, torch.tensor([0.0, 1.0, 2.0]))
        guide = make(_tree)
        guide()
        for shift in (0.0, 2.0):
            for number, name in enumerate(("root", "left", "right")):
                set_posterior(guide, name, mean[number] + shift, precision[number, number] ** -0.5)
            gradients = []
            for seed in range(10):
                guide.zero_grad()
                seeded(make_elbo(10).loss_and_grads, _tree, guide, seed=seed)
                gradients.append(torch.stack([p.grad for p in guide.parameters()]))
            standard_errors = torch.stack(gradients).mean(0) / (torch.stack(gradients).std(0) / 10**0.5)
            assert (standard_errors.abs() < 5).all() == (shift == 0)

    @pytest.mark.parametrize(
        "make_elbo",
        [
            pytest.param(lambda: Trace_ELBO(16, max_plate_nesting=0, vectorize_particles=True), id="Trace_ELBO"),
            pytest.param(SparseVD_ELBO, id="SparseVD_ELBO"),
        ],
    )
    def test_training_without_data_finds_medians_and_quantiles_of_the_prior(self, make, make_elbo):
        def model():
            pyro.sample("real", dist.Normal(1.0, 2.0))
            pyro.sample("positive", dist.LogNormal(0.5, 1.0))
            pyro.sample("unit", dist.Beta(3.0, 3.0))

        guide = make(model)
        guide()
        for name in ("real", "positive", "unit"):
            set_posterior(guide, name, -0.3, 0.6)
        _train(model, guide, make_elbo())
        medians, quantiles = guide.median(), guide.quantiles([0.5, 0.8])
        for name, prior in (("real", dist.Normal(1.0, 2.0)), ("positive", dist.LogNormal(0.5, 1.0))):
            torch.testing.assert_close(medians[name], quantiles[name][0])
            torch.testing.assert_close(medians[name], prior.icdf(torch.tensor(0.5)), rtol=0.15, atol=0.2)
            torch.testing.assert_close(quantiles[name][1], prior.icdf(torch.tensor(0.8)), rtol=0.2, atol=0.1)
        torch.testing.assert_close(medians["unit"], torch.tensor(0.5), rtol=0, atol=0.05)

    @pytest.mark.parametrize("prior", [dist.Normal(0.0, 1.0), LogUniform(1e-6, 10.0)], ids=["Normal", "LogUniform"])
    def test_a_linear_regression_finds_its_line(self, make, prior):
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


@pytest.mark.parametrize("make", GUIDES)
class TestSubsamples:
    @pytest.mark.parametrize("plates", ["one", "several"])
    def test_create_plates_trains_the_rows_of_a_batch_and_leaves_the_rest(self, make, plates):
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
            before = mean_of(guide, "z").detach().clone()
            assert before.shape == (10,)
            svi.step(index[batch], y[batch])
            changed = (mean_of(guide, "z") != before).nonzero().flatten().tolist()
            assert changed == sorted(index[batch].tolist())

    def test_one_seed_gives_one_loss_in_batches_of_different_sizes(self, make):
        def model(index, y):
            with pyro.plate("data", 10, subsample=index):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

        index, y = torch.tensor([7, 2, 4]), torch.tensor([1.0, 2.0, 3.0])
        guide = make(model, create_plates=lambda index, y: pyro.plate("data", 10, subsample=index))
        guide(index, y)
        set_posterior(guide, "z", torch.arange(10.0) / 10, 0.3)
        for size in (3, 1, 2):
            pyro.set_rng_seed(size)
            z = torch.arange(10.0)[index[:size]] / 10 + 0.3 * torch.randn(size)
            q = dist.Normal(torch.arange(10.0)[index[:size]] / 10, 0.3)
            log_ratio = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(y[:size]) - q.log_prob(z)
            loss = seeded(Trace_ELBO().loss, model, guide, index[:size], y[:size], seed=size)
            assert loss == pytest.approx(-10 / size * log_ratio.sum().item())

    def test_global_latents_go_with_an_encoder_of_the_local_ones(self, make):
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
        before, layer = state_of(guide), encoder.weight.detach().clone()
        for elbo in (Trace_ELBO(), SparseVD_ELBO()):
            assert math.isfinite(svi_of(model, guide, elbo).step(y))
        assert all((value != before[name]).all() for name, value in state_of(guide).items())
        assert (encoder.weight != layer).all()
