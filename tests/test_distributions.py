"""The prior against quadrature and sampling laws, the posterior against torch's Normal, and their divergence."""

import copy
import math
import pickle
import warnings

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch.distributions import kl_divergence

from pyro_sparsevd import ImproperPriorWarning, LogUniform, SparseNormal
from pyro_sparsevd.distributions.kl import kl_normal_log_uniform
from pyro_sparsevd.distributions.log_uniform import IMPROPER_LOG_NORMALIZER
from pyro_sparsevd.distributions.sparse_normal import log_variance_of
from pyro_sparsevd.distributions.util import unwrap_independent
from pyro_sparsevd.ops import divergence

SIGMAS = 5  # two-sided, 6e-7 for each statistic
DRAWS = 100_000


def ignoring_improper(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImproperPriorWarning)
        return function()


def tensor(value, device):
    return torch.tensor(value, dtype=torch.float64, device=device)


def bounded(low, high, device):
    return LogUniform(tensor(low, device), tensor(high, device))


def assert_mean(samples, expected, name=""):
    """Checks a mean to 5 standard errors, along the first dimension."""
    error = samples.std(0) / math.sqrt(len(samples))
    distance = ((samples.mean(0) - expected).abs() / error.clamp_min(1e-300)).max()
    assert distance < SIGMAS, f"{name}: {distance:.2f} standard errors"


def assert_uniform(samples, name=""):
    """Checks samples for a uniform law on [0, 1], by the distance of Kolmogorov and Smirnov."""
    ordered = samples.sort().values
    ranks = torch.arange(1, len(ordered) + 1, dtype=ordered.dtype, device=ordered.device) / len(ordered)
    distance = torch.maximum((ranks - ordered).abs(), (ranks - 1 / len(ordered) - ordered).abs()).max()
    # P(distance > bound) < 2 exp(-2 N bound²), here that of 5 sigma
    bound = math.sqrt(math.log(2 / math.erfc(SIGMAS / math.sqrt(2))) / (2 * len(ordered)))
    assert distance < bound, f"{name}: {distance:.5f} >= {bound:.5f}"


def same(a, b):
    """Whether two priors have one law and one shape."""
    values = torch.linspace(-3, 3, 7, dtype=a.low.dtype, device=a.low.device)
    values = values.reshape(-1, *(1 for _ in a.batch_shape)).expand(7, *a.batch_shape)
    return (a.batch_shape, a.is_proper) == (b.batch_shape, b.is_proper) and torch.equal(
        a.log_prob(values), b.log_prob(values)
    )


# The prior: density

BOUNDS = [(1e-3, 1.0), (0.5, 0.6), (1e-8, 1e4), (2.0, 300.0)]


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_bounded_density_integrates_to_one_half_on_each_side(low, high, device):
    nodes, weights = (tensor(a.tolist(), device) for a in np.polynomial.legendre.leggauss(40))
    half = 0.5 * math.log(high / low)
    magnitude = torch.exp(math.log(low) + half * (nodes + 1))
    for sign in (-1, 1):
        mass = (weights * half * magnitude * bounded(low, high, device).log_prob(sign * magnitude).exp()).sum()
        assert mass.item() == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_bounded_density_is_the_formula_inside_and_zero_outside(low, high, device):
    prior = bounded(low, high, device)
    inside = tensor([low, high, math.sqrt(low * high)], device)
    expected = -inside.log() - math.log(2 * math.log(high / low))
    outside = tensor([0.0, 0.999 * low, 1.001 * high, math.inf], device)
    for sign in (-1, 1):
        torch.testing.assert_close(prior.log_prob(sign * inside), expected)
        assert (prior.log_prob(sign * outside) == -math.inf).all()


def test_improper_density_is_one_over_the_magnitude(device):
    value = tensor([-1e-30, -0.5, 1e-8, 1.0, 3e20], device)
    torch.testing.assert_close(LogUniform().log_prob(value), -value.abs().log())
    assert LogUniform().log_prob(tensor([0.0, -0.0], device)).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("make", [LogUniform, lambda: LogUniform(0.1, 10.0)], ids=["improper", "bounded"])
