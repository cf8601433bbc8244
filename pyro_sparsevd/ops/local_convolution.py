"""Convolutions that sample their output instead of their weight.

The mean is the convolution of the input with θ, the variance that of the squared input with σ². What they share with
linear layers, such as the noise, is in :mod:`~.local_linear`; :mod:`~.local_forms` chooses between them.
"""

__all__ = ["LocalConvolution", "SingleChannelConvolution"]

from typing import Any

import torch
from torch import Tensor

from . import fused
from .geometry import output_size, patches_of, prefers_channels_last
from .local_linear import KLHandle, add_noise_, finish_gradients_, once_differentiable
from .memory import is_channels_last


class LocalConvolution(torch.autograd.Function):
    """As for a linear layer, with independent noise for each output pixel."""

    @staticmethod
    def forward(  # noqa: D102 # as of every autograd function
        ctx: Any, x: Tensor, loc: Tensor, log_variance: Tensor, bias: Tensor | None, handle: KLHandle, *geometry: Any
    ) -> tuple[Tensor, Tensor]:
        workspace = handle.workspace
        handle.variance = variance = fused.exp(log_variance, out=workspace.empty_like(log_variance))
        inputs = workspace.empty_channels_last(x.shape, x).copy_(x) if prefers_channels_last(x, loc, geometry) else x
        squares = torch.mul(inputs, inputs, out=workspace.empty_like(inputs))
        output = torch.convolution(inputs, loc, bias, *geometry)
        r = add_noise_(output, torch.convolution(squares, variance, None, *geometry), workspace)
        if inputs is not x:  # views of the output need the strides of torch's own convolution
            output = workspace.empty(output.shape, output).copy_(output)
        ctx.save_for_backward(inputs, squares, loc, variance, r)
        ctx.handle, ctx.geometry = handle, geometry
        ctx.set_materialize_grads(False)
        return output, loc.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, squares, loc, variance, r = ctx.saved_tensors
        workspace, geometry = ctx.handle.workspace, ctx.geometry
        x_needed, loc_needed, log_variance_needed, bias_needed, *_ = ctx.needs_input_grad
        if grad is None:
            grad = torch.zeros_like(r)
        elif not grad.is_contiguous(memory_format=torch.channels_last) and is_channels_last(r):
            grad = workspace.empty_channels_last(grad.shape, grad).copy_(grad)
        grad_x, grad_loc = _convolution_gradients(grad, x, loc, geometry, (x_needed, loc_needed))
        grad_squares = torch.mul(grad, r, out=workspace.empty_like(r))  # twice the gradient of the variance
        needed = x_needed, log_variance_needed
        grad_x_squares, grad_variance = _convolution_gradients(grad_squares, squares, variance, geometry, needed)
        if x_needed:
            grad_x.addcmul_(grad_x_squares, x)
        grad_loc = grad_loc.contiguous() if loc_needed else None
        grad_log_variance = grad_variance.contiguous() if log_variance_needed else None
        finish_gradients_(grad_loc, grad_log_variance, loc, ctx.handle, grad_kl)
        grad_bias = grad.sum((0, *range(2, grad.dim()))) if bias_needed else None
        return grad_x, grad_loc, grad_log_variance, grad_bias, None, *(None for _ in geometry)


class SingleChannelConvolution(torch.autograd.Function):
    """As any convolution, for images of one channel that need no gradient, such as data.

    For these, oneDNN pads 1 channel to 16 and takes several times as long as matrix products with the images' patches.
    """

    @staticmethod
    def applies(x: Tensor, shape: torch.Size, geometry: tuple) -> bool:
        """Tells whether a convolution is of this kind, and its patches take not much more memory than its output."""
        *_, transposed, _, groups = geometry
        has_one_channel = x.is_cpu and x.dim() == 4 and x.shape[1] == groups == 1
        if not has_one_channel or transposed or x.requires_grad:
            return False
        return shape[2:].numel() <= 2 * shape[0] and min(output_size(x, shape[2:], geometry)) > 0

    @staticmethod
    def forward(  # noqa: D102 # as of every autograd function
        ctx: Any, x: Tensor, loc: Tensor, log_variance: Tensor, bias: Tensor | None, handle: KLHandle, *geometry: Any
    ) -> tuple[Tensor, Tensor]:
        workspace = handle.workspace
        handle.variance = variance = fused.exp(log_variance, out=workspace.empty_like(log_variance))
        patches = patches_of(x, loc.shape[2:], geometry, workspace)
        squares = torch.mul(patches, patches, out=workspace.empty_like(patches))  # made again in the backward pass
        shape = len(x), len(loc), patches.shape[2]
        output, output_variance = (
            torch.bmm(weight.flatten(1).expand(len(x), -1, -1), of, out=workspace.empty(shape, x))
            for weight, of in ((loc, patches), (variance, squares))
        )
        if bias is not None:
            output.add_(bias[:, None])
        r = add_noise_(output, output_variance, workspace)
        ctx.save_for_backward(patches, loc, r)
        ctx.handle = handle
        ctx.set_materialize_grads(False)
        return output.view(*shape[:2], *output_size(x, loc.shape[2:], geometry)).data, loc.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102
        patches, loc, r = ctx.saved_tensors
        workspace = ctx.handle.workspace
        grad = torch.zeros_like(r) if grad is None else grad.flatten(2)
        grad_squares = torch.mul(grad, r, out=workspace.empty_like(r))  # twice that of the variance
        squares = torch.mul(patches, patches, out=workspace.empty_like(patches))
        grad_loc, grad_log_variance = (
            torch.bmm(of_output, of.mT).sum(0).view(loc.shape)
            for of_output, of in ((grad, patches), (grad_squares, squares))
        )
        finish_gradients_(grad_loc, grad_log_variance, loc, ctx.handle, grad_kl)
        grad_bias = grad.sum((0, 2)) if ctx.needs_input_grad[3] else None
        return None, grad_loc, grad_log_variance, grad_bias, *(None for _ in ctx.needs_input_grad[4:])


def _convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: tuple, needed: tuple[bool, bool]
) -> list[Any]:
    """Returns the gradients in the input and the weight that are needed. For the bias, a sum is much cheaper."""
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, (*needed, False))[:2]
