"""Linear operations by a Gaussian weight that sample their output, as autograd functions."""

__all__ = ["Integral", "LocalConvolution", "LocalGreyConvolution", "LocalLinear"]

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import divergence, fused
from .geometry import output_size, patches_of, wastes_channels
from .workspace import Workspace, is_channels_last


class Integral:
    """What the divergence of a weight shares with the operation that integrated it out.

    The operation returns, beside its output, a zero: the carrier. The gradient that the carrier receives is that of
    the divergence, whose gradients the operation's backward pass adds to its own where they are made. The graph holds
    this object, so it must not hold the carrier.
    """

    __slots__ = ("on_backward", "slope", "variance", "workspace")

    def __init__(self, workspace: Workspace, on_backward: Callable[[], None]) -> None:
        self.workspace = workspace
        self.on_backward = on_backward
        self.variance: Tensor
        self.slope: Tensor | None = None  # of the one divergence whose gradients are added here


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Says that a derivative is taken; torch's own decorator says nothing where the gradient given needs none."""
    once = once_differentiable(backward)

    @wraps(backward)
    def noted(ctx: Any, *grads: Any) -> Any:
        ctx.integral.on_backward()
        return once(ctx, *grads)

    return noted


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
        integral.variance = fused.exp(log_variance, out=variance)
        outputs = integral.workspace.empty((2, x.shape[0], loc.shape[0]), x)
        output, output_variance = torch.bmm(inputs, weights.mT, out=outputs).unbind()
        if bias is not None:
            output.add_(bias)
        r = _add_noise_(output, output_variance, integral.workspace)
        ctx.save_for_backward(inputs, weights, r)
        ctx.integral = integral
        ctx.set_materialize_grads(False)
        return output.data, loc.new_zeros(())  # a view would refuse a change in place, as by nn.ReLU(inplace=True)

    @staticmethod
    @_once_differentiable
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
            grad_loc, grad_log_variance = torch.bmm(grads.mT, inputs, out=workspace.empty_like(weights)).unbind()
            _finish_gradients_(grad_loc, grad_log_variance, weights[0], ctx.integral, grad_kl)
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
        integral.variance = variance = fused.exp(log_variance, out=workspace.empty_like(log_variance))
        inputs = _channels_last(x, workspace) if wastes_channels(x, loc, geometry) else x
        squares = torch.mul(inputs, inputs, out=workspace.empty_like(inputs))
        output = torch.convolution(inputs, loc, bias, *geometry)
        r = _add_noise_(output, torch.convolution(squares, variance, None, *geometry), workspace)
        if inputs is not x:  # whoever asks for a view of the output expects the strides that it always had
            output = workspace.empty(output.shape, output).copy_(output)
        ctx.save_for_backward(inputs, squares, loc, variance, r)
        ctx.integral, ctx.geometry = integral, geometry
        ctx.set_materialize_grads(False)
        return output, loc.new_zeros(())

    @staticmethod
    @_once_differentiable
    def backward(  # noqa: D102
        ctx: Any, grad: Tensor | None, grad_kl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, squares, loc, variance, r = ctx.saved_tensors
        workspace, geometry = ctx.integral.workspace, ctx.geometry
        x_needed, loc_needed, log_variance_needed, bias_needed, *_ = ctx.needs_input_grad
        if grad is None:
            grad = torch.zeros_like(r)
        elif not grad.is_contiguous(memory_format=torch.channels_last) and is_channels_last(r):
            grad = _channels_last(grad, workspace)
        grad_x, grad_loc = _convolution_gradients(grad, x, loc, geometry, (x_needed, loc_needed))
        grad_squares = torch.mul(grad, r, out=workspace.empty_like(r))  # twice the gradient of the variance
        needed = x_needed, log_variance_needed
        grad_x_squares, grad_variance = _convolution_gradients(grad_squares, squares, variance, geometry, needed)
        if x_needed:
            grad_x.addcmul_(grad_x_squares, x)
        grad_loc = grad_loc.contiguous() if loc_needed else None
        grad_log_variance = grad_variance.contiguous() if log_variance_needed else None
        _finish_gradients_(grad_loc, grad_log_variance, loc, ctx.integral, grad_kl)
        grad_bias = _sum_of_channels(grad) if bias_needed else None
        return grad_x, grad_loc, grad_log_variance, grad_bias, None, *(None for _ in geometry)


class LocalGreyConvolution(torch.autograd.Function):
    """As any convolution, for images of one channel that need no gradient, such as data.

    For these, oneDNN pads 1 channel to 16 and takes several times as long as the matrix products with the patches of
    the images that a convolution is.
    """

    @staticmethod
    def applies(x: Tensor, shape: torch.Size, geometry: tuple) -> bool:
        """Tells whether a convolution is of this kind, and its patches take not much more memory than its output.

        Args:
            x: Its input.
            shape: The shape of its weight.
            geometry: Its stride, padding, dilation and so on.

        Returns:
            Whether it is.
        """
        *_, transposed, _, groups = geometry
        is_grey = x.is_cpu and x.dim() == 4 and x.shape[1] == groups == 1 and not (transposed or x.requires_grad)
        return is_grey and shape[2:].numel() <= 2 * shape[0] and min(output_size(x, shape[2:], geometry)) > 0

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
        integral.variance = variance = fused.exp(log_variance, out=workspace.empty_like(log_variance))
        patches = patches_of(x, loc.shape[2:], geometry, workspace)
        squares = torch.mul(patches, patches, out=workspace.empty_like(patches))  # made again in the backward pass
        shape = len(x), len(loc), patches.shape[2]
        output, output_variance = (
            torch.bmm(weight.flatten(1).expand(len(x), -1, -1), of, out=workspace.empty(shape, x))
            for weight, of in ((loc, patches), (variance, squares))
        )
        if bias is not None:
            output.add_(bias[:, None])
        r = _add_noise_(output, output_variance, workspace)
        ctx.save_for_backward(patches, loc, r)
        ctx.integral = integral
        ctx.set_materialize_grads(False)
        return output.view(*shape[:2], *output_size(x, loc.shape[2:], geometry)).data, loc.new_zeros(())

    @staticmethod
    @_once_differentiable
    def backward(  # noqa: D102
        ctx: Any, grad: Tensor | None, grad_kl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        patches, loc, r = ctx.saved_tensors
        workspace = ctx.integral.workspace
        grad = torch.zeros_like(r) if grad is None else grad.flatten(2)
        grad_squares = torch.mul(grad, r, out=workspace.empty_like(r))  # twice that of the variance
        squares = torch.mul(patches, patches, out=workspace.empty_like(patches))
        grad_loc, grad_log_variance = (
            torch.bmm(of_output, of.mT).sum(0).view(loc.shape)
            for of_output, of in ((grad, patches), (grad_squares, squares))
        )
        _finish_gradients_(grad_loc, grad_log_variance, loc, ctx.integral, grad_kl)
        grad_bias = _sum_of_channels(grad) if ctx.needs_input_grad[3] else None
        return None, grad_loc, grad_log_variance, grad_bias, *(None for _ in ctx.needs_input_grad[4:])


def _channels_last(x: Tensor, workspace: Workspace) -> Tensor:
    return workspace.empty_channels_last(x.shape, x).copy_(x)


def _convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple, needed: tuple[bool, bool]
) -> list[Any]:
    """Returns the gradients in the input and the weight that are needed. For the bias, a sum is much cheaper."""
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, (*needed, False))[:2]


