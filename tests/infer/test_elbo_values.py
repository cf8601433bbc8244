"""The loss against formulas by hand and against Pyro's own losses from the same seed."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor

from checks import SIGMAS, assert_close, differentiable_loss, gradients_of, seeded
from operations import EULER, approximate_kl, exact_kl, log_normaliser, normal_to_normal
from problems import (
    F64,
    NUM_DATA,
    Twin,
    bounded_twin,
    function_twin,
    model_and_guide,
    network_twin,
    normal_likelihood,
    regression_data,
    small_network,
    student_twin,
)
from pyro_sparsevd import AutoSparseNormal, LogUniform, SparseVD_ELBO


def _kl_laplace(loc: Tensor, variance: Tensor) -> Tensor:
    std = variance.sqrt()
    ratio = loc / std
    magnitude = std * math.sqrt(2 / math.pi) * (-(ratio**2) / 2).exp() + loc * torch.erf(ratio / math.sqrt(2))
    return (magnitude + math.log(2) - 0.5 * (2 * math.pi * math.e * variance).log()).sum()


class Latent(NamedTuple):
    prior: Callable[[Tensor], dist.TorchDistribution]
    kl: dict[str, Callable[[Tensor, Tensor], Any]]


LATENTS = [
    pytest.param(
        Latent(lambda zeros: dist.Normal(zeros, 1.0), {"approximate": normal_to_normal, "exact": normal_to_normal}),
        id="normal",
    ),
    pytest.param(
        Latent(lambda zeros: dist.Laplace(zeros, 1.0), {"approximate": _kl_laplace, "exact": _kl_laplace}),
        id="laplace",
    ),
    pytest.param(
        Latent(lambda zeros: LogUniform().expand(zeros.shape), {"approximate": approximate_kl, "exact": exact_kl}),
        id="log-uniform",
    ),
    pytest.param(
        Latent(
            lambda zeros: LogUniform(zeros + 1e-30, 1e30),
            {
                "approximate": lambda loc, variance: approximate_kl(loc, variance) + log_normaliser(loc),
                "exact": lambda loc, variance: exact_kl(loc, variance) + log_normaliser(loc),
            },
        ),
        id="bounded-log-uniform",
    ),
]


def _fitted(latent: Latent, shape: tuple[int, ...], device: torch.device) -> tuple[Callable, AutoSparseNormal]:
    zeros = torch.zeros(shape, dtype=F64, device=device)
    torch.manual_seed(3)
    loc, log_variance = torch.randn(2, *shape, dtype=F64, device=device)

    def model():
        pyro.sample("w", latent.prior(zeros).to_event(len(shape)))

    guide = AutoSparseNormal(model, init_loc_fn=lambda site: loc)
    guide()
    with torch.no_grad():
        guide.posteriors["w"].log_variance.copy_(log_variance)
    return model, guide


class TestFormulasByHand:
    @pytest.mark.parametrize("kl", ["approximate", "exact"])
    def test_a_log_normal_latent_with_posterior_one_one_costs_one_half(self, kl, device):
        zero = torch.zeros((), dtype=F64, device=device)

        def model():
            pyro.sample("x", dist.LogNormal(zero, 1.0))

        guide = AutoSparseNormal(model, init_loc_fn=init_to_value(values={"x": zero.add(1).exp()}), init_scale=1.0)
        assert_close(differentiable_loss(SparseVD_ELBO(kl), model, guide), zero + 0.5, 1e-14)

    @pytest.mark.parametrize("kl", ["approximate", "monte_carlo"])
    def test_log_normal_latents_cost_one_half_each_with_auto_normal_too(self, kl, device):
        zeros = torch.zeros(4000, dtype=F64, device=device)

        def model():
            with pyro.plate("plate", len(zeros)):
                pyro.sample("x", dist.LogNormal(zeros, 1.0))

        guide = AutoNormal(model, init_loc_fn=init_to_value(values={"x": zeros.add(1).exp()}), init_scale=1.0)
        # One sample of the loss of one latent is z - 1/2 with z ~ N(1, 1).
        loss = SparseVD_ELBO(kl).loss(model, guide) / len(zeros)
        assert abs(loss - 0.5) < SIGMAS / len(zeros) ** 0.5

    @pytest.mark.parametrize("local_reparam", [True, False])
    @pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
    @pytest.mark.parametrize("kl", ["approximate", "exact"])
    @pytest.mark.parametrize("latent", LATENTS)
    def test_divergences_are_those_of_the_hand_formula(self, latent, kl, shape, local_reparam, device):
        model, guide = _fitted(latent, shape, device)
        q = guide.posteriors["w"]
        loss = differentiable_loss(SparseVD_ELBO(kl, local_reparam=local_reparam), model, guide)
        assert_close(loss.double(), latent.kl[kl](q.loc, q.variance))

    @pytest.mark.parametrize("local_reparam", [True, False])
    @pytest.mark.parametrize("latent", LATENTS)
    def test_the_monte_carlo_divergence_has_the_mean_of_the_hand_formula(self, latent, local_reparam, device):
        model, guide = _fitted(latent, (100, 3), device)
        q = guide.posteriors["w"]
        elbo, samples = SparseVD_ELBO("monte_carlo", local_reparam=local_reparam), 50
        losses = torch.tensor([elbo.loss(model, guide) for _ in range(samples)], dtype=F64)
        error = losses.mean() - latent.kl["exact"](q.loc, q.variance).item()
        assert abs(error) < SIGMAS * losses.std() / samples**0.5

    @pytest.mark.parametrize("kl", ["approximate", "exact"])
    def test_a_network_costs_its_nll_and_the_divergence_of_its_weights(self, kl, device):
        model, guide = model_and_guide(device, log_variance=-70.0)  # noise too small to see
        x, y = regression_data(device)
        elbo = SparseVD_ELBO(kl)
        loss = differentiable_loss(elbo, model, guide, x, y)
        nll = -NUM_DATA / len(x) * normal_likelihood(small_network(device)(x)).log_prob(y).sum()
        formula = {"approximate": approximate_kl, "exact": exact_kl}[kl]
        # The series of the exact form is too slow here; its tail is -½ log α + ½ (γ + log 2).
        if kl == "exact":
            formula = lambda loc, variance: 0.5 * ((loc**2 / variance).log() + EULER + math.log(2)).sum()  # noqa: E731
        divergence = sum(formula(q.loc, q.variance) for q in guide.posteriors.values())
        assert_close(loss, nll + divergence, 1e-9)
        assert_close([elbo.terms["nll"], elbo.terms["kl"]], [nll.detach(), divergence.detach()], 1e-9)

    @pytest.mark.parametrize("kl", ["approximate", "exact"])
    def test_a_bounded_prior_of_a_network_adds_its_normaliser(self, kl, device):
        data = regression_data(device)
        divergences = []
        for prior in (LogUniform(), LogUniform(1e-30, 1e30)):
            model, guide = model_and_guide(device, prior=prior)
            elbo = SparseVD_ELBO(kl)
            elbo.loss(model, guide, *data)
            divergences.append(elbo.terms["kl"])
        weights = torch.zeros(3 * 4 + 3)
        # The bounds are numbers, which makes their normaliser one of float32.
        assert_close(divergences[1] - divergences[0], divergences[0].new_tensor(log_normaliser(weights)), 1e-4)


def _subsampled_twin(device: torch.device) -> Twin:
    return function_twin(device, subsample=True)


def _constrained_twin(device: torch.device) -> Twin:
    one = torch.ones((), dtype=F64, device=device)

    def model():
        scale = pyro.sample("scale", dist.Gamma(2 * one, 1.0))
        share = pyro.sample("share", dist.Dirichlet(one.expand(3)))
        with pyro.plate("groups", 4):
            rate = pyro.sample("rate", dist.Beta(one, 2.0))
        pyro.sample("y", dist.Normal(share[0] + rate.sum(), scale), obs=one)

    return Twin(model, AutoSparseNormal(model, init_log_variance=-1.0), ())


def _auto_normal_twin(device: torch.device) -> Twin:
    model = _constrained_twin(device).model
    return Twin(model, AutoNormal(model), ())


def _scaled_and_masked_twin(device: torch.device) -> Twin:
    zero = torch.zeros((), dtype=F64, device=device)
    mask = torch.tensor([True, False, True, True], device=device)

    def sites(fn: Callable) -> None:
        with pyro.plate("plate", 4), poutine.scale(scale=2.5):
            fn("scaled")
            with poutine.mask(mask=mask):
                fn("both")
        with pyro.plate("plate", 4), poutine.mask(mask=mask):
            fn("masked")

    def model():
        sites(lambda name: pyro.sample(name, dist.Normal(zero, 1.0)))

    def guide():
        sites(lambda name: pyro.sample(name, dist.Normal(zero.expand(4) + 0.3, 0.7)))

    return Twin(_once(model), _once(guide), ())


def _once(function: Callable) -> Callable:
    """Two plates of one name in one pass need names of their own."""

    def renamed(*args: Any) -> None:
        plate = pyro.plate
        count = iter(range(9))
        try:
            pyro.plate = lambda name, size: plate(f"{name}{next(count)}", size)
            function(*args)
        finally:
            pyro.plate = plate

    return renamed


def _auxiliary_twin(device: torch.device) -> Twin:
    zero = torch.zeros((), dtype=F64, device=device)

    def model():
        z = pyro.sample("z", dist.Normal(zero, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=zero + 1)

    def guide():
        a = pyro.sample("a", dist.Normal(zero, 0.5), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(a, 0.5))

    return Twin(model, guide, ())


TWINS = [
    pytest.param(network_twin, id="network"),
    pytest.param(bounded_twin, id="network-log-uniform"),
    pytest.param(function_twin, id="function"),
    pytest.param(_subsampled_twin, id="subsample"),
    pytest.param(_constrained_twin, id="constrained"),
    pytest.param(_auto_normal_twin, id="constrained-auto-normal"),
    pytest.param(_scaled_and_masked_twin, id="scale-and-mask"),
    pytest.param(_auxiliary_twin, id="auxiliary"),
    pytest.param(student_twin, id="student"),
]


class TestPyrosLosses:
    @pytest.mark.parametrize("make", TWINS)
    def test_monte_carlo_without_local_noise_is_trace_elbo(self, make, device):
        twin = make(device)
        twin.guide(*twin.args)
        elbo = SparseVD_ELBO("monte_carlo", local_reparam=False)
        for seed in range(3):
            loss = seeded(elbo.differentiable_loss, twin.model, twin.guide, *twin.args, seed=seed)
            expected = seeded(Trace_ELBO().differentiable_loss, twin.model, twin.guide, *twin.args, seed=seed)
            assert_close(loss.double(), expected.double(), 1e-6 if make is bounded_twin else 1e-10)
            assert_close(gradients_of(loss, twin.guide), gradients_of(expected, twin.guide), 1e-8)

    @pytest.mark.parametrize(
        "make", [p for p in TWINS if p.id in ("network", "function", "subsample", "scale-and-mask")]
    )
    def test_closed_forms_of_normals_are_those_of_trace_mean_field_elbo(self, make, device):
        twin = make(device)
        twin.guide(*twin.args)
        elbo = SparseVD_ELBO(local_reparam=False)
        for seed in range(3):
            loss = seeded(elbo.differentiable_loss, twin.model, twin.guide, *twin.args, seed=seed)
            expected = seeded(TraceMeanField_ELBO().differentiable_loss, twin.model, twin.guide, *twin.args, seed=seed)
            assert_close(loss, expected)
            assert_close(gradients_of(loss, twin.guide), gradients_of(expected, twin.guide))

    @pytest.mark.parametrize(
        "make", [p for p in TWINS if p.id in ("network", "network-log-uniform", "constrained", "student")]
    )
    def test_the_mean_loss_is_that_of_trace_elbo(self, make, device):
        twin = make(device)
        twin.guide(*twin.args)
        samples = 100
        means, variances = [], []
        for elbo in (SparseVD_ELBO("exact"), Trace_ELBO()):
            losses = torch.tensor([elbo.loss(twin.model, twin.guide, *twin.args) for _ in range(samples)], dtype=F64)
            means.append(losses.mean())
            variances.append(losses.var() / samples)
        assert abs(means[0] - means[1]) < SIGMAS * sum(variances).sqrt()
