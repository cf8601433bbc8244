"""A Gaussian weight that is not sampled until somebody needs its numbers, and what is done with it instead."""

__all__ = ["LazyWeight", "PassNotes", "PassSpoiled", "RepeatedUseError", "kl_log_uniform_total"]

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_leaves, tree_map_only

from .._compat import in_backward_pass, in_function_transform, tensor_without_memory, without_torch_function
from ..distributions.sparse_normal import SparseNormal, log_variance_of
from ..ops import divergence
from ..ops.geometry import pad_same, per_dim
from ..ops.kernels import KERNELS
from ..ops.local_convolution import LocalConvolution, LocalGreyConvolution
from ..ops.local_linear import Integral, LocalLinear
from ..ops.workspace import Workspace

Form = divergence.Form


class RepeatedUseError(Exception):
    """A weight was used again after a local reparameterisation had stood in for its one sample.

    Args:
        site: The name of the weight's sample site.
    """

    def __init__(self, site: str) -> None:
        super().__init__(
            f"{site}: used more than once in a pass, so its output cannot be sampled instead of the weight itself; "
            f"exclude the site: local_reparam(..., exclude={{{site!r}}})"
        )
        self.site = site


class PassNotes(set[str]):
    """Names of weights whose sample a pass needed, where sampled outputs had stood in for them or not.

    Example:
        >>> PassNotes().is_running
        True
    """

    is_running = True


class PassSpoiled(Exception):  # noqa: N818 # no error: the pass starts again
    """A weight that a pass needs in numbers has to be sampled before the model runs."""