def test_gradient_of_log_density_is_minus_one_over_the_value(make, device):
    value = tensor([-2.0, -0.3, 0.2, 9.0], device).requires_grad_()
    make().log_prob(value).sum().backward()
    torch.testing.assert_close(value.grad, -1 / value.detach())


def test_gradient_of_bounded_log_density_is_zero_outside_the_bounds(device):
    value = tensor([-20.0, -0.01, 0.0, 0.01, 20.0], device).requires_grad_()
    bounded(0.1, 10.0, device).log_prob(value).sum().backward()
    assert value.grad.tolist() == [0] * 5


def test_log_density_is_differentiable_in_the_bounds(device):
    low, high = tensor([0.1, 0.2], device).requires_grad_(), tensor(5.0, device).requires_grad_()
    value = tensor([0.3, -2.0], device)
    assert torch.autograd.gradcheck(lambda a, b: LogUniform(a, b).log_prob(value), (low, high))


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_mean_and_variance_are_those_of_the_density(low, high, device):
    prior = bounded(low, high, device)
    with mpmath.workdps(30):
        ratio = mpmath.log(mpmath.mpf(high) / low)
        second = 2 * mpmath.quad(lambda t: mpmath.exp(2 * t) / (2 * ratio), [mpmath.log(low), mpmath.log(high)])
    assert prior.mean.item() == 0
    assert prior.variance.item() == pytest.approx(float(second), rel=1e-12)
    assert prior.stddev.item() == pytest.approx(math.sqrt(float(second)), rel=1e-12)


@pytest.mark.parametrize("what", ["mean", "variance", "stddev"])
def test_improper_prior_has_no_moments(what):
    name = "variance" if what == "stddev" else what
    with pytest.raises(NotImplementedError, match=f"improper log-uniform prior has no {name}: give LogUniform low"):
        getattr(LogUniform(), what)


# The prior: samples


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_samples_have_a_fair_sign_and_a_uniform_log_magnitude(low, high, device):
    samples = bounded(low, high, device).sample((DRAWS,))
    assert (samples.abs() >= low).all()
    assert (samples.abs() <= high).all()
    assert_mean(samples.sign(), 0.0, "sign")
    position = (samples.abs() / low).log() / math.log(high / low)
    assert_uniform(position, "log magnitude")
    assert_mean(samples.sign() * (position - 0.5), 0.0, "sign and magnitude together")


def test_samples_have_the_moments_of_the_density(device):
    prior = bounded(0.5, 4.0, device)
    samples = prior.sample((DRAWS,))
    assert_mean(samples, prior.mean, "mean")
    assert_mean(samples**2, prior.variance, "variance")


def test_bounds_whose_quotient_overflows_are_bounds_like_any(device):
    prior = LogUniform(torch.tensor(1e-30, device=device), torch.tensor(1e30, device=device))
    expected = LogUniform(torch.tensor(1e-30).double(), torch.tensor(1e30).double())
    assert prior.log_prob(torch.tensor(1.0, device=device)).item() == pytest.approx(
        expected.log_prob(torch.tensor(1.0).double()).item()
    )
    assert prior.log_normalizer.item() == pytest.approx(expected.log_normalizer.item())
    magnitudes = prior.sample((1_000,)).abs().log10()
    assert magnitudes.min() < -25
    assert magnitudes.max() > 25


def test_samples_of_a_batch_are_independent(device):
    samples = LogUniform(tensor([1e-3, 0.1], device), tensor(1.0, device)).expand([3, 2]).sample((DRAWS,))
    assert samples.shape == (DRAWS, 3, 2)
    flat = samples.flatten(1)
    products = torch.stack([flat[:, i] * flat[:, j] for i in range(6) for j in range(i)], -1)
    assert_mean(products, 0.0, "covariance")
    log_means = 0.5 * tensor([1e-3, 0.1] * 3, device).log()
    magnitudes = flat.abs().log() - log_means
    products = torch.stack([magnitudes[:, i] * magnitudes[:, j] for i in range(6) for j in range(i)], -1)
    assert_mean(products, 0.0, "covariance of log magnitudes")


