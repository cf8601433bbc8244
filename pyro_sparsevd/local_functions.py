"""Linear operations by a Gaussian weight that sample their output, as autograd functions."""

__all__ = ["Integral", "LocalConvolution", "LocalLinear"]

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import divergence
from .kernels import exp
from .workspace import Workspace


class Integral:
    """What the divergence of a weight shares with the operation that integrated it out.

    The operation returns, beside its output, a zero: the carrier. The gradient that the carrier receives is that of
    the divergence, whose gradients the operation's backward pass adds to its own where they are made. The graph holds
    this object, so it must not hold the carrier.
    """

    __slots__ = ("slope", "variance", "workspace")

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.variance: Tensor
        self.slope: Tensor | None = None  # of the one divergence whose gradients are added here


class LocalLinear(torch.autograd.Function):
    """output = mean + √variance · ε, with mean and variance linear in the weight's mean and variance.

    The gradient reaches the variance through r = ε / √variance, the only tensor of the output's size that is saved;
    that of √variance is r/2. Where the variance is 0, as for an input of zeros, r is finite and multiplies zeros.

    What concerns the mean and what concerns the variance lie behind each other in one tensor, and each pair of matrix
    products is one batched product: on a CPU the two then run side by side, one thread each.
    """

    @staticmethod
    def forward(  # noqa: D102 # as of every autograd function
        ctx: Any, x: Tensor, loc: Tensor, log_variance: Tensor, bias: Tensor | None, integral: Integral
    ) -> tuple[Tensor, Tensor]:
        inputs, weights = (integral.workspace.empty((2, *t.shape), t) for t in (x, loc))
        x_copy, squares = inputs.unbind()
        torch.mul(x_copy.copy_(x), x, out=squares)
        loc_copy, variance = weights.unbind()
        loc_copy.copy_(loc)
        integral.variance = exp(log_variance, out=variance)
        outputs = integral.workspace.empty((2, x.shape[0], loc.shape[0]), x)
        output, output_variance = torch.bmm(inputs, weights.mT, out=outputs).unbind()
        if bias is not None:
            output.add_(bias)
        r = _add_noise_(output, output_variance, integral.workspace)
        ctx.save_for_backward(inputs, weights, r)
        ctx.integral = integral
        ctx.set_materialize_grads(False)
        return output, loc.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(  # noqa: D102
        ctx: Any, grad: Tensor | None, grad_kl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        inputs, weights, r = ctx.saved_tensors
        workspace = ctx.integral.workspace
        x_needed, loc_needed, log_variance_needed, bias_needed, _ = ctx.needs_input_grad
        grads = workspace.empty((2, *r.shape), r)
        grad_mean, grad_squares = grads.unbind()
        grad_mean.zero_() if grad is None else grad_mean.copy_(grad)
        torch.mul(grad_mean, r, out=grad_squares)  # twice the gradient of the variance
        grad_x = grad_loc = grad_log_variance = None
        if x_needed:
            of_mean, of_squares = torch.bmm(grads, weights, out=workspace.empty_like(inputs)).unbind()
            grad_x = of_mean.addcmul_(of_squares, inputs[0])
        if loc_needed or log_variance_needed:
            grad_squares.mul_(0.5)
            grad_loc, grad_variance = torch.bmm(grads.mT, inputs, out=workspace.empty_like(weights)).unbind()
            grad_log_variance = grad_variance.mul_(weights[1])
            _add_kl_gradients_(grad_loc, grad_log_variance, weights[0], ctx.integral, grad_kl)
        grad_bias = grad_mean.sum(0) if bias_needed else None
        return grad_x, grad_loc, grad_log_variance, grad_bias, None


class LocalConvolution(torch.autograd.Function):
    """As for a linear layer, with independent noise for each output pixel."""

    @staticmethod
    def forward(  # noqa: D102 # as of every autograd function
        ctx: Any,
        x: Tensor,
        loc: Tensor,
        log_variance: Tensor,
        bias: Tensor | None,
        integral: Integral,
        *geometry: Any,
    ) -> tuple[Tensor, Tensor]:
        workspace = integral.workspace
        integral.variance = variance = exp(log_variance, out=workspace.empty_like(log_variance))
        output = torch.convolution(x, loc, bias, *geometry)
        squares = torch.mul(x, x, out=workspace.empty_like(x))
        r = _add_noise_(output, torch.convolution(squares, variance, None, *geometry), workspace)
        ctx.save_for_backward(x, squares, loc, variance, r)
        ctx.integral, ctx.geometry = integral, geometry
        ctx.set_materialize_grads(False)
        return output, loc.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(  # noqa: D102
        ctx: Any, grad: Tensor | None, grad_kl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, squares, loc, variance, r = ctx.saved_tensors
        workspace, geometry = ctx.integral.workspace, ctx.geometry
        x_needed, loc_needed, log_variance_needed, bias_needed, *_ = ctx.needs_input_grad
        grad = torch.zeros_like(r) if grad is None else grad
        grad_squares = torch.mul(grad, r, out=workspace.empty_like(r))  # twice the gradient of the variance
        backward, bias_size = torch.ops.aten.convolution_backward, [grad.shape[1]]
        grey = x.is_cpu and _is_grey_image(x, geometry)
        needed = x_needed, loc_needed and not grey, bias_needed
        grad_x, grad_loc, grad_bias = backward(grad, x, loc, bias_size, *geometry, needed)
        needed = x_needed, log_variance_needed and not grey, False
        grad_x_squares, grad_log_variance, _ = backward(grad_squares, squares, variance, bias_size, *geometry, needed)
        if x_needed:
            grad_x.addcmul_(grad_x_squares, x)
        if grey:
            grad_loc, grad_log_variance = _weight_gradients_of_grey_images(
                grad, grad_squares, x, loc.shape, geometry, workspace
            )
        grad_loc = grad_loc.contiguous() if loc_needed else None
        grad_log_variance = grad_log_variance.contiguous().mul_(variance).mul_(0.5) if log_variance_needed else None
        _add_kl_gradients_(grad_loc, grad_log_variance, loc, ctx.integral, grad_kl)
        return grad_x, grad_loc, grad_log_variance, grad_bias, None, *(None for _ in geometry)


def _is_grey_image(x: Tensor, geometry: tuple) -> bool:
    *_, transposed, _, groups = geometry
    return x.dim() == 4 and x.shape[1] == groups == 1 and not transposed


def _weight_gradients_of_grey_images(
    grad: Tensor, grad_squares: Tensor, x: Tensor, shape: torch.Size, geometry: tuple, workspace: Workspace
) -> tuple[Tensor, Tensor]:
    """Returns the weight's gradients of a convolution of x and of one of its squares.

    For images of one channel oneDNN takes several times as long as the matrix products that these gradients are.
    """
    stride, padding, dilation, *_ = geometry
    grad, grad_squares = grad.flatten(2), grad_squares.flatten(2)
    patches = workspace.empty((len(x), shape[2:].numel(), grad.shape[2]), x)
    torch.ops.aten.im2col.out(x.contiguous(), shape[2:], dilation, padding, stride, out=patches)
    grad_mean = torch.bmm(grad, patches.transpose(1, 2)).sum(0)
    grad_variance = torch.bmm(grad_squares, patches.mul_(patches).transpose(1, 2)).sum(0)
    return grad_mean.view(shape), grad_variance.view(shape)


def _add_noise_(output: Tensor, variance: Tensor, workspace: Workspace) -> Tensor:
    """Adds the noise to the mean, and returns r in the place of the variance."""
    std = variance.clamp_min_(torch.finfo(variance.dtype).tiny).sqrt_()
    noise = workspace.empty_like(std).normal_()
    output.addcmul_(std, noise)
    return torch.div(noise, std, out=std)


def _add_kl_gradients_(
    grad_loc: Tensor | None, grad_log_variance: Tensor | None, loc: Tensor, integral: Integral, grad: Tensor | None
) -> None:
    if grad is not None and integral.slope is not None:
        divergence.add_gradients_(grad_loc, grad_log_variance, loc, integral.variance, integral.slope, grad)
