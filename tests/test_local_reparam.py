"""Every operation that samples its output against its plain formula; every other use against one draw."""

import gc
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_sparsevd import AutoSparseNormal, SparseNormal, bayesianize
from pyro_sparsevd.distributions.log_uniform import LogUniform
from pyro_sparsevd.infer.checks import finite_value
from pyro_sparsevd.ops import divergence
from pyro_sparsevd.ops.local_convolution import SingleChannelConvolution
from pyro_sparsevd.ops.memory import Workspace
from pyro_sparsevd.poutine.kl import kl_log_uniform_total
from pyro_sparsevd.poutine.local_reparam import LocalReparamMessenger, local_reparam
from pyro_sparsevd.poutine.unsampled_weight import RepeatedUseError, UnsampledWeight, _Noise

# Each statistical test compares thousands of numbers: 6 sigma keep the chance of a false alarm in the file below 1 %.
SIGMAS = 6
SAMPLES = 300

# Torch's own plain operation says so.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


class Operation(NamedTuple):
    call: Callable[[Tensor, Any, Tensor | None], Tensor]
    x: tuple[int, ...]
    weight: tuple[int, ...]
    bias: int | None


def _case(name: str, function: Callable, x: tuple, weight: tuple, bias: int | None, **options: Any) -> Any:
    return pytest.param(Operation(lambda x, w, b: function(x, w, b, **options), x, weight, bias), id=name)


def _call(name: str, call: Callable, x: tuple, weight: tuple, bias: int | None) -> Any:
    return pytest.param(Operation(call, x, weight, bias), id=name)


def _channels_last(x: Tensor, w: Any, b: Tensor | None) -> Tensor:
    return F.conv2d(x.contiguous(memory_format=torch.channels_last), w, b, padding=1)


LINEAR = _case("linear", F.linear, (5, 4), (3, 4), 3)
CONV2D = _case("conv2d", F.conv2d, (2, 3, 5, 4), (2, 3, 3, 3), 2, stride=(2, 1), padding=(1, 0))
CONV_TRANSPOSE2D = _case(
    "conv_transpose2d", F.conv_transpose2d, (2, 3, 3, 2), (3, 2, 3, 2), 2, stride=2, padding=1, output_padding=(1, 0)
)
CHANNELS_LAST = _call("conv2d-channels-last", _channels_last, (2, 3, 4, 4), (2, 3, 3, 3), 2)

