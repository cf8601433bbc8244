r"""The local reparameterisation trick, as an effect handler.

Under :func:`local_reparam`, a factorised Gaussian sample site yields a :class:`LazyWeight`: a tensor of the right
shape, dtype and device that holds a mean and a log variance, and no numbers. ``F.linear`` and the convolutions, where
they meet one, sample their output instead of the weight. Anything else draws the weight, once, and computes with that
draw. The handler is used in the three ways of Pyro's own::

    guide = local_reparam(guide)                     # a function of a function
    with local_reparam(): ...                        # a context
    trace = poutine.trace(local_reparam(guide)).get_trace(x, y)
    poutine.replay(model, trace=trace)(x, y)         # the model receives the weight that is not drawn

A linear layer is exact: each datum of the batch has its own, independent draw of the weight, integrated out. In a
convolution the noise of each output pixel is independent, while one draw of a kernel would correlate the pixels of an
image: the marginals are right, and the gradient has less variance.

References:
    | Variational Dropout and the Local Reparameterization Trick (Kingma, Salimans, Welling, 2015)
    | https://arxiv.org/abs/1506.02557
"""

__all__ = ["LazyWeight", "LocalReparamMessenger", "RepeatedUseError", "local_reparam"]

import inspect
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from .divergence import FORMS, Form, KLForm, add_kl_gradients_, kl_log_uniform_total, total_kl
from .distributions import log_variance_of, unwrap_independent
from .workspace import Workspace


class RepeatedUseError(Exception):
    """A weight was used again after a local reparameterisation had stood in for its one draw.

    Args:
        site: The name of the weight's sample site.
    """

    def __init__(self, site: str) -> None:
        super().__init__(
            f"{site}: used more than once in a pass, so its output cannot be sampled instead of the weight itself; "
            f"exclude the site: local_reparam(..., exclude={{{site!r}}})"
        )
        self.site = site


class LocalReparamMessenger(Messenger):
    """The handler behind :func:`local_reparam`.

    Args:
        exclude: Names of sites that are drawn as usual.
        workspace: Where to take memory from.
    """

    def __init__(self, exclude: Collection[str] = (), workspace: Workspace | None = None) -> None:
        super().__init__()
        self.exclude = exclude
        self.workspace = Workspace() if workspace is None else workspace

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["done"] or msg["value"] is not None or msg["name"] in self.exclude or msg["cond_indep_stack"]:
            return
        base = unwrap_independent(fn)
        if isinstance(base, torch.distributions.Normal) and fn.event_shape and not fn.batch_shape:
            msg["value"] = LazyWeight(base, msg["name"], self.workspace)


def local_reparam(
    fn: Callable | None = None, *, exclude: Collection[str] = (), workspace: Workspace | None = None
) -> Any:
    """Makes factorised Gaussian weights lazy: their users sample outputs instead of weights, where they can.

    Args:
        fn: A function with Pyro sample statements, such as a guide; without it, a context manager is returned.
        exclude: Names of sites that are drawn as usual. A weight that a model uses more than once in a pass, such as
            a tied or a recurrent one, must have one draw.
        workspace: Where to take memory from; one that is kept from step to step saves its allocation.

    Returns:
        The wrapped function, or a context manager.

    Raises:
        RepeatedUseError: Later, where a weight that was not excluded is used a second time.

    Example:
        >>> guide = lambda: pyro.sample("w", pyro.distributions.Normal(torch.zeros(3, 4), 1.0).to_event(2))
        >>> w = local_reparam(guide)()
        >>> w
        LazyWeight('w', shape=(3, 4))
        >>> torch.nn.functional.linear(torch.randn(8, 4), w).shape
        torch.Size([8, 3])
    """
    messenger = LocalReparamMessenger(exclude, workspace)
    return messenger if fn is None else messenger(fn)


