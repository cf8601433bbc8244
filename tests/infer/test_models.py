"""Pyro models without any network: their loss against Pyro's own, and what training finds in them.

Each problem is a model with one sparse site and constrained latents beside it, and small data made from known values
of all its latents.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from sklearn.decomposition import FactorAnalysis
from torch import Tensor

from pyro_sparsevd import AutoSparseNormal, LogUniform, SparseVD_ELBO, init_to_weights, sparsify


class Problem(NamedTuple):
    model: Callable
    data: tuple[Tensor, ...]
    truth: dict[str, Tensor]
    sparse: str
    free: int  # how many numbers the latents are, a simplex of three being two
    start: dict[str, Tensor] | None = None  # where training starts; random where there is none


def linear(prior: LogUniform) -> Problem:
    """A regression with noise of unknown scale; 3 of 12 features matter."""
    coefficients = torch.zeros(1, 12)
    coefficients[0, [0, 3, 7]] = torch.tensor([2.0, -1.5, 1.0])
    truth = {"intercept": torch.tensor(0.5), "scale": torch.tensor(0.3), "coefficients": coefficients}
    x = torch.randn(60, 12)
    y = F.linear(x, coefficients)[:, 0] + 0.5 + 0.3 * torch.randn(60)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        intercept = pyro.sample("intercept", dist.Normal(0.0, 10.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        coefficients = pyro.sample("coefficients", prior.expand([1, 12]).to_event(2))
        with pyro.plate("data", 60, subsample=x):
            pyro.sample("y", dist.Normal(F.linear(x, coefficients)[:, 0] + intercept, scale), obs=y)

    return Problem(model, (x, y), truth, "coefficients", 2 + 12)


def logistic(prior: LogUniform) -> Problem:
    """A classification in which some labels are guessed, at an unknown rate between 0 and 1."""
    coefficients = torch.zeros(1, 8)
    coefficients[0, [1, 4]] = torch.tensor([3.0, -3.0])
    x = torch.randn(300, 8)
    labels = torch.rand(300) < F.linear(x, coefficients)[:, 0].sigmoid()
    y = torch.where(torch.rand(300) < 0.1, torch.rand(300) < 0.5, labels).float()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        lapse = pyro.sample("lapse", dist.Beta(1.0, 10.0))
        coefficients = pyro.sample("coefficients", prior.expand([1, 8]).to_event(2))
        probabilities = 0.5 * lapse + (1 - lapse) * F.linear(x, coefficients)[:, 0].sigmoid()
        with pyro.plate("data", 300, subsample=x):
            pyro.sample("y", dist.Bernoulli(probabilities), obs=y)

    return Problem(model, (x, y), {"lapse": torch.tensor(0.1), "coefficients": coefficients}, "coefficients", 1 + 8)


def poisson(prior: LogUniform) -> Problem:
    """Counts whose total rate is shared among three groups, a simplex."""
    coefficients, shares = torch.zeros(1, 10), torch.tensor([0.2, 0.3, 0.5])
    coefficients[0, [2, 5]] = torch.tensor([0.8, -0.6])
    truth = {"total": torch.tensor(9.0), "shares": shares, "coefficients": coefficients}
    x, group = torch.randn(120, 10), torch.arange(120) % 3
    y = torch.poisson(9 * shares[group] * F.linear(x, coefficients)[:, 0].exp())

    def model(x: Tensor, group: Tensor, y: Tensor | None = None) -> None:
        total = pyro.sample("total", dist.Gamma(2.0, 0.2))
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        coefficients = pyro.sample("coefficients", prior.expand([1, 10]).to_event(2))
        rate = total * shares[group] * F.linear(x, coefficients)[:, 0].exp()
        with pyro.plate("data", 120, subsample=x):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    return Problem(model, (x, group, y), truth, "coefficients", 1 + 2 + 10)


def terms(prior: LogUniform) -> Problem:
    """A damped oscillator, x' = v and v' = -2 x - 0.3 v, from slopes and all monomials in x and v up to degree 3."""
    coefficients = torch.zeros(2, 10)
    coefficients[0, 2], coefficients[1, 1], coefficients[1, 2] = 1.0, -2.0, -0.3
    frequency, time = math.sqrt(2 - 0.15**2), torch.linspace(0, 10, 100)
    amplitude, phase = (-0.15 * time).exp(), frequency * time
    x = amplitude * phase.cos()
    v = -0.15 * x - frequency * amplitude * phase.sin()
    library = torch.stack([x ** (degree - j) * v**j for degree in range(4) for j in range(degree + 1)], 1)
    slopes = F.linear(library, coefficients) + 0.1 * torch.randn(100, 2)

    def model(library: Tensor, slopes: Tensor | None = None) -> None:
        scales = pyro.sample("scales", dist.HalfNormal(torch.ones(2)).to_event(1))
        coefficients = pyro.sample("coefficients", prior.expand([2, 10]).to_event(2))
        with pyro.plate("times", 100, subsample=library):
            pyro.sample("slopes", dist.Normal(F.linear(library, coefficients), scales).to_event(1), obs=slopes)

    truth = {"scales": torch.full((2,), 0.1), "coefficients": coefficients}
    return Problem(model, (library, slopes), truth, "coefficients", 2 + 20)


def factors(prior: LogUniform) -> Problem:
    """Two factors that each load on some of eight features; loadings, scores and noise scales are in plates."""
    loadings, scores, scales = torch.zeros(8, 1, 2), torch.randn(80, 2), torch.full((8, 1), 0.5)
    loadings[:3, 0, 0], loadings[4:7, 0, 1] = torch.tensor([2.0, -1.5, 1.5]), torch.tensor([1.5, 2.0, -1.5])
    y = (loadings * scores).sum(-1) + scales * torch.randn(8, 80)

    def model(y: Tensor) -> None:
        features, objects = pyro.plate("features", 8, dim=-2), pyro.plate("objects", 80, dim=-1)
        with objects:
            scores = pyro.sample("scores", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with features:
            loadings = pyro.sample("loadings", prior.expand([2]).to_event(1))
            scales = pyro.sample("scales", dist.LogNormal(0.0, 1.0))
            with objects:
                pyro.sample("y", dist.Normal((loadings * scores).sum(-1), scales), obs=y)

    truth = {"scores": scores, "loadings": loadings, "scales": scales}
    # From random starts, training often ends in an optimum that is not the best.
    rotated = FactorAnalysis(2, rotation="varimax").fit(y.T.cpu().numpy())
    start = {"loadings": torch.tensor(rotated.components_.T).float()[:, None]}
    return Problem(model, (y,), truth, "loadings", 160 + 16 + 8, start)


def hierarchy(prior: LogUniform) -> Problem:
    """Groups with levels of their own that share their slopes, but for a few deviations."""
    slopes, levels, deviations = torch.tensor([1.0, -1.0, 0.5]), torch.randn(8), torch.zeros(8, 3)
    deviations[2, 0], deviations[5, 1], deviations[5, 2] = 1.5, -1.0, 1.0
    group, x = torch.arange(160) % 8, torch.randn(160, 3)
    y = levels[group] + (x * (slopes + deviations)[group]).sum(-1) + 0.3 * torch.randn(160)

    def model(x: Tensor, group: Tensor, y: Tensor | None = None) -> None:
        slopes = pyro.sample("slopes", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        spread = pyro.sample("spread", dist.HalfCauchy(1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", 8):
            levels = pyro.sample("levels", dist.Normal(0.0, spread))
            deviations = pyro.sample("deviations", prior.expand([3]).to_event(1))
        mean = levels[group] + (x * (slopes + deviations)[group]).sum(-1)
        with pyro.plate("data", 160, subsample=x):
            pyro.sample("y", dist.Normal(mean, scale), obs=y)

    truth = {"slopes": slopes, "spread": torch.tensor(1.0), "scale": torch.tensor(0.3)}
    truth |= {"levels": levels, "deviations": deviations}
    return Problem(model, (x, group, y), truth, "deviations", 3 + 2 + 8 + 24)


PROBLEMS = [linear, logistic, poisson, terms, factors, hierarchy]
IN_BATCHES = [linear, logistic, poisson, terms, hierarchy]
IMPROPER, BOUNDED = (), (1e-15, 1e15)
# What -log|w| lacks of the density from which the divergence vanishes as α grows, in nats per weight.
CONSTANT = 0.5 * (1 + 0.5772156649015329 + math.log(math.pi)) + math.log(2)
SAMPLES = 80


@pytest.fixture(autouse=True)
def _on_the_device(device):
    with device:
        yield


def _problem(make: Callable, bounds: tuple = IMPROPER) -> Problem:
    pyro.set_rng_seed(1)
    return make(LogUniform(*bounds))


def _near_truth(problem: Problem) -> AutoSparseNormal:
    """Returns a guide near the truth: log α is 2.4 where a weight is 0 in truth, and far below 0 elsewhere."""
    pyro.set_rng_seed(2)
    guide = AutoSparseNormal(problem.model, init_loc_fn=init_to_value(values=problem.truth))
    guide(*problem.data)
    with torch.no_grad():
        for q in guide.posteriors.values():
            q.log_variance.uniform_(-10, -7)
        q, zero = guide.posteriors[problem.sparse], problem.truth[problem.sparse] == 0
        q.loc[zero] = 0.3 * q.scale[zero] * torch.randn(int(zero.sum())).sign()
    return guide


def _number_of_weights(problem: Problem) -> int:
    return problem.truth[problem.sparse].numel()


def _constant(problem: Problem, bounds: tuple) -> float:
    return 0 if bounds else CONSTANT * _number_of_weights(problem)


def _mean_and_error(losses: list[float]) -> tuple[float, float]:
    values = torch.tensor(losses, dtype=torch.float64)
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


@lru_cache
def _reference(make: Callable, bounds: tuple) -> tuple[float, float]:
    """Returns the loss of Pyro with a guide of Pyro's of the same parameters, averaged, and its standard error."""
    problem = _problem(make, bounds)
    guide = AutoNormal(problem.model, init_loc_fn=init_to_value(values=problem.truth))
    guide(*problem.data)
    for name, q in _near_truth(problem).posteriors.items():
        setattr(guide.locs, name, q.loc.detach())
        setattr(guide.scales, name, q.scale.detach())
    return _mean_and_error([Trace_ELBO().loss(problem.model, guide, *problem.data) for _ in range(SAMPLES)])