OPERATIONS = [
    LINEAR,
    _case("linear-no-bias", F.linear, (5, 4), (3, 4), None),
    _case("linear-1d", F.linear, (4,), (3, 4), 3),
    _case("linear-3d", F.linear, (2, 3, 4), (3, 4), 3),
    _case("linear-4d-no-bias", F.linear, (2, 2, 3, 4), (3, 4), None),
    _case("linear-one-output", F.linear, (5, 4), (1, 4), 1),
    _call("linear-keywords", lambda x, w, b: F.linear(bias=b, weight=w, input=x), (5, 4), (3, 4), 3),
    _call("linear-strided-input", lambda x, w, b: F.linear(x.t(), w, b), (4, 5), (3, 4), 3),
    _call("linear-expanded-input", lambda x, w, b: F.linear(x.expand(5, 4), w, b), (1, 4), (3, 4), 3),
    _case("conv1d", F.conv1d, (2, 3, 7), (4, 3, 3), 4),
    _case("conv1d-no-bias", F.conv1d, (2, 3, 7), (4, 3, 3), None),
    _case("conv1d-stride-padding", F.conv1d, (2, 3, 7), (4, 3, 3), 4, stride=2, padding=1),
    _case("conv1d-dilation", F.conv1d, (2, 3, 7), (4, 3, 3), 4, dilation=2),
    _case("conv1d-groups", F.conv1d, (2, 4, 5), (6, 2, 3), 6, groups=2),
    _case("conv1d-depthwise", F.conv1d, (2, 3, 5), (6, 1, 3), 6, groups=3),
    _case("conv1d-same-odd", F.conv1d, (2, 3, 5), (4, 3, 3), 4, padding="same"),
    _case("conv1d-same-even", F.conv1d, (2, 3, 5), (4, 3, 4), 4, padding="same"),
    _case("conv1d-same-even-dilation", F.conv1d, (2, 3, 8), (4, 3, 2), 4, padding="same", dilation=3),
    _case("conv1d-valid", F.conv1d, (2, 3, 5), (4, 3, 3), 4, padding="valid"),
    _case("conv1d-unbatched", F.conv1d, (3, 5), (4, 3, 3), 4),
    _case("conv1d-unbatched-same-even", F.conv1d, (3, 5), (4, 3, 2), None, padding="same"),
    _call(
        "conv1d-keywords",
        lambda x, w, b: F.conv1d(padding=(1,), stride=(2,), bias=b, weight=w, input=x),
        (2, 3, 5),
        (4, 3, 3),
        4,
    ),
    CONV2D,
    CHANNELS_LAST,
    _case("conv2d-no-bias", F.conv2d, (2, 3, 4, 4), (2, 3, 3, 3), None),
    _case("conv2d-pointwise", F.conv2d, (2, 3, 3, 3), (2, 3, 1, 1), 2),
    _case("conv2d-grey", F.conv2d, (2, 1, 6, 5), (3, 1, 3, 2), 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    _case("conv2d-grey-unbatched", F.conv2d, (1, 4, 4), (3, 1, 2, 2), None, padding="same"),
    _case("conv2d-dilation", F.conv2d, (2, 3, 6, 5), (2, 3, 3, 2), 2, dilation=(2, 1), padding=1),
    _case("conv2d-groups", F.conv2d, (2, 4, 4, 4), (4, 2, 3, 3), 4, groups=2, padding=1),
    _case("conv2d-depthwise", F.conv2d, (2, 3, 4, 4), (6, 1, 3, 3), 6, groups=3),
    _case("conv2d-same-odd", F.conv2d, (2, 3, 4, 4), (2, 3, 3, 3), 2, padding="same"),
    _case("conv2d-same-even-odd", F.conv2d, (2, 3, 4, 4), (2, 3, 2, 3), 2, padding="same"),
    _case("conv2d-same-odd-even", F.conv2d, (2, 3, 4, 4), (2, 3, 3, 4), 2, padding="same"),
    _case("conv2d-same-even-dilation", F.conv2d, (2, 3, 6, 6), (2, 3, 4, 2), 2, padding="same", dilation=(1, 3)),
    _case("conv2d-valid", F.conv2d, (2, 3, 4, 4), (2, 3, 3, 3), 2, padding="valid", stride=(1,)),
    _case("conv2d-unbatched", F.conv2d, (3, 4, 4), (2, 3, 3, 3), 2, padding=1),
    _case("conv2d-unbatched-groups-same", F.conv2d, (4, 4, 4), (4, 2, 2, 2), None, padding="same", groups=2),
    _case("conv3d", F.conv3d, (2, 2, 3, 4, 3), (2, 2, 2, 3, 2), 2, stride=(1, 2, 1), padding=1),
    _case("conv3d-no-bias-dilation", F.conv3d, (1, 2, 3, 3, 5), (2, 2, 2, 2, 2), None, dilation=(1, 1, 2)),
    _case("conv3d-groups", F.conv3d, (1, 4, 3, 3, 3), (4, 2, 2, 2, 2), 4, groups=2),
    _case("conv3d-same", F.conv3d, (1, 2, 3, 3, 3), (2, 2, 2, 3, 2), 2, padding="same"),
    _case("conv3d-unbatched", F.conv3d, (2, 3, 3, 3), (2, 2, 2, 2, 2), 2),
    _case("conv_transpose1d", F.conv_transpose1d, (2, 3, 4), (3, 2, 3), 2),
    _case("conv_transpose1d-no-bias", F.conv_transpose1d, (2, 3, 4), (3, 2, 3), None, stride=2, padding=1),
    _call(
        "conv_transpose1d-positional",
        lambda x, w, b: F.conv_transpose1d(x, w, b, 3, 1, 2, 2, 1),
        (2, 4, 3),
        (4, 2, 3),
        4,
    ),
    _case("conv_transpose1d-dilation", F.conv_transpose1d, (2, 3, 3), (3, 2, 3), 2, dilation=2, padding=1),
    _case("conv_transpose1d-unbatched", F.conv_transpose1d, (3, 4), (3, 2, 3), 2, stride=2),
    CONV_TRANSPOSE2D,
    _case("conv_transpose2d-groups", F.conv_transpose2d, (2, 4, 3, 2), (4, 2, 2, 2), 4, groups=2),
    _case("conv_transpose2d-depthwise", F.conv_transpose2d, (2, 3, 3, 2), (3, 1, 2, 2), 3, groups=3, stride=2),
    _case("conv_transpose2d-unbatched", F.conv_transpose2d, (3, 3, 2), (3, 2, 2, 2), None, dilation=(2, 1)),
    _case(
        "conv_transpose3d",
        F.conv_transpose3d,
        (1, 2, 2, 2, 2),
        (2, 2, 2, 3, 2),
        2,
        stride=2,
        padding=(0, 1, 0),
        output_padding=1,
    ),
    _case("conv_transpose3d-groups", F.conv_transpose3d, (1, 4, 2, 2, 2), (4, 1, 2, 2, 2), 2, groups=2),
    _case("conv_transpose3d-unbatched", F.conv_transpose3d, (2, 2, 2, 2), (2, 2, 2, 2, 2), None),
]
ONE_OF_EACH = [LINEAR, CONV2D, CONV_TRANSPOSE2D]


class Inputs(NamedTuple):
    x: Tensor
    loc: Tensor
    log_variance: Tensor
    bias: Tensor | None

    def trainable(self) -> list[Tensor]:
        return [t for t in self if t is not None and t.requires_grad]


def _inputs(operation: Operation, device: torch.device, frozen: tuple[str, ...] = (), seed: int = 1) -> Inputs:
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


def _lazy(loc: Tensor, log_variance: Tensor, site: str = "w", workspace: Workspace | None = None) -> Any:
    q = SparseNormal(loc, log_variance).to_event(loc.dim())
    return local_reparam(lambda: pyro.sample(site, q), workspace=workspace)()


def _local(operation: Operation, inputs: Inputs, seed: int | None = None) -> tuple[Tensor, UnsampledWeight]:
    weight = _lazy(inputs.loc, inputs.log_variance)
    if seed is not None:
        torch.manual_seed(seed)
    return operation.call(inputs.x, weight, inputs.bias), weight


def _moments(operation: Operation, inputs: Inputs) -> tuple[Tensor, Tensor]:
    mean = operation.call(inputs.x, inputs.loc, inputs.bias)
    return mean, operation.call(inputs.x**2, inputs.log_variance.exp(), None)


def _plain(operation: Operation, inputs: Inputs, seed: int) -> Tensor:
    """The slow twin: autograd through mean + √variance ε, with the same ε."""
    mean, variance = _moments(operation, inputs)
    torch.manual_seed(seed)
    noise = torch.empty(mean.shape, dtype=mean.dtype, device=mean.device).normal_()
    return mean + variance.sqrt() * noise


def _projected(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (output * torch.randn(output.shape, generator=generator, dtype=output.dtype).to(output)).sum()


def _assert_close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The distribution of every weight that is sampled, once for each sample."""
    drawn = []
    draw = _Noise.draw

    def counted(self: _Noise) -> None:
        drawn.append(self.base_dist)
        draw(self)

    monkeypatch.setattr(_Noise, "draw", counted)
    return drawn


# Outputs that are sampled instead of weights.


def _standardised(samples: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Returns the samples, a row each, with their mean and scale taken away, where there is a variance."""
    assert samples.shape[1:] == mean.shape
    noisy = variance > 0  # no kernel reaches the output padding of a transposed convolution
    _assert_close(samples[:, ~noisy], mean[~noisy].expand(len(samples), -1))
    return (samples[:, noisy] - mean[noisy]) / variance[noisy].sqrt()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_outputs_are_independent_with_the_mean_and_variance_of_the_formula(operation, device):
    inputs = Inputs(*(t if t is None else t.detach() for t in _inputs(operation, device)))
    samples = torch.stack([_local(operation, inputs)[0] for _ in range(SAMPLES)])
    z = _standardised(samples, *_moments(operation, inputs))
    assert z.mean(0).abs().max() < SIGMAS / SAMPLES**0.5
    correlation = z.t() @ z / SAMPLES
    assert (correlation.diagonal() - 1).abs().max() < SIGMAS * (2 / SAMPLES) ** 0.5
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < SIGMAS / SAMPLES**0.5


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_formula_has_the_mean_and_variance_of_drawn_weights(operation, device):
    inputs = Inputs(*(t if t is None else t.detach() for t in _inputs(operation, device)))
    q = SparseNormal(inputs.loc, inputs.log_variance)
    samples = torch.stack([operation.call(inputs.x, q.sample(), inputs.bias) for _ in range(SAMPLES)])
    z = _standardised(samples, *_moments(operation, inputs))
    assert z.mean(0).abs().max() < SIGMAS / SAMPLES**0.5
    assert (z.square().mean(0) - 1).abs().max() < SIGMAS * (2 / SAMPLES) ** 0.5


@pytest.mark.parametrize("operation", OPERATIONS)
def test_output_and_gradients_equal_those_of_the_plain_formula_with_the_same_noise(operation, device):
    inputs = _inputs(operation, device)
    output, _ = _local(operation, inputs, seed=3)
    expected = _plain(operation, inputs, seed=3)
    _assert_close(output, expected)
    gradients = torch.autograd.grad(_projected(output), inputs.trainable())
    _assert_close(gradients, torch.autograd.grad(_projected(expected), inputs.trainable()))


@pytest.mark.parametrize("frozen", [(), ("x",), ("loc", "bias")], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_single_precision_has_the_same_values_and_strides(operation, frozen, device):
    # On a CPU, oneDNN and the order of channels that suits it come in here.
    double = _inputs(operation, device, frozen)
    single = Inputs(*(t if t is None else t.detach().float().requires_grad_(t.requires_grad) for t in double))
    output, _ = _local(operation, single, seed=3)
    expected = _plain(operation, single, seed=3)
    _assert_close(output, expected, 1e-4)
    plain = operation.call(single.x, single.loc, single.bias)
    assert output.is_contiguous() == plain.is_contiguous()
    gradients = torch.autograd.grad(_projected(output), single.trainable())
    _assert_close(gradients, torch.autograd.grad(_projected(expected), single.trainable()), 1e-3)


@pytest.mark.parametrize(
    "frozen",
    [
        ("x",),
        ("loc",),
        ("log_variance",),
        ("bias",),
        ("x", "loc"),
        ("x", "log_variance"),
        ("loc", "log_variance"),
        ("x", "bias"),
        ("x", "loc", "log_variance"),
        ("loc", "log_variance", "bias"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("operation", ONE_OF_EACH)
def test_gradients_are_right_with_inputs_frozen(operation, frozen, device):
    inputs = _inputs(operation, device, frozen)
    output, _ = _local(operation, inputs, seed=3)
    gradients = torch.autograd.grad(_projected(output), inputs.trainable())
    expected = _plain(operation, inputs, seed=3)
    _assert_close(gradients, torch.autograd.grad(_projected(expected), inputs.trainable()))


@pytest.mark.parametrize("operation", ONE_OF_EACH)
def test_gradients_reach_the_scale_of_a_plain_normal(operation, device):
    inputs = _inputs(operation, device)
    scale = inputs.log_variance.detach().div(2).exp().requires_grad_()
    weight = local_reparam(lambda: pyro.sample("w", dist.Normal(inputs.loc, scale).to_event(inputs.loc.dim())))()
    torch.manual_seed(3)
    gradient = torch.autograd.grad(_projected(operation.call(inputs.x, weight, inputs.bias)), scale)
    expected = _plain(operation, inputs._replace(log_variance=2 * scale.log()), seed=3)
    _assert_close(gradient, torch.autograd.grad(_projected(expected), scale))


@pytest.mark.parametrize("operation", ONE_OF_EACH)
def test_gradient_of_the_second_moment_is_that_of_squared_mean_plus_variance(operation, device):
    inputs = _inputs(operation, device)
    mean, variance = _moments(operation, inputs)
    expected = torch.autograd.grad((mean**2 + variance).sum(), inputs.trainable())
    samples = []
    for _ in range(SAMPLES):
        output, _ = _local(operation, inputs)
        gradients = torch.autograd.grad(output.square().sum(), inputs.trainable())
        samples.append(torch.cat([g.reshape(-1) for g in gradients]))
    samples = torch.stack(samples)
    error = samples.mean(0) - torch.cat([g.reshape(-1) for g in expected])
    assert (error.abs() < SIGMAS * samples.std(0) / SAMPLES**0.5 + 1e-12).all()


@pytest.mark.parametrize("operation", ONE_OF_EACH)
def test_gradients_accumulate_and_may_be_taken_twice_from_a_retained_graph(operation, device):
    inputs = _inputs(operation, device)
    loss = _projected(_local(operation, inputs, seed=3)[0])
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in inputs.trainable()]
    loss.backward()
    _assert_close([t.grad for t in inputs.trainable()], [2 * g for g in once])


class _Recorder(TorchDispatchMode):
    """Records the calls of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.calls.append((func.overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("frozen", "products"), [((), 2), (("x",), 1), (("loc", "log_variance"), 1)])
def test_a_linear_layer_computes_no_gradient_that_nobody_needs(frozen, products, device):
    operation = LINEAR.values[0]
    inputs = _inputs(operation, device, frozen)
    loss = _projected(_local(operation, inputs, seed=3)[0])
    with _Recorder() as recorder:
        torch.autograd.grad(loss, inputs.trainable())
    assert sum(name == "bmm" for name, _ in recorder.calls) == products


def test_a_convolution_computes_no_gradient_of_an_input_that_needs_none(device):
    operation = CONV2D.values[0]
    inputs = _inputs(operation, device, frozen=("x",))
    loss = _projected(_local(operation, inputs, seed=3)[0])
    with _Recorder() as recorder:
        torch.autograd.grad(loss, inputs.trainable())
    masks = [args[-1] for name, args in recorder.calls if name == "convolution_backward"]
    assert len(masks) == 2
    assert not any(needs_x for needs_x, *_ in masks)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("other", ["x", "bias"])
@pytest.mark.parametrize("operation", ONE_OF_EACH)
def test_operands_of_two_dtypes_are_refused_or_taken_as_by_torch(operation, other, autocast, device):
    inputs = _inputs(operation, device)
    dtype = torch.float32 if inputs.x.dtype == torch.float64 else torch.float64
    x, loc, log_variance, bias = inputs._replace(**{other: getattr(inputs, other).detach().to(dtype)})
    weight = UnsampledWeight(dist.Normal(loc, (0.5 * log_variance).exp()), "w", Workspace())
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
        of_torch, found = (_error_or_dtype(operation, x, w, bias) for w in (loc, weight))
    assert found == of_torch
    assert other == "bias" or isinstance(found, str)


def _error_or_dtype(operation, *operands):
    try:
        return operation.call(*operands).dtype
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("operation", [*ONE_OF_EACH, CHANNELS_LAST])
def test_inputs_of_zeros_give_the_bias_and_finite_gradients(operation, dtype, device):
    x, loc, log_variance, bias = (t.detach().to(dtype) for t in _inputs(operation, device))
    x[0] = 0
    inputs = Inputs(*(t.requires_grad_() for t in (x, loc, log_variance, bias)))
    output, _ = _local(operation, inputs, seed=3)
    expected = operation.call(inputs.x, inputs.loc, inputs.bias)
    torch.testing.assert_close(output[0], expected[0])
    gradients = dict(zip(inputs._fields, torch.autograd.grad(_projected(output), list(inputs)), strict=True))
    assert all(g.isfinite().all() for g in gradients.values())
    # The noise of a zero input has no gradient: what is left is the mean's.
    (of_mean,) = torch.autograd.grad(_projected(expected), inputs.x)
    torch.testing.assert_close(gradients["x"][0], of_mean[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("operation", [*ONE_OF_EACH, CHANNELS_LAST])
def test_zeros_beside_other_numbers_leave_weight_gradients_right(operation, dtype, device):
    inputs = _inputs(operation, device, frozen=("x",))
    inputs.x[0] = 0
    inputs.x[1, :2] = 0
    cast = Inputs(*(t.detach().to(dtype).requires_grad_(t.requires_grad) for t in inputs))
    gradients = torch.autograd.grad(_projected(_local(operation, cast, seed=3)[0]), cast.trainable())
    mean, variance = _moments(operation, cast)
    torch.manual_seed(3)
    noise = torch.empty(mean.shape, dtype=dtype, device=device).normal_()
    # √ has no gradient at 0 in the plain formula: the noise is taken away there.
    noisy = torch.where(variance > 0, variance, 1).sqrt() * torch.where(variance > 0, noise, 0)
    expected = torch.autograd.grad(_projected(mean + noisy), cast.trainable())
    assert (variance == 0).any()
    _assert_close(gradients, expected, 1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("operation", ONE_OF_EACH)
def test_a_variance_that_underflows_gives_the_mean_and_finite_gradients(operation, device):
    inputs = Inputs(*(t.detach().float() for t in _inputs(operation, device)))
    inputs.log_variance.fill_(-1e4)
    inputs = Inputs(*(t.requires_grad_() for t in inputs))
    output, _ = _local(operation, inputs, seed=3)
    expected = operation.call(inputs.x, inputs.loc, inputs.bias)
    torch.testing.assert_close(output, expected)
    x, loc, log_variance, bias = torch.autograd.grad(_projected(output), list(inputs))
    of_mean = torch.autograd.grad(_projected(expected), [inputs.x, inputs.loc, inputs.bias])
    torch.testing.assert_close((x, loc, bias), of_mean)
    assert not log_variance.any()


def test_a_linear_map_by_a_vector_has_the_mean_and_variance_of_the_formula(device):
    # Which torch allows; whether it is sampled locally or drawn is free.
    operation = Operation(F.linear, (5, 4), (4,), None)
    inputs = _inputs(operation, device)
    z = _standardised(torch.stack([_local(operation, inputs)[0] for _ in range(SAMPLES)]), *_moments(operation, inputs))
    assert z.mean(0).abs().max() < SIGMAS / SAMPLES**0.5
    assert (z.square().mean(0) - 1).abs().max() < SIGMAS * (2 / SAMPLES) ** 0.5
    gradients = torch.autograd.grad(_projected(_local(operation, inputs)[0]), inputs.trainable())
    assert [g.shape for g in gradients] == [(5, 4), (4,), (4,)]


@pytest.mark.parametrize(
    "options",
    [{"padding": "same", "stride": 2}, {"padding": "full"}, {"stride": (1, 2, 3)}, {"groups": 2}, {"padding": -1}],
    ids=str,
)
def test_a_convolution_that_torch_refuses_is_refused(options, device):
    x, loc = (
        torch.ones(1, 3, 5, 5, dtype=torch.float64, device=device),
        torch.ones(2, 3, 3, 3, dtype=torch.float64, device=device),
    )
    for weight in (loc, _lazy(loc, loc)):
        with pytest.raises((RuntimeError, TypeError, ValueError), match=r"same|padding|stride|groups|channels"):
            F.conv2d(x, weight, **options)


def test_an_empty_batch_gives_an_empty_output_and_gradients_of_zero(device):
    inputs = _inputs(Operation(F.linear, (0, 4), (3, 4), 3), device)
    output, _ = _local(LINEAR.values[0], inputs, seed=3)
    assert output.shape == (0, 3)
    assert not any(g.any() for g in torch.autograd.grad(output.sum(), inputs.trainable()))


def test_an_expanded_posterior_receives_the_summed_gradient(device):
    torch.manual_seed(1)
    loc = torch.randn(4, dtype=torch.float64, device=device).requires_grad_()
    x = torch.randn(5, 4, dtype=torch.float64, device=device)
    weight = local_reparam(lambda: pyro.sample("w", SparseNormal(loc, -2.0).expand([3, 4]).to_event(2)))()
    torch.manual_seed(3)
    gradient = torch.autograd.grad(_projected(F.linear(x, weight)), loc)
    inputs = Inputs(x, loc.expand(3, 4), torch.full((3, 4), -2.0, dtype=torch.float64, device=device), None)
    expected = _plain(Operation(F.linear, (5, 4), (3, 4), None), inputs, seed=3)
    _assert_close(gradient, torch.autograd.grad(_projected(expected), loc))


MODULES = [
    pytest.param(lambda: nn.Linear(4, 3), (5, 4), id="Linear"),
    pytest.param(lambda: nn.Conv1d(3, 2, 3, padding="same"), (2, 3, 5), id="Conv1d"),
    pytest.param(lambda: nn.Conv2d(4, 4, 3, stride=2, groups=2), (2, 4, 5, 5), id="Conv2d"),
    pytest.param(lambda: nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"), (2, 3, 4, 4), id="Conv2d-circular"),
    pytest.param(lambda: nn.Conv3d(2, 2, 2), (1, 2, 3, 3, 3), id="Conv3d"),
    pytest.param(lambda: nn.ConvTranspose1d(3, 2, 3, stride=2), (2, 3, 4), id="ConvTranspose1d"),
    pytest.param(lambda: nn.ConvTranspose2d(3, 2, 3, output_padding=1, stride=2), (2, 3, 3, 3), id="ConvTranspose2d"),
    pytest.param(lambda: nn.ConvTranspose3d(2, 2, 2), (1, 2, 2, 2, 2), id="ConvTranspose3d"),
]


@pytest.mark.parametrize(("make", "shape"), MODULES)
def test_torch_modules_sample_their_output_through_functional_call(make, shape, device, draws):
    torch.manual_seed(1)
    module = make().to(device).double()
    x = torch.randn(shape, dtype=torch.float64, device=device)
    loc, log_variance = module.weight, torch.randn_like(module.weight)
    weight = _lazy(loc, log_variance)
    torch.manual_seed(3)
    output = functional_call(module, {"weight": weight}, (x,))
    no_bias = torch.zeros_like(module.bias)

    def plain(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return functional_call(module, {"weight": w, "bias": no_bias if b is None else b}, x)

    inputs = Inputs(x, loc, log_variance, module.bias)
    _assert_close(output, _plain(Operation(plain, shape, tuple(loc.shape), None), inputs, seed=3))
    assert draws == []


# Every other use draws the weight, once.

OTHER_USES = [
    pytest.param(lambda w, x: x @ w.T, id="T"),
    pytest.param(lambda w, x: x @ w.t(), id="t"),
    pytest.param(lambda w, x: w @ x.t(), id="matmul"),
    pytest.param(lambda w, x: torch.matmul(x, w.transpose(0, 1)), id="transpose"),
    pytest.param(lambda w, x: torch.einsum("bi,oi->bo", x, w), id="einsum"),
    pytest.param(lambda w, x: torch.tensordot(x, w, dims=([1], [1])), id="tensordot"),
    pytest.param(lambda w, x: w[0], id="index"),
    pytest.param(lambda w, x: w[:, 1:], id="slice"),
    pytest.param(lambda w, x: w[torch.tensor([0, 2, 0], device=w.device)], id="index-tensor"),
    pytest.param(lambda w, x: w + 1, id="add"),
    pytest.param(lambda w, x: 1 - w, id="rsub"),
    pytest.param(lambda w, x: w * w, id="square"),
    pytest.param(lambda w, x: -w.abs().exp(), id="chain"),
    pytest.param(lambda w, x: torch.cat([w, w]), id="cat"),
    pytest.param(lambda w, x: torch.stack([w, w.detach()]), id="stack"),
    pytest.param(lambda w, x: w.reshape(-1), id="reshape"),
    pytest.param(lambda w, x: w.clone(), id="clone"),
    pytest.param(lambda w, x: w.to(torch.float32), id="to"),
    pytest.param(lambda w, x: torch.stack(list(w)), id="iterate"),
    pytest.param(lambda w, x: torch.stack(w.chunk(3)), id="chunk"),
    pytest.param(lambda w, x: torch.tensor(w.tolist()), id="tolist"),
    pytest.param(lambda w, x: torch.tensor(w.sum().item()), id="item"),
    pytest.param(lambda w, x: torch.where(w > 0, w, 0.0), id="where"),
    pytest.param(lambda w, x: F.linear(x, w.clone()), id="linear-clone"),
    pytest.param(lambda w, x: F.linear(w, x), id="linear-input"),
    pytest.param(lambda w, x: F.linear(x, x, bias=w[:, 0].repeat(2)[:5]), id="linear-bias"),
    pytest.param(lambda w, x: F.embedding(torch.tensor([[0, 2], [1, 1]], device=w.device), w), id="embedding"),
    pytest.param(lambda w, x: F.normalize(w, dim=1), id="normalize"),
    pytest.param(lambda w, x: F.bilinear(x, x, w.expand(2, 3, 4)[:, :1].expand(2, 4, 4)), id="bilinear"),
    pytest.param(lambda w, x: F.conv1d(x[None], w[:, None].expand(3, 5, 4)), id="conv-of-expanded"),
    pytest.param(lambda w, x: torch.special.expit(w), id="special"),
    pytest.param(lambda w, x: torch.linalg.norm(w), id="linalg"),
]


def _posterior(device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    loc = torch.randn(3, 4, dtype=torch.float64, device=device).requires_grad_()
    return loc, torch.randn(3, 4, dtype=torch.float64, device=device).requires_grad_()


@pytest.mark.parametrize("use", OTHER_USES)
def test_another_use_draws_once_and_computes_with_that_draw(use, device, draws):
    loc, log_variance = _posterior(device)
    x = torch.randn(5, 4, dtype=torch.float64, device=device)
    weight = _lazy(loc, log_variance)
    torch.manual_seed(3)
    results = [use(weight, x), use(weight, x)]
    assert len(draws) == 1
    torch.manual_seed(3)
    plain = SparseNormal(loc, log_variance).rsample()
    expected = use(plain, x)
    assert all(type(result) is Tensor and torch.equal(result, expected) for result in results)
    assert torch.equal(weight.clone(), weight.clone())
    if expected.requires_grad:
        gradients = torch.autograd.grad(results[0].sum(), (loc, log_variance))
        _assert_close(gradients, torch.autograd.grad(expected.sum(), (loc, log_variance)))


DRAWING_MODULES = [
    pytest.param(lambda: nn.Embedding(6, 3, padding_idx=0), "tokens", id="Embedding"),
    pytest.param(lambda: nn.EmbeddingBag(6, 3), "tokens", id="EmbeddingBag"),
    pytest.param(lambda: nn.Bilinear(4, 4, 2), "twice", id="Bilinear"),
    pytest.param(lambda: nn.RNN(4, 3), "once", id="RNN"),
    pytest.param(lambda: nn.LSTM(4, 3, num_layers=2, bidirectional=True), "once", id="LSTM"),
    pytest.param(lambda: nn.GRU(4, 3, batch_first=True), "once", id="GRU"),
    pytest.param(lambda: nn.LSTMCell(4, 3), "step", id="LSTMCell"),
    pytest.param(lambda: nn.GRUCell(4, 3), "step", id="GRUCell"),
    pytest.param(lambda: nn.MultiheadAttention(4, 2), "self-attention", id="MultiheadAttention"),
    pytest.param(lambda: nn.MultiheadAttention(4, 2, kdim=4, vdim=4).eval(), "self-attention", id="attention-eval"),
    pytest.param(lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0), "once", id="TransformerEncoderLayer"),
]


@pytest.mark.parametrize(("make", "kind"), DRAWING_MODULES)
def test_modules_without_a_local_form_compute_with_one_draw_of_each_weight(make, kind, device, draws):
    torch.manual_seed(1)
    module = make().to(device).double()
    x = torch.randn(5, 2, 4, dtype=torch.float64, device=device)
    tokens = torch.tensor([[0, 5, 2], [1, 1, 3]], device=device)
    inputs = {"tokens": (tokens,), "once": (x,), "twice": (x, x), "step": (x[0],), "self-attention": (x, x, x)}[kind]
    weights = {n: _lazy(p, torch.full_like(p, -2.0), n) for n, p in module.named_parameters() if p.dim() > 1}
    local = {"linear1.weight", "linear2.weight"} & weights.keys()
    torch.manual_seed(3)
    output = functional_call(module, weights, inputs)
    assert sorted(map(id, draws)) == sorted(id(w.base_dist) for name, w in weights.items() if name not in local)
    if not local:
        expected = functional_call(module, {name: w.clone() for name, w in weights.items()}, inputs)
        _assert_close(output, expected)


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda w: w.shape, id="shape"),
        pytest.param(lambda w: w.size(), id="size"),
        pytest.param(lambda w: w.size(-1), id="size-of-dim"),
        pytest.param(lambda w: w.dim(), id="dim"),
        pytest.param(lambda w: w.ndim, id="ndim"),
        pytest.param(lambda w: w.numel(), id="numel"),
        pytest.param(lambda w: w.nelement(), id="nelement"),
        pytest.param(len, id="len"),
        pytest.param(lambda w: w.dtype, id="dtype"),
        pytest.param(lambda w: w.device, id="device"),
        pytest.param(lambda w: w.layout, id="layout"),
        pytest.param(lambda w: w.is_cuda, id="is_cuda"),
        pytest.param(lambda w: w.is_floating_point(), id="is_floating_point"),
        pytest.param(torch.is_floating_point, id="torch.is_floating_point"),
        pytest.param(torch.is_complex, id="torch.is_complex"),
        pytest.param(torch.is_tensor, id="torch.is_tensor"),
        pytest.param(torch.numel, id="torch.numel"),
        pytest.param(lambda w: w.element_size(), id="element_size"),
        pytest.param(lambda w: isinstance(w, Tensor), id="isinstance"),
    ],
)
def test_what_can_be_known_without_numbers_is_right_and_draws_nothing(ask, device, draws):
    loc, log_variance = _posterior(device)
    assert ask(_lazy(loc, log_variance)) == ask(loc)
    assert draws == []


@pytest.mark.parametrize("show", [repr, str, "{}".format], ids=["repr", "str", "format"])
def test_it_is_shown_by_site_and_shape_without_a_draw(show, device, draws):
    assert show(_lazy(*_posterior(device))) == "UnsampledWeight('w', shape=(3, 4))"
    assert draws == []


def test_a_linear_layer_after_a_draw_uses_that_draw(device, draws):
    loc, log_variance = _posterior(device)
    x = torch.randn(5, 4, dtype=torch.float64, device=device)
    weight = _lazy(loc, log_variance)
    drawn = weight.clone()
    outputs = [F.linear(x, weight), F.linear(x, weight)]
    assert all(torch.equal(output, F.linear(x, drawn)) for output in outputs)
    assert len(draws) == 1


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(lambda w: F.linear(torch.ones(1, 4, dtype=w.dtype, device=w.device), w), id="linear"),
        pytest.param(lambda w: w.T, id="T"),
        pytest.param(lambda w: w + 1, id="add"),
        pytest.param(lambda w: F.embedding(torch.tensor([0], device=w.device), w), id="embedding"),
        pytest.param(lambda w: w.clone(), id="clone"),
    ],
)
def test_a_second_use_after_a_local_one_raises_an_error_that_names_the_site(second, device):
    weight = _lazy(*_posterior(device), site="net.weight")
    F.linear(torch.ones(2, 4, dtype=torch.float64, device=device), weight)
    with pytest.raises(RepeatedUseError, match=r"^net\.weight: used more than once.*exclude=\{'net\.weight'\}") as info:
        second(weight)
    assert info.value.site == "net.weight"


def test_a_second_convolution_raises_an_error_that_names_the_site(device):
    operation = CONV2D.values[0]
    inputs = _inputs(operation, device)
    _, weight = _local(operation, inputs, seed=3)
    with pytest.raises(RepeatedUseError, match=r"^w: used more than once"):
        operation.call(inputs.x, weight, inputs.bias)


def test_a_lazy_bias_is_drawn_and_its_layer_still_samples_its_output(device, draws):
    loc, log_variance = _posterior(device)
    x = torch.randn(5, 4, dtype=torch.float64, device=device)
    bias = _lazy(loc[:, 0], log_variance[:, 0], "bias")
    torch.manual_seed(3)
    output = F.linear(x, _lazy(loc, log_variance), bias)
    assert draws == [bias.base_dist]
    torch.manual_seed(3)
    value = SparseNormal(loc[:, 0], log_variance[:, 0]).rsample()
    mean, variance = F.linear(x, loc, value), F.linear(x**2, log_variance.exp())
    noise = torch.empty(mean.shape, dtype=mean.dtype, device=device).normal_()
    expected = mean + variance.sqrt() * noise
    _assert_close(output, expected)
    trainable = (loc, log_variance)
    gradients = torch.autograd.grad(_projected(output), trainable)
    _assert_close(gradients, torch.autograd.grad(_projected(expected), trainable))


def test_an_input_that_is_a_lazy_weight_itself_is_drawn(device, draws):
    loc, log_variance = _posterior(device)
    x, weight = _lazy(loc, log_variance, "x"), _lazy(loc, log_variance, "w")
    output = F.linear(x, weight)
    assert torch.equal(output, F.linear(x.clone(), weight.clone()))
    assert sorted(map(id, draws)) == sorted(map(id, [x.base_dist, weight.base_dist]))


@pytest.mark.parametrize("operation", ONE_OF_EACH)
def test_autocast_computes_the_noise_in_full_precision(operation, device):
    inputs = Inputs(*(t.detach().float().requires_grad_() for t in _inputs(operation, device)))
    inputs.log_variance.data.fill_(-30)  # x² σ² of float16 would underflow
    with torch.autocast(device.type, dtype=torch.bfloat16):
        output, _ = _local(operation, inputs._replace(x=inputs.x.bfloat16()), seed=3)
    expected = _plain(operation, inputs._replace(x=inputs.x.bfloat16().float()), seed=3)
    assert output.dtype == torch.bfloat16  # as of the plain operation, but rounded only once
    torch.testing.assert_close(output, expected.bfloat16(), rtol=1e-2, atol=1e-2)
    gradients = torch.autograd.grad(_projected(output.float()), inputs.trainable())
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[2].any()


# The handler.


def _three_layer_guide(device: torch.device) -> Callable[[], dict[str, Tensor]]:
    loc, log_variance = _posterior(device)
    return lambda: {
        name: pyro.sample(name, SparseNormal(loc, log_variance).to_event(2)) for name in ("first", "second", "third")
    }


def test_it_wraps_a_function(device):
    values = local_reparam(_three_layer_guide(device))()
    assert all(type(value) is UnsampledWeight for value in values.values())


def test_it_decorates_a_function(device):
    guide = _three_layer_guide(device)

    @local_reparam
    def bare():
        return guide()

    @local_reparam(exclude={"second"})
    def with_options():
        return guide()

    assert [type(value) for value in bare().values()] == [UnsampledWeight, UnsampledWeight, UnsampledWeight]
    assert [type(value) for value in with_options().values()] == [UnsampledWeight, Tensor, UnsampledWeight]


def test_it_is_a_context(device):
    guide = _three_layer_guide(device)
    with local_reparam(exclude=("first",)) as messenger:
        inside = guide()
    outside = guide()
    assert isinstance(messenger, LocalReparamMessenger)
    assert [type(value) for value in inside.values()] == [Tensor, UnsampledWeight, UnsampledWeight]
    assert all(type(value) is Tensor for value in outside.values())


def test_an_excluded_site_is_drawn_as_usual(device):
    guide = _three_layer_guide(device)
    torch.manual_seed(3)
    excluded = local_reparam(guide, exclude={"first", "second", "third"})()
    torch.manual_seed(3)
    _assert_close(excluded, guide(), 0.0)


def test_replay_hands_the_weight_that_is_not_drawn_to_the_model(device, draws):
    loc, log_variance = _posterior(device)
    x = torch.randn(5, 4, dtype=torch.float64, device=device)

    def guide(x):
        pyro.sample("w", SparseNormal(loc, log_variance).to_event(2))

    def model(x):
        weight = pyro.sample("w", dist.Normal(torch.zeros_like(loc), 1.0).to_event(2))
        return weight, F.linear(x, weight)

    trace = poutine.trace(local_reparam(guide)).get_trace(x)
    torch.manual_seed(3)
    weight, output = poutine.replay(model, trace=trace)(x)
    assert weight is trace.nodes["w"]["value"]
    assert draws == []
    _assert_close(output, _plain(Operation(F.linear, (), (), None), Inputs(x, loc, log_variance, None), seed=3))


def test_two_calls_give_two_weights(device):
    guide = local_reparam(_three_layer_guide(device))
    first, second = guide()["first"], guide()["first"]
    assert first is not second
    assert not torch.equal(first.clone(), second.clone())


ZEROS = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("fn", "options", "is_lazy"),
    [
        pytest.param(SparseNormal(ZEROS, ZEROS).to_event(2), {}, True, id="sparse-normal"),
        pytest.param(dist.Normal(ZEROS, 1.0).to_event(2), {}, True, id="normal"),
        pytest.param(dist.Normal(ZEROS, 1.0).to_event(1).to_event(1), {}, True, id="nested-events"),
        pytest.param(dist.Normal(0.0, 1.0).expand([3, 4]).to_event(2), {}, True, id="expanded"),
        pytest.param(dist.Normal(ZEROS, 1.0), {}, False, id="batch"),
        pytest.param(dist.Normal(ZEROS, 1.0).to_event(1), {}, False, id="batch-and-event"),
        pytest.param(dist.Normal(0.0, 1.0), {}, False, id="scalar"),
        pytest.param(dist.LogNormal(ZEROS, 1.0).to_event(2), {}, False, id="log-normal"),
        pytest.param(dist.Laplace(ZEROS, 1.0).to_event(2), {}, False, id="laplace"),
        pytest.param(LogUniform(0.1, 1.0).expand([3, 4]).to_event(2), {}, False, id="log-uniform"),
        pytest.param(dist.MultivariateNormal(torch.zeros(4), torch.eye(4)), {}, False, id="multivariate-normal"),
        pytest.param(dist.Normal(ZEROS, 1.0).to_event(2), {"obs": ZEROS}, False, id="observed"),
    ],
)
def test_only_factorised_normal_latents_without_batch_dimensions_are_lazy(fn, options, is_lazy):
    value = local_reparam(lambda: pyro.sample("w", fn, **options))()
    assert (type(value) is UnsampledWeight) == is_lazy
    assert value.shape == fn.shape()


def test_a_site_in_a_plate_is_drawn():
    @local_reparam
    def guide():
        with pyro.plate("plate", 2):
            return pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(1))

    assert type(guide()) is Tensor


def test_a_value_that_another_handler_gave_is_kept():
    value = torch.randn(3, 4)
    guide = poutine.condition(_three_layer_guide(torch.device("cpu")), data={"first": value})
    assert local_reparam(guide)()["first"] is value


# Memory.


@pytest.mark.parametrize(
    ("call", "x", "weight"),
    [
        pytest.param(F.linear, (128, 96), (128, 96), id="linear"),
        pytest.param(lambda x, w: F.conv2d(x, w, padding=1), (16, 32, 8, 8), (32, 32, 3, 3), id="conv2d"),
    ],
)
class TestMemory:
    # All tensors are large enough for the workspace.
    def _step(self, call, x, loc, log_variance, workspace):
        weight = _lazy(loc, log_variance, workspace=workspace)
        output = call(x, weight)
        loss = _projected(output) + kl_log_uniform_total([weight], "approximate")
        return output, torch.autograd.grad(loss, (x, loc, log_variance))

    def _tensors(self, x, weight, device):
        torch.manual_seed(1)
        x = torch.randn(x, dtype=torch.float64, device=device)
        loc, log_variance = torch.randn(2, *weight, dtype=torch.float64, device=device)
        return [t.requires_grad_() for t in (x, loc, log_variance)]

    def test_no_more_memory_is_held_after_twenty_steps_than_after_two(self, call, x, weight, device):
        tensors, workspace = self._tensors(x, weight, device), Workspace()
        gc.disable()  # so that no cycle is swept under the carpet
        try:
            lengths = []
            for _ in range(20):
                self._step(call, *tensors, workspace)
                lengths.append({key: len(arrays) for key, arrays in workspace._arrays.items()})
        finally:
            gc.enable()
        assert lengths[0] or device.type != "cpu"
        assert lengths[-1] == lengths[1]

    def test_outputs_and_gradients_that_are_kept_are_not_overwritten(self, call, x, weight, device):
        tensors, workspace = self._tensors(x, weight, device), Workspace()
        kept, copies = [], []
        for _ in range(5):
            output, gradients = self._step(call, *tensors, workspace)
            kept += [output.detach()[1:], *gradients]
            copies += [output.detach()[1:].clone(), *(g.clone() for g in gradients)]
        assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))

    def test_accumulated_gradients_are_those_of_fresh_memory(self, call, x, weight, device):
        sums = []
        for make in (Workspace, lambda: None):
            tensors, workspace = self._tensors(x, weight, device), make()
            for _ in range(4):
                parameter = _lazy(*tensors[1:], workspace=workspace)
                loss = _projected(call(tensors[0], parameter)) + kl_log_uniform_total([parameter], "exact")
                loss.backward()
            sums.append([t.grad for t in tensors])
        _assert_close(*sums, 0.0)

    def test_two_graphs_alive_at_once_do_not_share_memory(self, call, x, weight, device):
        tensors, workspace = self._tensors(x, weight, device), Workspace()
        gradients = []
        for kept in (True, False):
            torch.manual_seed(3)
            losses = []
            for _ in range(2):
                parameter = _lazy(*tensors[1:], workspace=workspace if kept else None)
                losses.append(_projected(call(tensors[0], parameter)) + kl_log_uniform_total([parameter], "exact"))
            gradients.append([torch.autograd.grad(loss, tensors) for loss in losses])
        _assert_close(*gradients, 0.0)


@pytest.mark.parametrize("operation", ONE_OF_EACH)
def test_the_graph_is_freed_without_the_garbage_collector(operation, device):
    inputs = _inputs(operation, device)
    gc.collect()
    gc.disable()
    try:
        output, weight = _local(operation, inputs, seed=3)
        loss = output.sum() + kl_log_uniform_total([weight], "exact")
        loss.backward()
        references = [weakref.ref(t) for t in (weight, weight._kl_zero, output, output.grad_fn, loss)]
        del output, weight, loss
        assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()


def test_a_weight_that_goes_before_its_output_leaves_the_backward_pass_intact(device):
    operation = LINEAR.values[0]
    inputs = _inputs(operation, device)
    output, weight = _local(operation, inputs, seed=3)
    reference = weakref.ref(weight)
    del weight
    assert reference() is None
    gradients = torch.autograd.grad(_projected(output), inputs.trainable())
    expected = torch.autograd.grad(_projected(_plain(operation, inputs, seed=3)), inputs.trainable())
    _assert_close(gradients, expected)


# The divergence, whose gradient travels with the operation.

FORMS = ["approximate", "exact"]
OTHERS = ("linear-3d", "conv1d-same-even", "conv2d-grey", "conv2d-depthwise", "conv3d", "conv_transpose3d")
CARRIERS = [*ONE_OF_EACH, CHANNELS_LAST, *(p for p in OPERATIONS if p.id in OTHERS)]


def _plain_loss(operation: Operation, inputs: Inputs, form: Any, weight_of_output: float) -> Tensor:
    output = _projected(_plain(operation, inputs, seed=3))
    return weight_of_output * output + 0.7 * divergence.kl_log_uniform_total(inputs.loc, inputs.log_variance, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight_of_output", [1.3, 0.0], ids=["output-used", "output-weighs-nothing"])
@pytest.mark.parametrize("operation", CARRIERS)
def test_divergence_and_gradients_equal_the_plain_ones(operation, weight_of_output, form, device):
    inputs = _inputs(operation, device)
    output, weight = _local(operation, inputs, seed=3)
    kl = kl_log_uniform_total([weight], form)
    _assert_close(kl, divergence.kl_log_uniform_total(inputs.loc, inputs.log_variance, form))
    gradients = torch.autograd.grad(weight_of_output * _projected(output) + 0.7 * kl, inputs.trainable())
    expected = _plain_loss(operation, inputs, form, weight_of_output)
    _assert_close(gradients, torch.autograd.grad(expected, inputs.trainable()))


@pytest.mark.parametrize("frozen", [("loc",), ("log_variance",), ("x", "bias"), ("x", "loc")], ids=" ".join)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operation", ONE_OF_EACH)
def test_divergence_gradients_are_right_with_inputs_frozen(operation, form, frozen, device):
    inputs = _inputs(operation, device, frozen)
    output, weight = _local(operation, inputs, seed=3)
    loss = 1.3 * _projected(output) + 0.7 * kl_log_uniform_total([weight], form)
    expected = torch.autograd.grad(_plain_loss(operation, inputs, form, 1.3), inputs.trainable())
    _assert_close(torch.autograd.grad(loss, inputs.trainable()), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operation", ONE_OF_EACH)
def test_divergence_alone_has_its_gradients_where_the_output_is_not_in_the_loss(operation, form, device):
    inputs = _inputs(operation, device)
    _, weight = _local(operation, inputs, seed=3)
    parameters = (inputs.loc, inputs.log_variance)
    gradients = torch.autograd.grad(kl_log_uniform_total([weight], form), parameters)
    expected = divergence.kl_log_uniform_total(*parameters, form)
    _assert_close(gradients, torch.autograd.grad(expected, parameters))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operation", ONE_OF_EACH)
def test_divergence_gradients_are_the_same_twice_from_a_retained_graph(operation, form, device):
    inputs = _inputs(operation, device)
    output, weight = _local(operation, inputs, seed=3)
    loss = 1.3 * _projected(output) + 0.7 * kl_log_uniform_total([weight], form)
    expected = torch.autograd.grad(_plain_loss(operation, inputs, form, 1.3), inputs.trainable())
    for retain_graph in (True, True, False):
        _assert_close(torch.autograd.grad(loss, inputs.trainable(), retain_graph=retain_graph), expected)


def test_one_divergence_keeps_its_gradient_when_another_form_of_it_is_computed(device):
    inputs = _inputs(LINEAR.values[0], device)
    _, weight = _local(LINEAR.values[0], inputs, seed=3)
    parameters = (inputs.loc, inputs.log_variance)
    totals = {form: kl_log_uniform_total([weight], form) for form in FORMS}
    for form, total in totals.items():
        expected = torch.autograd.grad(divergence.kl_log_uniform_total(*parameters, form), parameters)
        _assert_close(torch.autograd.grad(total, parameters, retain_graph=True), expected)


def test_output_and_divergence_may_be_differentiated_apart(device):
    operation = LINEAR.values[0]
    inputs = _inputs(operation, device)
    output, weight = _local(operation, inputs, seed=3)
    kl = kl_log_uniform_total([weight], "exact")
    parameters = (inputs.loc, inputs.log_variance)
    apart = [torch.autograd.grad(part, parameters, retain_graph=True) for part in (_projected(output), kl)]
    _assert_close(apart[0], torch.autograd.grad(_projected(_plain(operation, inputs, seed=3)), parameters))
    expected = divergence.kl_log_uniform_total(*parameters, "exact")
    _assert_close(apart[1], torch.autograd.grad(expected, parameters))


@pytest.mark.parametrize("form", FORMS)
def test_divergence_of_several_weights_used_in_every_way_is_the_sum(form, device):
    every = [_inputs(p.values[0], device, seed=seed) for seed, p in enumerate([LINEAR, CONV2D, LINEAR, LINEAR])]
    weights = []
    for inputs, p in zip(every[:2], [LINEAR, CONV2D], strict=True):
        weights.append(_local(p.values[0], inputs, seed=3)[1])
    drawn, unused = (_lazy(inputs.loc, inputs.log_variance) for inputs in every[2:])
    drawn.clone()
    kl = kl_log_uniform_total([weights[0], drawn, unused, weights[1]], form)
    parameters = [t for inputs in every for t in (inputs.loc, inputs.log_variance)]
    expected = sum(divergence.kl_log_uniform_total(i.loc, i.log_variance, form) for i in every)
    _assert_close(kl, expected)
    _assert_close(torch.autograd.grad(kl, parameters), torch.autograd.grad(expected, parameters))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_divergence_of_low_precision_weights_is_that_of_the_plain_function(dtype, form, device):
    inputs = Inputs(*(t.detach().to(dtype).requires_grad_() for t in _inputs(LINEAR.values[0], device)))
    _, weight = _local(LINEAR.values[0], inputs, seed=3)
    kl = kl_log_uniform_total([weight], form)
    expected = divergence.kl_log_uniform_total(inputs.loc, inputs.log_variance, form)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(kl.double(), expected.double(), rtol=tolerance, atol=tolerance)
    parameters = (inputs.loc, inputs.log_variance)
    gradients = torch.autograd.grad(kl, parameters)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, parameters), rtol=4 * tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_divergence_of_weights_of_two_dtypes_is_right_to_the_precision_of_the_lower(form, device):
    double = _inputs(LINEAR.values[0], device)
    single = Inputs(*(t.detach().float() for t in _inputs(LINEAR.values[0], device, seed=2)))
    weights = [_local(LINEAR.values[0], inputs, seed=3)[1] for inputs in (single, double)]
    kl = kl_log_uniform_total(weights, form)
    expected = sum(divergence.kl_log_uniform_total(i.loc, i.log_variance, form).double() for i in (single, double))
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=0)
    parameters = (double.loc, double.log_variance)
    plain = divergence.kl_log_uniform_total(*parameters, form)
    _assert_close(torch.autograd.grad(kl, parameters), torch.autograd.grad(plain, parameters), 1e-5)


def test_divergence_of_an_expanded_posterior_reaches_what_was_expanded(device):
    loc = torch.linspace(-1, 1, 4, dtype=torch.float64, device=device).requires_grad_()
    weight = local_reparam(lambda: pyro.sample("w", SparseNormal(loc, -2.0).expand([3, 4]).to_event(2)))()
    F.linear(torch.ones(2, 4, dtype=torch.float64, device=device), weight)
    gradient = torch.autograd.grad(kl_log_uniform_total([weight], "exact"), loc)
    expected = 3 * divergence.kl_log_uniform_total(loc, torch.tensor(-2.0, device=device), "exact")
    _assert_close(gradient, torch.autograd.grad(expected, loc))


def test_divergence_of_a_plain_normal_reaches_its_scale(device):
    loc, log_variance = _posterior(device)
    scale = (log_variance / 2).exp().detach().requires_grad_()
    weight = local_reparam(lambda: pyro.sample("w", dist.Normal(loc, scale).to_event(2)))()
    F.linear(torch.ones(2, 4, dtype=torch.float64, device=device), weight)
    gradients = torch.autograd.grad(kl_log_uniform_total([weight], "exact"), (loc, scale))
    expected = divergence.kl_log_uniform_total(loc, 2 * scale.log(), "exact")
    _assert_close(gradients, torch.autograd.grad(expected, (loc, scale)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_draw_that_is_first_asked_for_without_a_gradient_has_one_for_others(mode, device):
    loc = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    weight = _lazy(loc, torch.zeros_like(loc))
    with mode():
        norm = torch.linalg.vector_norm(weight)
    (grad,) = torch.autograd.grad((weight * 2).sum(), loc)
    assert norm > 0
    assert (grad == 2).all()


def test_a_draw_of_a_weight_made_without_a_gradient_has_none(device):
    loc = torch.randn(3, 4, device=device, requires_grad=True)
    with torch.no_grad():
        weight = _lazy(loc, torch.zeros_like(loc))
    assert not (weight * 2).requires_grad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operation", ONE_OF_EACH)
def test_divergence_has_its_gradients_where_the_output_was_sampled_without(operation, form, device):
    inputs = _inputs(operation, device)
    with torch.no_grad():
        _, weight = _local(operation, inputs, seed=3)
    parameters = (inputs.loc, inputs.log_variance)
    gradients = torch.autograd.grad(kl_log_uniform_total([weight], form), parameters)
    expected = divergence.kl_log_uniform_total(*parameters, form)
    _assert_close(gradients, torch.autograd.grad(expected, parameters))


def test_patches_are_not_made_where_they_take_much_more_memory_than_the_output(device):
    geometry = ([1, 1], [3, 3], [1, 1], False, [0, 0], 1)
    x = torch.zeros(2, 1, 16, 16, device=device)
    assert not SingleChannelConvolution.applies(x, torch.Size([8, 1, 7, 7]), geometry)
    assert SingleChannelConvolution.applies(x, torch.Size([25, 1, 7, 7]), geometry) == x.is_cpu


@pytest.mark.parametrize("shape", [(0, 4), (0, 5, 4), (2, 0, 4)], ids=str)
def test_an_empty_batch_has_an_empty_output(shape, device):
    weight = _lazy(torch.zeros(3, 4, device=device), torch.zeros(3, 4, device=device))
    assert F.linear(torch.zeros(shape, device=device), weight).shape == (*shape[:-1], 3)


@pytest.mark.parametrize("change", [nn.ReLU, nn.Dropout])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(4, 3), lambda: nn.Conv2d(1, 6, 2), lambda: nn.Conv2d(3, 6, 2)])
def test_a_sampled_output_may_be_changed_in_place(layer, change, device):
    torch.manual_seed(1)
    layer = layer().to(device)
    bnn, x = bayesianize(layer), torch.randn(5, *((4,) if isinstance(layer, nn.Linear) else (layer.in_channels, 4, 4)))
    guide = AutoSparseNormal(bnn, init_log_variance=-2.0)
    gradients = []
    for inplace in (False, True):
        torch.manual_seed(2)
        output = change(inplace=inplace)(poutine.replay(bnn, poutine.trace(local_reparam(guide)).get_trace(x))(x))
        gradients.append(torch.autograd.grad(output.square().sum(), list(guide.parameters())))
    torch.testing.assert_close(*gradients)


def _padded(output):
    return output.to_padded_tensor(0.0) if output.is_nested else output


# What knows no output that is sampled: of weight and input.
DRAWN = {
    "vmap": lambda w, x: torch.vmap(lambda row: F.linear(row, w))(x),
    "func.grad": lambda w, x: torch.vmap(torch.func.grad(lambda row: F.linear(row, w).square().sum()))(x),
    "jacrev": lambda w, x: torch.func.jacrev(lambda row: F.linear(row, w))(x[0]),
    "coordinates": lambda w, x: F.linear(x.to_sparse(), w),
    "compressed rows": lambda w, x: F.linear(x.to_sparse_csr(), w),
    "nested": lambda w, x: _padded(F.linear(torch.nested.nested_tensor([x[:2], x[2:]]), w)),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("use", DRAWN.values(), ids=DRAWN)
def test_where_no_output_can_be_sampled_the_weight_is_drawn_once(use, device):
    loc = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    log_variance = torch.zeros_like(loc, requires_grad=True)
    x = torch.randn(5, 4, dtype=torch.float64, device=device)
    results = []
    for handler in (nullcontext(), local_reparam()):
        torch.manual_seed(0)
        with handler:
            w = pyro.sample("w", SparseNormal(loc, log_variance).to_event(2))
            output = use(w, x)
        results.append((output, *torch.autograd.grad(output.square().sum(), (loc, log_variance))))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("bad", [False, True])
def test_nested_arguments_are_checked(bad, device):
    parts = [torch.ones(2, 3, device=device), torch.ones(4, 3, device=device)]
    parts[1][0, 0] = torch.nan if bad else 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        assert (finite_value(None, torch.nested.nested_tensor(parts)) is None) == bad
