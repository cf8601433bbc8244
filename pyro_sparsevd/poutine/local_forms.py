"""The functions of torch that sample their output where their weight is not sampled yet.

Each has the signature of the function that it stands for. It returns NotImplemented, and the weight is sampled, for all
but a linear operation on an ordinary tensor by a weight that is not sampled yet.
"""

__all__ = ["local_convolution", "local_linear", "local_transposed_convolution"]

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


def local_convolution(
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
    """Samples the output of a convolution over ``dims`` dimensions."""
    if not _can_sample_output(input, weight, bias):
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
    single_channel = SingleChannelConvolution.applies(x, weight.base_dist.loc.shape, geometry)
    output = weight.sample_output(SingleChannelConvolution if single_channel else LocalConvolution, x, bias, *geometry)
    return output if batched else output.squeeze(0)


def local_transposed_convolution(
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
    """Samples the output of a transposed convolution over ``dims`` dimensions."""
    return local_convolution(
        dims, input, weight, bias, stride, padding, dilation, groups, transposed=True, output_padding=output_padding
    )


def _can_sample_output(x: Any, weight: Any, bias: Any) -> bool:
    if type(weight) is not UnsampledWeight or weight.is_sampled:
        return False
    is_dense = type(x) is not UnsampledWeight and x.layout is torch.strided and not x.is_nested and x.dim() > 0
    # A weight that needs a gradient where no graph is recorded, as in the forward method of an autograd function, will
    # be differentiated by the caller, as one sample. Transforms such as vmap cannot batch a sampled output.
    has_gradient = torch.is_grad_enabled() or not weight.requires_grad
    return is_dense and has_gradient and _dtypes_are_accepted(x, weight, bias) and not in_function_transform()


def _dtypes_are_accepted(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tells whether torch accepts these dtypes together; if not, its own function says so best."""
    dtypes = {x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype}
    return len(dtypes) == 1 or (torch.float64 not in dtypes and torch.is_autocast_enabled(x.device.type))


LOCAL_FORMS.update(
    {
        F.linear: local_linear,
        F.conv1d: partial(local_convolution, 1),
        F.conv2d: partial(local_convolution, 2),
        F.conv3d: partial(local_convolution, 3),
        F.conv_transpose1d: partial(local_transposed_convolution, 1),
        F.conv_transpose2d: partial(local_transposed_convolution, 2),
        F.conv_transpose3d: partial(local_transposed_convolution, 3),
    }
)
