"""The loss: against hand formulas, against Pyro's own losses from the same seed, and where it must refuse."""

import copy
import gc
import logging
import math
import pickle
import random
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    init_to_value,
)
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions.transforms import AffineTransform, ComposeTransform, IndependentTransform
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_sparsevd import (
    AutoSparseNormal,
    EmpiricalBayesNormal,
    ImproperPriorWarning,
    LogUniform,
    SparseNormal,
    SparseVD_ELBO,
    Supervised,
    bayesianize,
    init_to_weights,
    local_reparam_gap,
    sparsify,
)
from pyro_sparsevd.distributions.kl import kl_normal_log_uniform
from pyro_sparsevd.distributions.util import map_tensors
from pyro_sparsevd.infer.dependence import is_factorised
from pyro_sparsevd.poutine.local_reparam import local_reparam
from pyro_sparsevd.poutine.trace import log_prob
from pyro_sparsevd.poutine.unsampled_weight import RepeatedUseError, UnsampledWeight

F64 = torch.float64
NUM_DATA = 20
SIGMAS = 5


def _network(device: torch.device) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).to(device).double()


def _normal(output: Tensor) -> dist.Normal:
    return dist.Normal(output.squeeze(-1), 0.5)


def _categorical(output: Tensor) -> dist.Categorical:
    return dist.Categorical(logits=torch.cat([output, -output, 2 * output], -1))


def _supervised(device: torch.device, likelihood: Callable = _normal, **options: Any) -> Supervised:
    return Supervised(bayesianize(_network(device), **options), likelihood, NUM_DATA)


def _data(device: torch.device, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(NUM_DATA, 4, generator=generator, dtype=F64)[:size]
    return x.to(device), torch.randn(NUM_DATA, generator=generator, dtype=F64)[:size].to(device)


def _pair(device: torch.device, log_variance: float = -2.0, **options: Any) -> tuple[Supervised, AutoSparseNormal]:
    model = _supervised(device, **options)
    return model, AutoSparseNormal(model, init_log_variance=log_variance)


def _state(*modules: nn.Module) -> list[Tensor]:
    return [value.clone() for module in modules for value in module.state_dict().values()]


def _seeded(function: Callable, *args: Any, seed: int = 5, **kwargs: Any) -> Any:
    pyro.set_rng_seed(seed)
    return function(*args, **kwargs)


def _assert_close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def _loss(elbo: SparseVD_ELBO, model: Callable, guide: Callable, *args: Any) -> Tensor:
    return elbo.differentiable_loss(model, guide, *args)


# The value.


@pytest.mark.parametrize("kl", ["approximate", "exact"])
def test_a_log_normal_latent_with_posterior_one_one_costs_one_half(kl, device):
    zero = torch.zeros((), dtype=F64, device=device)

    def model():
        pyro.sample("x", dist.LogNormal(zero, 1.0))

    guide = AutoSparseNormal(model, init_loc_fn=init_to_value(values={"x": zero.add(1).exp()}), init_scale=1.0)
    _assert_close(_loss(SparseVD_ELBO(kl), model, guide), zero + 0.5, 1e-14)


@pytest.mark.parametrize("kl", ["approximate", "monte_carlo"])
def test_log_normal_latents_cost_one_half_each_with_auto_normal_too(kl, device):
    zeros = torch.zeros(4000, dtype=F64, device=device)

    def model():
        with pyro.plate("plate", len(zeros)):
            pyro.sample("x", dist.LogNormal(zeros, 1.0))

    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"x": zeros.add(1).exp()}), init_scale=1.0)
    # One sample of the loss of one latent is z - 1/2 with z ~ N(1, 1).
    loss = SparseVD_ELBO(kl).loss(model, guide) / len(zeros)
    assert abs(loss - 0.5) < SIGMAS / len(zeros) ** 0.5


EULER = 0.5772156649015329


def _kl_normal(loc: Tensor, variance: Tensor) -> Tensor:
    return 0.5 * (loc**2 + variance - 1 - variance.log()).sum()


def _kl_laplace(loc: Tensor, variance: Tensor) -> Tensor:
    std = variance.sqrt()
    ratio = loc / std
    magnitude = std * math.sqrt(2 / math.pi) * (-(ratio**2) / 2).exp() + loc * torch.erf(ratio / math.sqrt(2))
    return (magnitude + math.log(2) - 0.5 * (2 * math.pi * math.e * variance).log()).sum()


def _kl_exact(loc: Tensor, variance: Tensor) -> Tensor:
    halves = (loc**2 / (2 * variance)).reshape(-1).tolist()
    return loc.new_tensor(sum(float(u * mpmath.hyper([1, 1], [1.5, 2], -u)) for u in halves))


def _kl_approximate(loc: Tensor, variance: Tensor) -> Tensor:
    log_alpha = variance.log() - 2 * loc.abs().log()
    kl = 0.5 * torch.log1p(1 / log_alpha.exp()) + 0.63576 * (1 - torch.sigmoid(1.87320 + 1.48695 * log_alpha))
    return kl.sum()


LOG_RATIO = 2 * math.log(1e30)


def _normaliser(loc: Tensor) -> float:
    return loc.numel() * (math.log(LOG_RATIO) - 0.5 * (1 + EULER + math.log(math.pi)))


class Latent(NamedTuple):
    prior: Callable[[Tensor], dist.TorchDistribution]
    kl: dict[str, Callable[[Tensor, Tensor], Any]]


