"""The log-uniform prior against quadrature and sampling laws."""

import copy
import math
import pickle
import warnings

import mpmath
import numpy as np
import pyro
import pytest
import torch

from checks import SAMPLES, SIGMAS, assert_mean
from operations import BOUNDS, bounded, tensor64
from pyro_sparsevd import ImproperPriorWarning, LogUniform, SparseNormal


def ignoring_improper(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImproperPriorWarning)
        return function()


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


class TestDensity:
    @pytest.mark.parametrize(("low", "high"), BOUNDS)
    def test_bounded_density_integrates_to_one_half_on_each_side(self, low, high, device):
        nodes, weights = (tensor64(a.tolist(), device) for a in np.polynomial.legendre.leggauss(40))
        half = 0.5 * math.log(high / low)
        magnitude = torch.exp(math.log(low) + half * (nodes + 1))
        for sign in (-1, 1):
            mass = (weights * half * magnitude * bounded(low, high, device).log_prob(sign * magnitude).exp()).sum()
            assert mass.item() == pytest.approx(0.5, rel=1e-12)

    @pytest.mark.parametrize(("low", "high"), BOUNDS)
    def test_bounded_density_is_the_formula_inside_and_zero_outside(self, low, high, device):
        prior = bounded(low, high, device)
        inside = tensor64([low, high, math.sqrt(low * high)], device)
        expected = -inside.log() - math.log(2 * math.log(high / low))
        outside = tensor64([0.0, 0.999 * low, 1.001 * high, math.inf], device)
        for sign in (-1, 1):
            torch.testing.assert_close(prior.log_prob(sign * inside), expected)
            assert (prior.log_prob(sign * outside) == -math.inf).all()

    def test_improper_density_is_one_over_the_magnitude(self, device):
        value = tensor64([-1e-30, -0.5, 1e-8, 1.0, 3e20], device)
        torch.testing.assert_close(LogUniform().log_prob(value), -value.abs().log())
        assert LogUniform().log_prob(tensor64([0.0, -0.0], device)).tolist() == [math.inf, math.inf]

    @pytest.mark.parametrize("make", [LogUniform, lambda: LogUniform(0.1, 10.0)], ids=["improper", "bounded"])
    def test_gradient_of_log_density_is_minus_one_over_the_value(self, make, device):
        value = tensor64([-2.0, -0.3, 0.2, 9.0], device).requires_grad_()
        make().log_prob(value).sum().backward()
        torch.testing.assert_close(value.grad, -1 / value.detach())

    def test_gradient_of_bounded_log_density_is_zero_outside_the_bounds(self, device):
        value = tensor64([-20.0, -0.01, 0.0, 0.01, 20.0], device).requires_grad_()
        bounded(0.1, 10.0, device).log_prob(value).sum().backward()
        assert value.grad.tolist() == [0] * 5

    def test_log_density_is_differentiable_in_the_bounds(self, device):
        low, high = tensor64([0.1, 0.2], device).requires_grad_(), tensor64(5.0, device).requires_grad_()
        value = tensor64([0.3, -2.0], device)
        assert torch.autograd.gradcheck(lambda a, b: LogUniform(a, b).log_prob(value), (low, high))


class TestMoments:
    @pytest.mark.parametrize(("low", "high"), BOUNDS)
    def test_mean_and_variance_are_those_of_the_density(self, low, high, device):
        prior = bounded(low, high, device)
        with mpmath.workdps(30):
            ratio = mpmath.log(mpmath.mpf(high) / low)
            second = 2 * mpmath.quad(lambda t: mpmath.exp(2 * t) / (2 * ratio), [mpmath.log(low), mpmath.log(high)])
        assert prior.mean.item() == 0
        assert prior.variance.item() == pytest.approx(float(second), rel=1e-12)
        assert prior.stddev.item() == pytest.approx(math.sqrt(float(second)), rel=1e-12)

    @pytest.mark.parametrize("what", ["mean", "variance", "stddev"])
    def test_improper_prior_has_no_moments(self, what):
        name = "variance" if what == "stddev" else what
        with pytest.raises(NotImplementedError, match=f"improper log-uniform prior has no {name}: give LogUniform low"):
            getattr(LogUniform(), what)


