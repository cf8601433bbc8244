"""The divergences against mpmath and against their plain formulas under autograd."""

import math
import threading
from functools import cache, partial

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from checks import value_and_gradients
from operations import DIVERGENCES, TOTALS
from pyro_sparsevd.ops.divergence import kl_ard, kl_log_uniform, kl_log_uniform_total, log_alpha

K1, K2, K3 = 0.63576, 1.87320, 1.48695
# log α, exact KL, equation 14, exact dKL/dlog α
TABLE = [
    (-10.0, 5.635159, 5.635781, -0.500023),
    (-4.0, 2.625755, 2.634208, -0.509714),
    (-2.0, 1.544155, 1.540533, -0.611234),
    (0.0, 0.426686, 0.431239, -0.362389),
    (2.0, 0.066168, 0.068417, -0.064696),
    (3.0, 0.024688, 0.025420, -0.024484),
    (6.0, 0.001239, 0.001251, -0.001238),
]


def plain_approximate(loc, log_variance):
    """Equation 14 of the paper, with 1 - sigmoid(z) = sigmoid(-z), which keeps its digits where α is large."""
    rate = log_variance - torch.log(loc**2)
    return 0.5 * F.softplus(-rate) + K1 * torch.sigmoid(-(K2 + K3 * rate))


def plain_ard(loc, log_variance):
    return 0.5 * torch.log1p(loc**2 * torch.exp(-log_variance))


def plain_exact(loc, log_variance):
    """The integral of Dawson's function by a quadrature that torch differentiates: for u = θ²/(2σ²) up to 50."""
    nodes, weights = (torch.as_tensor(a, device=loc.device) for a in _gauss_legendre(60))
    u = (0.5 * loc**2 * torch.exp(-log_variance)).unsqueeze(-1)
    # D(x) = x ∫_0^1 exp(-x² (1 - s²)) ds, hence 2 ∫_0^√u D(t) dt = ∫_0^1 (1 - exp(-u (1 - s²))) / (1 - s²) ds
    gap = 1 - nodes**2
    return (-torch.expm1(-u * gap) / gap * weights).sum(-1)


@cache
def _gauss_legendre(order):
    nodes, weights = np.polynomial.legendre.leggauss(order)
    return 0.5 * (nodes + 1), 0.5 * weights


@cache
def true_kl(inverse_alpha):
    with mpmath.workdps(30):
        u = mpmath.mpf(inverse_alpha) / 2
        return float(u * mpmath.hyp2f2(1, 1, mpmath.mpf(3) / 2, 2, -u))


@cache
def true_derivative(inverse_alpha):
    """Returns dKL/dlog α = -√u D(√u)."""
    with mpmath.workdps(30):
        x = mpmath.sqrt(mpmath.mpf(inverse_alpha) / 2)
        dawson = mpmath.sqrt(mpmath.pi) / 2 * mpmath.exp(-(x**2)) * mpmath.erfi(x)
        return float(-x * dawson)


def inverse_alphas(loc, log_variance):
    """Returns 1/α to 30 digits, of the numbers that the tensors hold."""
    with mpmath.workdps(30):
        pairs = zip(loc.tolist(), log_variance.tolist(), strict=True)
        return [mpmath.mpf(t) ** 2 * mpmath.exp(-mpmath.mpf(s)) for t, s in pairs]


def assert_relative(actual, expected, bound):
    expected = torch.tensor(expected, dtype=torch.float64)
    error = (actual.double().cpu() / expected - 1).abs().max()
    assert error < bound, f"relative error {error:.3g}"


def rates_grid(dtype, device):
    """Returns θ of several magnitudes and signs and log σ² such that log α covers [-20, 20]."""
    rates = torch.linspace(-20, 20, 161, dtype=torch.float64)
    loc = torch.tensor([1.0, -0.01, 30.0], dtype=torch.float64).repeat(54)[:161]
    log_variance = rates + 2 * loc.abs().log()
    return loc.to(device, dtype), log_variance.to(device, dtype)


