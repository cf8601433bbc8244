r"""KL divergence of a Gaussian weight posterior from sparsifying priors.

Everything here is torch only. A weight has the posterior N(θ, σ²), held as ``loc`` θ and ``log_variance`` log σ²;
its dropout rate is α = σ²/θ². Each divergence below depends on θ and σ² through 1/α = θ²/σ² alone, tends to 0 as
α → ∞ (a weight of pure noise costs nothing) and grows like -½ log α as α → 0.
"""

__all__ = [
    "KERNELS",
    "Kernel",
    "add_gradients_",
    "kl_ard",
    "kl_log_uniform",
    "kl_log_uniform_total",
    "log_alpha",
    "total_and_slopes",
]

import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Form = Literal["approximate", "exact"]


def kl_log_uniform(loc: Tensor, log_variance: Tensor, form: Form = "approximate") -> Tensor:
    r"""Returns KL(N(θ, σ²) ‖ log-uniform) of each weight, in nats.

    With :math:`u = 1/(2\alpha) = \theta^2 / (2\sigma^2)` and the free constant of the improper prior set so that the
    divergence vanishes as :math:`\alpha \to \infty`, the exact form is

    .. math:: \mathrm{KL} = u \; {}_2F_2(1, 1; \tfrac32, 2; -u) = 2 \int_0^{\sqrt u} D(t) \, dt

    with Dawson's integral :math:`D`, evaluated by a rational function to a relative error of 5e-6 in float32 and
    1e-11 in float64. The approximate form is equation 14 of Molchanov et al.,

    .. math:: \mathrm{KL} \approx \tfrac12 \log(1 + \alpha^{-1}) + k_1 (1 - \mathrm{sigmoid}(k_2 + k_3 \log \alpha)),

    off by at most 0.0094 nats. Both are finite, with finite gradients, at θ = 0. Gradients are computed in the same
    closed form (for the exact one, from Dawson's integral), once: there is no second derivative.

    References:
        | Variational Dropout Sparsifies Deep Neural Networks (Molchanov, Ashukha, Vetrov, 2017)
        | https://arxiv.org/abs/1701.05369

    Args:
        loc: The mean θ of each weight, of any shape.
        log_variance: log σ² of each weight, of a shape that broadcasts with ``loc``.
        form: ``"approximate"`` or ``"exact"``.

    Returns:
        The divergence of each weight, with the broadcast shape. Half-precision input is computed, and returned,
        in float32.

    Raises:
        ValueError: If ``form`` is neither of the two.

    Example:
        >>> loc, log_variance = torch.tensor([0.0, 0.1, 1.0]), torch.tensor(-2.0)
        >>> kl_log_uniform(loc, log_variance, form="exact").argsort()
        tensor([0, 1, 2])
    """
    return _Elementwise.apply(*_operands(loc, log_variance), _kernel(form))


def kl_log_uniform_total(loc: Tensor, log_variance: Tensor, form: Form = "approximate") -> Tensor:
    r"""Returns the sum of :func:`kl_log_uniform` over all weights, without storing its terms.

    Args:
        loc: The mean θ of each weight, of any shape.
        log_variance: log σ² of each weight, of a shape that broadcasts with ``loc``.
        form: ``"approximate"`` or ``"exact"``.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: If ``form`` is neither of the two.

    Example:
        >>> loc, log_variance = torch.randn(3, 4), torch.randn(3, 4)
        >>> total = kl_log_uniform_total(loc, log_variance)
        >>> torch.allclose(total, kl_log_uniform(loc, log_variance).sum())
        True
    """
    return _Total.apply(*_operands(loc, log_variance), _kernel(form))


def kl_ard(loc: Tensor, log_variance: Tensor) -> Tensor:
    r"""Returns the KL of each weight from its automatic-relevance-determination prior, in nats.

    The prior N(0, 1/τ) has its precision at the optimum of the evidence lower bound, 1/τ = θ² + σ², which leaves

    .. math:: \mathrm{KL} = \tfrac12 \log(1 + \alpha^{-1}).

    References:
        | Variational Dropout via Empirical Bayes (Kharitonov, Molchanov, Vetrov, 2018)
        | https://arxiv.org/abs/1811.00596

    Args:
        loc: The mean θ of each weight, of any shape.
        log_variance: log σ² of each weight, of a shape that broadcasts with ``loc``.

    Returns:
        The divergence of each weight, with the broadcast shape.

    Example:
        >>> kl_ard(torch.tensor(0.0), torch.tensor(-3.0))
        tensor(0.)
    """
    return _Elementwise.apply(*_operands(loc, log_variance), _ard)