def test_samples_are_differentiable_in_the_bounds(device):
    low, high = tensor(0.5, device).requires_grad_(), tensor(4.0, device).requires_grad_()
    samples = LogUniform(low, high).rsample((DRAWS,))
    grad_low, grad_high = torch.autograd.grad((samples**2).mean(), (low, high))
    position = ((samples.abs() / low).log() / (high / low).log()).detach()
    per_draw = 2 * (samples.detach() ** 2)
    true_low, true_high = torch.autograd.grad(LogUniform(low, high).variance, (low, high))
    torch.testing.assert_close(grad_low, (per_draw * (1 - position) / low).mean().detach())
    assert_mean(per_draw * (1 - position) / low.detach(), true_low, "gradient of the variance in low")
    assert_mean(per_draw * position / high.detach(), true_high, "gradient of the variance in high")
    torch.testing.assert_close(grad_high, (per_draw * position / high).mean().detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_stay_inside_the_bounds_to_the_last_digit(dtype, device):
    # Bounds a few representable numbers apart: rounding alone can leave them.
    bits = torch.int32 if dtype == torch.float32 else torch.int64
    low = torch.linspace(0.1, 0.9, 200, dtype=dtype, device=device)
    steps = torch.arange(200, dtype=bits, device=device) % 8 + 1
    prior = LogUniform(low, (low.view(bits) + steps).view(dtype))
    samples = prior.sample((500,))
    assert samples.dtype == dtype
    assert (prior.log_prob(samples) > -math.inf).all()


def test_improper_prior_draws_from_its_truncation_with_one_warning():
    prior = LogUniform()
    with pytest.warns(ImproperPriorWarning, match="improper and has no samples.*Give LogUniform low and high") as found:
        samples = prior.sample((DRAWS,))
    assert len(found) == 1
    assert (samples.abs() >= 1e-8).all()
    assert (samples.abs() <= 1).all()
    assert_mean(samples.double().sign(), 0.0, "sign")
    assert_uniform(1 + samples.double().abs().log10() / 8, "log magnitude")


EXPANSIONS = {
    "itself": lambda prior: prior,
    "expanded": lambda prior: prior.expand([2, 3]),
    "expanded twice": lambda prior: prior.expand([3]).expand([2, 3]),
    "event": lambda prior: prior.expand([2, 3]).to_event(2),
    "mask": lambda prior: prior.expand([3]).mask(torch.tensor([True, False, True])),
    "expanded by": lambda prior: prior.expand_by([4]),
}


@pytest.mark.parametrize("first", EXPANSIONS.values(), ids=EXPANSIONS)
def test_a_prior_and_all_its_expansions_warn_once(first):
    prior = LogUniform()

    def draw_from_all():
        first(prior).sample()
        for expansion in EXPANSIONS.values():
            expansion(prior).sample()
            expansion(prior).rsample()

    with pytest.warns(ImproperPriorWarning) as found:
        draw_from_all()
    assert len(found) == 1


def test_another_improper_prior_warns_for_itself():
    for _ in range(2):
        with pytest.warns(ImproperPriorWarning):
            LogUniform().sample()


def test_warning_points_at_the_line_that_samples():
    with pytest.warns(ImproperPriorWarning) as found:
        LogUniform().rsample()
    assert found[0].filename == __file__


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_of_the_improper_prior_are_like_what_it_is_given(dtype, device):
    like = torch.zeros(2, dtype=dtype, device=device)
    for prior in (LogUniform(like=like), LogUniform(like=like).expand([3]).to_event(1)):
        with pytest.warns(ImproperPriorWarning):
            sample = prior.sample()
        assert (sample.dtype, sample.device) == (like.dtype, like.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density_and_divergence_have_the_dtype_of_the_weight(dtype, device):
    q = SparseNormal(torch.zeros(3, dtype=dtype, device=device), -1.0)
    for prior in (LogUniform(), LogUniform().expand([3])):
        assert prior.log_prob(q.loc + 1).dtype == torch.distributions.kl_divergence(q, prior).dtype == dtype


def test_improper_site_traces_and_scores_without_a_warning(device):
    value = torch.full((2, 3), 0.5, device=device)
    trace = pyro.poutine.trace(lambda: pyro.sample("w", LogUniform().expand([2, 3]).to_event(2), obs=value)).get_trace()
    assert trace.log_prob_sum().item() == pytest.approx(6 * math.log(2))


# The prior: what every distribution does

PRIORS = [
    pytest.param(lambda device: LogUniform(), id="improper"),
    pytest.param(lambda device: bounded(0.1, 2.0, device), id="bounded"),
    pytest.param(lambda device: LogUniform(tensor([0.1, 0.2, 1.0], device), 2.0), id="batch"),
    pytest.param(lambda device: bounded(1e-3, 1.0, device).expand([2, 3]), id="expanded"),
    pytest.param(lambda device: LogUniform().expand([2, 3]), id="improper expanded"),
]


@pytest.mark.parametrize("make", PRIORS)
def test_shapes_of_samples_densities_and_expansions(make, device):
    prior = make(device)
    batch = prior.batch_shape
    assert prior.event_shape == ()
    assert prior.shape() == batch
    assert ignoring_improper(lambda: prior.sample()).shape == batch
    assert ignoring_improper(lambda: prior.sample((7, 5))).shape == (7, 5, *batch)
    value = torch.ones(7, *batch, dtype=torch.float64, device=device)
    assert prior.log_prob(value).shape == value.shape
    assert prior.log_prob(torch.ones((), device=device)).shape == batch
    wide = prior.expand((4, *batch))
    assert isinstance(wide, LogUniform)
    assert wide.batch_shape == (4, *batch)
    assert wide.is_proper == prior.is_proper
    torch.testing.assert_close(wide.log_prob(value[:4]), prior.log_prob(value[:4]))
    event = wide.to_event()
    assert (event.batch_shape, event.event_shape) == ((), (4, *batch))
    torch.testing.assert_close(event.log_prob(value[:4]), prior.log_prob(value[:4]).sum())


@pytest.mark.parametrize("make", PRIORS)
def test_mask_hides_densities(make, device):
    prior = make(device)
    value = torch.full(prior.batch_shape, 1.5, device=device)
    assert (prior.mask(False).log_prob(value) == 0).all()
    torch.testing.assert_close(prior.mask(True).log_prob(value), prior.log_prob(value))


@pytest.mark.parametrize("make", PRIORS)
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "deepcopy", "pickle"]
)
def test_copies_are_equal_and_work(make, copied, device):
    prior = make(device)
    other = copied(prior)
    assert same(other, prior)
    assert repr(other) == repr(prior)
    assert ignoring_improper(lambda: other.expand((2, *prior.batch_shape)).sample()).shape == (2, *prior.batch_shape)