class TestLoss:
    @pytest.mark.parametrize(
        ("kl", "bounds"),
        [("exact", IMPROPER), ("approximate", IMPROPER), ("monte_carlo", IMPROPER), ("exact", BOUNDED)],
        ids=["exact", "approximate", "monte carlo", "exact, bounded"],
    )
    @pytest.mark.parametrize("make", PROBLEMS)
    def test_the_loss_is_that_of_trace_elbo_on_average(self, make, kl, bounds):
        problem = _problem(make, bounds)
        guide, elbo = _near_truth(problem), SparseVD_ELBO(kl)
        pyro.set_rng_seed(3)
        mean, error = _mean_and_error([elbo.loss(problem.model, guide, *problem.data) for _ in range(SAMPLES)])
        expected, its_error = _reference(make, bounds)
        slack = 0.0094 * _number_of_weights(problem) if kl == "approximate" else 0
        error = math.hypot(error, its_error)
        assert error < 1.5
        assert abs(mean - expected - _constant(problem, bounds)) < 3 * error + slack

    @pytest.mark.parametrize("bounds", [IMPROPER, BOUNDED], ids=["improper", "bounded"])
    @pytest.mark.parametrize("make", PROBLEMS)
    def test_sampled_loss_and_gradients_are_those_of_trace_elbo_from_one_seed(self, make, bounds):
        problem = _problem(make, bounds)
        guide = _near_truth(problem)
        results = []
        for elbo in (SparseVD_ELBO("monte_carlo", local_reparam=False), Trace_ELBO()):
            pyro.set_rng_seed(3)
            loss = elbo.differentiable_loss(problem.model, guide, *problem.data)
            results.append((loss.detach(), torch.autograd.grad(loss, list(guide.parameters()))))
        (loss, gradients), (expected, expected_gradients) = results
        torch.testing.assert_close(loss, expected + _constant(problem, bounds), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-2)

    @pytest.mark.parametrize("make", IN_BATCHES)
    def test_mini_batches_cost_what_all_data_cost_on_average(self, make):
        problem = _problem(make)
        guide, elbo = _near_truth(problem), SparseVD_ELBO("exact")
        with torch.no_grad():
            for q in guide.posteriors.values():
                q.log_variance.fill_(-60.0)  # noise too small to see

        def nll(*data: Tensor) -> Tensor:
            elbo.loss(problem.model, guide, *data)
            return elbo.terms["nll"]

        batches = list(zip(*(t.chunk(4) for t in problem.data), strict=True))
        mean = torch.stack([nll(*batch) for batch in batches]).mean()
        torch.testing.assert_close(mean, nll(*problem.data), rtol=1e-4, atol=1e-3)


