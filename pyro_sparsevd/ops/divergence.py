r"""KL divergence of a Gaussian weight posterior from sparsifying priors.

Everything here is torch only. A weight has the posterior N(θ, σ²), held as ``loc`` θ and ``log_variance`` log σ²;
its dropout rate is α = σ²/θ². Each divergence below depends on θ and σ² through 1/α = θ²/σ² alone, tends to 0 as
α → ∞ (a weight of pure noise costs nothing) and grows like -½ log α as α → 0.
"""

__all__ = ["add_gradients_", "kl_ard", "kl_log_uniform", "kl_log_uniform_total", "log_alpha", "total_and_derivatives"]

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import fused
from .kernels import KERNELS, Kernel, ard
from .memory import blocks

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
    """Returns the sum of :func:`kl_log_uniform` over all weights, a scalar, without storing its terms."""
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
    return _Elementwise.apply(*_operands(loc, log_variance), ard)


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


def total_and_derivatives(
    locs: list[Tensor], variances: list[Tensor], kernel: Kernel, derivatives: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Returns the sum of a divergence over several tensors, and 2 dKL/da of each weight with a = 1/α, outside autograd.

    The derivatives are views of the flat tensor ``derivatives``, which has an element for each weight.
    """
    parts = derivatives.split([loc.numel() for loc in locs])
    of_each = [part.view(loc.shape) for part, loc in zip(parts, locs, strict=True)]
    if fused.serve(derivatives, *locs, *variances):
        totals = [fused.divergence(kernel, *of_loc) for of_loc in zip(locs, variances, of_each, strict=True)]
    else:
        totals = []
        for a, loc, variance in zip(of_each, locs, variances, strict=True):
            torch.mul(loc, loc, out=a).div_(variance)
        for (a,), scratch in blocks(derivatives):
            kernel(a, *scratch)
            totals.append(scratch[0].sum())
    return sum(totals[1:], start=totals[0]).mul_(0.5), of_each


def add_gradients_(
    grad_loc: Tensor | None,
    grad_log_variance: Tensor | None,
    loc: Tensor,
    variance: Tensor,
    derivative: Tensor,
    grad: Tensor,
) -> None:
    """Adds the gradients of a divergence in θ, 2 θ/σ² dKL/da, and in log σ², -θ²/σ² dKL/da, with a = θ²/σ².

    ``derivative`` is 2 dKL/da, ``grad`` the gradient of each weight's divergence or one for all. The gradients to add
    to are contiguous, or None where none is needed.
    """
    tensors = loc, variance, derivative, grad, grad_loc, grad_log_variance
    for (theta, var, d, of_kl, of_loc, of_log_variance), (ratio, *_) in blocks(*tensors):
        torch.div(theta, var, out=ratio).mul_(d).mul_(of_kl)
        if of_log_variance is not None:
            of_log_variance.addcmul_(ratio, theta, value=-0.5)
        if of_loc is not None:
            of_loc.add_(ratio)


def _kernel(form: str) -> Kernel:
    if form not in KERNELS:
        raise ValueError(f"form: expected one of {', '.join(map(repr, KERNELS))}, but got {form!r}")
    return KERNELS[form]


def _operands(loc: Tensor, log_variance: Tensor) -> Sequence[Tensor]:
    dtype = torch.promote_types(loc.dtype, log_variance.dtype)
    dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    return torch.broadcast_tensors(loc.to(dtype), log_variance.to(dtype))


class _Elementwise(torch.autograd.Function):
    """The divergence of each weight."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_variance: Tensor, kernel: Kernel) -> Tensor:
        variance = fused.exp(log_variance, out=torch.empty_like(log_variance, memory_format=torch.contiguous_format))
        value, derivative = torch.empty_like(variance), torch.empty_like(variance)
        if fused.serve(loc, variance):
            fused.divergence(kernel, loc, variance, derivative, value)
        else:
            torch.mul(loc, loc, out=derivative).div_(variance)
            for (a, out), (*scratch, _) in blocks(derivative, value):
                kernel(a, out, *scratch)
        ctx.save_for_backward(loc, log_variance, variance, derivative)
        return value.mul_(0.5)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return _gradients(ctx, grad, *ctx.saved_tensors)


class _Total(_Elementwise):
    """The sum of the divergences of all weights."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, log_variance: Tensor, kernel: Kernel) -> Tensor:
        variance = fused.exp(log_variance, out=torch.empty_like(log_variance, memory_format=torch.contiguous_format))
        total, (derivative,) = total_and_derivatives([loc], [variance], kernel, variance.new_empty(variance.numel()))
        ctx.save_for_backward(loc, log_variance, variance, derivative)
        return total


# What is saved is an argument so that the decorator sees that a second derivative would need it, and refuses that.
@once_differentiable
def _gradients(
    ctx: Any, grad: Tensor, loc: Tensor, log_variance: Tensor, variance: Tensor, derivative: Tensor
) -> tuple[Tensor, Tensor, None]:
    grad_loc, grad_log_variance = torch.zeros_like(variance), torch.zeros_like(variance)
    if grad.dim() == 0 and fused.serve(loc, variance, derivative):
        fused.finish_gradients(grad.item(), grad_loc, grad_log_variance, loc, variance, derivative)
    else:
        add_gradients_(grad_loc, grad_log_variance, loc, variance, derivative, grad)
    return grad_loc, grad_log_variance, None