LATENTS = [
    pytest.param(
        Latent(lambda zeros: dist.Normal(zeros, 1.0), {"approximate": _kl_normal, "exact": _kl_normal}), id="normal"
    ),
    pytest.param(
        Latent(lambda zeros: dist.Laplace(zeros, 1.0), {"approximate": _kl_laplace, "exact": _kl_laplace}),
        id="laplace",
    ),
    pytest.param(
        Latent(lambda zeros: LogUniform().expand(zeros.shape), {"approximate": _kl_approximate, "exact": _kl_exact}),
        id="log-uniform",
    ),
    pytest.param(
        Latent(
            lambda zeros: LogUniform(zeros + 1e-30, 1e30),
            {
                "approximate": lambda loc, variance: _kl_approximate(loc, variance) + _normaliser(loc),
                "exact": lambda loc, variance: _kl_exact(loc, variance) + _normaliser(loc),
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


@pytest.mark.parametrize("local_reparam", [True, False])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("kl", ["approximate", "exact"])
@pytest.mark.parametrize("latent", LATENTS)
def test_divergences_are_those_of_the_hand_formula(latent, kl, shape, local_reparam, device):
    model, guide = _fitted(latent, shape, device)
    q = guide.posteriors["w"]
    loss = _loss(SparseVD_ELBO(kl, local_reparam=local_reparam), model, guide)
    _assert_close(loss.double(), latent.kl[kl](q.loc, q.variance))


@pytest.mark.parametrize("local_reparam", [True, False])
@pytest.mark.parametrize("latent", LATENTS)
def test_the_monte_carlo_divergence_has_the_mean_of_the_hand_formula(latent, local_reparam, device):
    model, guide = _fitted(latent, (100, 3), device)
    q = guide.posteriors["w"]
    elbo, samples = SparseVD_ELBO("monte_carlo", local_reparam=local_reparam), 50
    losses = torch.tensor([elbo.loss(model, guide) for _ in range(samples)], dtype=F64)
    error = losses.mean() - latent.kl["exact"](q.loc, q.variance).item()
    assert abs(error) < SIGMAS * losses.std() / samples**0.5


@pytest.mark.parametrize("kl", ["approximate", "exact"])
def test_a_network_costs_its_negative_log_likelihood_and_the_divergence_of_its_weights(kl, device):
    model, guide = _pair(device, log_variance=-70.0)  # noise too small to see
    x, y = _data(device)
    elbo = SparseVD_ELBO(kl)
    loss = _loss(elbo, model, guide, x, y)
    nll = -NUM_DATA / len(x) * _normal(_network(device)(x)).log_prob(y).sum()
    formula = {"approximate": _kl_approximate, "exact": _kl_exact}[kl]
    # The series of the exact form is too slow here; its tail is -½ log α + ½ (γ + log 2).
    if kl == "exact":
        formula = lambda loc, variance: 0.5 * ((loc**2 / variance).log() + EULER + math.log(2)).sum()  # noqa: E731
    divergence = sum(formula(q.loc, q.variance) for q in guide.posteriors.values())
    _assert_close(loss, nll + divergence, 1e-9)
    _assert_close([elbo.terms["nll"], elbo.terms["kl"]], [nll.detach(), divergence.detach()], 1e-9)


@pytest.mark.parametrize("kl", ["approximate", "exact"])
def test_a_bounded_prior_of_a_network_adds_its_normaliser(kl, device):
    data = _data(device)
    divergences = []
    for prior in (LogUniform(), LogUniform(1e-30, 1e30)):
        model, guide = _pair(device, prior=prior)
        elbo = SparseVD_ELBO(kl)
        elbo.loss(model, guide, *data)
        divergences.append(elbo.terms["kl"])
    weights = torch.zeros(3 * 4 + 3)
    # The bounds are numbers, which makes their normaliser one of float32.
    _assert_close(divergences[1] - divergences[0], divergences[0].new_tensor(_normaliser(weights)), 1e-4)


# Against Pyro's losses, from the same seed.


class Twin(NamedTuple):
    model: Callable
    guide: Callable
    args: tuple


def _network_twin(device: torch.device) -> Twin:
    model, guide = _pair(device, prior=dist.Normal(0.0, 1.0))
    return Twin(model, guide, _data(device))


def _bounded_twin(device: torch.device) -> Twin:
    model, guide = _pair(device, prior=LogUniform(1e-30, 1e30))
    return Twin(model, guide, _data(device))


def _function_twin(device: torch.device, subsample: bool = False) -> Twin:
    zero = torch.zeros((), dtype=F64, device=device)
    data = torch.linspace(-1, 2, NUM_DATA, dtype=F64, device=device)

    def model():
        w = pyro.sample("w", dist.Normal(zero.expand(3), 1.0).to_event(1))
        with pyro.plate("data", NUM_DATA, subsample_size=4 if subsample else None) as indices:
            z = pyro.sample("z", dist.Normal(w.sum(), 2.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=data[indices])

    return Twin(model, AutoSparseNormal(model, init_log_variance=-1.0), ())


def _function_of_data_twin(device: torch.device) -> Twin:
    zeros = torch.zeros(4, dtype=F64, device=device)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(zeros, 1.0).to_event(1))
        with pyro.plate("data", NUM_DATA, subsample=x):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    return Twin(model, AutoSparseNormal(model, init_log_variance=-1.0), _data(device))


def _subsampled_twin(device: torch.device) -> Twin:
    return _function_twin(device, subsample=True)


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


def _student_twin(device: torch.device) -> Twin:
    zero = torch.zeros((), dtype=F64, device=device)

    def model():
        w = pyro.sample("w", dist.StudentT(3 + zero, zero.expand(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=zero)

    return Twin(model, AutoSparseNormal(model, init_log_variance=-1.0), ())


TWINS = [
    pytest.param(_network_twin, id="network"),
    pytest.param(_bounded_twin, id="network-log-uniform"),
    pytest.param(_function_twin, id="function"),
    pytest.param(_subsampled_twin, id="subsample"),
    pytest.param(_constrained_twin, id="constrained"),
    pytest.param(_auto_normal_twin, id="constrained-auto-normal"),
    pytest.param(_scaled_and_masked_twin, id="scale-and-mask"),
    pytest.param(_auxiliary_twin, id="auxiliary"),
    pytest.param(_student_twin, id="student"),
]


def _gradients(loss: Tensor, guide: Callable) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(guide.parameters()))) if isinstance(guide, nn.Module) else []


@pytest.mark.parametrize("make", TWINS)
def test_monte_carlo_without_local_noise_is_trace_elbo(make, device):
    twin = make(device)
    twin.guide(*twin.args)
    elbo = SparseVD_ELBO("monte_carlo", local_reparam=False)
    for seed in range(3):
        loss = _seeded(elbo.differentiable_loss, twin.model, twin.guide, *twin.args, seed=seed)
        expected = _seeded(Trace_ELBO().differentiable_loss, twin.model, twin.guide, *twin.args, seed=seed)
        _assert_close(loss.double(), expected.double(), 1e-6 if make is _bounded_twin else 1e-10)
        _assert_close(_gradients(loss, twin.guide), _gradients(expected, twin.guide), 1e-8)


@pytest.mark.parametrize("make", [p for p in TWINS if p.id in ("network", "function", "subsample", "scale-and-mask")])
def test_closed_forms_of_normals_without_local_noise_are_those_of_trace_mean_field_elbo(make, device):
    twin = make(device)
    twin.guide(*twin.args)
    elbo = SparseVD_ELBO(local_reparam=False)
    for seed in range(3):
        loss = _seeded(elbo.differentiable_loss, twin.model, twin.guide, *twin.args, seed=seed)
        expected = _seeded(TraceMeanField_ELBO().differentiable_loss, twin.model, twin.guide, *twin.args, seed=seed)
        _assert_close(loss, expected)
        _assert_close(_gradients(loss, twin.guide), _gradients(expected, twin.guide))


@pytest.mark.parametrize(
    "make", [p for p in TWINS if p.id in ("network", "network-log-uniform", "constrained", "student")]
)
def test_the_mean_loss_is_that_of_trace_elbo(make, device):
    twin = make(device)
    twin.guide(*twin.args)
    samples = 100
    means, variances = [], []
    for elbo in (SparseVD_ELBO("exact"), Trace_ELBO()):
        losses = torch.tensor([elbo.loss(twin.model, twin.guide, *twin.args) for _ in range(samples)], dtype=F64)
        means.append(losses.mean())
        variances.append(losses.var() / samples)
    assert abs(means[0] - means[1]) < SIGMAS * sum(variances).sqrt()


# Local reparameterisation.


def _gradient_samples(elbo: SparseVD_ELBO, device: torch.device, samples: int) -> Tensor:
    model, guide = _pair(device, log_variance=-1.0)
    loss = elbo(model, guide)
    data = _data(device)
    loss(*data)
    parameters = list(loss.parameters())
    rows = [torch.autograd.grad(loss(*data), parameters) for _ in range(samples)]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def test_gradients_with_and_without_local_noise_have_one_mean_and_the_local_ones_less_variance(device):
    samples = 200
    local = _gradient_samples(SparseVD_ELBO(), device, samples)
    drawn = _gradient_samples(SparseVD_ELBO(local_reparam=False), device, samples)
    error = local.mean(0) - drawn.mean(0)
    sigma = ((local.var(0) + drawn.var(0)) / samples).sqrt()
    assert (error.abs() < SIGMAS * sigma).all()
    assert local.var(0).sum() < drawn.var(0).sum()


@pytest.mark.parametrize("local_reparam", [True, False])
def test_weights_are_lazy_only_with_local_reparam(local_reparam, device):
    kinds = []

    class Spy(nn.Linear):
        def forward(self, x):
            kinds.append(type(self.weight))
            return super().forward(x)

    torch.manual_seed(1)
    bnn = bayesianize(Spy(4, 1).to(device).double())
    model = Supervised(bnn, _normal, NUM_DATA)
    guide = AutoSparseNormal(model)
    guide(*_data(device))
    kinds.clear()
    SparseVD_ELBO(local_reparam=local_reparam).loss(model, guide, *_data(device))
    assert kinds == [UnsampledWeight if local_reparam else Tensor]


class _Twice(nn.Module):
    """Its first layer is used twice, the others once."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.once(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


class _Tied(nn.Module):
    """The output layer is the embedding, transposed."""

    def __init__(self, linear_first: bool = False) -> None:
        super().__init__()
        self.embedding, self.linear_first = nn.Embedding(4, 4), linear_first

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x > 0).long().sum(-1).clamp_max(3)
        if self.linear_first:
            return (F.linear(x, self.embedding.weight) * self.embedding(tokens)).sum(-1, keepdim=True)
        return F.linear(self.embedding(tokens) * x, self.embedding.weight).sum(-1, keepdim=True)


class _Recurrent(nn.Module):
    """A recurrent network by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(1, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h = torch.tanh(self.inner(x[:, t, None]) + self.outer(h))
        return h.sum(-1, keepdim=True)


class _Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x[..., None])[0][:, -1].sum(-1, keepdim=True)


class _Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t, None], h)
        return h.sum(-1, keepdim=True)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[:, None], x[:, None], x[:, None])[0].sum((1, 2))[:, None]


REPEATED = [
    pytest.param(_Twice, {"twice.weight"}, id="twice"),
    pytest.param(_Tied, {"embedding.weight"}, id="tied"),
    pytest.param(lambda: _Tied(linear_first=True), {"embedding.weight"}, id="tied-linear-first"),
    pytest.param(_Recurrent, {"inner.weight", "outer.weight"}, id="recurrent"),
    pytest.param(_Lstm, {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}, id="lstm"),
    pytest.param(_Cell, {"cell.weight_ih", "cell.weight_hh"}, id="gru-cell"),
    pytest.param(_Attention, {"attention.in_proj_weight", "attention.out_proj.weight"}, id="attention"),
]


def _of_network(make: Callable, device: torch.device) -> tuple[Supervised, AutoSparseNormal]:
    torch.manual_seed(1)
    model = Supervised(bayesianize(make().to(device).double()), _normal, NUM_DATA)
    guide = AutoSparseNormal(model, init_log_variance=-2.0)
    guide(*_data(device))
    return model, guide


@pytest.mark.parametrize(("make", "sites"), REPEATED)
def test_a_weight_used_otherwise_than_by_one_linear_operation_is_sampled_at_its_site(make, sites, device):
    model, guide = _of_network(make, device)
    elbo = SparseVD_ELBO()
    for _ in range(2):
        loss = elbo(model, guide)(*_data(device))
        assert elbo._sampled_sites == sites
        assert loss.isfinite()


class _Siamese(nn.Module):
    """Every layer is used twice, and random numbers come from torch's generator and from one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        self.dropout, self.generator, self.passes = nn.Dropout(), torch.Generator().manual_seed(0), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        noise = torch.randn(x.shape, generator=self.generator, dtype=F64).to(x)
        return self.net(self.dropout(x)) - self.net(x + noise)


def test_all_weights_used_twice_are_found_in_one_pass_and_generators_are_put_back(device):
    model, guide = _of_network(_Siamese, device)
    net = model.network
    losses = []
    for _ in range(2):
        elbo = SparseVD_ELBO()
        net.generator.manual_seed(0)
        torch.manual_seed(0)
        for passes in (2, 1, 1):
            net.passes = 0
            losses.append(elbo.loss(model, guide, *_data(device)))
            assert net.passes == passes
    assert losses[:3] == losses[3:]
    known = SparseVD_ELBO()
    known.loss(model, guide, *_data(device))
    net.generator.manual_seed(0)
    torch.manual_seed(0)
    assert [known.loss(model, guide, *_data(device)) for _ in range(3)] == losses[:3]


@pytest.mark.parametrize(("make", "sites"), [p for p in REPEATED if p.id != "twice"])
def test_where_every_weight_is_drawn_loss_and_gradients_are_those_of_drawn_weights(make, sites, device):
    model, guide = _of_network(make, device)
    local, drawn = SparseVD_ELBO(), SparseVD_ELBO(local_reparam=False)
    local.loss(model, guide, *_data(device))
    for seed in range(2):
        loss = _seeded(_loss, local, model, guide, *_data(device), seed=seed)
        expected = _seeded(_loss, drawn, model, guide, *_data(device), seed=seed)
        _assert_close(loss, expected)
        _assert_close(_gradients(loss, guide), _gradients(expected, guide))


def test_a_weight_used_twice_that_another_handler_made_lazy_is_an_error_that_says_what_to_do(device):
    net = _Twice().to(device)
    model = Supervised(bayesianize(net), lambda f: dist.Normal(f[:, 0], 1.0), 20)
    guide = local_reparam(AutoSparseNormal(model))
    x, y = torch.randn(5, 4, device=device), torch.randn(5, device=device)
    for elbo in (SparseVD_ELBO(local_reparam=False), SparseVD_ELBO()):
        with pytest.raises(RepeatedUseError, match=r"twice\.weight: used more than once .* exclude the site"):
            elbo.differentiable_loss(model, guide, x, y)


def test_gradients_of_a_weight_used_twice_beside_a_local_one_have_the_mean_of_drawn_weights(device):
    samples = 150
    model, guide = _of_network(_Twice, device)
    means, variances = [], []
    for elbo in (SparseVD_ELBO(), SparseVD_ELBO(local_reparam=False)):
        elbo.loss(model, guide, *_data(device))
        rows = []
        for _ in range(samples):
            loss = _loss(elbo, model, guide, *_data(device))
            rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(guide.parameters()))]))
        rows = torch.stack(rows)
        means.append(rows.mean(0))
        variances.append(rows.var(0) / samples)
    assert ((means[0] - means[1]).abs() < SIGMAS * (variances[0] + variances[1]).sqrt()).all()


@pytest.mark.parametrize("used_before", [False, True], ids=["fresh-loss", "loss-of-another-model"])
def test_falling_back_updates_running_statistics_once(used_before, device):
    class Normalised(_Twice):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x))

    elbo = SparseVD_ELBO()
    if used_before:
        elbo.loss(*_pair(device), *_data(device))
    model, guide = _of_network(Normalised, device)
    elbo.loss(model, guide, *_data(device))
    assert elbo._sampled_sites == {"twice.weight"}
    assert model.network.norm.num_batches_tracked == 1


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda elbo: pickle.loads(pickle.dumps(elbo))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_used_loss_gives_the_same_loss(copied, device):
    elbo = SparseVD_ELBO(kl="exact", kl_weight=0.5)
    elbo.loss(*_pair(device), *_data(device))
    model, guide = _pair(device)
    losses = [_seeded(e.loss, model, guide, *_data(device)) for e in (elbo, copied(elbo))]
    assert losses[0] == losses[1]


def test_autocast_gives_a_finite_loss_and_finite_gradients(device):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding="valid"), nn.ReLU(), nn.Flatten(), nn.Linear(3, 1)
    )
    model = Supervised(bayesianize(net.to(device)), lambda output: _normal(output.float()), NUM_DATA)
    loss_module = SparseVD_ELBO()(model, AutoSparseNormal(model))
    x, y = (t.float() for t in _data(device))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = loss_module(x, y)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in loss_module.parameters())


@pytest.mark.parametrize("kl", ["approximate", "exact"])
def test_a_network_in_half_precision_gives_a_finite_loss_and_finite_gradients(kl, device):
    model, guide = _pair(device)
    loss_module = SparseVD_ELBO(kl)(model, guide).to(torch.bfloat16)
    loss = loss_module(*(t.bfloat16() for t in _data(device)))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in loss_module.parameters())


# Terms, weights, particles.


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0, 7.0])
@pytest.mark.parametrize("kl", ["approximate", "exact", "monte_carlo"])
def test_the_loss_is_the_sum_of_its_detached_terms(kl, kl_weight, device):
    model, guide = _pair(device)
    elbo = SparseVD_ELBO(kl, kl_weight)
    loss = elbo(model, guide)(*_data(device))
    assert elbo.terms.keys() == {"nll", "kl"}
    assert not any(term.requires_grad for term in elbo.terms.values())
    assert all(term.shape == () for term in elbo.terms.values())
    _assert_close(loss.detach(), elbo.terms["nll"] + kl_weight * elbo.terms["kl"], 0.0)


def test_the_weight_of_the_divergence_may_change_at_every_step(device):
    model, guide = _pair(device)
    elbo = SparseVD_ELBO()
    for weight in (0, 0.25, 1):
        elbo.kl_weight = weight
        loss = _seeded(_loss, elbo, model, guide, *_data(device))
        _assert_close(loss.detach(), elbo.terms["nll"] + weight * elbo.terms["kl"], 0.0)
    assert elbo.kl_weight == 1


def test_the_weight_of_the_divergence_scales_its_gradient(device):
    model, guide = _pair(device)
    parameters = list(guide.parameters())
    gradients = []
    for weight in (0.0, 1.0, 3.0):
        loss = _seeded(_loss, SparseVD_ELBO(kl_weight=weight), model, guide, *_data(device))
        gradients.append(torch.autograd.grad(loss, parameters))
    none, one, three = gradients
    _assert_close([n + 3 * (o - n) for n, o in zip(none, one, strict=True)], list(three))


def test_all_latents_share_the_weight_of_the_divergence(device):
    twin = _function_twin(device)
    elbo = SparseVD_ELBO(kl_weight=0.0)
    loss = elbo.loss(twin.model, twin.guide)
    assert loss == elbo.terms["nll"]
    assert elbo.terms["kl"] > 0


@pytest.mark.parametrize("num_particles", [2, 5])
@pytest.mark.parametrize("local_reparam", [True, False])
def test_particles_are_averaged(num_particles, local_reparam, device):
    model, guide = _pair(device)
    one = SparseVD_ELBO(local_reparam=local_reparam)
    many = SparseVD_ELBO(local_reparam=local_reparam, num_particles=num_particles)
    parameters = list(guide.parameters())
    guide(*_data(device))
    pyro.set_rng_seed(5)
    losses, terms = [], []
    for _ in range(num_particles):
        losses.append(_loss(one, model, guide, *_data(device)))
        terms.append(one.terms)
    gradients = torch.autograd.grad(torch.stack(losses).mean(), parameters)
    loss = _seeded(_loss, many, model, guide, *_data(device))
    _assert_close(loss, torch.stack(losses).mean())
    _assert_close(torch.autograd.grad(loss, parameters), gradients)
    for name in ("nll", "kl"):
        _assert_close(many.terms[name], torch.stack([t[name] for t in terms]).mean())


# The ways to call it.


def test_every_entry_point_gives_the_same_number_from_the_same_seed(device):
    model, guide = _pair(device)
    elbo = SparseVD_ELBO()
    data = _data(device)
    guide(*data)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), elbo)
    losses = [
        _seeded(elbo.loss, model, guide, *data),
        _seeded(elbo.differentiable_loss, model, guide, *data).item(),
        _seeded(elbo.loss_and_grads, model, guide, *data),
        _seeded(elbo(model, guide), *data).item(),
        _seeded(svi.evaluate_loss, *data),
        _seeded(svi.step, *data),
    ]
    assert all(isinstance(loss, float) for loss in losses)
    assert losses == [losses[0]] * len(losses)


class _Names(Messenger):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        self.names.append(msg["name"])


@pytest.mark.parametrize("kl", ["approximate", "exact", "monte_carlo"])
@pytest.mark.parametrize("local_reparam", [True, False])
@pytest.mark.parametrize("prior", [LogUniform(), LogUniform(1e-9, 99.0), dist.Normal(0.0, 1.0)], ids=str)
def test_handlers_that_look_on_change_neither_loss_nor_gradients(prior, local_reparam, kl, device):
    model, guide = _pair(device, prior=prior)
    loss = SparseVD_ELBO(kl=kl, local_reparam=local_reparam)(model, guide)
    x, y = _data(device)
    alone = _seeded(loss, x, y)
    gradients = torch.autograd.grad(alone, list(loss.parameters()))
    with _Names() as seen:
        watched = _seeded(loss, x, y)
    assert seen.names == ["0.weight", "2.weight", "0.weight", "2.weight", "data", "y"]
    _assert_close(watched, alone)
    _assert_close(torch.autograd.grad(watched, list(loss.parameters())), gradients)


def test_loss_builds_no_graph_and_leaves_gradients_alone(device):
    model, guide = _pair(device)
    elbo = SparseVD_ELBO()
    elbo.loss(model, guide, *_data(device))
    assert all(p.grad is None for p in [*model.parameters(), *guide.parameters()])
    assert torch.is_grad_enabled()


def test_loss_and_grads_adds_the_gradients_of_the_differentiable_loss(device):
    model, guide = _pair(device)
    elbo = SparseVD_ELBO()
    guide(*_data(device))
    parameters = [*model.parameters(), *guide.parameters()]
    expected = torch.autograd.grad(_seeded(_loss, elbo, model, guide, *_data(device)), parameters)
    for times in (1, 2):
        _seeded(elbo.loss_and_grads, model, guide, *_data(device))
        _assert_close([p.grad for p in parameters], [times * g for g in expected])


def test_svi_and_a_torch_optimizer_take_the_same_step(device):
    states = []
    for way in ("svi", "torch"):
        pyro.clear_param_store()
        model, guide = _pair(device)
        guide(*_data(device))
        pyro.set_rng_seed(5)
        if way == "svi":
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), SparseVD_ELBO())
            for _ in range(3):
                svi.step(*_data(device))
        else:
            loss = SparseVD_ELBO()(model, guide)
            optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
            for _ in range(3):
                optimizer.zero_grad()
                loss(*_data(device)).backward()
                optimizer.step()
        states.append(_state(model, guide))
    _assert_close(*states)


def test_a_torch_optimizer_lowers_the_loss(device):
    model, guide = _pair(device, log_variance=-6.0)
    loss = SparseVD_ELBO(kl_weight=0.01)(model, guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(*_data(device))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_parameters_of_a_loss_module_are_those_of_model_and_guide(device):
    model, guide = _pair(device)
    loss = SparseVD_ELBO()(model, guide)
    assert {id(p) for p in loss.parameters()} == {id(p) for p in [*model.parameters(), *guide.parameters()]}


def test_a_copied_loss_module_trains_apart(device):
    model, guide = _pair(device)
    loss = SparseVD_ELBO()(model, guide)
    loss(*_data(device))
    new = copy.deepcopy(loss)
    assert new.guide._model[0] is new.model
    before = _state(loss)
    optimizer = torch.optim.SGD(new.parameters(), lr=1e-3)
    new(*_data(device)).backward()
    optimizer.step()
    _assert_close(_state(loss), before, 0.0)
    _assert_close(_seeded(loss, *_data(device)), _seeded(loss, *_data(device)), 0.0)


def test_frozen_guide_parameters_are_left_out(device):
    model, guide = _pair(device)
    for p in guide.log_variances.parameters():
        p.requires_grad_(False)
    loss = SparseVD_ELBO()(model, guide)
    loss(*_data(device)).backward()
    assert all(p.grad is None for p in guide.log_variances.parameters())
    assert all(p.grad.any() for p in guide.locs.parameters())


def test_a_loss_without_trainable_parameters_is_only_a_number(device):
    model, guide = _pair(device)
    for p in [*model.parameters(), *guide.parameters()]:
        p.requires_grad_(False)
    assert math.isfinite(SparseVD_ELBO().loss_and_grads(model, guide, *_data(device)))


def test_a_short_last_batch_is_scaled_to_the_whole_data_set(device):
    model, guide = _pair(device, log_variance=-70.0)
    x, y = _data(device, NUM_DATA)
    elbo = SparseVD_ELBO()
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), elbo)
    net = _network(device)
    for batch in (slice(0, 8), slice(8, 16), slice(16, 20), slice(0, 1)):
        svi.step(x[batch], y[batch])
        log_likelihood = _normal(net(x[batch])).log_prob(y[batch]).mean()
        _assert_close(elbo.terms["nll"], -NUM_DATA * log_likelihood.detach(), 1e-9)


def test_one_loss_serves_two_models_in_turn(device):
    elbo = SparseVD_ELBO()
    pairs = [_pair(device), _of_network(_Recurrent, device)]
    for model, guide in pairs:
        elbo.loss(model, guide, *_data(device))
    for model, guide in pairs:
        own = SparseVD_ELBO()
        own.loss(model, guide, *_data(device))
        value = _seeded(_loss, elbo, model, guide, *_data(device))
        _assert_close(value, _seeded(_loss, own, model, guide, *_data(device)))


def test_a_parameter_of_a_prior_receives_the_gradient_of_the_divergence(device):
    zeros = torch.zeros(3, dtype=F64, device=device)
    scale = torch.tensor(2.0, dtype=F64, device=device, requires_grad=True)

    def model():
        pyro.sample("w", dist.Normal(zeros, scale).to_event(1))

    guide = AutoSparseNormal(model, init_log_variance=-1.0)
    gradient = torch.autograd.grad(_loss(SparseVD_ELBO(), model, guide), scale)[0]
    q = guide.posteriors["w"]
    expected = (1 / scale - (q.variance + q.loc**2) / scale**3).sum()
    _assert_close(gradient, expected.detach())


# Plates, scales and masks.


@pytest.mark.parametrize("kl", ["approximate", "exact"])
def test_local_latents_of_a_subsample_count_for_the_whole_plate(kl, device):
    zero = torch.zeros((), dtype=F64, device=device)

    def model():
        with pyro.plate("data", NUM_DATA, subsample_size=5):
            pyro.sample("z", dist.Normal(zero, 1.0))
            pyro.sample("v", LogUniform(1e-30 + zero, 1e30).expand([2]).to_event(1))

    guide = AutoSparseNormal(model, init_loc_fn=lambda site: torch.full_like(site["fn"].sample(), 0.5))
    guide()
    with torch.no_grad():
        for q in guide.posteriors.values():
            q.log_variance.fill_(-1.0)
    half, variance = torch.full((NUM_DATA,), 0.5, dtype=F64), torch.full((NUM_DATA,), math.exp(-1), dtype=F64)
    formula = {"approximate": _kl_approximate, "exact": _kl_exact}[kl]
    expected = _kl_normal(half, variance) + 2 * (formula(half, variance) + _normaliser(half))
    assert abs(SparseVD_ELBO(kl).loss(model, guide) - expected) < 1e-9


@pytest.mark.parametrize("prior", [LogUniform(), LogUniform(1e-30, 1e30), dist.Normal(0.0, 1.0)], ids=repr)
@pytest.mark.parametrize("scale", [3.0, "tensor"])
@pytest.mark.parametrize("kl", ["approximate", "exact", "monte_carlo"])
def test_a_scale_of_model_and_guide_multiplies_the_loss(kl, scale, prior, device):
    model, guide = _pair(device, prior=prior)
    guide(*_data(device))
    scale = torch.tensor(3.0, dtype=F64, device=device) if scale == "tensor" else scale
    elbo = SparseVD_ELBO(kl)
    expected = 3 * _seeded(_loss, elbo, model, guide, *_data(device))
    terms = {name: 3 * term for name, term in elbo.terms.items()}
    scaled = poutine.scale(model, scale=scale), poutine.scale(guide, scale=scale)
    loss = _seeded(_loss, elbo, *scaled, *_data(device))
    _assert_close(loss, expected)
    _assert_close(elbo.terms, terms)
    parameters = list(guide.parameters())
    _assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters))


def test_scales_of_model_and_guide_that_differ_are_each_respected(device):
    zeros = torch.zeros(3, dtype=F64, device=device)

    def model():
        with poutine.scale(scale=2.0):
            pyro.sample("w", dist.Normal(zeros, 1.0).to_event(1))

    def guide():
        pyro.sample("w", SparseNormal(zeros + 0.5, -1.0).to_event(1))

    q = SparseNormal(zeros + 0.5, -1.0)
    cross_entropy = 0.5 * (q.loc**2 + q.variance + math.log(2 * math.pi)).sum()
    expected = 2 * cross_entropy - q.entropy().sum()
    assert abs(SparseVD_ELBO().loss(model, guide) - expected.item()) < 1e-10


@pytest.mark.parametrize("prior", ["normal", "log-uniform"])
@pytest.mark.parametrize("mask", ["tensor", True, False])
def test_a_mask_of_model_and_guide_leaves_masked_latents_out(mask, prior, device):
    zeros = torch.zeros(4, dtype=F64, device=device)
    value = torch.tensor([True, False, True, True], device=device) if mask == "tensor" else mask
    fn = dist.Normal(zeros, 1.0) if prior == "normal" else LogUniform().expand([4])

    def model():
        with pyro.plate("plate", 4), poutine.mask(mask=value):
            pyro.sample("w", fn)

    def guide():
        with pyro.plate("plate", 4), poutine.mask(mask=value):
            pyro.sample("w", SparseNormal(zeros + 0.5, -1.0))

    q = SparseNormal(zeros + 0.5, -1.0)
    kept = {"tensor": 3, True: 4, False: 0}[mask]
    formula = _kl_normal if prior == "normal" else _kl_approximate
    expected = formula(q.loc, q.variance) * kept / 4
    assert abs(SparseVD_ELBO().loss(model, guide) - expected.item()) < 1e-10


@pytest.mark.parametrize("mask", ["tensor", False])
def test_masks_of_model_and_guide_that_differ_are_each_respected(mask, device):
    zeros = torch.zeros(4, dtype=F64, device=device)
    value = torch.tensor([True, False, False, True], device=device) if mask == "tensor" else mask
    q = SparseNormal(zeros + 0.5, -1.0)

    def model():
        with pyro.plate("plate", 4), poutine.mask(mask=value):
            pyro.sample("w", dist.Normal(zeros, 1.0))

    def guide():
        with pyro.plate("plate", 4):
            pyro.sample("w", q)

    cross_entropy = 0.5 * (q.loc**2 + q.variance + math.log(2 * math.pi))
    expected = (2 if mask == "tensor" else 0) * cross_entropy[0] - q.entropy().sum()
    assert abs(SparseVD_ELBO().loss(model, guide) - expected.item()) < 1e-10


def test_a_mask_of_the_likelihood_leaves_data_out(device):
    model, guide = _pair(device, log_variance=-70.0)
    x, y = _data(device)
    elbo = SparseVD_ELBO()
    mask = torch.arange(len(x), device=device) < 3
    likelihood = model.likelihood
    model.likelihood = lambda output: likelihood(output).mask(mask)
    elbo.loss(model, guide, x, y)
    expected = -NUM_DATA / len(x) * _normal(_network(device)(x)).log_prob(y)[mask].sum()
    _assert_close(elbo.terms["nll"], expected.detach(), 1e-9)


def test_weights_with_different_scales_are_counted_each_with_its_own(device):
    zeros = torch.zeros(2, 3, dtype=F64, device=device)
    x = torch.ones(1, 3, dtype=F64, device=device)

    def sites(prior: bool) -> list[Any]:
        values = []
        for name, scale in (("a", 1.0), ("b", 2.0), ("c", 2.0)):
            with poutine.scale(scale=scale):
                fn = LogUniform().expand([2, 3]) if prior else SparseNormal(zeros + 0.5, -1.0)
                values.append(pyro.sample(name, fn.to_event(2)))
        return values

    def model():
        for value in sites(prior=True):
            F.linear(x, value)

    loss = SparseVD_ELBO().loss(model, lambda: sites(prior=False))
    q = SparseNormal(zeros + 0.5, -1.0)
    assert abs(loss - 5 * _kl_approximate(q.loc, q.variance).item()) < 1e-10


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": "eq14"}, r"kl: expected one of 'approximate', 'exact', 'monte_carlo', but got 'eq14'"),
        ({"kl": None}, r"kl: expected one of"),
        ({"kl_weight": -0.1}, r"kl_weight: expected a finite number, at least 0, but got -0\.1"),
        ({"kl_weight": math.inf}, r"kl_weight: expected a finite number"),
        ({"kl_weight": math.nan}, r"kl_weight: expected a finite number"),
        ({"num_particles": 0}, r"num_particles: expected a positive integer, but got 0"),
        ({"num_particles": 1.5}, r"num_particles: expected a positive integer, but got 1\.5"),
        ({"num_particles": -2}, r"num_particles: expected a positive integer"),
    ],
)
def test_options_out_of_range_are_an_error_that_names_them(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SparseVD_ELBO(**options)


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_a_weight_out_of_range_that_is_set_later_is_an_error_and_not_taken(weight):
    elbo = SparseVD_ELBO(kl_weight=0.5)
    with pytest.raises(ValueError, match=r"^kl_weight: expected a finite number, at least 0, but got"):
        elbo.kl_weight = weight
    assert elbo.kl_weight == 0.5


def _sample(name: str, fn: Any = None, **options: Any) -> Tensor:
    return pyro.sample(name, dist.Normal(0.0, 1.0) if fn is None else fn, **options)


def _both(*functions: Callable) -> Callable:
    def run() -> None:
        for function in functions:
            function()

    return run


def _w() -> None:
    _sample("w")


COIN = dist.Bernoulli(0.5)
ENUMERATED = {"infer": {"enumerate": "parallel"}}


@pytest.mark.parametrize("local_reparam", [True, False])
@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        pytest.param(_both(_w, lambda: _sample("v")), _w, r"^v: expected this latent of the model", id="missing"),
        pytest.param(_w, _both(_w, lambda: _sample("v")), r"^v: the guide has this site, but the model", id="extra"),
        pytest.param(
            lambda: _sample("coin", COIN), lambda: _sample("coin", COIN), r"^coin: .*no rsample", id="discrete"
        ),
        pytest.param(
            lambda: _sample("w"), lambda: _sample("w", dist.VonMises(0.0, 1.0)), r"^w: .*no rsample", id="no-rsample"
        ),
        pytest.param(
            lambda: _sample("coin", COIN, **ENUMERATED), lambda: None, r"^coin: ", id="enumerated-in-model-only"
        ),
        pytest.param(
            lambda: _sample("coin", COIN),
            lambda: _sample("coin", COIN, **ENUMERATED),
            r"^coin: .*enumerated; use TraceEnum_ELBO",
            id="enumerated-in-guide",
        ),
        pytest.param(
            lambda: _sample("coin", COIN, **ENUMERATED),
            lambda: _sample("coin", COIN, **ENUMERATED),
            r"^coin: .*enumerated; use TraceEnum_ELBO",
            id="enumerated-in-both",
        ),
        pytest.param(
            lambda: _sample("w", **ENUMERATED),
            lambda: _sample("w", **ENUMERATED),
            r"^w: .*enumerated; use TraceEnum_ELBO",
            id="continuous-enumerated",
        ),
        pytest.param(_both(_w, _w), _w, r"^w: expected a name for every sample site, but two", id="twice-in-model"),
        pytest.param(_w, _both(_w, _w), r"^w: expected a name for every sample site, but two", id="twice-in-guide"),
    ],
)
def test_sites_that_do_not_fit_are_an_error_that_names_the_site(model, guide, message, local_reparam):
    with pytest.raises(ValueError, match=message):
        SparseVD_ELBO(local_reparam=local_reparam).loss(model, guide)


def test_a_discrete_site_that_is_observed_is_no_error():
    def model():
        logit = _sample("w")
        _sample("coin", dist.Bernoulli(logits=logit), obs=torch.tensor(1.0))

    assert math.isfinite(SparseVD_ELBO().loss(model, _w))


def test_deterministic_sites_do_not_count():
    def model():
        pyro.deterministic("square", _sample("w") ** 2)

    assert SparseVD_ELBO().loss(model, _w) == 0.0


# Numbers that are not finite.


class _Poisoned(NamedTuple):
    model: Supervised
    guide: AutoSparseNormal
    svi: SVI
    loss: nn.Module
    data: tuple[Tensor, Tensor]


def _trained(device: torch.device, task: str, **options: Any) -> _Poisoned:
    likelihood = _normal if task == "regression" else _categorical
    model, guide = _pair(device, likelihood=likelihood)
    elbo = SparseVD_ELBO(**options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    x, y = _data(device)
    y = y if task == "regression" else (y > 0).double()
    svi.step(x, y)
    return _Poisoned(model, guide, svi, elbo(model, guide), (x.clone(), y.clone()))


def _store() -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}


def _bits(tensors: Any) -> list[bytes]:
    return [t.detach().cpu().numpy().tobytes() for t in tensors]


NAN_OR_INF = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("way", ["svi", "loss"])
@pytest.mark.parametrize("value", NAN_OR_INF)
@pytest.mark.parametrize(("position", "name"), [(0, "x"), (1, "y")])
@pytest.mark.parametrize("task", ["regression", "classification"])
def test_data_that_are_not_finite_raise_before_anything_changes(task, position, name, value, way, device):
    p = _trained(device, task)
    p.data[position].view(-1)[-1] = value
    state, store, terms = _bits(_state(p.model, p.guide)), _store(), p.svi.loss
    for parameter in p.loss.parameters():
        parameter.grad = None
    with pytest.raises(ValueError, match=rf"^{name}: expected finite numbers, but it holds NaN or infinities"):
        p.svi.step(*p.data) if way == "svi" else p.loss(*p.data).backward()
    assert _bits(_state(p.model, p.guide)) == state
    assert _store().keys() == store.keys()
    assert all(torch.equal(_store()[key], store[key]) for key in store)
    assert all(parameter.grad is None for parameter in p.loss.parameters())
    assert p.svi.loss is terms


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_an_error_comes_without_a_warning(task, device):
    p = _trained(device, task)
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
    p = _trained(device, task)
    with torch.no_grad():
        parameter, name = {
            "locs": lambda: (p.guide.posteriors["2.weight"].loc, r"locs\.2\.weight"),
            "log_variances": lambda: (p.guide.posteriors["2.weight"].log_variance, r"log_variances\.2\.weight"),
            "bias": lambda: (p.model.network[2].bias, r"2\.bias"),
        }[owner]()
        parameter.view(-1)[0] = value
    state = _bits(_state(p.model, p.guide))
    with pytest.raises(ValueError, match=rf"^\S*{name}\S*: expected finite numbers, but it holds NaN or infinities"):
        p.svi.step(*p.data) if way == "svi" else p.loss(*p.data).backward()
    assert _bits(_state(p.model, p.guide)) == state


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("make", [_network_twin, _function_of_data_twin], ids=["network", "function"])
def test_bad_data_at_the_very_first_step_do_no_harm(make, position, device):
    twin, other = make(device), make(device)
    bad = [t.clone() for t in twin.args]
    bad[position][0] = math.nan
    svi = SVI(twin.model, twin.guide, pyro.optim.SGD({"lr": 0.0}), SparseVD_ELBO())
    with pytest.raises(ValueError, match=r"expected finite numbers"):
        svi.step(*bad)
    for guide in (twin.guide, other.guide):
        guide(*twin.args)
    loss = _seeded(svi.step, *twin.args)
    assert loss == _seeded(SparseVD_ELBO().loss, other.model, other.guide, *other.args)


@pytest.mark.parametrize("value", NAN_OR_INF)
def test_bad_data_do_not_reach_running_statistics(value, device):
    class Normalised(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 1)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.norm(x))

    model, guide = _of_network(Normalised, device)
    x, y = _data(device)
    loss = SparseVD_ELBO()(model, guide)
    loss(x, y)
    before = [b.clone() for b in model.buffers()]
    bad = x.clone()
    bad[0, 0] = value
    with pytest.raises(ValueError, match=r"^x: expected finite numbers"):
        loss(bad, y)
    assert all(torch.equal(b, kept) for b, kept in zip(model.buffers(), before, strict=True))


def test_a_keyword_argument_is_named(device):
    p = _trained(device, "regression")
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
    model, guide = _pair(device, likelihood=lambda output: dist.Normal(output.squeeze(-1), 1e-200))
    with pytest.raises(
        ValueError, match=r"^loss: expected .*, but got nll inf and kl [\d.]+; not finite are the terms of y$"
    ):
        SparseVD_ELBO().loss(model, guide, *_data(device))


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
    p = _trained(device, "regression")
    p.loss(*p.data)
    terms = dict(p.loss.elbo.terms)
    p.data[0][0] = math.nan
    with pytest.raises(ValueError, match=r"^x: expected finite"):
        p.loss(*p.data)
    assert p.loss.elbo.terms == terms


def test_a_gradient_step_is_possible_after_an_error(device):
    p = _trained(device, "regression")
    bad = p.data[0].clone()
    bad[0] = math.nan
    with pytest.raises(ValueError, match=r"^x: expected finite"):
        p.svi.step(bad, p.data[1])
    assert math.isfinite(p.svi.step(*p.data))


@pytest.mark.parametrize(("position", "value"), [(0, math.nan), (1, math.nan), (1, math.inf)])
def test_without_the_check_a_loss_that_is_not_finite_is_returned(position, value, device):
    def likelihood(output):
        return dist.Normal(output.squeeze(-1), 0.5, validate_args=False)

    model, guide = _pair(device, likelihood=likelihood)
    data = _data(device)
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
    p = _trained(device, "classification")
    x, y = p.data
    with pytest.raises(ValueError, match="Expected value argument"):
        p.loss(x, y + 7)


# Logging, memory and global state.


def test_a_divergence_that_is_sampled_is_logged_with_its_site_at_debug_level(device, caplog):
    twin = _student_twin(device)
    with caplog.at_level(logging.DEBUG, logger="pyro_sparsevd"):
        SparseVD_ELBO().loss(twin.model, twin.guide)
    records = [r for r in caplog.records if r.name == "pyro_sparsevd.infer.kl"]
    assert [r.levelno for r in records] == [logging.DEBUG]
    assert records[0].getMessage().startswith("w: no closed form of KL(")
    assert "StudentT" in records[0].getMessage()


@pytest.mark.parametrize("kl", ["approximate", "exact"])
@pytest.mark.parametrize("make", [_network_twin, _bounded_twin, _function_twin])
def test_closed_forms_are_not_logged(make, kl, device, caplog):
    twin = make(device)
    with caplog.at_level(logging.DEBUG, logger="pyro_sparsevd"):
        SparseVD_ELBO(kl).loss(twin.model, twin.guide, *twin.args)
    assert caplog.records == []


@pytest.mark.parametrize("prior", [LogUniform(), dist.Normal(0.0, 1.0)], ids=repr)
@pytest.mark.parametrize("local_reparam", [True, False])
def test_latents_with_a_closed_form_have_no_density_computed(local_reparam, prior, device, monkeypatch):
    model, guide = _pair(device, prior=prior)
    guide(*_data(device))

    def forbidden(self, value):
        raise AssertionError("a density that nobody reads")

    monkeypatch.setattr(SparseNormal, "log_prob", forbidden)
    monkeypatch.setattr(LogUniform, "log_prob", forbidden)
    assert math.isfinite(SparseVD_ELBO(local_reparam=local_reparam).loss(model, guide, *_data(device)))


class TestMemory:
    def _pair(self, device: torch.device, spy: list) -> tuple[Supervised, AutoSparseNormal, tuple]:
        # All tensors are large enough for the workspace.
        class Spy(nn.Linear):
            def forward(self, x):
                spy.append(weakref.ref(self.weight))
                return super().forward(x)

        torch.manual_seed(1)
        net = nn.Sequential(Spy(96, 96), nn.ReLU(), Spy(96, 96)).to(device)
        model = Supervised(bayesianize(net), lambda output: dist.Normal(output, 1.0).to_event(1), 128)
        data = torch.randn(128, 96, device=device), torch.randn(128, 96, device=device)
        guide = AutoSparseNormal(model)
        guide(*data)
        return model, guide, data

    @pytest.mark.parametrize("way", ["svi", "loss"])
    def test_no_more_is_held_after_twenty_steps_than_after_two(self, way, device):
        spy: list = []
        model, guide, data = self._pair(device, spy)
        elbo = SparseVD_ELBO()
        svi, loss = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo), elbo(model, guide)
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
        lengths = []
        gc.collect()
        gc.disable()  # so that no cycle is swept under the carpet
        try:
            spy.clear()
            for _ in range(20):
                if way == "svi":
                    svi.step(*data)
                else:
                    optimizer.zero_grad()
                    loss(*data).backward()
                    optimizer.step()
                lengths.append({key: len(arrays) for key, arrays in elbo._workspace._arrays.items()})
            assert len(spy) == 40
            assert [reference() for reference in spy] == [None] * 40
        finally:
            gc.enable()
        assert lengths[1] or device.type != "cpu"
        assert lengths[-1] == lengths[1]

    def test_the_graph_of_a_loss_is_freed_with_it(self, device):
        spy: list = []
        model, guide, data = self._pair(device, spy)
        elbo = SparseVD_ELBO()
        gc.collect()
        gc.disable()
        try:
            spy.clear()
            loss = elbo(model, guide)(*data)
            reference = weakref.ref(loss)
            assert len(spy) == 2
            del loss
            assert reference() is None
            assert [reference() for reference in spy] == [None, None]
        finally:
            gc.enable()


def _global_state() -> dict[str, Any]:
    return {
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "validation": torch.distributions.Distribution._Distribution__validate_args
        if hasattr(torch.distributions.Distribution, "_Distribution__validate_args")
        else torch.distributions.Distribution._validate_args,
        "pyro validation": pyro.infer.util.is_validation_enabled(),
        "pyro settings": pyro.settings.get(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "seed": torch.initial_seed(),
        "filters": list(warnings.filters),
        "log level": logging.getLogger().level,
        "own log level": logging.getLogger("pyro_sparsevd").level,
        "handlers": (list(logging.getLogger().handlers), list(logging.getLogger("pyro_sparsevd").handlers)),
        "linear": F.linear,
        "python rng": random.getstate(),
        "numpy rng": np.random.get_state()[1].tolist(),  # noqa: NPY002 # the global one is meant
        "stack": list(poutine.runtime._PYRO_STACK),
    }


@pytest.mark.parametrize("local_reparam", [True, False])
def test_training_changes_nothing_global_but_the_state_of_the_generator(local_reparam, device):
    state = _global_state()
    generator = torch.get_rng_state()
    model, guide = _pair(device)
    elbo = SparseVD_ELBO(local_reparam=local_reparam)
    torch.set_rng_state(generator)
    elbo.loss_and_grads(model, guide, *_data(device))
    after = _global_state()
    state["seed"] = after["seed"]  # the helpers of this test set it
    assert after == state
    assert not torch.equal(torch.get_rng_state(), generator) or device.type != "cpu"


def test_an_error_leaves_nothing_global_behind(device):
    p = _trained(device, "regression")
    state = _global_state()
    p.data[0][0] = math.nan
    with pytest.raises(ValueError, match=r"^x: expected finite"):
        p.svi.step(*p.data)
    assert _global_state() == state


def test_two_evaluations_draw_different_noise_and_one_seed_the_same(device):
    model, guide = _pair(device)
    guide(*_data(device))
    loss = SparseVD_ELBO()(model, guide)
    assert loss(*_data(device)) != loss(*_data(device))
    assert _seeded(loss, *_data(device)) == _seeded(loss, *_data(device))


def test_memory_does_not_grow_with_the_number_of_batch_sizes(device):
    model = Supervised(bayesianize(nn.Linear(64, 256).to(device)), lambda x: dist.Normal(x, 1.0).to_event(1), 10_000)
    guide, elbo = AutoSparseNormal(model), SparseVD_ELBO()
    kept = []
    for size in range(200, 230):
        elbo(model, guide)(torch.ones(size, 64, device=device), torch.ones(size, 256, device=device)).backward()
        kept.append(sum(a.nbytes for arrays in elbo._workspace._arrays.values() for a in arrays))
    assert kept[-1] <= kept[5] * 1.2


@pytest.mark.parametrize(
    "nest", [lambda x: {"x": x}, lambda x: [x], lambda x: ({"a": [x]},)], ids=["dict", "list", "deep"]
)
def test_values_that_are_not_finite_are_found_in_containers_before_they_reach_the_model(nest, device):
    calls = []

    def model(batch):
        calls.append(batch)
        pyro.sample("w", LogUniform().expand([3]).to_event(1))

    guide = AutoSparseNormal(model)
    guide(nest(torch.ones(2, device=device)))
    calls.clear()
    with pytest.raises(ValueError, match=r"batch.*: expected finite numbers, but it holds NaN or infinities"):
        SparseVD_ELBO().loss(model, guide, nest(torch.tensor([1.0, math.nan], device=device)))
    assert not calls


def test_a_draw_of_exactly_0_has_a_finite_density_and_gradient(device):
    value = torch.tensor([0.0, 1.0], device=device, requires_grad=True)
    site = {"name": "w", "fn": LogUniform().expand([2]).to_event(1), "value": value, "scale": 1.0, "mask": None}
    site["cond_indep_stack"] = ()
    density = log_prob(site)
    density.backward()
    assert density.isfinite()
    assert value.grad.tolist() == [0.0, -1.0]


def _normal_model(batch_shape, event_dim, plate=None):
    def model(x):
        with pyro.plate("rows", plate) if plate else nullcontext():
            w = pyro.sample("w", dist.Normal(torch.zeros(batch_shape, device=x.device), 1.0).to_event(event_dim))
        pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=x.sum())

    return model


DISAGREEING = {  # the model, what the guide draws
    "shape": (_normal_model((3, 4), 2), SparseNormal(torch.zeros(1, 4), -2.0).to_event(2)),
    "event": (_normal_model((3, 4), 2), SparseNormal(torch.zeros(3, 4), -2.0).to_event(1)),
    "plate": (_normal_model((), 0, plate=3), SparseNormal(0.0, -2.0)),
}


@pytest.mark.parametrize(("model", "q"), DISAGREEING.values(), ids=DISAGREEING)
def test_a_guide_of_other_shapes_than_the_model_is_refused(model, q, device):
    q = map_tensors(q, lambda t: t.to(device))
    with pytest.raises(
        ValueError, match=r"^w: expected batch shape .* and event shape .* in the guide, as in the model"
    ):
        SparseVD_ELBO().loss(model, lambda x: pyro.sample("w", q), torch.ones(2, device=device))


def _outer_product(x, y):  # targets of shape (M,) and means of shape (M, 1)
    w = pyro.sample("w", LogUniform().expand([3]).to_event(1))
    with pyro.plate("data", 100, subsample=x):
        pyro.sample("y", dist.Normal((x @ w)[:, None], 1.0), obs=y)


def _latent_outside_of_plates(x, y):
    pyro.sample("w", LogUniform().expand([3]))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(2), obs=x)


@pytest.mark.filterwarnings("ignore::pyro_sparsevd.distributions.ImproperPriorWarning")
@pytest.mark.parametrize(("model", "site"), [(_outer_product, "y"), (_latent_outside_of_plates, "w")])
def test_a_batch_that_no_plate_declares_is_refused_as_elsewhere_in_pyro(model, site, device):
    guide, data = AutoSparseNormal(model), (torch.ones(5, 3, device=device), torch.ones(5, device=device))
    with pytest.raises(ValueError, match=site):
        Trace_ELBO().loss(model, guide, *data)
    with pytest.raises(ValueError, match=f"^{site}: expected a batch of the sizes of its plates"):
        SparseVD_ELBO().loss(model, guide, *data)
    with pyro.validation_enabled(False):
        assert math.isfinite(SparseVD_ELBO().loss(model, guide, *data))


def test_between_plates_any_size_is_fine_as_elsewhere_in_pyro(device):
    def model(x):
        with pyro.plate("rows", 4, dim=-2):
            pyro.sample("w", dist.Normal(torch.zeros(4, 3, device=device), 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=x)

    guide, x = AutoNormal(model), torch.ones(4, 3, device=device)
    assert math.isfinite(Trace_ELBO().loss(model, guide, x))
    assert math.isfinite(SparseVD_ELBO().loss(model, guide, x))


# Where the closed form is the wrong one, or another than it seems.


def _against_the_order(prior_of_y: Callable = lambda x: dist.Normal(x, 1.0)) -> tuple[Callable, Callable]:
    """A model x, y, obs with the exact posterior as its guide, which samples y first."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        y = pyro.sample("y", prior_of_y(x))
        pyro.sample("obs", dist.Normal(y, 1.0), obs=torch.ones((), dtype=F64))

    def guide():
        y = pyro.sample("y", dist.Normal(torch.tensor(2 / 3, dtype=F64), (2 / 3) ** 0.5))
        pyro.sample("x", dist.Normal(y / 2, 0.5**0.5))

    return model, guide


@pytest.mark.parametrize("kl", ["approximate", "exact", "monte_carlo"])
def test_a_guide_against_the_order_of_the_model_has_the_loss_of_trace_elbo(kl):
    model, guide = _against_the_order()
    losses = torch.tensor([SparseVD_ELBO(kl).loss(model, guide) for _ in range(2_000)], dtype=F64)
    evidence = -dist.Normal(torch.zeros((), dtype=F64), 3**0.5).log_prob(torch.ones((), dtype=F64))
    assert abs(losses.mean() - evidence) < SIGMAS * losses.std() / len(losses) ** 0.5 + 1e-12


def test_a_factorised_guide_keeps_its_closed_forms_in_any_order():
    zero = torch.zeros((), dtype=F64)

    def model():
        x = pyro.sample("x", dist.Normal(zero, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0))

    guide = AutoGuideList(model)
    guide.append(AutoSparseNormal(poutine.block(model, hide=["x"]), init_log_variance=-1.0))
    guide.append(AutoNormal(poutine.block(model, hide=["y"])))
    guide()
    with poutine.trace() as trace:
        guide()
    assert list(trace.trace.stochastic_nodes) == ["y", "x_unconstrained", "x"]
    values = {SparseVD_ELBO().loss(poutine.condition(model, {"x": zero}), guide.__getattr__("0")) for _ in range(5)}
    assert len(values) == 1
    assert is_factorised(guide)
    assert is_factorised(poutine.mask(guide.__getattr__("0").sparsified(sparsify(guide.__getattr__("0"))), True))
    guide.append(lambda: {})
    assert not is_factorised(guide)


class _OfTheOutput(nn.Module):
    """A guide in which a later latent depends on the output of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.full((1, 2), 0.3, dtype=F64))

    def forward(self) -> None:
        w = pyro.sample("w", SparseNormal(self.loc, -1.0).to_event(2))
        u = F.linear(torch.ones(1, 2, dtype=F64), w).sum()
        pyro.sample("u", dist.Normal(u, 0.5))


def test_a_weight_against_the_order_is_sampled():
    def model():
        u = pyro.sample("u", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.sample("w", dist.Normal(u * torch.ones(1, 2, dtype=F64), 1.0).to_event(2))

    guide, elbo = _OfTheOutput(), SparseVD_ELBO()
    losses, expected = (
        torch.tensor([e.loss(model, guide) for _ in range(4_000)], dtype=F64) for e in (elbo, Trace_ELBO())
    )
    error = (losses.var() / len(losses) + expected.var() / len(expected)).sqrt()
    assert abs(losses.mean() - expected.mean()) < SIGMAS * error


@pytest.mark.parametrize("kl", ["approximate", "exact"])
@pytest.mark.parametrize(
    "make",
    [
        lambda q: dist.TransformedDistribution(q.to_event(1), []),
        lambda q: dist.TransformedDistribution(q, [IndependentTransform(ComposeTransform([]), 1)]),
        lambda q: dist.TransformedDistribution(dist.Normal(q.loc * 0, 1.0), AffineTransform(q.loc, -q.scale)).to_event(
            1
        ),
        lambda q: dist.TransformedDistribution(
            dist.Normal(q.loc / 2, q.scale / 2).to_event(1), [AffineTransform(0.0, 2.0), ComposeTransform([])]
        ),
    ],
    ids=["nothing", "identity", "location and scale", "both"],
)
def test_a_gaussian_by_transforms_has_the_closed_form(make, kl):
    q = SparseNormal(torch.tensor([0.3, -2.0, 0.0], dtype=F64), torch.tensor([-1.0, 0.5, -3.0], dtype=F64))
    losses = {
        SparseVD_ELBO(kl).loss(
            lambda: pyro.sample("w", LogUniform().expand([3]).to_event(1)), lambda: pyro.sample("w", make(q))
        )
        for _ in range(3)
    }
    expected = kl_normal_log_uniform(q, LogUniform(), kl).sum().item()
    assert all(abs(loss - expected) < 1e-10 for loss in losses)


@pytest.mark.parametrize("make", [AutoNormal, AutoNormalMessenger])
@pytest.mark.parametrize("prior", [LogUniform(), LogUniform(1e-3, 10.0), dist.Normal(0.0, 2.0)], ids=repr)
def test_pyros_own_normal_guides_have_the_closed_form(make, prior):
    def model():
        pyro.sample("w", prior.expand([3]).to_event(1))

    guide = make(model, init_loc_fn=init_to_value(values={"w": torch.tensor([0.3, -2.0, 0.1])}), init_scale=0.2)
    guide()
    q = dist.Normal(torch.tensor([0.3, -2.0, 0.1]), 0.2)
    expected = torch.distributions.kl_divergence(q, prior.expand([3])).sum().item()
    elbo = SparseVD_ELBO("exact")
    for _ in range(3):
        assert elbo.loss(model, guide) == pytest.approx(expected, rel=1e-5)


def test_a_density_that_a_delta_adds_to_its_value_counts():
    zero = torch.zeros((), dtype=F64)

    def guide():
        u = pyro.sample("u", dist.Normal(zero + 0.3, 0.5), infer={"is_auxiliary": True})
        pyro.sample("w", dist.Delta(u, log_density=zero + 0.7))

    loss = SparseVD_ELBO().loss(lambda: pyro.sample("w", dist.Normal(zero, 1.0)), guide)
    expected = torch.distributions.kl_divergence(dist.Normal(zero + 0.3, 0.5), dist.Normal(zero, 1.0)) + 0.7
    assert loss == pytest.approx(expected.item(), abs=1e-10)


def test_a_divergence_from_the_improper_prior_that_has_to_be_sampled_is_one_warning_with_the_site():
    def model():
        for name in "vw":
            pyro.sample(name, LogUniform().expand([3]).to_event(1))

    guide, elbo = AutoMultivariateNormal(model, init_loc_fn=init_to_weights), SparseVD_ELBO()
    with pytest.warns(ImproperPriorWarning, match=r"no closed form of the divergence") as found:
        elbo.loss(model, guide)
    assert [str(w.message)[0] for w in found] == ["v", "w"]
    elbo.loss(model, guide)  # a warning would be an error
    SparseVD_ELBO("monte_carlo").loss(model, guide)  # which asks for it


@pytest.mark.parametrize("where", ["prior", "prior, before to_event", "both", "handler"])
@pytest.mark.parametrize("mask", [False, True, torch.tensor([True, False, True])], ids=str)
@pytest.mark.parametrize("prior", [LogUniform(), dist.Normal(0.0, 1.0)], ids=repr)
def test_masks_leave_the_closed_form_and_its_mean(prior, mask, where):
    q = SparseNormal(torch.tensor([0.5, -1.0, 0.1], dtype=F64), torch.tensor([-1.0, 0.0, -2.0], dtype=F64))
    p = prior.expand([3])
    kl, entropy = torch.distributions.kl_divergence(q, p), q.entropy()
    counted = torch.as_tensor(mask).expand(3).double()

    def sampled(masked, fn):
        if masked and where == "prior, before to_event":
            pyro.sample("w", fn.mask(mask).to_event(1))
        elif masked and where in ("prior", "both"):
            with pyro.plate("plate", 3):
                pyro.sample("w", fn.mask(mask))
        elif where in ("prior", "both", "handler"):
            with pyro.plate("plate", 3), poutine.mask(mask=mask if where == "handler" else True):
                pyro.sample("w", fn)
        else:
            pyro.sample("w", fn.to_event(1))

    both = where in ("both", "handler")
    expected = (counted * kl).sum() + (0.0 if both else ((counted - 1) * entropy).sum())
    loss = SparseVD_ELBO("exact").loss(lambda: sampled(True, p), lambda: sampled(both, q))
    assert loss == pytest.approx(float(expected), abs=1e-10)
    sampling = SparseVD_ELBO("monte_carlo")
    losses = [sampling.loss(lambda: sampled(True, p), lambda: sampled(both, q)) for _ in range(400)]
    assert abs(np.mean(losses) - float(expected)) <= SIGMAS * np.std(losses) / 20 + 1e-10


@pytest.mark.parametrize("prior", [dist.Normal(0.0, 1.0), LogUniform()], ids=repr)
def test_a_sampled_divergence_takes_both_densities_at_one_sample(prior, device):
    model, guide = _pair(device, log_variance=0.0, prior=prior)
    with torch.no_grad():
        for q in guide.posteriors.values():
            q.loc.zero_()
    guide(*_data(device))
    spread = []
    for is_local in (True, False):
        elbo = SparseVD_ELBO("monte_carlo", local_reparam=is_local)
        kls = [(elbo.loss(model, guide, *_data(device)), elbo.terms["kl"].item())[1] for _ in range(300)]
        spread.append(np.std(kls))
    assert spread[0] <= 1.2 * spread[1] + 1e-12  # 0 against 0 where posterior and prior are the same


def test_the_variance_of_a_pooled_prior_is_that_of_the_weights_that_are_kept(device):
    model = Supervised(
        bayesianize(nn.Linear(50, 1, bias=False).to(device).double(), EmpiricalBayesNormal(())), _normal, 9
    )
    guide = AutoSparseNormal(model, init_log_variance=-4.0)
    loc = torch.where(torch.arange(50, device=device) < 5, 2.0, 1e-3).double()
    with torch.no_grad():
        guide.posteriors["weight"].loc.copy_(loc)
    x, y = torch.randn(9, 50, dtype=F64, device=device), torch.randn(9, dtype=F64, device=device)
    guide(x, y)
    sparse, elbo = guide.sparsified(sparsify(guide, {"weight": 0.0})), SparseVD_ELBO()
    elbo(model, sparse)(x, y).backward()
    q = guide.posteriors["weight"]
    second = (q.loc**2 + q.variance)[0, :5]
    _assert_close(elbo.terms["kl"], (0.5 * (second.mean().log() - q.log_variance[0, :5])).sum().detach(), 1e-9)
    gradients = [p.grad for p in sparse.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("make", [AutoNormal, AutoSparseNormal])
def test_a_plate_without_a_size_takes_data_of_any(make):
    data = torch.randn(17, dtype=F64)

    def model():
        loc = pyro.sample("loc", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("plate"):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=data)

    guide = make(model)
    guide()
    loss, expected = (_seeded(elbo.loss, model, guide) for elbo in (SparseVD_ELBO("monte_carlo"), Trace_ELBO()))
    assert loss == pytest.approx(expected, abs=1e-10)
    with pytest.raises(ValueError, match=r"^y: expected a value of shape \(\)"):
        SparseVD_ELBO().loss(
            lambda: pyro.sample("y", dist.Normal(pyro.sample("loc", dist.Normal(0.0, 1.0)), 1.0), obs=data), guide
        )


def test_an_auxiliary_site_that_is_not_reparameterised_is_refused():
    def guide():
        pyro.sample("a", dist.Bernoulli(0.5), infer={"is_auxiliary": True})

    with pytest.raises(
        ValueError, match=r"^a: expected a reparameterised auxiliary site, but Bernoulli has no rsample"
    ):
        SparseVD_ELBO().loss(lambda: None, guide)


# Parameters that nobody trains.


def _function_of_a_network(device: torch.device) -> tuple[Callable, AutoSparseNormal]:
    network = bayesianize(_network(device))

    def model(x, y):
        scale = pyro.param("scale", torch.ones((), dtype=F64, device=device), dist.constraints.positive)
        output = network(x).squeeze(-1)
        with pyro.plate("data", NUM_DATA, subsample=x):
            pyro.sample("y", dist.Normal(output, scale), obs=y)

    return model, AutoSparseNormal(model)


def test_parameters_that_a_loss_module_lacks_are_one_warning_that_names_them(device):
    model, guide = _function_of_a_network(device)
    loss = SparseVD_ELBO()(model, guide)
    with pytest.warns(UserWarning, match=r"the loss depends on these") as found:
        loss(*_data(device))
    loss(*_data(device))  # a warning would be an error
    message = str(found[0].message)
    assert set(message.split(":")[0].split(", ")) == {"0.bias", "2.bias", "scale"}
    assert "torch module" in message


def test_svi_trains_them_without_a_warning(device):
    model, guide = _function_of_a_network(device)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), SparseVD_ELBO())
    svi.step(*_data(device))
    before = _store()
    svi.step(*_data(device))
    assert all(not torch.equal(value, before[name]) for name, value in _store().items())


def test_a_plain_network_that_svi_does_not_see_is_one_warning(device):
    plain = _network(device)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=F64, device=device), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * plain(x).squeeze(-1), 1.0), obs=y)

    svi = SVI(model, AutoSparseNormal(model), pyro.optim.Adam({"lr": 0.1}), SparseVD_ELBO())
    with pytest.warns(UserWarning, match=r"^one of shape .* one of shape \(3, 4\): the loss .*pyro\.module"):
        svi.step(*_data(device))
    svi.step(*_data(device))  # a warning would be an error


# Sites whose weights are sampled.


@pytest.mark.parametrize("exclude", ["0.*", ["0.weight"], ("2.nothing*", "0.weight")])
def test_excluded_sites_are_sampled_and_all_others_local(exclude, device):
    model, guide = _pair(device)
    elbo = SparseVD_ELBO(exclude=exclude)
    if "2.nothing*" in exclude:
        with pytest.raises(ValueError, match=r"^exclude: .* of 0\.weight, 2\.weight, but got '2\.nothing\*'"):
            elbo.loss(model, guide, *_data(device))
        return
    for own in (elbo, copy.deepcopy(elbo), pickle.loads(pickle.dumps(elbo))):
        found = _seeded(own.loss, model, guide, *_data(device))
        by_handler = local_reparam(guide, exclude={"0.weight"})
        assert found == _seeded(SparseVD_ELBO(local_reparam=False).loss, model, by_handler, *_data(device))


def test_an_exclude_of_other_things_than_names_is_refused():
    with pytest.raises(TypeError, match=r"^exclude: expected names or globs of sites, but got <class"):
        SparseVD_ELBO(exclude=[nn.Linear])


def test_a_layer_whose_rows_mix_has_a_gap_and_others_none(device):
    mixing = torch.full((NUM_DATA, NUM_DATA), 1 / NUM_DATA, dtype=F64, device=device)
    for is_graph in (True, False):
        net = nn.Linear(4, 1, bias=False).to(device).double()
        nn.init.zeros_(net.weight)
        model = Supervised(bayesianize(net), lambda out, mixed=is_graph: _normal(mixing @ out if mixed else out), 20)
        guide, data = AutoSparseNormal(model, init_log_variance=0.0), _data(device, NUM_DATA)
        data = (data[0].abs(), data[1])
        guide(*data)
        gap = local_reparam_gap(SparseVD_ELBO(), model, guide, *data, num_passes=200)
        assert (gap.sigmas < -SIGMAS) == is_graph
        assert is_graph or abs(gap.sigmas) < SIGMAS
    with pytest.raises(ValueError, match=r"^num_passes: expected at least 2"):
        local_reparam_gap(SparseVD_ELBO(), model, guide, *data, num_passes=1)


# Devices.


@pytest.mark.parametrize("check_finite", [True, False])
@pytest.mark.parametrize("used_before", [True, False])
@pytest.mark.parametrize("position", [0, 1])
def test_an_argument_on_another_device_is_named(position, used_before, check_finite, device):
    model, guide = _pair(device)
    loss = SparseVD_ELBO(check_finite=check_finite)(model, guide)
    data = list(_data(device))
    if used_before:
        loss(*data)
    data[position] = data[position].to("meta")
    with pytest.raises(ValueError, match=rf"^{'xy'[position]}: expected a tensor on {device}.*, but it is on meta"):
        loss(*data)


def test_an_error_of_another_kind_does_not_blame_the_device(device):
    class Moving(nn.Linear):
        def forward(self, x):
            raise RuntimeError("mine")

    model = Supervised(bayesianize(Moving(4, 1)), _normal, NUM_DATA)
    with pytest.raises(RuntimeError, match=r"^mine"):
        SparseVD_ELBO(check_finite=False).loss(model, AutoSparseNormal(model), *(t.to("meta") for t in _data(device)))


class _Waits(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func) in ("aten._local_scalar_dense.default", "aten.equal.default", "aten.is_nonzero.default")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("check_finite", [True, False])
@pytest.mark.parametrize("svi", [True, False])
def test_a_step_waits_for_the_device_once_at_most(svi, check_finite, device):
    with pyro.validation_enabled(False):
        model, guide = _pair(device)
        elbo = SparseVD_ELBO(check_finite=check_finite)
        step = partial(elbo.loss_and_grads, model, guide) if svi else elbo(model, guide)
        step(*_data(device))
        with _Waits() as waits:
            step(*_data(device))
    assert waits.count == (1 if svi or check_finite else 0)


def test_a_sum_that_overflows_of_finite_data_is_no_error(device):
    model, guide = _pair(device, likelihood=lambda output: dist.Normal(output.squeeze(-1).tanh(), 1.0))
    x, y = _data(device)
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
