"""The functions of torch that sample their output where their weight is not sampled yet.

Each takes the arguments of the function that it stands for. It returns NotImplemented, and that function runs on the
sampled weight, for all but a linear operation on an ordinary tensor by a weight that is not sampled yet.
"""

__all__ = ["local_convolution", "local_linear"]

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._compat import in_function_transform
from ..ops.geometry import pad_same, per_dim
from ..ops.local_convolution import LocalConvolution, SingleChannelConvolution
from ..ops.local_linear import LocalLinear
from .unsampled_weight import LOCAL_FORMS, UnsampledWeight


def local_linear(input: Any, weight: Any, bias: Any = None) -> Any:  # noqa: A002 # as in torch
    """Samples the output of ``F.linear``."""
    if not _can_sample_output(input, weight, bias) or weight.base_dist.loc.dim() != 2:
        return NotImplemented
    if input.dim() == 2:
        return weight.sample_output(LocalLinear, input, bias)
    output = weight.sample_output(LocalLinear, input.reshape(-1, input.shape[-1]), bias)
    return output.reshape(*input.shape[:-1], output.shape[-1])


def local_convolution(dims: int, transposed: bool, input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: A002
    """Samples the output of a convolution, or of a transposed one, over ``dims`` dimensions."""
    names = _TRANSPOSED_ARGUMENTS if transposed else _ARGUMENTS
    given = _DEFAULTS | dict(zip(names, args, strict=False)) | kwargs
    if len(args) > len(names) or not kwargs.keys() <= _DEFAULTS.keys():  # torch's own function says what is wrong
        return NotImplemented
    bias, padding = given["bias"], given["padding"]
    if not _can_sample_output(input, weight, bias):
        return NotImplemented
    stride, dilation, output_padding = (per_dim(given[name], dims) for name in ("stride", "dilation", "output_padding"))
    batched = input.dim() == dims + 2
    x = input if batched else input.unsqueeze(0)
    if padding == "same":
        if any(s != 1 for s in stride):
            raise RuntimeError(f"padding='same': expected a stride of 1, but got {stride}")
        x, padding = pad_same(x, weight.shape[2:], dilation)
    padding = per_dim(0 if padding == "valid" else padding, dims)
    geometry = stride, padding, dilation, transposed, output_padding, given["groups"]
    single_channel = SingleChannelConvolution.applies(x, weight.base_dist.loc.shape, geometry)
    output = weight.sample_output(SingleChannelConvolution if single_channel else LocalConvolution, x, bias, *geometry)
    return output if batched else output.squeeze(0)


def _can_sample_output(x: Any, weight: Any, bias: Any) -> bool:
    if type(weight) is not UnsampledWeight or weight.is_sampled:
        return False
    is_dense = type(x) is not UnsampledWeight and x.layout is torch.strided and not x.is_nested and x.dim() > 0
    # A weight that needs a gradient where no graph is recorded, as in the forward method of an autograd function, will
    # be differentiated by the caller, as one sample. Transforms such as vmap cannot batch a sampled output.
    has_gradient = torch.is_grad_enabled() or not weight.requires_grad
    return is_dense and has_gradient and _dtypes_are_accepted(x, weight, bias) and not in_function_transform()


def _dtypes_are_accepted(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tells whether torch accepts these dtypes together."""
    dtypes = {x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype}
    return len(dtypes) == 1 or (torch.float64 not in dtypes and torch.is_autocast_enabled(x.device.type))


# What torch's functions take after input and weight, in their order.
_ARGUMENTS = ("bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGUMENTS = ("bias", "stride", "padding", "output_padding", "groups", "dilation")
_DEFAULTS: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}

LOCAL_FORMS.update(
    {
        F.linear: local_linear,
        F.conv1d: partial(local_convolution, 1, False),
        F.conv2d: partial(local_convolution, 2, False),
        F.conv3d: partial(local_convolution, 3, False),
        F.conv_transpose1d: partial(local_convolution, 1, True),
        F.conv_transpose2d: partial(local_convolution, 2, True),
        F.conv_transpose3d: partial(local_convolution, 3, True),
    }
)