class TestSamples:
    @pytest.mark.parametrize(("low", "high"), BOUNDS)
    def test_samples_have_a_fair_sign_and_a_uniform_log_magnitude(self, low, high, device):
        samples = bounded(low, high, device).sample((SAMPLES,))
        assert (samples.abs() >= low).all()
        assert (samples.abs() <= high).all()
        assert_mean(samples.sign(), 0.0, "sign")
        position = (samples.abs() / low).log() / math.log(high / low)
        assert_uniform(position, "log magnitude")
        assert_mean(samples.sign() * (position - 0.5), 0.0, "sign and magnitude together")

    def test_samples_have_the_moments_of_the_density(self, device):
        prior = bounded(0.5, 4.0, device)
        samples = prior.sample((SAMPLES,))
        assert_mean(samples, prior.mean, "mean")
        assert_mean(samples**2, prior.variance, "variance")

    def test_bounds_whose_quotient_overflows_are_bounds_like_any(self, device):
        prior = LogUniform(torch.tensor(1e-30, device=device), torch.tensor(1e30, device=device))
        expected = LogUniform(torch.tensor(1e-30).double(), torch.tensor(1e30).double())
        assert prior.log_prob(torch.tensor(1.0, device=device)).item() == pytest.approx(
            expected.log_prob(torch.tensor(1.0).double()).item()
        )
        assert prior.log_normalizer.item() == pytest.approx(expected.log_normalizer.item())
        magnitudes = prior.sample((1_000,)).abs().log10()
        assert magnitudes.min() < -25
        assert magnitudes.max() > 25

    def test_samples_of_a_batch_are_independent(self, device):
        samples = LogUniform(tensor64([1e-3, 0.1], device), tensor64(1.0, device)).expand([3, 2]).sample((SAMPLES,))
        assert samples.shape == (SAMPLES, 3, 2)
        flat = samples.flatten(1)
        products = torch.stack([flat[:, i] * flat[:, j] for i in range(6) for j in range(i)], -1)
        assert_mean(products, 0.0, "covariance")
        log_means = 0.5 * tensor64([1e-3, 0.1] * 3, device).log()
        magnitudes = flat.abs().log() - log_means
        products = torch.stack([magnitudes[:, i] * magnitudes[:, j] for i in range(6) for j in range(i)], -1)
        assert_mean(products, 0.0, "covariance of log magnitudes")

    def test_samples_are_differentiable_in_the_bounds(self, device):
        low, high = tensor64(0.5, device).requires_grad_(), tensor64(4.0, device).requires_grad_()
        samples = LogUniform(low, high).rsample((SAMPLES,))
        grad_low, grad_high = torch.autograd.grad((samples**2).mean(), (low, high))
        position = ((samples.abs() / low).log() / (high / low).log()).detach()
        per_draw = 2 * (samples.detach() ** 2)
        true_low, true_high = torch.autograd.grad(LogUniform(low, high).variance, (low, high))
        torch.testing.assert_close(grad_low, (per_draw * (1 - position) / low).mean().detach())
        assert_mean(per_draw * (1 - position) / low.detach(), true_low, "gradient of the variance in low")
        assert_mean(per_draw * position / high.detach(), true_high, "gradient of the variance in high")
        torch.testing.assert_close(grad_high, (per_draw * position / high).mean().detach())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_samples_stay_inside_the_bounds_to_the_last_digit(self, dtype, device):
        # Bounds a few representable numbers apart: rounding alone can leave them.
        bits = torch.int32 if dtype == torch.float32 else torch.int64
        low = torch.linspace(0.1, 0.9, 200, dtype=dtype, device=device)
        steps = torch.arange(200, dtype=bits, device=device) % 8 + 1
        prior = LogUniform(low, (low.view(bits) + steps).view(dtype))
        samples = prior.sample((500,))
        assert samples.dtype == dtype
        assert (prior.log_prob(samples) > -math.inf).all()


EXPANSIONS = {
    "itself": lambda prior: prior,
    "expanded": lambda prior: prior.expand([2, 3]),
    "expanded twice": lambda prior: prior.expand([3]).expand([2, 3]),
    "event": lambda prior: prior.expand([2, 3]).to_event(2),
    "mask": lambda prior: prior.expand([3]).mask(torch.tensor([True, False, True])),
    "expanded by": lambda prior: prior.expand_by([4]),
}