def test_expansion_of_a_batch_keeps_each_bound(device):
    low = tensor([0.1, 0.5], device)
    prior = LogUniform(low, 2.0).expand([3, 2])
    assert torch.equal(prior.low, low.expand(3, 2))
    assert torch.equal(prior.high, torch.full_like(prior.low, 2.0))
    with pytest.raises(RuntimeError, match="expand"):
        prior.expand([5])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda device: LogUniform(), "LogUniform()"),
        (lambda device: LogUniform(0.25, 1.0), "LogUniform(low: 0.25, high: 1"),
        (lambda device: LogUniform(0.25, 8.0).expand([3, 2]), "high: 8"),
        (lambda device: LogUniform(0.25, 8.0).expand([3, 2]), "batch_shape: (3, 2))"),
        (lambda device: LogUniform().expand([2]), "LogUniform(batch_shape: (2,))"),
        (lambda device: LogUniform(tensor([0.1, 0.2], device), 1.0), "(2,)"),
    ],
)
def test_repr_shows_bounds_and_batch_shape(make, text, device):
    assert text in repr(make(device))


@pytest.mark.parametrize("make", PRIORS)
def test_invalid_values_are_refused_with_validation_and_only_then(make, device):
    prior = make(device)
    for checked in (prior, prior.expand((2, *prior.batch_shape))):
        with pytest.raises(ValueError, match="within the support"):
            checked.log_prob(torch.full(checked.batch_shape, math.nan, device=device))
    unchecked = copy.copy(prior)
    unchecked._validate_args = False
    assert not unchecked.log_prob(torch.full(prior.batch_shape, math.nan, device=device)).isfinite().any()
    with pytest.raises(ValueError, match=r"broadcast"):
        bounded(1e-3, 1.0, device).expand([3]).log_prob(torch.ones(2, device=device))