def log_alpha(loc: Tensor, log_variance: Tensor) -> Tensor:
    r"""Returns log α = log σ² - log θ², the log dropout rate of each weight.

    The equivalent rate of binary dropout is p = α / (1 + α). A weight of mean 0 has log α = +∞.

    References:
        | Variational Dropout and the Local Reparameterization Trick (Kingma, Salimans, Welling, 2015)
        | https://arxiv.org/abs/1506.02557

    Args:
        loc: The mean θ of each weight, of any shape.
        log_variance: log σ² of each weight, of a shape that broadcasts with ``loc``.

    Returns:
        log α of each weight, with the broadcast shape.

    Example:
        >>> log_alpha(torch.tensor([0.0, 1.0]), torch.tensor(3.0))
        tensor([inf, 3.])
    """
    return log_variance - 2 * loc.abs().log()


# Twice a divergence as a function of a = 1/α: it overwrites ``value``, beside which three more tensors are scratch,
# with 2 KL and a with the slope 2 dKL/da. The two share all that is costly; the factor 2 saves a pass for each.
Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]

_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695


def _approximate(a: Tensor, value: Tensor, step: Tensor, clamped: Tensor, _: Tensor) -> None:
    torch.log(a, out=step).mul_(_K3).sub_(_K2).sigmoid_()
    torch.log1p(a, out=value).add_(step, alpha=2 * _K1)
    # d step / da = k3 step (1 - step) / a, which vanishes with a; the clamp keeps 0 / 0 out.
    torch.clamp_min(a, torch.finfo(a.dtype).tiny, out=clamped)
    step.addcmul_(step, step, value=-1).div_(clamped)
    a.add_(1).reciprocal_().add_(step, alpha=2 * _K1 * _K3)


def _exact(a: Tensor, value: Tensor, t: Tensor, numerator: Tensor, denominator: Tensor) -> None:
    torch.add(a, 16, out=t).reciprocal_().mul_(-32).add_(1)  # (u - 8) / (u + 8) with u = a / 2
    _GROWTH[a.dtype](t, value, denominator).mul_(a).log1p_()
    _DAWSON[a.dtype](t, numerator, denominator)
    a.add_(1).reciprocal_().mul_(numerator)


def _ard(a: Tensor, value: Tensor, *_: Tensor) -> None:
    torch.log1p(a, out=value)
    a.add_(1).reciprocal_()