class TestImproperSamples:
    def test_improper_prior_draws_from_its_truncation_with_one_warning(self):
        prior = LogUniform()
        with pytest.warns(
            ImproperPriorWarning, match="improper and has no samples.*Give LogUniform low and high"
        ) as found:
            samples = prior.sample((SAMPLES,))
        assert len(found) == 1
        assert (samples.abs() >= 1e-8).all()
        assert (samples.abs() <= 1).all()
        assert_mean(samples.double().sign(), 0.0, "sign")
        assert_uniform(1 + samples.double().abs().log10() / 8, "log magnitude")

    @pytest.mark.parametrize("first", EXPANSIONS.values(), ids=EXPANSIONS)
    def test_a_prior_and_all_its_expansions_warn_once(self, first):
        prior = LogUniform()

        def draw_from_all():
            first(prior).sample()
            for expansion in EXPANSIONS.values():
                expansion(prior).sample()
                expansion(prior).rsample()

        with pytest.warns(ImproperPriorWarning) as found:
            draw_from_all()
        assert len(found) == 1

    def test_another_improper_prior_warns_for_itself(self):
        for _ in range(2):
            with pytest.warns(ImproperPriorWarning):
                LogUniform().sample()

    def test_warning_points_at_the_line_that_samples(self):
        with pytest.warns(ImproperPriorWarning) as found:
            LogUniform().rsample()
        assert found[0].filename == __file__

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_samples_of_the_improper_prior_are_like_what_it_is_given(self, dtype, device):
        like = torch.zeros(2, dtype=dtype, device=device)
        for prior in (LogUniform(like=like), LogUniform(like=like).expand([3]).to_event(1)):
            with pytest.warns(ImproperPriorWarning):
                sample = prior.sample()
            assert (sample.dtype, sample.device) == (like.dtype, like.device)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_density_and_divergence_have_the_dtype_of_the_weight(self, dtype, device):
        q = SparseNormal(torch.zeros(3, dtype=dtype, device=device), -1.0)
        for prior in (LogUniform(), LogUniform().expand([3])):
            assert prior.log_prob(q.loc + 1).dtype == torch.distributions.kl_divergence(q, prior).dtype == dtype

    def test_improper_site_traces_and_scores_without_a_warning(self, device):
        value = torch.full((2, 3), 0.5, device=device)
        trace = pyro.poutine.trace(
            lambda: pyro.sample("w", LogUniform().expand([2, 3]).to_event(2), obs=value)
        ).get_trace()
        assert trace.log_prob_sum().item() == pytest.approx(6 * math.log(2))


PRIORS = [
    pytest.param(lambda device: LogUniform(), id="improper"),
    pytest.param(lambda device: bounded(0.1, 2.0, device), id="bounded"),
    pytest.param(lambda device: LogUniform(tensor64([0.1, 0.2, 1.0], device), 2.0), id="batch"),
    pytest.param(lambda device: bounded(1e-3, 1.0, device).expand([2, 3]), id="expanded"),
    pytest.param(lambda device: LogUniform().expand([2, 3]), id="improper expanded"),
]


class TestDistribution:
    @pytest.mark.parametrize("make", PRIORS)
    def test_shapes_of_samples_densities_and_expansions(self, make, device):
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
    def test_mask_hides_densities(self, make, device):
        prior = make(device)
        value = torch.full(prior.batch_shape, 1.5, device=device)
        assert (prior.mask(False).log_prob(value) == 0).all()
        torch.testing.assert_close(prior.mask(True).log_prob(value), prior.log_prob(value))

    @pytest.mark.parametrize("make", PRIORS)
    @pytest.mark.parametrize(
        "copied",
        [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))],
        ids=["copy", "deepcopy", "pickle"],
    )
    def test_copies_are_equal_and_work(self, make, copied, device):
        prior = make(device)
        other = copied(prior)
        assert same(other, prior)
        assert repr(other) == repr(prior)
        assert ignoring_improper(lambda: other.expand((2, *prior.batch_shape)).sample()).shape == (
            2,
            *prior.batch_shape,
        )

    def test_expansion_of_a_batch_keeps_each_bound(self, device):
        low = tensor64([0.1, 0.5], device)
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
            (lambda device: LogUniform(tensor64([0.1, 0.2], device), 1.0), "(2,)"),
        ],
    )
    def test_repr_shows_bounds_and_batch_shape(self, make, text, device):
        assert text in repr(make(device))


class TestValidation:
    @pytest.mark.parametrize("make", PRIORS)
    def test_invalid_values_are_refused_with_validation_and_only_then(self, make, device):
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
    def test_validation_is_kept_by_expansions(self, validate_args, device):
        bounds = tensor64(1e-3, device), tensor64(1.0, device)
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
    def test_bad_bounds_are_refused(self, low, high, validate_args):
        with pytest.raises(ValueError, match=r"LogUniform: expected 0 < low < high < inf, but got low=.*, high="):
            LogUniform(low, high, validate_args=validate_args)

    @pytest.mark.parametrize(("low", "high"), [(0.1, None), (None, 1.0)])
    def test_one_bound_alone_is_refused(self, low, high):
        with pytest.raises(
            ValueError, match=rf"LogUniform: expected both bounds or neither, but got low={low}, high={high}"
        ):
            LogUniform(low, high)

    def test_bounds_of_integers_are_taken_as_reals(self, device):
        prior = LogUniform(torch.tensor(1, device=device), torch.tensor(10, device=device))
        assert prior.sample().dtype == torch.get_default_dtype()