@pytest.mark.parametrize("validate_args", [True, False])
def test_validation_is_kept_by_expansions(validate_args, device):
    bounds = tensor(1e-3, device), tensor(1.0, device)
    prior = LogUniform(*bounds, validate_args=validate_args).expand([2]).expand([3, 2])
    value = torch.full((3, 2), math.nan, device=device)
    if validate_args:
        with pytest.raises(ValueError, match="within the support"):
            prior.log_prob(value)
    else:
        assert (prior.log_prob(value) == -math.inf).all()


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.0, 1.0),
        (-0.1, 1.0),
        (1.0, 1.0),
        (2.0, 1.0),
        (0.1, math.inf),
        (math.inf, math.inf),
        (math.nan, 1.0),
        (0.1, math.nan),
        (-2.0, -1.0),
        (torch.tensor([0.1, 0.0]), 1.0),
        (0.5, torch.tensor([1.0, 0.4])),
        (torch.tensor([0.1, 3.0]), torch.tensor([1.0, 2.0])),
    ],
    ids=lambda bound: str(bound).removeprefix("tensor"),
)
@pytest.mark.parametrize("validate_args", [None, False], ids=["validated", "not validated"])
def test_bad_bounds_are_refused(low, high, validate_args):
    with pytest.raises(ValueError, match=r"LogUniform: expected 0 < low < high < inf, but got low=.*, high="):
        LogUniform(low, high, validate_args=validate_args)


@pytest.mark.parametrize(("low", "high"), [(0.1, None), (None, 1.0)])
def test_one_bound_alone_is_refused(low, high):
    with pytest.raises(
        ValueError, match=rf"LogUniform: expected both bounds or neither, but got low={low}, high={high}"
    ):
        LogUniform(low, high)


# The posterior

POSTERIOR_SHAPES = [((), ()), ((4,), (4,)), ((3, 1), (4,)), ((2, 3), ())]


@pytest.fixture(params=POSTERIOR_SHAPES, ids=str)
def posterior(request, device):
    loc, log_variance = (torch.randn(shape, dtype=torch.float64, device=device) for shape in request.param)
    return SparseNormal(loc.requires_grad_(), log_variance.requires_grad_())


def normal_of(q):
    return dist.Normal(q.loc, (0.5 * q.log_variance).exp())


def test_posterior_is_a_normal_distribution(posterior):
    assert isinstance(posterior, torch.distributions.Normal)
    assert isinstance(posterior, dist.Normal)
    assert isinstance(posterior, TorchDistributionMixin)


@pytest.mark.parametrize(
    "what", ["mean", "mode", "scale", "stddev", "variance", "batch_shape", "event_shape", "support"]
)
def test_posterior_has_the_attributes_of_the_normal(what, posterior):
    actual, expected = getattr(posterior, what), getattr(normal_of(posterior), what)
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected)
    else:
        assert actual == expected


