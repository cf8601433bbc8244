"""The operations that sample their output, with inputs and plain formulas; distributions and divergences of weights."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from problems import F64
from pyro_sparsevd import LogUniform, SparseNormal
from pyro_sparsevd.ops.divergence import kl_ard, kl_log_uniform, kl_log_uniform_total
from pyro_sparsevd.ops.memory import Workspace
from pyro_sparsevd.poutine.local_reparam import local_reparam
from pyro_sparsevd.poutine.unsampled_weight import UnsampledWeight


class Operation(NamedTuple):
    call: Callable[[Tensor, Any, Tensor | None], Tensor]
    x: tuple[int, ...]
    weight: tuple[int, ...]
    bias: int | None


def case_of(name: str, function: Callable, x: tuple, weight: tuple, bias: int | None, **options: Any) -> Any:
    return pytest.param(Operation(lambda x, w, b: function(x, w, b, **options), x, weight, bias), id=name)


def call_of(name: str, call: Callable, x: tuple, weight: tuple, bias: int | None) -> Any:
    return pytest.param(Operation(call, x, weight, bias), id=name)


def channels_last(x: Tensor, w: Any, b: Tensor | None) -> Tensor:
    return F.conv2d(x.contiguous(memory_format=torch.channels_last), w, b, padding=1)


LINEAR = case_of("linear", F.linear, (5, 4), (3, 4), 3)
CONV2D = case_of("conv2d", F.conv2d, (2, 3, 5, 4), (2, 3, 3, 3), 2, stride=(2, 1), padding=(1, 0))
CONV_TRANSPOSE2D = case_of(
    "conv_transpose2d", F.conv_transpose2d, (2, 3, 3, 2), (3, 2, 3, 2), 2, stride=2, padding=1, output_padding=(1, 0)
)
CHANNELS_LAST = call_of("conv2d-channels-last", channels_last, (2, 3, 4, 4), (2, 3, 3, 3), 2)
OPERATIONS = [
    LINEAR,
    case_of("linear-no-bias", F.linear, (5, 4), (3, 4), None),
    case_of("linear-1d", F.linear, (4,), (3, 4), 3),
    case_of("linear-3d", F.linear, (2, 3, 4), (3, 4), 3),
    case_of("linear-4d-no-bias", F.linear, (2, 2, 3, 4), (3, 4), None),
    case_of("linear-one-output", F.linear, (5, 4), (1, 4), 1),
    call_of("linear-keywords", lambda x, w, b: F.linear(bias=b, weight=w, input=x), (5, 4), (3, 4), 3),
    call_of("linear-strided-input", lambda x, w, b: F.linear(x.t(), w, b), (4, 5), (3, 4), 3),
    call_of("linear-expanded-input", lambda x, w, b: F.linear(x.expand(5, 4), w, b), (1, 4), (3, 4), 3),
    case_of("conv1d", F.conv1d, (2, 3, 7), (4, 3, 3), 4),
    case_of("conv1d-no-bias", F.conv1d, (2, 3, 7), (4, 3, 3), None),
    case_of("conv1d-stride-padding", F.conv1d, (2, 3, 7), (4, 3, 3), 4, stride=2, padding=1),
    case_of("conv1d-dilation", F.conv1d, (2, 3, 7), (4, 3, 3), 4, dilation=2),
    case_of("conv1d-groups", F.conv1d, (2, 4, 5), (6, 2, 3), 6, groups=2),
    case_of("conv1d-depthwise", F.conv1d, (2, 3, 5), (6, 1, 3), 6, groups=3),
    case_of("conv1d-same-odd", F.conv1d, (2, 3, 5), (4, 3, 3), 4, padding="same"),
    case_of("conv1d-same-even", F.conv1d, (2, 3, 5), (4, 3, 4), 4, padding="same"),
    case_of("conv1d-same-even-dilation", F.conv1d, (2, 3, 8), (4, 3, 2), 4, padding="same", dilation=3),
    case_of("conv1d-valid", F.conv1d, (2, 3, 5), (4, 3, 3), 4, padding="valid"),
    case_of("conv1d-unbatched", F.conv1d, (3, 5), (4, 3, 3), 4),
    case_of("conv1d-unbatched-same-even", F.conv1d, (3, 5), (4, 3, 2), None, padding="same"),
    call_of(
        "conv1d-keywords",
        lambda x, w, b: F.conv1d(padding=(1,), stride=(2,), bias=b, weight=w, input=x),
        (2, 3, 5),
        (4, 3, 3),
        4,
    ),
    CONV2D,
    CHANNELS_LAST,
    case_of("conv2d-no-bias", F.conv2d, (2, 3, 4, 4), (2, 3, 3, 3), None),
    case_of("conv2d-pointwise", F.conv2d, (2, 3, 3, 3), (2, 3, 1, 1), 2),
    case_of("conv2d-grey", F.conv2d, (2, 1, 6, 5), (3, 1, 3, 2), 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    case_of("conv2d-grey-unbatched", F.conv2d, (1, 4, 4), (3, 1, 2, 2), None, padding="same"),
    case_of("conv2d-dilation", F.conv2d, (2, 3, 6, 5), (2, 3, 3, 2), 2, dilation=(2, 1), padding=1),
    case_of("conv2d-groups", F.conv2d, (2, 4, 4, 4), (4, 2, 3, 3), 4, groups=2, padding=1),
    case_of("conv2d-depthwise", F.conv2d, (2, 3, 4, 4), (6, 1, 3, 3), 6, groups=3),
    case_of("conv2d-same-odd", F.conv2d, (2, 3, 4, 4), (2, 3, 3, 3), 2, padding="same"),
    case_of("conv2d-same-even-odd", F.conv2d, (2, 3, 4, 4), (2, 3, 2, 3), 2, padding="same"),
    case_of("conv2d-same-odd-even", F.conv2d, (2, 3, 4, 4), (2, 3, 3, 4), 2, padding="same"),
    case_of("conv2d-same-even-dilation", F.conv2d, (2, 3, 6, 6), (2, 3, 4, 2), 2, padding="same", dilation=(1, 3)),
    case_of("conv2d-valid", F.conv2d, (2, 3, 4, 4), (2, 3, 3, 3), 2, padding="valid", stride=(1,)),
    case_of("conv2d-unbatched", F.conv2d, (3, 4, 4), (2, 3, 3, 3), 2, padding=1),
    case_of("conv2d-unbatched-groups-same", F.conv2d, (4, 4, 4), (4, 2, 2, 2), None, padding="same", groups=2),
    case_of("conv3d", F.conv3d, (2, 2, 3, 4, 3), (2, 2, 2, 3, 2), 2, stride=(1, 2, 1), padding=1),
    case_of("conv3d-no-bias-dilation", F.conv3d, (1, 2, 3, 3, 5), (2, 2, 2, 2, 2), None, dilation=(1, 1, 2)),
    case_of("conv3d-groups", F.conv3d, (1, 4, 3, 3, 3), (4, 2, 2, 2, 2), 4, groups=2),
    case_of("conv3d-same", F.conv3d, (1, 2, 3, 3, 3), (2, 2, 2, 3, 2), 2, padding="same"),
    case_of("conv3d-unbatched", F.conv3d, (2, 3, 3, 3), (2, 2, 2, 2, 2), 2),
    case_of("conv_transpose1d", F.conv_transpose1d, (2, 3, 4), (3, 2, 3), 2),
    case_of("conv_transpose1d-no-bias", F.conv_transpose1d, (2, 3, 4), (3, 2, 3), None, stride=2, padding=1),
    call_of(
        "conv_transpose1d-positional",
        lambda x, w, b: F.conv_transpose1d(x, w, b, 3, 1, 2, 2, 1),
        (2, 4, 3),
        (4, 2, 3),
        4,
    ),
    case_of("conv_transpose1d-dilation", F.conv_transpose1d, (2, 3, 3), (3, 2, 3), 2, dilation=2, padding=1),
    case_of("conv_transpose1d-unbatched", F.conv_transpose1d, (3, 4), (3, 2, 3), 2, stride=2),
    CONV_TRANSPOSE2D,
    case_of("conv_transpose2d-groups", F.conv_transpose2d, (2, 4, 3, 2), (4, 2, 2, 2), 4, groups=2),
    case_of("conv_transpose2d-depthwise", F.conv_transpose2d, (2, 3, 3, 2), (3, 1, 2, 2), 3, groups=3, stride=2),
    case_of("conv_transpose2d-unbatched", F.conv_transpose2d, (3, 3, 2), (3, 2, 2, 2), None, dilation=(2, 1)),
    case_of(
        "conv_transpose3d",
        F.conv_transpose3d,
        (1, 2, 2, 2, 2),
        (2, 2, 2, 3, 2),
        2,
        stride=2,
        padding=(0, 1, 0),
        output_padding=1,
    ),
    case_of("conv_transpose3d-groups", F.conv_transpose3d, (1, 4, 2, 2, 2), (4, 1, 2, 2, 2), 2, groups=2),
    case_of("conv_transpose3d-unbatched", F.conv_transpose3d, (2, 2, 2, 2), (2, 2, 2, 2, 2), None),
]
ONE_OF_EACH = [LINEAR, CONV2D, CONV_TRANSPOSE2D]


class Inputs(NamedTuple):
    x: Tensor
    loc: Tensor
    log_variance: Tensor
    bias: Tensor | None

    def trainable(self) -> list[Tensor]:
        return [t for t in self if t is not None and t.requires_grad]


def inputs_of(operation: Operation, device: torch.device, frozen: tuple[str, ...] = (), seed: int = 1) -> Inputs:
    torch.manual_seed(seed)
    options = {"dtype": torch.float64, "device": device}
    inputs = Inputs(
        torch.randn(operation.x, **options),
        torch.randn(operation.weight, **options),
        torch.randn(operation.weight, **options) - 1,
        None if operation.bias is None else torch.randn(operation.bias, **options),
    )
    for name, tensor in inputs._asdict().items():
        if tensor is not None:
            tensor.requires_grad_(name not in frozen)
    return inputs


def unsampled_weight(loc: Tensor, log_variance: Tensor, site: str = "w", workspace: Workspace | None = None) -> Any:
    q = SparseNormal(loc, log_variance).to_event(loc.dim())
    return local_reparam(lambda: pyro.sample(site, q), workspace=workspace)()


def sampled_output(operation: Operation, inputs: Inputs, seed: int | None = None) -> tuple[Tensor, UnsampledWeight]:
    weight = unsampled_weight(inputs.loc, inputs.log_variance)
    if seed is not None:
        torch.manual_seed(seed)
    return operation.call(inputs.x, weight, inputs.bias), weight


def moments_of(operation: Operation, inputs: Inputs) -> tuple[Tensor, Tensor]:
    mean = operation.call(inputs.x, inputs.loc, inputs.bias)
    return mean, operation.call(inputs.x**2, inputs.log_variance.exp(), None)


def plain_output(operation: Operation, inputs: Inputs, seed: int) -> Tensor:
    """The slow twin: autograd through mean + √variance ε, with the same ε."""
    mean, variance = moments_of(operation, inputs)
    torch.manual_seed(seed)
    noise = torch.empty(mean.shape, dtype=mean.dtype, device=mean.device).normal_()
    return mean + variance.sqrt() * noise


def projected(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (output * torch.randn(output.shape, generator=generator, dtype=output.dtype).to(output)).sum()


def posterior_parameters(device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    loc = torch.randn(3, 4, dtype=torch.float64, device=device).requires_grad_()
    return loc, torch.randn(3, 4, dtype=torch.float64, device=device).requires_grad_()


FORMS = ("approximate", "exact")
DIVERGENCES = [
    pytest.param(partial(kl_log_uniform, form="approximate"), id="approximate"),
    pytest.param(partial(kl_log_uniform, form="exact"), id="exact"),
    pytest.param(kl_ard, id="ard"),
]
TOTALS = [pytest.param(partial(kl_log_uniform_total, form=form), id=f"total-{form}") for form in FORMS]


# Divergences by hand.


EULER = 0.5772156649015329


def normal_to_normal(loc: Tensor, variance: Tensor) -> Tensor:
    return 0.5 * (loc**2 + variance - 1 - variance.log()).sum()


def exact_kl(loc: Tensor, variance: Tensor) -> Tensor:
    halves = (loc**2 / (2 * variance)).reshape(-1).tolist()
    return loc.new_tensor(sum(float(u * mpmath.hyper([1, 1], [1.5, 2], -u)) for u in halves))


def approximate_kl(loc: Tensor, variance: Tensor) -> Tensor:
    log_alpha = variance.log() - 2 * loc.abs().log()
    kl = 0.5 * torch.log1p(1 / log_alpha.exp()) + 0.63576 * (1 - torch.sigmoid(1.87320 + 1.48695 * log_alpha))
    return kl.sum()


LOG_RATIO = 2 * math.log(1e30)


def log_normaliser(loc: Tensor) -> float:
    return loc.numel() * (math.log(LOG_RATIO) - 0.5 * (1 + EULER + math.log(math.pi)))


# Distributions.


def tensor64(value, device):
    return torch.tensor(value, dtype=torch.float64, device=device)


def bounded(low, high, device):
    return LogUniform(tensor64(low, device), tensor64(high, device))


BOUNDS = [(1e-3, 1.0), (0.5, 0.6), (1e-8, 1e4), (2.0, 300.0)]


def normal_of(q):
    return dist.Normal(q.loc, (0.5 * q.log_variance).exp())


def random_posterior(shape, dtype=F64):
    generator = torch.Generator().manual_seed(2)
    loc, log_variance = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    return SparseNormal(loc, log_variance - 1)
