"""A Gaussian weight that is not drawn until somebody needs its numbers, and what is done with it instead."""

__all__ = ["LazyWeight", "RepeatedUseError", "kl_log_uniform_total"]

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import divergence
from .distributions import log_variance_of
from .geometry import pad_same, per_dim
from .kernels import KERNELS
from .local_functions import Integral, LocalConvolution, LocalGreyConvolution, LocalLinear
from .sites import in_backward_pass
from .workspace import Workspace

Form = divergence.Form


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
    _modes: tuple[bool, bool]
    _integral: "Integral | None"
    _carrier: Tensor

    @staticmethod
    def __new__(cls, base_dist: torch.distributions.Normal, site: str, workspace: Workspace) -> "LazyWeight":  # noqa: D102
        loc = base_dist.loc
        self = Tensor._make_wrapper_subclass(cls, loc.shape, dtype=loc.dtype, device=loc.device)
        self.base_dist, self.site, self._workspace = base_dist, site, workspace
        self._drawn, self._integral = None, None
        self._modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyWeight({self.site!r}, shape={tuple(self.shape)})"

    def __format__(self, spec: str) -> str:
        return repr(self)

    def draw(self) -> Tensor:
        """Returns the one draw of the weight.

        Raises:
            RepeatedUseError: If a sampled output has already stood in for it.
        """
        if self._drawn is None:
            if self._integral is not None:
                raise RepeatedUseError(self.site)
            # Who asks first may do so without a gradient, others may need it.
            inference, grad = self._modes
            with torch.inference_mode(inference), torch.set_grad_enabled(grad), _outside_of_transforms():
                self._drawn = self.base_dist.rsample()
        return self._drawn

    def repeated(self) -> "LazyWeight":
        """Returns the weight as it was before its use, to be used in the same way again."""
        return LazyWeight(self.base_dist, self.site, self._workspace)

    def value_for_density(self) -> Tensor:
        """Returns the draw if there is one, else an independent draw: the bound's terms are separate expectations."""
        return self.base_dist.rsample() if self._drawn is None else self._drawn

    def integrate_out(self, function: Any, x: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        """Returns a sample of the output of a linear operation on x, for the one user that needs no more.

        Args:
            function: The operation, an autograd function.
            x: Its input.
            bias: Its bias.
            *geometry: What else it needs.

        Returns:
            The sampled output.

        Raises:
            RepeatedUseError: If the weight was used in this way before.
        """
        is_first = self._integral is None
        if not (is_first or in_backward_pass()):  # where a checkpoint computes the one use again
            raise RepeatedUseError(self.site)
        loc, log_variance, bias = self.base_dist.loc, log_variance_of(self.base_dist), _drawn(bias)
        integral = Integral(self._workspace)
        autocast = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():  # small variances underflow
            x = x.to(loc.dtype) if autocast else x
            output, carrier = function.apply(x, loc, log_variance, bias, integral, *geometry)
        if is_first:
            self._integral, self._carrier = integral, carrier
        return output.to(torch.get_autocast_dtype(x.device.type)) if autocast else output

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.detach and in_backward_pass():
            raise RuntimeError(
                f"{args[0].site}: given to torch.utils.checkpoint with use_reentrant=True, which would lose its "
                "gradient; use use_reentrant=False"
            )
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        local = _LOCAL_FORMS.get(func)
        if local is not None:
            result = local(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*_drawn(tuple(args)), **_drawn(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*_drawn(tuple(args)), **_drawn(kwargs or {}))


def _drawn(tree: Any) -> Any:
    if tree is None or type(tree) is Tensor or type(tree) is torch.nn.Parameter:
        return tree
    return tree_map_only(LazyWeight, LazyWeight.draw, tree)


# What can be asked of a weight without its numbers.
_METADATA: set[Any] = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_leaf", "is_cpu", "is_cuda", "is_sparse", "is_nested", "is_meta")),
    *(getattr(Tensor, name).__get__ for name in ("is_mkldnn", "is_quantized", "grad_fn")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.__len__, Tensor.element_size),
    *(Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex, torch.numel),
}


# A local form has the signature of the function whose output it samples. It leaves to that function, with the weight
# drawn, what is not a linear operation on a plain input by a weight that is not drawn yet.
def _local_linear(input: Any, weight: Any, bias: Any = None) -> Any:  # noqa: A002 # as in torch
    if not _can_integrate_out(input, weight, bias) or weight.base_dist.loc.dim() != 2:
        return NotImplemented
    if input.dim() == 2:
        return weight.integrate_out(LocalLinear, input, bias)
    output = weight.integrate_out(LocalLinear, input.reshape(-1, input.shape[-1]), bias)
    return output.reshape(*input.shape[:-1], output.shape[-1])


def _local_convolution(
    dims: int,
    input: Any,  # noqa: A002 # as in torch
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    transposed: bool = False,
    output_padding: Any = 0,
) -> Any:
    if not _can_integrate_out(input, weight, bias):
        return NotImplemented
    stride, dilation, output_padding = (per_dim(v, dims) for v in (stride, dilation, output_padding))
    batched = input.dim() == dims + 2
    x = input if batched else input.unsqueeze(0)
    if padding == "same":
        if any(s != 1 for s in stride):
            raise RuntimeError(f"padding='same': expected a stride of 1, but got {stride}")
        x, padding = pad_same(x, weight.shape[2:], dilation)
    padding = per_dim(0 if padding == "valid" else padding, dims)
    geometry = stride, padding, dilation, transposed, output_padding, groups
    is_grey = LocalGreyConvolution.applies(x, weight.base_dist.loc.shape, geometry)
    output = weight.integrate_out(LocalGreyConvolution if is_grey else LocalConvolution, x, bias, *geometry)
    return output if batched else output.squeeze(0)


def _local_transposed_convolution(
    dims: int,
    input: Any,  # noqa: A002 # as in torch
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    return _local_convolution(
        dims, input, weight, bias, stride, padding, dilation, groups, transposed=True, output_padding=output_padding
    )


def _can_integrate_out(x: Any, weight: Any, bias: Any) -> bool:
    is_undrawn = type(weight) is LazyWeight and weight._drawn is None
    is_dense = type(x) is not LazyWeight and x.layout is torch.strided and not x.is_nested and x.dim() > 0
    return is_undrawn and is_dense and _have_same_dtype(x, weight, bias) and not _in_transform()


def _have_same_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tells whether torch will not refuse these operands, as it says best itself."""
    dtypes = {x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype}
    return len(dtypes) == 1 or (torch.float64 not in dtypes and torch.is_autocast_enabled(x.device.type))


def _in_transform() -> bool:
    """Tells whether a transform of torch.func is at work, such as vmap, which knows no output that is sampled."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _outside_of_transforms() -> AbstractContextManager:
    """Lets one draw be that of all that a transform of torch.func maps over."""
    if not _in_transform():
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def kl_log_uniform_total(weights: Sequence[LazyWeight], form: Form) -> Tensor:
    """Returns the sum of :func:`~.divergence.kl_log_uniform` over the elements of several weights.

    Where an output was sampled instead of a weight, the gradient of the first divergence of that weight is added in
    place to that of the output.

    Args:
        weights: The weights, at least one.
        form: ``"approximate"`` or ``"exact"``.

    Returns:
        A scalar, in nats.

    Example:
        >>> q = pyro.distributions.Normal(torch.zeros(3, 4), 1.0)
        >>> kl_log_uniform_total([LazyWeight(q, "w", Workspace())], "exact")
        tensor(0.)
    """
    totals, integrated = [], []
    for w in weights:
        # An output that was sampled without a gradient passes none on.
        shares = w._integral is not None and w._integral.slope is None and w._carrier.requires_grad
        if shares and w.base_dist.loc.dtype in (torch.float32, torch.float64):
            integrated.append(w)
        else:
            totals.append(divergence.kl_log_uniform_total(w.base_dist.loc, log_variance_of(w.base_dist), form))
    if integrated:
        totals.append(_kl_of_integrated(integrated, form))
    return sum(totals[1:], start=totals[0])


def _kl_of_integrated(weights: list[LazyWeight], form: Form) -> Tensor:
    integrals = [w._integral for w in weights if w._integral is not None]
    locs = [w.base_dist.loc.detach() for w in weights]
    memory = integrals[0].workspace.empty((sum(loc.numel() for loc in locs),), locs[0])
    total, slopes = divergence.total_and_slopes(locs, [i.variance for i in integrals], KERNELS[form], memory)
    for integral, slope in zip(integrals, slopes, strict=True):
        integral.slope = slope
    return sum((w._carrier for w in weights), start=total)


_LOCAL_FORMS: dict[Any, Callable] = {
    F.linear: _local_linear,
    F.conv1d: partial(_local_convolution, 1),
    F.conv2d: partial(_local_convolution, 2),
    F.conv3d: partial(_local_convolution, 3),
    F.conv_transpose1d: partial(_local_transposed_convolution, 1),
    F.conv_transpose2d: partial(_local_transposed_convolution, 2),
    F.conv_transpose3d: partial(_local_transposed_convolution, 3),
}