class TestValues:
    @pytest.mark.parametrize(("rate", "exact", "approximate", "slope"), TABLE, ids=lambda value: f"{value:g}")
    def test_table_of_published_values(self, rate, exact, approximate, slope, device):
        loc = torch.ones(1, dtype=torch.float64, device=device)
        log_variance = torch.full_like(loc, rate)
        value, _, grad = value_and_gradients(partial(kl_log_uniform, form="exact"), loc, log_variance)
        assert value.item() == pytest.approx(exact, abs=6e-7)
        assert grad.item() == pytest.approx(slope, abs=6e-7)
        assert kl_log_uniform(loc, log_variance).item() == pytest.approx(approximate, abs=6e-7)

    @pytest.mark.parametrize(
        ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
    )
    def test_exact_form_is_the_hypergeometric_function(self, dtype, bound, device):
        loc, log_variance = rates_grid(dtype, device)
        value, grad_loc, grad_log_variance = value_and_gradients(
            partial(kl_log_uniform, form="exact"), loc, log_variance
        )
        inverse = inverse_alphas(loc, log_variance)
        slope = torch.tensor([true_derivative(a) for a in inverse], dtype=torch.float64)
        assert value.dtype == grad_loc.dtype == grad_log_variance.dtype == dtype
        assert_relative(value, [true_kl(a) for a in inverse], bound)
        assert_relative(grad_log_variance, slope.tolist(), bound)
        assert_relative(grad_loc, (-2 * slope / loc.cpu().double()).tolist(), bound)

    @pytest.mark.parametrize(
        ("function", "plain"),
        [(kl_log_uniform, plain_approximate), (kl_ard, plain_ard)],
        ids=["approximate", "ard"],
    )
    def test_closed_form_and_its_gradients_are_those_of_the_plain_formula(self, function, plain, device):
        loc, log_variance = rates_grid(torch.float64, device)
        grad = torch.randn_like(loc)
        for actual, expected in zip(
            value_and_gradients(function, loc, log_variance, grad=grad),
            value_and_gradients(plain, loc, log_variance, grad=grad),
            strict=True,
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-15)

    def test_exact_form_and_its_gradients_are_those_of_a_quadrature(self, device):
        loc = torch.randn(50, dtype=torch.float64, device=device)
        log_variance = torch.linspace(-3, 8, 50, dtype=torch.float64, device=device)
        grad = torch.randn_like(loc)
        exact = partial(kl_log_uniform, form="exact")
        for actual, expected in zip(
            value_and_gradients(exact, loc, log_variance, grad=grad),
            value_and_gradients(plain_exact, loc, log_variance, grad=grad),
            strict=True,
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)

    def test_approximate_form_in_float32_is_that_in_float64(self, device):
        loc, log_variance = rates_grid(torch.float32, device)
        single = value_and_gradients(kl_log_uniform, loc, log_variance)
        double = value_and_gradients(plain_approximate, loc.double(), log_variance.double())
        for actual, expected in zip(single, double, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)

    def test_approximate_form_is_within_its_stated_error_of_the_exact_one(self, device):
        rates = torch.linspace(-20, 20, 4001, dtype=torch.float64, device=device)
        loc = torch.ones_like(rates)
        error = (kl_log_uniform(loc, rates) - kl_log_uniform(loc, rates, form="exact")).abs()
        assert 0.0093 < error.max() < 0.0094