class _Rational(NamedTuple):
    """The coefficients, lowest power first, of a rational function."""

    numerator: tuple[float, ...]
    denominator: tuple[float, ...]

    def __call__(self, t: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
        _horner(self.numerator, t, out=numerator)
        return numerator.div_(_horner(self.denominator, t, out=denominator))


def _horner(coefficients: tuple[float, ...], t: Tensor, out: Tensor) -> Tensor:
    *rest, constant, last = coefficients
    torch.mul(t, last, out=out).add_(constant)
    for c in reversed(rest):
        out.mul_(t).add_(c)
    return out


# The exact divergence is ½ log(1 + 2u r(u)) and its slope dKL/du = D(√u)/√u is d(u) / (1 + 2u), where r rises from
# 1 to 2 exp(γ) and d stays between 1 and 1.3. Both are smooth on [0, ∞], so a rational function of t in [-1, 1]
# fits them with uniform relative error: 4e-8 and 8e-8 for float32, 6e-12 and 4e-12 for float64. The coefficients
# are minimax fits (Sanathanan-Koerner iteration with Lawson's weights) to 40-digit values.
_GROWTH = {
    torch.float32: _Rational(
        (3.257488743, 8.605784777, 19.5056415, 30.39751416, 33.58015322, 25.62200928, 11.62256349, 2.242726454),
        (1.0, 2.437172281, 5.741982291, 8.461878317, 9.566451973, 6.903881225, 3.16641283, 0.5741030291),
    ),
    torch.float64: _Rational(
        (
            3.2574888436018488,
            3.3794402355296533,
            12.8466996391998,
            23.816158806149527,
            42.102591148978696,
            69.767538579613699,
            99.599606837046593,
            125.60500669034163,
            135.64809309008993,
            118.16494069462453,
            80.001476576379176,
            38.824926026810495,
            11.621666256717052,
            1.5642948990706489,
        ),
        (
            1.0,
            0.83276307909232872,
            4.0261748531055535,
            6.3869866057387483,
            12.671874229201146,
            19.355028749983298,
            28.677852559226061,
            35.381759923685976,
            38.001526872471885,
            32.78953418085699,
            22.032084885344844,
            10.420781196512991,
            3.1156988470610836,
            0.40304205064444976,
        ),
    ),
}
_DAWSON = {
    torch.float32: _Rational(
        (
            1.149184248,
            1.939962541,
            5.70741874,
            7.889652966,
            10.53753886,
            9.393116583,
            4.884963662,
            2.316738127,
            0.2183465901,
        ),
        (1.0, 2.012664804, 5.132866593, 8.124987505, 10.30241836, 9.29348949, 5.710140224, 2.108330049, 0.3520284857),
    ),
    torch.float64: _Rational(
        (
            1.1491842572058524,
            -2.5503472314348623,
            6.9335933448056428,
            -7.7277313349542647,
            13.375973414770707,
            -7.2402122112955229,
            10.262483477163416,
            5.3367898369330558,
            -2.1256107980707446,
            11.4710646689625,
            -3.5345435347970824,
            3.2931418293325461,
            -0.37133399244147064,
            0.095625954574599784,
        ),
        (
            1.0,
            -1.8947224623810364,
            4.9317440884840078,
            -3.6281725662672706,
            6.8150827382281935,
            -0.079494796219472849,
            5.8125973623766054,
            3.8460640632134302,
            4.7105957707032386,
            3.4693015263353684,
            2.1654787645689355,
            0.93306831485272912,
            0.25424744435883501,
            0.032287432592979649,
        ),
    ),
}

KERNELS: dict[str, Kernel] = {"approximate": _approximate, "exact": _exact}


def total_and_slopes(locs: list[Tensor], variances: list[Tensor], kernel: Kernel, slopes: Tensor) -> Tensor:
    """Returns the sum of a divergence over the weights of several tensors, outside autograd.

    Args:
        locs: The means θ.
        variances: σ² of each weight, in tensors of the same shapes.
        kernel: The divergence, one of ``KERNELS``.
        slopes: Filled in with twice the slope in 1/α of each weight, tensor after tensor, for :func:`add_gradients_`.

    Returns:
        A scalar, in nats.

    Example:
        >>> loc, variance = torch.zeros(2, 3), torch.ones(2, 3)
        >>> total_and_slopes([loc, loc], [variance, variance], KERNELS["exact"], torch.empty(12))
        tensor(0.)
    """
    end = 0
    for loc, variance in zip(locs, variances, strict=True):
        start, end = end, end + loc.numel()
        torch.mul(loc, loc, out=slopes[start:end].view(loc.shape)).div_(variance)
    totals = []
    for (a,), scratch in _blocks(slopes):
        kernel(a, *scratch)
        totals.append(scratch[0].sum())
    return sum(totals[1:], start=totals[0]).mul_(0.5)


def add_gradients_(
    grad_loc: Tensor | None,
    grad_log_variance: Tensor | None,
    loc: Tensor,
    variance: Tensor,
    slope: Tensor,
    grad: Tensor,
) -> None:
    """Adds the gradients of a divergence in θ, 2 θ/σ² dKL/da, and in log σ², -θ²/σ² dKL/da, with a = θ²/σ².

    Args:
        grad_loc: The contiguous gradient in θ, or None where none is needed.
        grad_log_variance: The contiguous gradient in log σ², or None where none is needed.
        loc: The mean θ of each weight.
        variance: σ² of each weight.
        slope: 2 dKL/da of each weight.
        grad: The gradient of the divergence of each weight, or a scalar for all.

    Example:
        >>> grad_loc = torch.ones(3)
        >>> add_gradients_(grad_loc, None, torch.ones(3), torch.ones(3), torch.ones(3), torch.tensor(0.5))
        >>> grad_loc
        tensor([1.5000, 1.5000, 1.5000])
    """
    optional = [t for t in (grad_loc, grad_log_variance, grad if grad.dim() else None) if t is not None]
    for (theta, var, c, *pieces), (ratio, *_) in _blocks(loc, variance, slope, *optional):
        g = pieces.pop() if grad.dim() else grad
        torch.div(theta, var, out=ratio).mul_(c).mul_(g)
        if grad_log_variance is not None:
            pieces.pop().addcmul_(ratio, theta, value=-0.5)
        if grad_loc is not None:
            pieces.pop().add_(ratio)


def _kernel(form: str) -> Kernel:
    if form not in KERNELS:
        raise ValueError(f"form: expected one of {', '.join(map(repr, KERNELS))}, but got {form!r}")
    return KERNELS[form]


def _operands(loc: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(loc.dtype, log_variance.dtype)
    if dtype not in _GROWTH:
        dtype = torch.float32
    loc, log_variance = torch.broadcast_tensors(loc.to(dtype), log_variance.to(dtype))
    return loc, log_variance


class _Elementwise(torch.autograd.Function):
    """The divergence of each weight."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_variance: Tensor, kernel: Kernel) -> Tensor:
        variance = log_variance.exp().contiguous()
        value, slope = torch.empty_like(variance), torch.mul(loc, loc, out=torch.empty_like(variance)).div_(variance)
        for (a, out), (*scratch, _) in _blocks(slope, value):
            kernel(a, out, *scratch)
            out.mul_(0.5)
        ctx.save_for_backward(loc, variance, slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        loc, variance, slope = ctx.saved_tensors
        grad_loc, grad_log_variance = torch.zeros_like(variance), torch.zeros_like(variance)
        add_gradients_(grad_loc, grad_log_variance, loc, variance, slope, grad)
        return grad_loc, grad_log_variance, None


class _Total(_Elementwise):
    """The sum of the divergences of all weights."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_variance: Tensor, kernel: Kernel) -> Tensor:
        variance = log_variance.exp().contiguous()
        slope = torch.empty_like(variance)
        ctx.save_for_backward(loc, variance, slope)
        return total_and_slopes([loc], [variance], kernel, slope.view(-1))


# On a CPU, a temporary of a megabyte costs more in page faults than the arithmetic on it. Work is done in blocks
# whose scratch memory each thread keeps: four of these, 8 MB in float32. Smaller blocks cost more in calls than they
# save in cache misses.
_BLOCK = 2**19


def _blocks(*tensors: Tensor) -> Iterator[tuple[list[Tensor], tuple[Tensor, ...]]]:
    """Yields matching flat pieces of tensors of one size, and four pieces of scratch."""
    like = tensors[0]
    total = like.numel()
    size = _BLOCK if like.device.type == "cpu" else max(total, 1)
    flat = [t.reshape(-1) for t in tensors]
    if total <= size:
        yield flat, _scratch(total, like)
        return
    for start in range(0, total, size):
        length = min(size, total - start)
        yield [t.narrow(0, start, length) for t in flat], _scratch(length, like)


def _scratch(length: int, like: Tensor) -> tuple[Tensor, ...]:
    if like.device.type != "cpu":
        return like.new_empty(4, length).unbind()
    return _kept_scratch(length, like.dtype, threading.get_ident())


@lru_cache(maxsize=256)
def _kept_scratch(length: int, dtype: torch.dtype, thread: int) -> tuple[Tensor, ...]:
    return tuple(t.narrow(0, 0, length) for t in _kept_memory(dtype, thread))


@lru_cache(maxsize=16)
def _kept_memory(dtype: torch.dtype, thread: int) -> tuple[Tensor, ...]:
    return torch.empty(4, _BLOCK, dtype=dtype).unbind()