@pytest.mark.parametrize("what", ["log_prob", "cdf", "icdf", "entropy"])
def test_posterior_has_the_functions_of_the_normal_and_their_gradients(what, posterior):
    shape = (5, *posterior.batch_shape)
    value = {"icdf": torch.rand, "entropy": None}.get(what, torch.randn)
    args = () if value is None else (value(shape, dtype=torch.float64, device=posterior.loc.device).requires_grad_(),)
    results = []
    for q in (posterior, normal_of(posterior)):
        result = getattr(q, what)(*args)
        inputs = [posterior.log_variance] if what == "entropy" else [*args, posterior.loc, posterior.log_variance]
        results.append((result, *torch.autograd.grad(result.sum(), inputs)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_posterior_draws_what_the_normal_draws_with_its_gradients(posterior):
    results = []
    for q in (posterior, normal_of(posterior)):
        pyro.set_rng_seed(3)
        draw = q.rsample((6,))
        results.append((draw, *torch.autograd.grad((draw**3).sum(), (posterior.loc, posterior.log_variance))))
    assert results[0][0].shape == (6, *posterior.batch_shape)
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_draws_have_the_moments_of_the_posterior_and_their_gradients(device):
    loc = tensor([0.0, -1.5, 0.3], device)
    log_variance = tensor([0.0, 1.0, -4.0], device)
    # one copy of the parameters for each draw gives the gradient of each draw
    locs, log_variances = (t.expand(DRAWS, 3).clone().requires_grad_() for t in (loc, log_variance))
    draws = SparseNormal(locs, log_variances).rsample()
    first = torch.autograd.grad(draws.sum(), (locs, log_variances), retain_graph=True)
    second = torch.autograd.grad((draws**2).sum(), (locs, log_variances))
    assert_mean(draws.detach(), loc, "mean")
    assert_mean(draws.detach() ** 2, loc**2 + log_variance.exp(), "second moment")
    assert torch.equal(first[0], torch.ones_like(locs))
    assert_mean(first[1], 0.0, "gradient of the mean in log variance")
    assert_mean(second[0], 2 * loc, "gradient of the second moment in loc")
    assert_mean(second[1], log_variance.exp(), "gradient of the second moment in log variance")


def test_sample_has_no_gradient(posterior):
    assert not posterior.sample().requires_grad


def test_log_alpha_of_the_posterior_is_that_of_its_parameters(posterior):
    torch.testing.assert_close(posterior.log_alpha, divergence.log_alpha(posterior.loc, posterior.log_variance))
    torch.testing.assert_close(posterior.log_alpha, (posterior.variance / posterior.loc**2).log())


@pytest.mark.parametrize("log_variance", [-80.0, 80.0])
def test_density_is_exact_at_extreme_variances(log_variance, device):
    q = SparseNormal(tensor(0.0, device), tensor(log_variance, device))
    value = math.exp(0.5 * log_variance)
    expected = -0.5 * (1 + log_variance + math.log(2 * math.pi))
    assert q.log_prob(tensor(value, device)).item() == pytest.approx(expected, rel=1e-12)


def test_posterior_expands_to_a_posterior(posterior):
    shape = (5, *posterior.batch_shape)
    wide = posterior.expand(shape)
    assert type(wide) is type(posterior)
    assert wide.batch_shape == wide.sample().shape == shape
    assert torch.equal(wide.log_variance, posterior.log_variance.expand(shape))
    value = torch.randn(shape, dtype=torch.float64, device=posterior.loc.device)
    torch.testing.assert_close(wide.log_prob(value), posterior.log_prob(value))
    event = wide.to_event()
    torch.testing.assert_close(event.log_prob(value), posterior.log_prob(value).sum())
    with pytest.raises(RuntimeError, match="expand"):
        wide.expand([7, 9])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["deepcopy", "pickle"])
def test_copies_of_the_posterior_are_equal(copied, device):
    q = SparseNormal(torch.randn(3, device=device), torch.randn(3, device=device))
    other = copied(q)
    assert type(other) is SparseNormal
    assert torch.equal(other.loc, q.loc)
    assert torch.equal(other.log_variance, q.log_variance)
    assert other.sample().shape == (3,)


@pytest.mark.parametrize(
    ("loc", "log_variance"), [(0.0, 1.0), ("tensor", 1.0), (0.0, "tensor"), ("tensor", "tensor")], ids=str
)
def test_numbers_and_tensors_make_a_posterior_of_the_tensors_dtype(loc, log_variance, device):
    numbers = torch.full((2,), 0.5, dtype=torch.float64, device=device)
    loc, log_variance = (numbers if value == "tensor" else value for value in (loc, log_variance))
    q = SparseNormal(loc, log_variance)
    expected = torch.float64 if any(value is numbers for value in (loc, log_variance)) else torch.get_default_dtype()
    assert q.loc.dtype == q.log_variance.dtype == q.rsample().dtype == expected


@pytest.mark.parametrize(
    ("loc", "log_variance", "batch"), [((), (), ()), ((3,), (2, 1), (2, 3)), ((4, 1, 3), (2, 1), (4, 2, 3))]
)
def test_shapes_are_inferred_without_tensors(loc, log_variance, batch, device):
    inferred = SparseNormal.infer_shapes(loc=loc, log_variance=log_variance)
    assert inferred == (batch, ())
    q = SparseNormal(torch.zeros(loc, device=device), torch.zeros(log_variance, device=device))
    assert q.batch_shape == inferred[0]


@pytest.mark.parametrize("bad", ["loc", "log_variance"])
def test_nan_parameters_are_refused_by_name_with_validation_and_only_then(bad, device):
    values = {"loc": torch.zeros(2, device=device), "log_variance": torch.zeros(2, device=device)}
    values[bad][0] = math.nan
    with pytest.raises(ValueError, match=f"Expected parameter {bad}"):
        SparseNormal(**values, validate_args=True)
    assert SparseNormal(**values, validate_args=False).batch_shape == (2,)


@pytest.mark.parametrize("validate_args", [True, False])
def test_values_are_checked_with_validation_and_only_then(validate_args, device):
    q = SparseNormal(torch.zeros(2, device=device), torch.zeros(2, device=device), validate_args=validate_args)
    value = torch.full((3, 2), math.nan, device=device)
    for checked in (q, q.expand([3, 2])):
        if validate_args:
            with pytest.raises(ValueError, match="within the support"):
                checked.log_prob(value)
        else:
            assert checked.log_prob(value).isnan().all()


def test_shapes_that_do_not_broadcast_are_refused(device):
    with pytest.raises(RuntimeError, match=r"size|shape"):
        SparseNormal(torch.zeros(2, device=device), torch.zeros(3, device=device))


def test_repr_of_the_posterior_names_its_parameters(device):
    text = repr(SparseNormal(0.5, -4.0))
    assert text == "SparseNormal(loc: 0.5, log_variance: -4.0)"


# The divergence

FAMILIES = {"Normal": normal_of, "SparseNormal": lambda q: q}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_registered_divergence_from_the_improper_prior_is_the_exact_form(family, posterior):
    expected = divergence.kl_log_uniform(posterior.loc, posterior.log_variance, form="exact")
    torch.testing.assert_close(kl_divergence(family(posterior), LogUniform()), expected, rtol=1e-10, atol=1e-12)


def test_registered_divergence_knows_torchs_own_normal(device):
    q = torch.distributions.Normal(tensor(0.7, device), tensor(0.5, device))
    expected = divergence.kl_log_uniform(q.loc, 2 * q.scale.log(), form="exact")
    torch.testing.assert_close(kl_divergence(q, LogUniform()), expected)


@pytest.mark.parametrize(
    ("loc", "scale", "low", "high"),
    [(0.5, 0.3, 1e-12, 1e3), (0.0, 1.0, 1e-13, 50.0), (-2.0, 0.1, 1e-2, 10.0), (1e-3, 0.02, 1e-15, 1.0)],
)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_divergence_from_a_bounded_prior_is_the_integral_of_q_log_q_over_p(family, loc, scale, low, high, device):
    """The bounds hold the posterior but for less than 1e-11 of its mass."""
    with mpmath.workdps(30):
        normalizer = mpmath.log(2 * mpmath.log(mpmath.mpf(high) / low))

        def integrand(w):
            log_q = -(((w - loc) / scale) ** 2) / 2 - mpmath.log(scale * mpmath.sqrt(2 * mpmath.pi))
            return mpmath.exp(log_q) * (log_q + mpmath.log(abs(w)) + normalizer)

        edges = {sign * m for sign in (-1, 1) for m in (low, 1e-9, 1e-6, 1e-4, 1e-2, high) if low <= m <= high}
        edges |= {loc + k * scale for k in (-40, -10, -4, -1, 0, 1, 4, 10, 40) if low < abs(loc + k * scale) < high}
        negative, positive = sorted(e for e in edges if e < 0), sorted(e for e in edges if e > 0)
        expected = float(mpmath.quad(integrand, negative) + mpmath.quad(integrand, positive))
    q = SparseNormal(tensor(loc, device), 2 * tensor(scale, device).log())
    assert kl_divergence(family(q), bounded(low, high, device)).item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("form", ["approximate", "exact"])
def test_bounds_add_their_constant(form, device):
    q = SparseNormal(torch.randn(5, dtype=torch.float64, device=device), torch.zeros(5, device=device).double())
    for low, high in BOUNDS:
        prior = bounded(low, high, device)
        added = kl_normal_log_uniform(q, prior, form) - kl_normal_log_uniform(q, LogUniform(), form)
        expected = math.log(math.log(high / low)) - 1.360973  # facts.md, section 2
        assert added.tolist() == pytest.approx([expected] * 5, abs=6e-7)
        assert prior.log_normalizer.item() == pytest.approx(expected, abs=6e-7)
    assert LogUniform().log_normalizer.item() == 0


@pytest.mark.parametrize(
    "make", [lambda device: LogUniform(), lambda device: bounded(1e-9, 1e3, device)], ids=["improper", "bounded"]
)
@pytest.mark.parametrize("rate", [-4.0, 0.0, 3.0, math.inf], ids=lambda rate: f"log_alpha={rate:g}")
def test_divergence_is_the_mean_of_the_log_density_ratio(make, rate, device):
    prior = make(device)
    loc = 0.0 if rate == math.inf else math.exp(-0.5 * rate)
    q = SparseNormal(tensor(loc, device), tensor(0.0, device))
    draws = q.sample((DRAWS,))
    ratio = q.log_prob(draws) - prior.log_prob(draws)
    if not prior.is_proper:
        ratio = ratio - IMPROPER_LOG_NORMALIZER
    assert_mean(ratio, kl_divergence(q, prior), f"log α = {rate}")


def test_kl_form_is_passed_on(posterior):
    actual = kl_normal_log_uniform(posterior, LogUniform(), "approximate")
    torch.testing.assert_close(actual, divergence.kl_log_uniform(posterior.loc, posterior.log_variance))
    with pytest.raises(ValueError, match="form: expected one of 'approximate', 'exact', but got 'best'"):
        kl_normal_log_uniform(posterior, LogUniform(), "best")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("ndims", [1, 2])
@pytest.mark.parametrize(
    "make", [lambda device: LogUniform(), lambda d: bounded(1e-4, 9.0, d)], ids=["improper", "bounded"]
)
def test_divergence_reaches_through_to_event(family, ndims, make, device):
    loc, log_variance = (torch.randn(2, 3, 4, dtype=torch.float64, device=device) for _ in range(2))
    q, p = family(SparseNormal(loc, log_variance)), make(device).expand([2, 3, 4])
    expected = kl_divergence(q, p)
    assert expected.shape == (2, 3, 4)
    actual = kl_divergence(q.to_event(ndims), p.to_event(ndims))
    torch.testing.assert_close(actual, expected.flatten(3 - ndims).sum(-1))
    if ndims == 2:
        nested = kl_divergence(q.to_event(1).to_event(1), p.to_event(1).to_event(1))
        torch.testing.assert_close(nested, actual)


@pytest.mark.parametrize(
    "make", [lambda device: LogUniform(), lambda d: bounded(1e-4, 9.0, d)], ids=["improper", "bounded"]
)
def test_divergence_has_the_broadcast_shape_of_the_two(make, device):
    q = SparseNormal(torch.zeros(3, 1, device=device), torch.zeros(3, 1, device=device))
    assert kl_divergence(q, make(device)).shape == (3, 1)
    assert kl_divergence(q, make(device).expand([4])).shape == (3, 4)


def test_divergence_from_a_normal_is_torchs_rule(posterior):
    prior = dist.Normal(torch.full_like(posterior.loc, 0.3), 2.0)
    torch.testing.assert_close(kl_divergence(posterior, prior), kl_divergence(normal_of(posterior), prior))
    torch.testing.assert_close(kl_divergence(prior, posterior), kl_divergence(prior, normal_of(posterior)))
    assert (kl_divergence(posterior, posterior).abs() < 1e-12).all()


def test_divergence_the_other_way_round_is_not_known(posterior):
    with pytest.raises(NotImplementedError, match="LogUniform"):
        kl_divergence(LogUniform(0.1, 1.0), posterior)


# Helpers


def test_log_variance_of_either_normal(posterior):
    torch.testing.assert_close(log_variance_of(normal_of(posterior)), posterior.log_variance)
    assert log_variance_of(posterior) is posterior.log_variance


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: d.to_event(1), lambda d: d.to_event(1).to_event(1)])
def test_unwrap_independent_finds_the_innermost_distribution(wrap):
    base = LogUniform().expand([2, 3])
    assert unwrap_independent(wrap(base)) is base


def test_bounds_of_integers_are_taken_as_reals(device):
    prior = LogUniform(torch.tensor(1, device=device), torch.tensor(10, device=device))
    assert prior.sample().dtype == torch.get_default_dtype()
