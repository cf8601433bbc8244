"""The divergence of the posterior from the log-uniform prior."""

import math

import mpmath
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from checks import SAMPLES, assert_mean
from operations import BOUNDS, bounded, normal_of, random_posterior, tensor64
from pyro_sparsevd import LogUniform, SparseNormal
from pyro_sparsevd.distributions.kl import kl_normal_log_uniform
from pyro_sparsevd.distributions.log_uniform import IMPROPER_LOG_NORMALIZER
from pyro_sparsevd.ops import divergence

FAMILIES = {"Normal": normal_of, "SparseNormal": lambda q: q}


class TestLogUniform:
    @pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
    def test_registered_divergence_from_the_improper_prior_is_the_exact_form(self, family, posterior):
        expected = divergence.kl_log_uniform(posterior.loc, posterior.log_variance, form="exact")
        torch.testing.assert_close(kl_divergence(family(posterior), LogUniform()), expected, rtol=1e-10, atol=1e-12)

    def test_registered_divergence_knows_torchs_own_normal(self, device):
        q = torch.distributions.Normal(tensor64(0.7, device), tensor64(0.5, device))
        expected = divergence.kl_log_uniform(q.loc, 2 * q.scale.log(), form="exact")
        torch.testing.assert_close(kl_divergence(q, LogUniform()), expected)

    @pytest.mark.parametrize(
        ("loc", "scale", "low", "high"),
        [(0.5, 0.3, 1e-12, 1e3), (0.0, 1.0, 1e-13, 50.0), (-2.0, 0.1, 1e-2, 10.0), (1e-3, 0.02, 1e-15, 1.0)],
    )
    @pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
    def test_divergence_from_a_bounded_prior_is_the_integral_of_q_log_q_by_p(
        self, family, loc, scale, low, high, device
    ):
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
        q = SparseNormal(tensor64(loc, device), 2 * tensor64(scale, device).log())
        assert kl_divergence(family(q), bounded(low, high, device)).item() == pytest.approx(expected, rel=1e-8)

    @pytest.mark.parametrize("form", ["approximate", "exact"])
    def test_bounds_add_their_constant(self, form, device):
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
    def test_divergence_is_the_mean_of_the_log_density_ratio(self, make, rate, device):
        prior = make(device)
        loc = 0.0 if rate == math.inf else math.exp(-0.5 * rate)
        q = SparseNormal(tensor64(loc, device), tensor64(0.0, device))
        draws = q.sample((SAMPLES,))
        ratio = q.log_prob(draws) - prior.log_prob(draws)
        if not prior.is_proper:
            ratio = ratio - IMPROPER_LOG_NORMALIZER
        assert_mean(ratio, kl_divergence(q, prior), f"log α = {rate}")

    def test_kl_form_is_passed_on(self, posterior):
        actual = kl_normal_log_uniform(posterior, LogUniform(), "approximate")
        torch.testing.assert_close(actual, divergence.kl_log_uniform(posterior.loc, posterior.log_variance))
        with pytest.raises(ValueError, match="form: expected one of 'approximate', 'exact', but got 'best'"):
            kl_normal_log_uniform(posterior, LogUniform(), "best")


@pytest.mark.parametrize(
    "make", [lambda device: LogUniform(), lambda d: bounded(1e-4, 9.0, d)], ids=["improper", "bounded"]
)
class TestShapes:
    @pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
    @pytest.mark.parametrize("ndims", [1, 2])
    def test_divergence_reaches_through_to_event(self, family, ndims, make, device):
        loc, log_variance = (torch.randn(2, 3, 4, dtype=torch.float64, device=device) for _ in range(2))
        q, p = family(SparseNormal(loc, log_variance)), make(device).expand([2, 3, 4])
        expected = kl_divergence(q, p)
        assert expected.shape == (2, 3, 4)
        actual = kl_divergence(q.to_event(ndims), p.to_event(ndims))
        torch.testing.assert_close(actual, expected.flatten(3 - ndims).sum(-1))
        if ndims == 2:
            nested = kl_divergence(q.to_event(1).to_event(1), p.to_event(1).to_event(1))
            torch.testing.assert_close(nested, actual)

    def test_divergence_has_the_broadcast_shape_of_the_two(self, make, device):
        q = SparseNormal(torch.zeros(3, 1, device=device), torch.zeros(3, 1, device=device))
        assert kl_divergence(q, make(device)).shape == (3, 1)
        assert kl_divergence(q, make(device).expand([4])).shape == (3, 4)


class TestOtherPairs:
    def test_divergence_from_a_normal_is_torchs_rule(self, posterior):
        prior = dist.Normal(torch.full_like(posterior.loc, 0.3), 2.0)
        torch.testing.assert_close(kl_divergence(posterior, prior), kl_divergence(normal_of(posterior), prior))
        torch.testing.assert_close(kl_divergence(prior, posterior), kl_divergence(prior, normal_of(posterior)))
        assert (kl_divergence(posterior, posterior).abs() < 1e-12).all()

    @pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
    @pytest.mark.parametrize("centre", [0.0, -2.0])
    def test_the_divergence_from_a_laplace_prior_is_the_integral(self, scale, centre):
        q, p = random_posterior((7,)), dist.Laplace(torch.tensor(centre, dtype=torch.float64), scale)
        z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)[:, None]
        w = q.loc + q.scale * z
        integrand = q.log_prob(w).exp() * (q.log_prob(w) - p.log_prob(w)) * q.scale
        torch.testing.assert_close(kl_divergence(q, p), torch.trapezoid(integrand, z, dim=0), rtol=1e-6, atol=1e-8)

    def test_divergence_the_other_way_round_is_not_known(self, posterior):
        with pytest.raises(NotImplementedError, match="LogUniform"):
            kl_divergence(LogUniform(0.1, 1.0), posterior)
