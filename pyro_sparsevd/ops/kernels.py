"""Twice each KL of :mod:`~.divergence` and its derivative as functions of 1/α, elementwise and in place."""

__all__ = ["DAWSON", "GROWTH", "K1", "K2", "K3", "KERNELS", "Kernel", "ard"]

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

# A kernel (a, value, scratch, scratch, scratch) takes a = 1/α and overwrites value with 2 KL and a with 2 dKL/da. The
# factor 2 saves a pass over each.
Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


K1, K2, K3 = 0.63576, 1.87320, 1.48695
_MINUS_K2 = torch.tensor(-K2, dtype=torch.float64)


def _approximate(a: Tensor, value: Tensor, step: Tensor, clamped: Tensor, _: Tensor) -> None:
    torch.add(_MINUS_K2, torch.log(a, out=step), alpha=K3, out=step).sigmoid_()
    torch.log1p(a, out=value).add_(step, alpha=2 * K1)
    # d step / da = k3 step (1 - step) / a, which vanishes with a; the clamp keeps 0 / 0 out.
    torch.clamp_min(a, torch.finfo(a.dtype).tiny, out=clamped)
    step.addcmul_(step, step, value=-1)
    a.add_(1).reciprocal_().addcdiv_(step, clamped, value=2 * K1 * K3)


def _exact(a: Tensor, value: Tensor, t: Tensor, numerator: Tensor, denominator: Tensor) -> None:
    torch.add(a, 16, out=t).reciprocal_().mul_(-32).add_(1)  # (u - 8) / (u + 8) with u = a / 2
    GROWTH[a.dtype](t, value, denominator).mul_(a).log1p_()
    DAWSON[a.dtype](t, numerator, denominator)
    a.add_(1).reciprocal_().mul_(numerator)


def ard(a: Tensor, value: Tensor, *_: Tensor) -> None:
    """The kernel of the divergence from the ARD prior, ½ log(1 + 1/α)."""
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


# The exact divergence is ½ log(1 + 2u r(u)) and its derivative dKL/du = D(√u)/√u is d(u) / (1 + 2u), where r rises from
# 1 to 2 exp(γ) and d stays between 1 and 1.3. Both are smooth on [0, ∞], so a rational function of t in [-1, 1]
# fits them with uniform relative error: 4e-8 and 8e-8 for float32, 6e-12 and 4e-12 for float64. The coefficients
# are minimax fits (Sanathanan-Koerner iteration with Lawson's weights) to 40-digit values.
# fmt: off
GROWTH = {
    torch.float32: _Rational(
        (3.257488743, 8.605784777, 19.5056415, 30.39751416, 33.58015322, 25.62200928, 11.62256349, 2.242726454),
        (1.0, 2.437172281, 5.741982291, 8.461878317, 9.566451973, 6.903881225, 3.16641283, 0.5741030291),
    ),
    torch.float64: _Rational(
        (3.2574888436018488, 3.3794402355296533, 12.8466996391998, 23.816158806149527, 42.102591148978696,
         69.767538579613699, 99.599606837046593, 125.60500669034163, 135.64809309008993, 118.16494069462453,
         80.001476576379176, 38.824926026810495, 11.621666256717052, 1.5642948990706489),
        (1.0, 0.83276307909232872, 4.0261748531055535, 6.3869866057387483, 12.671874229201146, 19.355028749983298,
         28.677852559226061, 35.381759923685976, 38.001526872471885, 32.78953418085699, 22.032084885344844,
         10.420781196512991, 3.1156988470610836, 0.40304205064444976),
    ),
}

DAWSON = {
    torch.float32: _Rational(
        (1.149184248, 1.939962541, 5.70741874, 7.889652966, 10.53753886, 9.393116583, 4.884963662, 2.316738127,
         0.2183465901),
        (1.0, 2.012664804, 5.132866593, 8.124987505, 10.30241836, 9.29348949, 5.710140224, 2.108330049, 0.3520284857),
    ),
    torch.float64: _Rational(
        (1.1491842572058524, -2.5503472314348623, 6.9335933448056428, -7.7277313349542647, 13.375973414770707,
         -7.2402122112955229, 10.262483477163416, 5.3367898369330558, -2.1256107980707446, 11.4710646689625,
         -3.5345435347970824, 3.2931418293325461, -0.37133399244147064, 0.095625954574599784),
        (1.0, -1.8947224623810364, 4.9317440884840078, -3.6281725662672706, 6.8150827382281935, -0.079494796219472849,
         5.8125973623766054, 3.8460640632134302, 4.7105957707032386, 3.4693015263353684, 2.1654787645689355,
         0.93306831485272912, 0.25424744435883501, 0.032287432592979649),
    ),
}
# fmt: on

KERNELS: dict[str, Kernel] = {"approximate": _approximate, "exact": _exact}