class LazyWeight(Tensor):
    """A factorised Gaussian weight that is not drawn until somebody needs its numbers.

    Args:
        base_dist: The normal distribution of its elements.
        site: The name of its sample site.
        workspace: Where to take memory from.
    """

    base_dist: torch.distributions.Normal
    site: str
    _workspace: Workspace
    _drawn: Tensor | None
    _integral: "_Integral | None"

    @staticmethod
    def __new__(cls, base_dist: torch.distributions.Normal, site: str, workspace: Workspace) -> "LazyWeight":
        loc = base_dist.loc
        self = Tensor._make_wrapper_subclass(cls, loc.shape, dtype=loc.dtype, device=loc.device)
        self.base_dist, self.site, self._workspace = base_dist, site, workspace
        self._drawn, self._integral = None, None
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LazyWeight({self.site!r}, shape={tuple(self.shape)})"

    def draw(self) -> Tensor:
        """Returns the one draw of the weight.

        Raises:
            RepeatedUseError: If a sampled output has already stood in for it.
        """
        if self._drawn is None:
            if self._integral is not None:
                raise RepeatedUseError(self.site)
            self._drawn = self.base_dist.rsample()
        return self._drawn

    def value_for_density(self) -> Tensor:
        """Returns the draw if there is one, else an independent draw: the bound's terms are separate expectations."""
        return self.base_dist.rsample() if self._drawn is None else self._drawn

    def kl_log_uniform_total(self, form: Form) -> Tensor:
        """Returns the sum of :func:`~.divergence.kl_log_uniform` over the weight's elements.

        Where an output was sampled instead of the weight, the gradient travels with that of the output, and is
        added to it in place.

        Args:
            form: ``"approximate"`` or ``"exact"``.

        Returns:
            A scalar, in nats.
        """
        if self._integral is None:
            return kl_log_uniform_total(self.base_dist.loc, log_variance_of(self.base_dist), form)
        return self._integral.kl_total(FORMS[form])

    def integrate_out(self, function: type["_LocalOutput"], x: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        """Returns a sample of the output of a linear operation on x, for the one user that needs no more.

        Args:
            function: The operation.
            x: Its input.
            bias: Its bias.
            *geometry: What else it needs.

        Returns:
            The sampled output.

        Raises:
            RepeatedUseError: If the weight was used in this way before.
        """
        if self._integral is not None:
            raise RepeatedUseError(self.site)
        self._integral = _Integral(self.base_dist.loc, self._workspace)
        with torch.autocast(x.device.type, enabled=False):
            loc, log_variance = self.base_dist.loc, log_variance_of(self.base_dist)
            output, self._integral.carrier = function.apply(x, loc, log_variance, bias, self._integral, *geometry)
        return output

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _LOCAL_FORMS:
            signature, local = _LOCAL_FORMS[func]
            call = signature.bind(*args, **kwargs)
            if _samples_output(call.arguments):
                return local(**{k: _drawn(v) if k != "weight" else v for k, v in call.arguments.items()})
        return func(*_drawn(tuple(args)), **_drawn(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_drawn(tuple(args)), **_drawn(kwargs or {}))


def _samples_output(arguments: dict[str, Any]) -> bool:
    weight = arguments["weight"]
    return isinstance(weight, LazyWeight) and weight._drawn is None and weight.dim() > 1


def _drawn(tree: Any) -> Any:
    return tree_map_only(LazyWeight, LazyWeight.draw, tree)


# What can be asked of a weight without its numbers.
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_leaf", "is_cpu", "is_cuda", "is_sparse", "is_nested", "is_meta")),
    *(getattr(Tensor, name).__get__ for name in ("is_mkldnn", "is_quantized", "grad_fn")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.__len__, Tensor.element_size),
    *(Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex, torch.numel),
}


def _local_linear(input: Tensor, weight: LazyWeight, bias: Tensor | None = None) -> Tensor:  # noqa: A002 # as in torch
    x = _out_of_autocast(input, weight.dtype).reshape(-1, input.shape[-1])
    return weight.integrate_out(_LocalLinear, x, bias).reshape(*input.shape[:-1], weight.shape[0])


def _local_convolution(
    dims: int,
    input: Tensor,  # noqa: A002 # as in torch
    weight: LazyWeight,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    transposed: bool = False,
    output_padding: Any = 0,
) -> Tensor:
    stride, dilation, output_padding = (_per_dim(v, dims) for v in (stride, dilation, output_padding))
    batched = input.dim() == dims + 2
    x = _out_of_autocast(input if batched else input.unsqueeze(0), weight.dtype)
    if padding == "same":
        x, padding = _pad_same(x, weight.shape[2:], dilation)
    padding = _per_dim(0 if padding == "valid" else padding, dims)
    output = weight.integrate_out(
        _LocalConvolution, x, bias, stride, padding, dilation, transposed, output_padding, groups
    )
    return output if batched else output.squeeze(0)


def _local_transposed_convolution(
    dims: int,
    input: Tensor,  # noqa: A002 # as in torch
    weight: LazyWeight,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    return _local_convolution(
        dims, input, weight, bias, stride, padding, dilation, groups, transposed=True, output_padding=output_padding
    )


def _out_of_autocast(input: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: A002
    # Small variances underflow in half precision: a local form is computed in the weight's own dtype.
    return input.to(dtype) if torch.is_autocast_enabled(input.device.type) else input


def _per_dim(value: Any, dims: int) -> list[int]:
    value = [value] if isinstance(value, int) else list(value)
    return value * dims if len(value) == 1 else value


def _pad_same(batch: Tensor, kernel: torch.Size, dilation: list[int]) -> tuple[Tensor, list[int]]:
    """Returns the batch, padded where the total is odd, and the symmetric padding that is left to do."""
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(total % 2 for total in totals):
        batch = F.pad(batch, [side for total in reversed(totals) for side in (0, total % 2)])
    return batch, [total // 2 for total in totals]


class _Integral:
    """What the divergence of a weight shares with the operation that integrated it out.

    The operation returns, beside its output, a zero: the carrier. The gradient that the carrier receives is that of
    the divergence, whose gradients the operation's backward pass adds to its own where they are made.
    """

    def __init__(self, loc: Tensor, workspace: Workspace) -> None:
        self.loc = loc
        self.workspace = workspace
        self.variance: Tensor | None = None
        self.carrier: Tensor | None = None
        self.form: KLForm | None = None

    def kl_total(self, form: KLForm) -> Tensor:
        assert self.variance is not None
        self.form = form
        return total_kl(self.loc.detach(), self.variance, form) + self.carrier


class _LocalOutput(torch.autograd.Function):
    """output = mean + √variance · ε, with mean and variance linear in the weight's mean and variance.

    The gradient reaches the variance through r = ε / (2 √variance), the only tensor of the output's size that is
    saved. Where the variance is 0, as for an input of zeros, r is finite and multiplies zeros.
    """

    @classmethod
    def sample(
        cls, ctx: Any, x: Tensor, loc: Tensor, log_variance: Tensor, bias: Tensor | None, integral: _Integral
    ) -> tuple[Tensor, Tensor]:
        """Returns the output and the carrier."""
        empty_like = integral.workspace.empty_like
        variance = torch.exp(log_variance, out=empty_like(log_variance))
        output = cls.linear(ctx, x, loc, bias)
        std = cls.linear(ctx, torch.mul(x, x, out=empty_like(x)), variance, None)
        std.clamp_min_(torch.finfo(std.dtype).tiny).sqrt_()
        noise = empty_like(std).normal_()
        output.addcmul_(std, noise)
        integral.variance = variance
        ctx.save_for_backward(x, loc, variance, noise.div_(std).mul_(0.5))
        ctx.set_materialize_grads(False)
        return output, loc.new_zeros(())

    @classmethod
    def gradients(cls, ctx: Any, grad: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the input, the mean, the log variance and the bias."""
        x, loc, variance, r = ctx.saved_tensors
        empty_like = ctx.integral.workspace.empty_like
        if grad is None:
            grad = torch.zeros_like(r)
        squares = torch.mul(x, x, out=empty_like(x))
        x_needed, loc_needed, variance_needed, bias_needed, *_ = ctx.needs_input_grad
        grad_x, grad_loc, grad_bias = cls.linear_backward(ctx, grad, x, loc, (x_needed, loc_needed, bias_needed))
        grad_squares, grad_log_variance, _ = cls.linear_backward(
            ctx, torch.mul(grad, r, out=empty_like(r)), squares, variance, (x_needed, variance_needed, False)
        )
        if x_needed:
            grad_x.addcmul_(grad_squares, x, value=2)
        if variance_needed:
            grad_log_variance.mul_(variance)
        if grad_kl is not None:
            add_kl_gradients_(grad_loc, grad_log_variance, loc, variance, grad_kl, ctx.integral.form)
        return grad_x, grad_loc, grad_log_variance, grad_bias


class _LocalLinear(_LocalOutput):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, loc: Tensor, log_variance: Tensor, bias: Tensor | None, integral: _Integral
    ) -> tuple[Tensor, Tensor]:
        ctx.integral = integral
        return _LocalLinear.sample(ctx, x, loc, log_variance, bias, integral)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_LocalLinear.gradients(ctx, *grads), None

    @staticmethod
    def linear(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = ctx.integral.workspace.empty((len(x), len(weight)), x)
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)

    @staticmethod
    def linear_backward(
        ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        empty_like = ctx.integral.workspace.empty_like
        x_needed, weight_needed, bias_needed = needed
        return (
            torch.mm(grad, weight, out=empty_like(x)) if x_needed else None,
            torch.mm(grad.t(), x, out=empty_like(weight)) if weight_needed else None,
            grad.sum(0) if bias_needed else None,
        )


class _LocalConvolution(_LocalOutput):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        loc: Tensor,
        log_variance: Tensor,
        bias: Tensor | None,
        integral: _Integral,
        *geometry: Any,
    ) -> tuple[Tensor, Tensor]:
        ctx.integral, ctx.geometry = integral, geometry
        return _LocalConvolution.sample(ctx, x, loc, log_variance, bias, integral)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_LocalConvolution.gradients(ctx, *grads), None, *(None for _ in ctx.geometry)

    @staticmethod
    def linear(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, *ctx.geometry)

    @staticmethod
    def linear_backward(
        ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        return torch.ops.aten.convolution_backward(grad, x, weight, [grad.shape[1]], *ctx.geometry, needed)


def _form(local: Callable) -> tuple[inspect.Signature, Callable]:
    return inspect.signature(local), local


_LOCAL_FORMS = {
    F.linear: _form(_local_linear),
    F.conv1d: _form(partial(_local_convolution, 1)),
    F.conv2d: _form(partial(_local_convolution, 2)),
    F.conv3d: _form(partial(_local_convolution, 3)),
    F.conv_transpose1d: _form(partial(_local_transposed_convolution, 1)),
    F.conv_transpose2d: _form(partial(_local_transposed_convolution, 2)),
    F.conv_transpose3d: _form(partial(_local_transposed_convolution, 3)),
}