def _fit(problem: Problem, steps: int = 300) -> AutoSparseNormal:
    pyro.set_rng_seed(0)
    init_loc_fn = init_to_value(values=problem.start or {}, fallback=init_to_weights)
    guide = AutoSparseNormal(problem.model, init_loc_fn=init_loc_fn, init_log_variance=-8.0)
    guide(*problem.data)
    loss = SparseVD_ELBO("exact")(problem.model, guide)
    optimizer = torch.optim.Adam(loss.parameters(), 0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    for _ in range(steps):
        optimizer.zero_grad()
        loss(*problem.data).backward()
        optimizer.step()
        schedule.step()
    return guide


@pytest.mark.parametrize("make", PROBLEMS)
class TestSparsified:
    def test_only_the_sparse_site_is_counted_and_masked(self, make):
        problem = _problem(make)
        guide, weights = _near_truth(problem), problem.truth[problem.sparse]
        summary = sparsify(guide, threshold=0.0)
        assert guide.sparse_sites == (problem.sparse,)
        assert [site.name for site in summary.sites] == list(summary.masks) == [problem.sparse]
        assert torch.equal(summary.masks[problem.sparse], weights != 0)
        assert (summary.total, summary.kept) == (weights.numel(), int((weights != 0).sum()))
        assert (summary.num_parameters, summary.kept_parameters) == (
            problem.free,
            problem.free - int((weights == 0).sum()),
        )

    def test_samples_of_the_sparsified_posterior_have_zeros_and_all_latents(self, make):
        problem = _problem(make, BOUNDED)
        guide, zero = _near_truth(problem), problem.truth[problem.sparse] == 0
        sparsified = guide.sparsified(sparsify(guide, threshold=0.0))
        draws = Predictive(problem.model, guide=sparsified, num_samples=5, return_sites=list(problem.truth))(
            *problem.data
        )
        for name, true in problem.truth.items():
            assert draws[name].shape[-true.dim() :] == true.shape if true.dim() else True
            assert (draws[name].std(0) > 0).all() or name == problem.sparse
        weights = draws[problem.sparse].reshape(5, *zero.shape)
        assert torch.equal(weights == 0, zero.expand(5, *zero.shape))

    def test_training_finds_what_matters(self, make):
        problem = _problem(make)
        guide, true = _fit(problem), problem.truth[problem.sparse]
        summary = sparsify(guide, threshold=-2.0)
        kept, found = summary.masks[problem.sparse], summary.masked(problem.sparse, guide.median()[problem.sparse])
        if make is factors:  # whose order and signs are free
            order = next((list(o) for o in permutations(range(2)) if torch.equal(kept[..., o], true != 0)), [0, 1])
            signs = (found[..., order] * true).sum((0, 1)).sign()
            kept, found = kept[..., order], found[..., order] * signs
        assert torch.equal(kept, true != 0)
        assert ((found - true).abs() <= 0.3 * true.abs()).all()
        assert sparsify(guide, threshold=3.0).kept < true.numel()
