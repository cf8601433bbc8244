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

from .distributions import log_variance_of, unwrap_independent


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
    """

    def __init__(self, exclude: Collection[str] = ()) -> None:
        super().__init__()
        self.exclude = exclude

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["done"] or msg["value"] is not None or msg["name"] in self.exclude or msg["cond_indep_stack"]:
            return
        base = unwrap_independent(fn)
        if isinstance(base, torch.distributions.Normal) and fn.event_shape and not fn.batch_shape:
            msg["value"] = LazyWeight(base, msg["name"])


def local_reparam(fn: Callable | None = None, *, exclude: Collection[str] = ()) -> Any:
    """Makes factorised Gaussian weights lazy: their users sample outputs instead of weights, where they can.

    Args:
        fn: A function with Pyro sample statements, such as a guide; without it, a context manager is returned.
        exclude: Names of sites that are drawn as usual. A weight that a model uses more than once in a pass, such as
            a tied or a recurrent one, must have one draw.

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
    messenger = LocalReparamMessenger(exclude)
    return messenger if fn is None else messenger(fn)


class LazyWeight(Tensor):
    """A factorised Gaussian weight that is not drawn until somebody needs its numbers.

    Args:
        base_dist: The normal distribution of its elements.
        site: The name of its sample site.
    """

    base_dist: torch.distributions.Normal
    site: str
    _drawn: Tensor | None
    _used: bool

    @staticmethod
    def __new__(cls, base_dist: torch.distributions.Normal, site: str) -> "LazyWeight":
        loc = base_dist.loc
        self = Tensor._make_wrapper_subclass(cls, loc.shape, dtype=loc.dtype, device=loc.device)
        self.base_dist, self.site = base_dist, site
        self._drawn, self._used = None, False
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LazyWeight({self.site!r}, shape={tuple(self.shape)})"

    def draw(self) -> Tensor:
        """Returns the one draw of the weight.

        Raises:
            RepeatedUseError: If a sampled output has already stood in for it.
        """
        if self._drawn is None:
            if self._used:
                raise RepeatedUseError(self.site)
            self._drawn = self.base_dist.rsample()
        return self._drawn

    def value_for_density(self) -> Tensor:
        """Returns the draw if there is one, else an independent draw: the bound's terms are separate expectations."""
        return self.base_dist.rsample() if self._drawn is None else self._drawn

    def integrate_out(self) -> tuple[Tensor, Tensor]:
        """Returns the mean and the log variance, for the one user that samples its output instead.

        Raises:
            RepeatedUseError: If another has done so before.
        """
        if self._used:
            raise RepeatedUseError(self.site)
        self._used = True
        return self.base_dist.loc, log_variance_of(self.base_dist)

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
    loc, log_variance = weight.integrate_out()
    input = _out_of_autocast(input, loc.dtype)  # noqa: A001
    with torch.autocast(input.device.type, enabled=False):
        output = _LocalLinear.apply(input.reshape(-1, input.shape[-1]), loc, log_variance, bias)
    return output.reshape(*input.shape[:-1], loc.shape[0])


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
    loc, log_variance = weight.integrate_out()
    stride, dilation, output_padding = (_per_dim(v, dims) for v in (stride, dilation, output_padding))
    batched = input.dim() == dims + 2
    batch = _out_of_autocast(input if batched else input.unsqueeze(0), loc.dtype)
    if padding == "same":
        batch, padding = _pad_same(batch, loc.shape[2:], dilation)
    padding = _per_dim(0 if padding == "valid" else padding, dims)
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    with torch.autocast(input.device.type, enabled=False):
        output = _LocalConvolution.apply(batch, loc, log_variance, bias, geometry)
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


class _LocalOutput(torch.autograd.Function):
    """output = mean + √variance · ε, with mean and variance linear in the weight's mean and variance.

    The gradient reaches the variance through r = ε / (2 √variance), the only tensor of the output's size that is
    saved. Where the variance is 0, as for an input of zeros, r is finite and multiplies zeros.
    """

    @staticmethod
    def sample(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Overwrites both arguments, and returns the output and r."""
        std = variance.clamp_min_(torch.finfo(variance.dtype).tiny).sqrt_()
        noise = torch.randn_like(mean)
        output = mean.addcmul_(std, noise)
        return output, noise.div_(std).mul_(0.5)


class _LocalLinear(_LocalOutput):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loc: Tensor, log_variance: Tensor, bias: Tensor | None) -> Tensor:
        variance = log_variance.exp()
        mean = torch.addmm(bias, x, loc.t()) if bias is not None else x @ loc.t()
        output, r = _LocalOutput.sample(mean, (x * x) @ variance.t())
        ctx.save_for_backward(x, loc, variance, r)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, loc, variance, r = ctx.saved_tensors
        x_needed, loc_needed, log_variance_needed, bias_needed = ctx.needs_input_grad
        grad_variance = r.mul(grad)
        grad_x = grad_loc = grad_log_variance = None
        if x_needed:
            grad_x = torch.addmm((grad_variance @ variance).mul_(x), grad, loc, beta=2)
        if loc_needed:
            grad_loc = grad.t() @ x
        if log_variance_needed:
            grad_log_variance = (grad_variance.t() @ (x * x)).mul_(variance)
        return grad_x, grad_loc, grad_log_variance, grad.sum(0) if bias_needed else None


class _LocalConvolution(_LocalOutput):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, loc: Tensor, log_variance: Tensor, bias: Tensor | None, geometry: tuple
    ) -> Tensor:
        variance = log_variance.exp()
        mean = torch.convolution(x, loc, bias, *geometry)
        output, r = _LocalOutput.sample(mean, torch.convolution(x * x, variance, None, *geometry))
        ctx.save_for_backward(x, loc, variance, r)
        ctx.geometry = geometry
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, loc, variance, r = ctx.saved_tensors
        x_needed, loc_needed, log_variance_needed, bias_needed, _ = ctx.needs_input_grad
        backward = torch.ops.aten.convolution_backward
        grad_x, grad_loc, grad_bias = backward(
            grad, x, loc, [grad.shape[1]], *ctx.geometry, [x_needed, loc_needed, bias_needed]
        )
        grad_square, grad_log_variance, _ = backward(
            r.mul(grad), x * x, variance, None, *ctx.geometry, [x_needed, log_variance_needed, False]
        )
        if x_needed:
            grad_x.addcmul_(grad_square, x, value=2)
        if log_variance_needed:
            grad_log_variance.mul_(variance)
        return grad_x, grad_loc, grad_log_variance, grad_bias, None


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