class LazyWeight(Tensor):
    r"""A factorised Gaussian weight that is not sampled until somebody needs its numbers.

    To autograd it is the output of a function of θ and log σ² whose backward pass maps the gradient g of the weight
    :math:`w = \theta + \sigma \varepsilon` to :math:`(g, \tfrac12 g \sigma \varepsilon)`. The linear operations that
    know it sample their output instead. Every other function runs as on any tensor, and its sample takes its place
    below autograd; so the gradient is right whatever the weight is given to.

    Args:
        base_dist: The normal distribution of its elements.
        site: The name of its sample site.
        workspace: Where to take memory from.
        notes: Where to note the site once the sample is needed, be it after a sampled output stood in for the weight,
            which spoils the pass; without it, or after the pass, that is an error.
    """

    base_dist: torch.distributions.Normal
    log_variance: Tensor
    site: str
    _workspace: Workspace
    _notes: PassNotes | None
    _noise: "_Noise"
    _integral: Integral | None
    _carrier: Tensor

    @staticmethod
    def __new__(  # noqa: D102
        cls,
        base_dist: torch.distributions.Normal,
        site: str,
        workspace: Workspace,
        notes: PassNotes | None = None,
    ) -> "LazyWeight":
        noise, log_variance = _Noise(base_dist), log_variance_of(base_dist)
        self: LazyWeight = _Sampling.apply(base_dist.loc, log_variance, noise)
        self.base_dist, self.log_variance, self.site, self._workspace = base_dist, log_variance, site, workspace
        self._noise, self._notes, self._integral = noise, notes, None
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyWeight({self.site!r}, shape={tuple(self.shape)})"

    def __format__(self, spec: str) -> str:
        return repr(self)

    def numpy(self, *, force: bool = False) -> Any:
        """Returns the sample as an array, where torch would return that of a tensor.

        Raises:
            RuntimeError: If the weight needs a gradient, which an array would lose.
        """
        if self.requires_grad and not force:
            raise RuntimeError(f"{self.site}: a weight that needs a gradient is no array; use .detach().numpy()")
        return self.detach().numpy(force=force)

    def register_hook(self, hook: Callable[[Tensor], Any]) -> Any:
        """Registers a hook on the gradient of the sample, which sampled outputs would pass by."""
        self._numbers()
        return super().register_hook(hook)

    def retain_grad(self) -> None:
        """Keeps the gradient of the sample, which sampled outputs would pass by."""
        self._numbers()
        super().retain_grad()

    def tolist(self) -> Any:
        """Returns the sample as lists of numbers."""
        return self.detach().tolist()

    def data_ptr(self) -> int:
        """Returns the address of the sample."""
        return self._numbers().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Returns the memory of the sample."""
        return self._numbers().untyped_storage()

    def __dlpack__(self, **options: Any) -> Any:
        """Returns the sample as a DLPack capsule, where torch would return that of a tensor."""
        return self.detach().requires_grad_(self.requires_grad).__dlpack__(**options)

    @property
    def data(self) -> Tensor:
        """The sample without a gradient; what is assigned to it takes the sample's place in this pass."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.site}: expected a tensor as its data, but got {type(value).__name__}")
        if (value.shape, value.dtype, value.device) != (self.shape, self.dtype, self.device):
            raise RuntimeError(
                f"{self.site}: expected data of shape {tuple(self.shape)}, {self.dtype}, on {self.device}, but got "
                f"{tuple(value.shape)}, {value.dtype}, on {value.device}"
            )
        self._numbers()
        self._noise.sample = value.detach().contiguous()

    def value_for_density(self) -> Tensor:
        """Returns the weight if it was sampled, else a sample apart: the bound's terms are separate expectations."""
        return self.base_dist.rsample() if self._noise.sample is None else self

    def integrate_out(self, function: Any, x: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        """Returns a sample of the output of a linear operation on x, for the one user that needs no more.

        Args:
            function: The operation, an autograd function.
            x: Its input.
            bias: Its bias.
            *geometry: What else it needs.

        Returns:
            The sampled output.
        """
        is_first = self._integral is None
        if not (is_first or in_backward_pass()):  # where a checkpoint computes the one use again
            self._note_sampled()
        loc, log_variance = self.base_dist.loc, self.log_variance
        integral = Integral(self._workspace, partial(_note_derivative, self.site, self._notes))
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
        local = _LOCAL_FORMS.get(func)
        if local is not None:
            result = local(*args, **kwargs)
            if result is not NotImplemented:
                return result
        elif func is torch.autograd.grad:
            for weight in tree_leaves(args[1] if len(args) > 1 else kwargs["inputs"]):
                if isinstance(weight, LazyWeight) and weight._noise.sample is None:
                    weight._note_sampled()
                    raise PassSpoiled
        with without_torch_function():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(LazyWeight, LazyWeight._numbers, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)

    def _numbers(self) -> Tensor:
        """Returns the numbers of the sample, which autograd knows nothing of."""
        if self._noise.sample is None:
            self._note_sampled()
            self._noise.draw()
        assert self._noise.sample is not None
        return self._noise.sample

    def _note_sampled(self) -> None:
        is_running = self._notes is not None and self._notes.is_running
        if self._integral is not None and not is_running:  # too late to start again
            raise RepeatedUseError(self.site)
        if self._notes is not None:
            self._notes.add(self.site)


# The graph holds this, so it must not hold the weight.
def _note_derivative(site: str, notes: PassNotes | None) -> None:
    """Notes that a sampled output is differentiated, which within a model is no derivative of its network."""
    if notes is not None and notes.is_running:
        notes.add(site)
    elif torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(
            f"{site}: a sampled output has no second derivative; sample the weight instead, by "
            f"SparseVD_ELBO(exclude={site!r}) or local_reparam=False"
        )


class _Noise:
    """The one sample of a weight, and the standard normal ε that it was made of."""

    __slots__ = ("base_dist", "eps", "is_inference", "sample")

    def __init__(self, base_dist: torch.distributions.Normal) -> None:
        self.base_dist = base_dist
        self.is_inference = torch.is_inference_mode_enabled()
        self.eps: Tensor
        self.sample: Tensor | None = None

    def draw(self) -> None:
        loc = self.base_dist.loc
        # Who asks first may do so in inference mode, others may need a gradient.
        mode = torch.inference_mode(self.is_inference)
        with mode if torch.is_inference_mode_enabled() != self.is_inference else nullcontext(), torch.no_grad():
            self.eps = torch.empty(loc.shape, dtype=loc.dtype, device=loc.device).normal_()
            q = self.base_dist
            scale = q.noise_scale if isinstance(q, SparseNormal) else q.scale
            self.sample = (loc + self.eps * scale).contiguous()  # as the weight says it is


class _Sampling(torch.autograd.Function):
    """w = θ + σ ε, with an ε that is not known before somebody needs it."""

    @staticmethod
    def forward(ctx: FunctionCtx, loc: Tensor, log_variance: Tensor, noise: _Noise) -> Tensor:
        ctx.save_for_backward(log_variance)
        ctx.noise = noise  # type: ignore[attr-defined]
        return tensor_without_memory(LazyWeight, loc)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (log_variance,) = ctx.saved_tensors
        return grad, 0.5 * grad * ctx.noise.eps * (0.5 * log_variance).exp(), None


# A local form has the signature of the function whose output it samples. It leaves to that function, with the weight
# sampled, what is not a linear operation on a plain input by a weight that is not sampled yet.
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
    if type(weight) is not LazyWeight or weight._noise.sample is not None:
        return False
    is_dense = type(x) is not LazyWeight and x.layout is torch.strided and not x.is_nested and x.dim() > 0
    # Where no graph is recorded for a weight that needs a gradient, as in the forward method of an autograd function,
    # somebody else is about to differentiate, and means one weight. Transforms as vmap know no sampled output.
    has_gradient = torch.is_grad_enabled() or not weight.requires_grad
    return is_dense and has_gradient and _have_same_dtype(x, weight, bias) and not in_function_transform()


def _have_same_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tells whether torch will not refuse these operands, as it says best itself."""
    dtypes = {x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype}
    return len(dtypes) == 1 or (torch.float64 not in dtypes and torch.is_autocast_enabled(x.device.type))


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
            totals.append(divergence.kl_log_uniform_total(w.base_dist.loc, w.log_variance, form))
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