class TestFunctionOfAlpha:
    @pytest.mark.parametrize("kl", DIVERGENCES)
    def test_divergence_depends_on_alpha_alone(self, kl, device):
        loc, log_variance = rates_grid(torch.float64, device)
        expected = kl(loc, log_variance)
        for scale in (-1.0, 1e-3, 250.0):
            scaled = kl(scale * loc, log_variance + 2 * math.log(abs(scale)))
            torch.testing.assert_close(scaled, expected, rtol=1e-10, atol=0)

    @pytest.mark.parametrize("kl", DIVERGENCES)
    def test_divergence_falls_with_alpha_from_positive_values(self, kl, device):
        rates = torch.linspace(-20, 20, 2001, dtype=torch.float64, device=device)
        value = kl(torch.ones_like(rates), rates)
        assert (value > 0).all()
        assert (value.diff() < 0).all()

    @pytest.mark.parametrize("kl", DIVERGENCES)
    def test_divergence_vanishes_like_half_of_inverse_alpha(self, kl, device):
        rate = torch.tensor([30.0, 60.0, 200.0], dtype=torch.float64, device=device)
        value = kl(torch.ones_like(rate), rate)
        torch.testing.assert_close(value / (0.5 * torch.exp(-rate)), torch.ones_like(rate), rtol=1e-4, atol=0)

    @pytest.mark.parametrize(
        ("kl", "constant"),
        [
            pytest.param(partial(kl_log_uniform, form="approximate"), K1, id="approximate"),
            pytest.param(partial(kl_log_uniform, form="exact"), 0.5 * (0.57721566490153286 + math.log(2)), id="exact"),
            pytest.param(kl_ard, 0.0, id="ard"),
        ],
    )
    def test_divergence_grows_like_minus_half_of_log_alpha_plus_its_constant(self, kl, constant, device):
        rate = torch.tensor([-25.0, -40.0, -100.0], dtype=torch.float64, device=device)
        value, _, grad = value_and_gradients(kl, torch.ones_like(rate), rate)
        torch.testing.assert_close(value, -0.5 * rate + constant, rtol=1e-10, atol=0)
        torch.testing.assert_close(grad, torch.full_like(rate, -0.5), rtol=1e-9, atol=0)

    @pytest.mark.parametrize("kl", DIVERGENCES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
    def test_divergence_and_gradients_vanish_at_mean_zero_for_every_variance(self, kl, dtype, device):
        log_variance = torch.linspace(-20, 20, 41, dtype=dtype, device=device)
        for loc in (torch.zeros_like(log_variance), -torch.zeros_like(log_variance)):
            for result in value_and_gradients(kl, loc, log_variance):
                assert (result == 0).all()

    @pytest.mark.parametrize("kl", DIVERGENCES)
    def test_gradients_live_wherever_the_true_ones_do_in_float32(self, kl, device):
        # Initial values far beyond the ±8 or ±10 at which others clamp log α.
        loc, log_variance = rates_grid(torch.float32, device)
        value, grad_loc, grad_log_variance = value_and_gradients(kl, loc, log_variance)
        _, true_loc, true_log_variance = value_and_gradients(kl, loc.double(), log_variance.double())
        assert value.isfinite().all()
        assert (grad_log_variance < 0).all()
        assert (grad_loc.sign() == loc.sign()).all()
        torch.testing.assert_close(grad_loc.double(), true_loc, rtol=2e-5, atol=0)
        torch.testing.assert_close(grad_log_variance.double(), true_log_variance, rtol=2e-5, atol=0)


class TestFunctionOfTorch:
    @pytest.mark.parametrize("kl", DIVERGENCES + TOTALS)
    @pytest.mark.parametrize(
        "shapes", [((3, 4), (3, 4)), ((3, 4), (4,)), ((3, 1), (1, 4)), ((), (5,)), ((2, 3), ()), ((), ())], ids=str
    )
    def test_gradcheck_with_broadcasting(self, kl, shapes, device):
        loc, log_variance = (torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes)
        if loc.dim():
            loc.view(-1)[0] = 0
        assert torch.autograd.gradcheck(kl, (loc.requires_grad_(), log_variance.requires_grad_()))

    @pytest.mark.parametrize("kl", DIVERGENCES)
    def test_result_has_the_broadcast_shape(self, kl, device):
        loc, log_variance = torch.randn(5, 1, 3, device=device), torch.randn(4, 1, device=device)
        value = kl(loc, log_variance)
        assert value.shape == (5, 4, 3)
        torch.testing.assert_close(
            value, kl(loc.expand(5, 4, 3).contiguous(), log_variance.expand(5, 4, 3).contiguous())
        )

    @pytest.mark.parametrize("kl", DIVERGENCES + TOTALS)
    @pytest.mark.parametrize("needed", [0, 1], ids=["loc", "log_variance"])
    def test_gradient_of_one_input_alone(self, kl, needed, device):
        inputs = [torch.randn(4, dtype=torch.float64, device=device) for _ in range(2)]
        _, *expected = value_and_gradients(kl, *inputs)
        inputs[needed].requires_grad_()
        kl(*inputs).sum().backward()
        torch.testing.assert_close(inputs[needed].grad, expected[needed])
        assert inputs[1 - needed].grad is None

    @pytest.mark.parametrize("kl", DIVERGENCES + TOTALS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    def test_half_precision_is_the_float32_computation_of_the_rounded_input(self, kl, dtype, device):
        loc = torch.randn(64, device=device).to(dtype)
        log_variance = torch.linspace(-10, 10, 64, device=device).to(dtype)
        value, *grads = value_and_gradients(kl, loc, log_variance)
        expected, *expected_grads = value_and_gradients(kl, loc.float(), log_variance.float())
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert grad.dtype == dtype
            assert torch.equal(grad, expected_grad.to(dtype))

    @pytest.mark.parametrize("kl", DIVERGENCES + TOTALS)
    def test_mixed_precision_is_computed_in_the_wider_type(self, kl, device):
        loc = torch.randn(8, device=device)
        log_variance = torch.randn(8, dtype=torch.float64, device=device)
        value = kl(loc, log_variance)
        assert value.dtype == torch.float64
        assert torch.equal(value, kl(loc.double(), log_variance))

    @pytest.mark.parametrize("kl", DIVERGENCES + TOTALS)
    def test_inputs_are_not_changed(self, kl, device):
        inputs = [torch.randn(40, device=device) for _ in range(2)]
        before = [t.clone() for t in inputs]
        value_and_gradients(lambda *a: kl(*a), *inputs)
        kl(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))

    @pytest.mark.parametrize("kl", DIVERGENCES + TOTALS)
    def test_second_derivative_is_refused_rather_than_zero(self, kl, device):
        loc = torch.randn(4, dtype=torch.float64, device=device, requires_grad=True)
        (grad,) = torch.autograd.grad(kl(loc, torch.zeros_like(loc)).sum() + (loc**2).sum(), loc, create_graph=True)
        with pytest.raises(RuntimeError, match="twice"):
            grad.sum().backward()

    @pytest.mark.parametrize("kl", DIVERGENCES + TOTALS)
    def test_second_backward_through_a_retained_graph_repeats_the_gradients(self, kl, device, small_blocks):
        loc = torch.randn(23, dtype=torch.float64, device=device, requires_grad=True)
        log_variance = torch.randn(23, dtype=torch.float64, device=device, requires_grad=True)
        value = kl(loc, log_variance).sum()
        first = torch.autograd.grad(value, (loc, log_variance), retain_graph=True)
        kl(torch.randn_like(loc), torch.randn_like(loc))  # the scratch memory is used for something else in between
        second = torch.autograd.grad(value, (loc, log_variance))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize("kl", DIVERGENCES + TOTALS)
    def test_results_of_two_calls_do_not_share_memory(self, kl, device):
        a, b = torch.ones(30, device=device), torch.full((30,), 2.0, device=device)
        first = kl(a, torch.zeros_like(a))
        kept = first.clone()
        second = kl(b, torch.zeros_like(b))
        assert torch.equal(first, kept)
        assert (second > first).all()

    @pytest.mark.parametrize("kl", DIVERGENCES + TOTALS)
    def test_gradients_can_be_taken_after_a_call_in_inference_mode(self, kl, device):
        # In a thread, whose scratch memory is fresh: it must not be made of inference tensors.
        loc, log_variance = torch.randn(9, device=device), torch.randn(9, device=device)
        expected = value_and_gradients(kl, loc, log_variance)

        def evaluate_then_train():
            with torch.inference_mode():
                kl(loc, log_variance)
            return value_and_gradients(kl, loc, log_variance)

        for actual, wanted in zip(in_thread(evaluate_then_train), expected, strict=True):
            assert torch.equal(actual, wanted)

    @pytest.mark.parametrize("kl", DIVERGENCES + TOTALS)
    def test_two_threads_at_once_give_the_results_of_one(self, kl, device, small_blocks):
        jobs = [
            (torch.randn(n, dtype=torch.float64, device=device), torch.randn(n, dtype=torch.float64, device=device))
            for n in (35, 61)
        ]
        expected = [value_and_gradients(kl, *job) for job in jobs]
        barrier, mistakes = threading.Barrier(2), []

        def work(job, wanted):
            barrier.wait()
            for _ in range(150):
                found = value_and_gradients(kl, *job)
                if not all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)):
                    mistakes.append(found)

        threads = [threading.Thread(target=work, args=pair) for pair in zip(jobs, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not mistakes


def in_thread(function):
    """Returns what a function returns in a thread of its own; its error is raised here."""
    result = {}

    def run():
        try:
            result["value"] = function()
        except Exception as error:
            result["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if "error" in result:
        raise result["error"]
    return result["value"]


class TestErrors:
    @pytest.mark.parametrize("function", [kl_log_uniform, kl_log_uniform_total])
    @pytest.mark.parametrize("form", ["Exact", "", None, "monte_carlo"], ids=repr)
    def test_unknown_form_is_refused_by_name(self, function, form, device):
        with pytest.raises(ValueError, match=rf"form: expected one of 'approximate', 'exact', but got {form!r}"):
            function(torch.ones(2, device=device), torch.ones(2, device=device), form)

    @pytest.mark.parametrize("kl", DIVERGENCES + TOTALS)
    def test_shapes_that_do_not_broadcast_are_refused(self, kl, device):
        with pytest.raises(RuntimeError, match=r"[Ss]hape|size"):
            kl(torch.ones(3, device=device), torch.ones(4, device=device))


class TestLogAlpha:
    def test_log_alpha_is_log_of_variance_over_squared_mean(self, device):
        loc = torch.tensor([[1.0, -1.0], [0.5, -1e-30]], dtype=torch.float64, device=device)
        log_variance = torch.tensor([-3.0, 2.0], dtype=torch.float64, device=device)
        expected = [[log_variance[j].item() - math.log(loc[i, j].item() ** 2) for j in range(2)] for i in range(2)]
        actual = log_alpha(loc, log_variance)
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64, device=device))

    def test_log_alpha_of_mean_zero_is_infinite_and_of_tiny_means_finite(self, device):
        loc = torch.tensor([0.0, -0.0, 1e-30], device=device)  # (1e-30)² underflows in float32
        assert log_alpha(loc, torch.tensor(-20.0, device=device)).tolist() == pytest.approx(
            [math.inf, math.inf, -20 + 60 * math.log(10)], rel=1e-6
        )
