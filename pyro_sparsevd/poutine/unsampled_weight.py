"""A Gaussian weight that is sampled only where its numbers are needed."""

__all__ = ["LOCAL_FORMS", "PassNotes", "PassSpoiled", "RepeatedUseError", "UnsampledWeight"]

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .._compat import in_backward_pass, tensor_without_memory, tree_leaves, tree_map_only, without_torch_function
from ..distributions.sparse_normal import SparseNormal, log_variance_of
from ..ops.local_linear import KLHandle
from ..ops.memory import Workspace

# What samples the output of a function of torch, by that function; local_forms.py fills it.
LOCAL_FORMS: dict[Any, Callable] = {}


class RepeatedUseError(Exception):
    """A weight was used again after an output had been sampled in place of its one sample."""

    def __init__(self, site: str) -> None:
        super().__init__(
            f"{site}: used more than once in a pass, so its output cannot be sampled instead of the weight itself; "
            f"exclude the site: local_reparam(..., exclude={{{site!r}}})"
        )
        self.site = site


class PassNotes(set[str]):
    """Names of the weights whose own sample a pass needed, whether or not an output was sampled in their place."""

    is_running = True


class PassSpoiled(Exception):  # noqa: N818 # no error: the pass starts again
    """A pass must start again, with a weight sampled before the model runs."""


class UnsampledWeight(Tensor):
    r"""A factorised Gaussian weight that is sampled only where its numbers are needed.

    To autograd it is the output of a function of θ and log σ² whose backward pass maps the gradient g of the weight
    :math:`w = \theta + \sigma \varepsilon` to :math:`(g, \tfrac12 g \sigma \varepsilon)`. The functions in LOCAL_FORMS
    sample their output instead. Every other function runs as on any tensor, and the sample takes the weight's place
    below autograd; so the gradient is right whatever the weight is given to.

    The site is added to ``notes`` once its sample is needed. If that is after an output was sampled in its place, the
    pass is spoiled; without notes, or after the pass, it is an error.
    """

    base_dist: torch.distributions.Normal
    log_variance: Tensor
    site: str
    _workspace: Workspace
    _notes: PassNotes | None
    _noise: "_Noise"
    _kl_handle: KLHandle | None
    _kl_zero: Tensor

    @staticmethod
    def __new__(  # noqa: D102
        cls, base_dist: torch.distributions.Normal, site: str, workspace: Workspace, notes: PassNotes | None = None
    ) -> "UnsampledWeight":
        noise, log_variance = _Noise(base_dist), log_variance_of(base_dist)
        self: UnsampledWeight = _Sampling.apply(base_dist.loc, log_variance, noise)
        self.base_dist, self.log_variance, self.site, self._workspace = base_dist, log_variance, site, workspace
        self._noise, self._notes, self._kl_handle = noise, notes, None
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"UnsampledWeight({self.site!r}, shape={tuple(self.shape)})"

    def numpy(self, *, force: bool = False) -> Any:
        """Returns the sample as an array; torch's own method would see a tensor without memory."""
        if self.requires_grad and not force:
            raise RuntimeError(f"{self.site}: a weight that needs a gradient is no array; use .detach().numpy()")
        return self.detach().numpy(force=force)

    def register_hook(self, hook: Callable[[Tensor], Any]) -> Any:
        """Registers a hook on the gradient of the sample, which sampled outputs would bypass."""
        self._numbers()
        return super().register_hook(hook)

    def retain_grad(self) -> None:
        """Keeps the gradient of the sample, which sampled outputs would bypass."""
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
        """Returns the sample as a DLPack capsule; torch's own method would see a tensor without memory."""
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
        """Returns the weight if it is sampled, else another sample: the bound's terms are separate expectations."""
        return self if self.is_sampled else self.base_dist.rsample()

    @property
    def is_sampled(self) -> bool:
        """Whether it has numbers already."""
        return self._noise.sample is not None

    def sample_output(self, function: Any, x: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        """Returns a sample of the output of a linear operation, an autograd function such as LocalLinear, on x."""
        is_first = self._kl_handle is None
        if not (is_first or in_backward_pass()):  # where a checkpoint computes the one use again
            self._note_sampled()
        loc, log_variance = self.base_dist.loc, self.log_variance
        handle = KLHandle(self._workspace, partial(_note_derivative, self.site, self._notes))
        autocast = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():  # small variances underflow
            x = x.to(loc.dtype) if autocast else x
            output, kl_zero = function.apply(x, loc, log_variance, bias, handle, *geometry)
        if is_first:
            self._kl_handle, self._kl_zero = handle, kl_zero
        return output.to(torch.get_autocast_dtype(x.device.type)) if autocast else output

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        local_form = LOCAL_FORMS.get(func)
        if local_form is not None:
            result = local_form(*args, **kwargs)
            if result is not NotImplemented:
                return result
        elif func is torch.autograd.grad:
            for weight in tree_leaves(args[1] if len(args) > 1 else kwargs["inputs"]):
                if isinstance(weight, UnsampledWeight) and not weight.is_sampled:
                    weight._note_sampled()
                    raise PassSpoiled
        with without_torch_function():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(UnsampledWeight, UnsampledWeight._numbers, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)

    def _numbers(self) -> Tensor:
        """Returns the sample, without a gradient."""
        if self._noise.sample is None:
            self._note_sampled()
            self._noise.draw()
        assert self._noise.sample is not None
        return self._noise.sample

    def _note_sampled(self) -> None:
        is_running = self._notes is not None and self._notes.is_running
        if self._kl_handle is not None and not is_running:  # too late to start again
            raise RepeatedUseError(self.site)
        if self._notes is not None:
            self._notes.add(self.site)


# The graph holds this, so it must not hold the weight.
def _note_derivative(site: str, notes: PassNotes | None) -> None:
    """Notes that a sampled output is differentiated within the model, where the network's own derivative is meant."""
    if notes is not None and notes.is_running:
        notes.add(site)
    elif torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(
            f"{site}: a sampled output has no second derivative; sample the weight instead, by "
            f"SparseVD_ELBO(exclude={site!r}) or local_reparam=False"
        )


@dataclass(slots=True, eq=False)
class _Noise:
    """The one sample of a weight, once it is needed, and its standard normal ε."""

    base_dist: torch.distributions.Normal
    is_inference: bool = field(default_factory=torch.is_inference_mode_enabled)
    eps: Tensor = field(init=False)
    sample: Tensor | None = None

    def draw(self) -> None:
        loc = self.base_dist.loc
        # The first access may be in inference mode; sample in the mode in which the weight was created.
        mode = torch.inference_mode(self.is_inference)
        with mode if torch.is_inference_mode_enabled() != self.is_inference else nullcontext(), torch.no_grad():
            self.eps = torch.empty(loc.shape, dtype=loc.dtype, device=loc.device).normal_()
            q = self.base_dist
            scale = q.noise_scale if isinstance(q, SparseNormal) else q.scale
            self.sample = (loc + self.eps * scale).contiguous()  # as the weight says it is


class _Sampling(torch.autograd.Function):
    """w = θ + σ ε, with an ε that is sampled only where w is needed."""

    @staticmethod
    def forward(ctx: FunctionCtx, loc: Tensor, log_variance: Tensor, noise: _Noise) -> Tensor:
        ctx.save_for_backward(log_variance)
        ctx.noise = noise  # type: ignore[attr-defined]
        return tensor_without_memory(UnsampledWeight, loc)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (log_variance,) = ctx.saved_tensors
        return grad, 0.5 * grad * ctx.noise.eps * (0.5 * log_variance).exp(), None