def _sum_of_channels(grad: Tensor) -> Tensor:
    return grad.sum([dim for dim in range(grad.dim()) if dim != 1])


def _add_noise_(output: Tensor, variance: Tensor, workspace: Workspace) -> Tensor:
    """Adds the noise to the mean, and returns r in the place of the variance."""
    noise = workspace.empty(variance.shape, variance).normal_()
    if fused.serve(output, variance, noise):
        fused.add_noise(output, variance, noise)
        return variance
    if is_channels_last(variance):  # a seed gives the same noise in any memory format
        noise = workspace.empty_like(variance).copy_(noise)
    std = variance.clamp_min_(torch.finfo(variance.dtype).tiny).sqrt_()
    output.addcmul_(std, noise)
    return torch.div(noise, std, out=std)


def _finish_gradients_(
    grad_loc: Tensor | None, grad_variance: Tensor | None, loc: Tensor, integral: Integral, grad_kl: Tensor | None
) -> None:
    """Turns twice the gradient in σ² into that in log σ², and adds the gradients of the divergence that is shared."""
    variance, slope = integral.variance, integral.slope
    tensors: Any = grad_loc, grad_variance, loc, variance, slope
    if grad_kl is not None and fused.serve(*tensors):
        fused.finish_gradients(grad_kl.item(), *tensors)
        return
    if grad_variance is not None:
        grad_variance.mul_(variance).mul_(0.5)
    if grad_kl is not None and slope is not None:
        divergence.add_gradients_(grad_loc, grad_variance, loc, variance, slope, grad_kl)
