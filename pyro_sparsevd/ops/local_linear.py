"""A linear layer that samples its output instead of its weight: of mean x θᵀ and variance x² (σ²)ᵀ.

It is the trick of :mod:`~.local_reparam`, which names the paper.
"""

__all__ = ["KLHandle", "LocalLinear", "add_noise_", "finish_gradients_", "once_differentiable"]

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function

from . import divergence, fused
from .memory import Workspace, is_channels_last


@dataclass(slots=True, eq=False)
class KLHandle:
    """What the KL of a weight shares with the operation that sampled its output.

    The operation returns a scalar zero beside its output, to be added to the KL. The gradient that this zero receives
    is that of the KL, and the operation's backward pass adds the KL's gradients to its own in place. The graph holds
    this object, so it must not hold that zero.
    """

    workspace: Workspace
    on_backward: Callable[[], None]
    variance: Tensor = field(init=False)
    derivative: Tensor | None = None  # of the first KL, whose gradients are added here


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses a second derivative, and calls ``on_backward`` also where the gradient given needs none."""
    once = function.once_differentiable(backward)

    @wraps(backward)
    def noted(ctx: Any, *grads: Any) -> Any:
        ctx.handle.on_backward()
        return once(ctx, *grads)

    return noted


class LocalLinear(torch.autograd.Function):
    """output = mean + √variance · ε, with mean and variance linear in the weight's mean and variance.

    The gradient reaches the variance through r = ε / √variance, the only tensor of the output's size that is saved;
    that of √variance is r/2. Where the variance is 0, as for an input of zeros, r is finite and multiplies zeros.

    The tensors of the mean and of the variance are stacked, so that each pair of matrix products is one batched
    product, which a CPU computes with one thread each.
    """

    @staticmethod
    def forward(  # noqa: D102 # as of every autograd function
        ctx: Any, x: Tensor, loc: Tensor, log_variance: Tensor, bias: Tensor | None, handle: KLHandle
    ) -> tuple[Tensor, Tensor]:
        inputs, weights = (handle.workspace.empty((2, *t.shape), t) for t in (x, loc))
        x_copy, squares = inputs.unbind()
        torch.mul(x_copy.copy_(x), x, out=squares)
        loc_copy, variance = weights.unbind()
        loc_copy.copy_(loc)
        handle.variance = fused.exp(log_variance, out=variance)
        outputs = handle.workspace.empty((2, x.shape[0], loc.shape[0]), x)
        output, output_variance = torch.bmm(inputs, weights.mT, out=outputs).unbind()
        if bias is not None:
            output.add_(bias)
        r = add_noise_(output, output_variance, handle.workspace)
        ctx.save_for_backward(inputs, weights, r)
        ctx.handle = handle
        ctx.set_materialize_grads(False)
        return output.data, loc.new_zeros(())  # a view would refuse a change in place, as by nn.ReLU(inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102
        inputs, weights, r = ctx.saved_tensors
        workspace = ctx.handle.workspace
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
            finish_gradients_(grad_loc, grad_log_variance, weights[0], ctx.handle, grad_kl)
        grad_bias = grad_mean.sum(0) if bias_needed else None
        return grad_x, grad_loc, grad_log_variance, grad_bias, None


def add_noise_(output: Tensor, variance: Tensor, workspace: Workspace) -> Tensor:
    """Adds the noise to the mean, and overwrites the variance with r, which it returns."""
    noise = workspace.empty(variance.shape, variance).normal_()
    if fused.serve(output, variance, noise):
        fused.add_noise(output, variance, noise)
        return variance
    if is_channels_last(variance):  # a seed gives the same noise in any memory format
        noise = workspace.empty_like(variance).copy_(noise)
    std = variance.clamp_min_(torch.finfo(variance.dtype).tiny).sqrt_()
    output.addcmul_(std, noise)
    return torch.div(noise, std, out=std)


def finish_gradients_(
    grad_loc: Tensor | None, grad_variance: Tensor | None, loc: Tensor, handle: KLHandle, grad_kl: Tensor | None
) -> None:
    """Turns twice the gradient in σ² into that in log σ², and adds the gradients of the KL of the handle."""
    variance, derivative = handle.variance, handle.derivative
    tensors: Any = grad_loc, grad_variance, loc, variance, derivative
    if grad_kl is not None and fused.serve(*tensors):
        fused.finish_gradients(grad_kl.item(), *tensors)
        return
    if grad_variance is not None:
        grad_variance.mul_(variance).mul_(0.5)
    if grad_kl is not None and derivative is not None:
        divergence.add_gradients_(grad_loc, grad_variance, loc, variance, derivative, grad_kl)
