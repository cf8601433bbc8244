"""Every operation that samples its output against its plain formula."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from checks import assert_close
from operations import (
    CHANNELS_LAST,
    CONV2D,
    LINEAR,
    ONE_OF_EACH,
    OPERATIONS,
    Inputs,
    Operation,
    inputs_of,
    moments_of,
    plain_output,
    projected,
    sampled_output,
    unsampled_weight,
)
from pyro_sparsevd import AutoSparseNormal, SparseNormal, bayesianize
from pyro_sparsevd.ops.local_convolution import SingleChannelConvolution
from pyro_sparsevd.ops.memory import Workspace
from pyro_sparsevd.poutine.local_reparam import local_reparam
from pyro_sparsevd.poutine.unsampled_weight import UnsampledWeight

# Torch's own plain operation says so.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

# Each statistical test compares thousands of numbers: 6 sigma keep the chance of a false alarm in the file below 1 %.
SIGMAS = 6
SAMPLES = 300


def _standardised(samples: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Returns the samples, a row each, with their mean and scale taken away, where there is a variance."""
    assert samples.shape[1:] == mean.shape
    noisy = variance > 0  # no kernel reaches the output padding of a transposed convolution
    assert_close(samples[:, ~noisy], mean[~noisy].expand(len(samples), -1))
    return (samples[:, noisy] - mean[noisy]) / variance[noisy].sqrt()


class TestMoments:
    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_outputs_are_independent_with_the_moments_of_the_formula(self, operation, device):
        inputs = Inputs(*(t if t is None else t.detach() for t in inputs_of(operation, device)))
        samples = torch.stack([sampled_output(operation, inputs)[0] for _ in range(SAMPLES)])
        z = _standardised(samples, *moments_of(operation, inputs))
        assert z.mean(0).abs().max() < SIGMAS / SAMPLES**0.5
        correlation = z.t() @ z / SAMPLES
        assert (correlation.diagonal() - 1).abs().max() < SIGMAS * (2 / SAMPLES) ** 0.5
        correlation.fill_diagonal_(0)
        assert correlation.abs().max() < SIGMAS / SAMPLES**0.5

    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_the_formula_has_the_mean_and_variance_of_drawn_weights(self, operation, device):
        inputs = Inputs(*(t if t is None else t.detach() for t in inputs_of(operation, device)))
        q = SparseNormal(inputs.loc, inputs.log_variance)
        samples = torch.stack([operation.call(inputs.x, q.sample(), inputs.bias) for _ in range(SAMPLES)])
        z = _standardised(samples, *moments_of(operation, inputs))
        assert z.mean(0).abs().max() < SIGMAS / SAMPLES**0.5
        assert (z.square().mean(0) - 1).abs().max() < SIGMAS * (2 / SAMPLES) ** 0.5

    def test_a_linear_map_by_a_vector_has_the_moments_of_the_formula(self, device):
        # Which torch allows; whether it is sampled locally or drawn is free.
        operation = Operation(F.linear, (5, 4), (4,), None)
        inputs = inputs_of(operation, device)
        z = _standardised(
            torch.stack([sampled_output(operation, inputs)[0] for _ in range(SAMPLES)]), *moments_of(operation, inputs)
        )
        assert z.mean(0).abs().max() < SIGMAS / SAMPLES**0.5
        assert (z.square().mean(0) - 1).abs().max() < SIGMAS * (2 / SAMPLES) ** 0.5
        gradients = torch.autograd.grad(projected(sampled_output(operation, inputs)[0]), inputs.trainable())
        assert [g.shape for g in gradients] == [(5, 4), (4,), (4,)]


class TestGradients:
    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_output_and_gradients_are_the_plain_formulas_for_the_same_noise(self, operation, device):
        inputs = inputs_of(operation, device)
        output, _ = sampled_output(operation, inputs, seed=3)
        expected = plain_output(operation, inputs, seed=3)
        assert_close(output, expected)
        gradients = torch.autograd.grad(projected(output), inputs.trainable())
        assert_close(gradients, torch.autograd.grad(projected(expected), inputs.trainable()))

    @pytest.mark.parametrize("frozen", [(), ("x",), ("loc", "bias")], ids=str)
    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_single_precision_has_the_same_values_and_strides(self, operation, frozen, device):
        # On a CPU, oneDNN and the order of channels that suits it come in here.
        double = inputs_of(operation, device, frozen)
        single = Inputs(*(t if t is None else t.detach().float().requires_grad_(t.requires_grad) for t in double))
        output, _ = sampled_output(operation, single, seed=3)
        expected = plain_output(operation, single, seed=3)
        assert_close(output, expected, 1e-4)
        plain = operation.call(single.x, single.loc, single.bias)
        assert output.is_contiguous() == plain.is_contiguous()
        gradients = torch.autograd.grad(projected(output), single.trainable())
        assert_close(gradients, torch.autograd.grad(projected(expected), single.trainable()), 1e-3)

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
    def test_gradients_are_right_with_inputs_frozen(self, operation, frozen, device):
        inputs = inputs_of(operation, device, frozen)
        output, _ = sampled_output(operation, inputs, seed=3)
        gradients = torch.autograd.grad(projected(output), inputs.trainable())
        expected = plain_output(operation, inputs, seed=3)
        assert_close(gradients, torch.autograd.grad(projected(expected), inputs.trainable()))

    @pytest.mark.parametrize("operation", ONE_OF_EACH)
    def test_gradients_reach_the_scale_of_a_plain_normal(self, operation, device):
        inputs = inputs_of(operation, device)
        scale = inputs.log_variance.detach().div(2).exp().requires_grad_()
        weight = local_reparam(lambda: pyro.sample("w", dist.Normal(inputs.loc, scale).to_event(inputs.loc.dim())))()
        torch.manual_seed(3)
        gradient = torch.autograd.grad(projected(operation.call(inputs.x, weight, inputs.bias)), scale)
        expected = plain_output(operation, inputs._replace(log_variance=2 * scale.log()), seed=3)
        assert_close(gradient, torch.autograd.grad(projected(expected), scale))

    @pytest.mark.parametrize("operation", ONE_OF_EACH)
    def test_gradient_of_the_second_moment_is_of_squared_mean_and_variance(self, operation, device):
        inputs = inputs_of(operation, device)
        mean, variance = moments_of(operation, inputs)
        expected = torch.autograd.grad((mean**2 + variance).sum(), inputs.trainable())
        samples = []
        for _ in range(SAMPLES):
            output, _ = sampled_output(operation, inputs)
            gradients = torch.autograd.grad(output.square().sum(), inputs.trainable())
            samples.append(torch.cat([g.reshape(-1) for g in gradients]))
        samples = torch.stack(samples)
        error = samples.mean(0) - torch.cat([g.reshape(-1) for g in expected])
        assert (error.abs() < SIGMAS * samples.std(0) / SAMPLES**0.5 + 1e-12).all()

    @pytest.mark.parametrize("operation", ONE_OF_EACH)
    def test_gradients_accumulate_and_may_be_taken_twice_from_one_graph(self, operation, device):
        inputs = inputs_of(operation, device)
        loss = projected(sampled_output(operation, inputs, seed=3)[0])
        loss.backward(retain_graph=True)
        once = [t.grad.clone() for t in inputs.trainable()]
        loss.backward()
        assert_close([t.grad for t in inputs.trainable()], [2 * g for g in once])

    def test_an_expanded_posterior_receives_the_summed_gradient(self, device):
        torch.manual_seed(1)
        loc = torch.randn(4, dtype=torch.float64, device=device).requires_grad_()
        x = torch.randn(5, 4, dtype=torch.float64, device=device)
        weight = local_reparam(lambda: pyro.sample("w", SparseNormal(loc, -2.0).expand([3, 4]).to_event(2)))()
        torch.manual_seed(3)
        gradient = torch.autograd.grad(projected(F.linear(x, weight)), loc)
        inputs = Inputs(x, loc.expand(3, 4), torch.full((3, 4), -2.0, dtype=torch.float64, device=device), None)
        expected = plain_output(Operation(F.linear, (5, 4), (3, 4), None), inputs, seed=3)
        assert_close(gradient, torch.autograd.grad(projected(expected), loc))


class _Recorder(TorchDispatchMode):
    """Records the calls of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.calls.append((func.overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))


class TestWorkDone:
    @pytest.mark.parametrize(("frozen", "products"), [((), 2), (("x",), 1), (("loc", "log_variance"), 1)])
    def test_a_linear_layer_computes_no_gradient_that_nobody_needs(self, frozen, products, device):
        operation = LINEAR.values[0]
        inputs = inputs_of(operation, device, frozen)
        loss = projected(sampled_output(operation, inputs, seed=3)[0])
        with _Recorder() as recorder:
            torch.autograd.grad(loss, inputs.trainable())
        assert sum(name == "bmm" for name, _ in recorder.calls) == products

    def test_a_convolution_computes_no_gradient_of_an_input_that_needs_none(self, device):
        operation = CONV2D.values[0]
        inputs = inputs_of(operation, device, frozen=("x",))
        loss = projected(sampled_output(operation, inputs, seed=3)[0])
        with _Recorder() as recorder:
            torch.autograd.grad(loss, inputs.trainable())
        masks = [args[-1] for name, args in recorder.calls if name == "convolution_backward"]
        assert len(masks) == 2
        assert not any(needs_x for needs_x, *_ in masks)

    def test_patches_are_not_made_where_they_take_much_more_than_the_output(self, device):
        geometry = ([1, 1], [3, 3], [1, 1], False, [0, 0], 1)
        x = torch.zeros(2, 1, 16, 16, device=device)
        assert not SingleChannelConvolution.applies(x, torch.Size([8, 1, 7, 7]), geometry)
        assert SingleChannelConvolution.applies(x, torch.Size([25, 1, 7, 7]), geometry) == x.is_cpu


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


class TestAsInTorch:
    @pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
    @pytest.mark.parametrize("other", ["x", "bias"])
    @pytest.mark.parametrize("operation", ONE_OF_EACH)
    def test_operands_of_two_dtypes_are_refused_or_taken_as_by_torch(self, operation, other, autocast, device):
        inputs = inputs_of(operation, device)
        dtype = torch.float32 if inputs.x.dtype == torch.float64 else torch.float64
        x, loc, log_variance, bias = inputs._replace(**{other: getattr(inputs, other).detach().to(dtype)})
        weight = UnsampledWeight(dist.Normal(loc, (0.5 * log_variance).exp()), "w", Workspace())
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
            of_torch, found = (_error_or_dtype(operation, x, w, bias) for w in (loc, weight))
        assert found == of_torch
        assert other == "bias" or isinstance(found, str)

    @pytest.mark.parametrize(
        "options",
        [{"padding": "same", "stride": 2}, {"padding": "full"}, {"stride": (1, 2, 3)}, {"groups": 2}, {"padding": -1}],
        ids=str,
    )
    def test_a_convolution_that_torch_refuses_is_refused(self, options, device):
        x, loc = (
            torch.ones(1, 3, 5, 5, dtype=torch.float64, device=device),
            torch.ones(2, 3, 3, 3, dtype=torch.float64, device=device),
        )
        for weight in (loc, unsampled_weight(loc, loc)):
            with pytest.raises((RuntimeError, TypeError, ValueError), match=r"same|padding|stride|groups|channels"):
                F.conv2d(x, weight, **options)

    @pytest.mark.parametrize(("make", "shape"), MODULES)
    def test_torch_modules_sample_their_output_through_functional_call(self, make, shape, device, draws):
        torch.manual_seed(1)
        module = make().to(device).double()
        x = torch.randn(shape, dtype=torch.float64, device=device)
        loc, log_variance = module.weight, torch.randn_like(module.weight)
        weight = unsampled_weight(loc, log_variance)
        torch.manual_seed(3)
        output = functional_call(module, {"weight": weight}, (x,))
        no_bias = torch.zeros_like(module.bias)

        def plain(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return functional_call(module, {"weight": w, "bias": no_bias if b is None else b}, x)

        inputs = Inputs(x, loc, log_variance, module.bias)
        assert_close(output, plain_output(Operation(plain, shape, tuple(loc.shape), None), inputs, seed=3))
        assert draws == []

    @pytest.mark.parametrize("change", [nn.ReLU, nn.Dropout])
    @pytest.mark.parametrize("layer", [lambda: nn.Linear(4, 3), lambda: nn.Conv2d(1, 6, 2), lambda: nn.Conv2d(3, 6, 2)])
    def test_a_sampled_output_may_be_changed_in_place(self, layer, change, device):
        torch.manual_seed(1)
        layer = layer().to(device)
        bnn, x = (
            bayesianize(layer),
            torch.randn(5, *((4,) if isinstance(layer, nn.Linear) else (layer.in_channels, 4, 4))),
        )
        guide = AutoSparseNormal(bnn, init_log_variance=-2.0)
        gradients = []
        for inplace in (False, True):
            torch.manual_seed(2)
            output = change(inplace=inplace)(poutine.replay(bnn, poutine.trace(local_reparam(guide)).get_trace(x))(x))
            gradients.append(torch.autograd.grad(output.square().sum(), list(guide.parameters())))
        torch.testing.assert_close(*gradients)


def _error_or_dtype(operation, *operands):
    try:
        return operation.call(*operands).dtype
    except RuntimeError as error:
        return str(error)


class TestExtremes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("operation", [*ONE_OF_EACH, CHANNELS_LAST])
    def test_inputs_of_zeros_give_the_bias_and_finite_gradients(self, operation, dtype, device):
        x, loc, log_variance, bias = (t.detach().to(dtype) for t in inputs_of(operation, device))
        x[0] = 0
        inputs = Inputs(*(t.requires_grad_() for t in (x, loc, log_variance, bias)))
        output, _ = sampled_output(operation, inputs, seed=3)
        expected = operation.call(inputs.x, inputs.loc, inputs.bias)
        torch.testing.assert_close(output[0], expected[0])
        gradients = dict(zip(inputs._fields, torch.autograd.grad(projected(output), list(inputs)), strict=True))
        assert all(g.isfinite().all() for g in gradients.values())
        # The noise of a zero input has no gradient: what is left is the mean's.
        (of_mean,) = torch.autograd.grad(projected(expected), inputs.x)
        torch.testing.assert_close(gradients["x"][0], of_mean[0], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("operation", [*ONE_OF_EACH, CHANNELS_LAST])
    def test_zeros_beside_other_numbers_leave_weight_gradients_right(self, operation, dtype, device):
        inputs = inputs_of(operation, device, frozen=("x",))
        inputs.x[0] = 0
        inputs.x[1, :2] = 0
        cast = Inputs(*(t.detach().to(dtype).requires_grad_(t.requires_grad) for t in inputs))
        gradients = torch.autograd.grad(projected(sampled_output(operation, cast, seed=3)[0]), cast.trainable())
        mean, variance = moments_of(operation, cast)
        torch.manual_seed(3)
        noise = torch.empty(mean.shape, dtype=dtype, device=device).normal_()
        # √ has no gradient at 0 in the plain formula: the noise is taken away there.
        noisy = torch.where(variance > 0, variance, 1).sqrt() * torch.where(variance > 0, noise, 0)
        expected = torch.autograd.grad(projected(mean + noisy), cast.trainable())
        assert (variance == 0).any()
        assert_close(gradients, expected, 1e-10 if dtype == torch.float64 else 1e-4)

    @pytest.mark.parametrize("operation", ONE_OF_EACH)
    def test_a_variance_that_underflows_gives_the_mean_and_finite_gradients(self, operation, device):
        inputs = Inputs(*(t.detach().float() for t in inputs_of(operation, device)))
        inputs.log_variance.fill_(-1e4)
        inputs = Inputs(*(t.requires_grad_() for t in inputs))
        output, _ = sampled_output(operation, inputs, seed=3)
        expected = operation.call(inputs.x, inputs.loc, inputs.bias)
        torch.testing.assert_close(output, expected)
        x, loc, log_variance, bias = torch.autograd.grad(projected(output), list(inputs))
        of_mean = torch.autograd.grad(projected(expected), [inputs.x, inputs.loc, inputs.bias])
        torch.testing.assert_close((x, loc, bias), of_mean)
        assert not log_variance.any()

    def test_an_empty_batch_gives_an_empty_output_and_gradients_of_zero(self, device):
        inputs = inputs_of(Operation(F.linear, (0, 4), (3, 4), 3), device)
        output, _ = sampled_output(LINEAR.values[0], inputs, seed=3)
        assert output.shape == (0, 3)
        assert not any(g.any() for g in torch.autograd.grad(output.sum(), inputs.trainable()))

    @pytest.mark.parametrize("shape", [(0, 4), (0, 5, 4), (2, 0, 4)], ids=str)
    def test_an_empty_batch_has_an_empty_output(self, shape, device):
        weight = unsampled_weight(torch.zeros(3, 4, device=device), torch.zeros(3, 4, device=device))
        assert F.linear(torch.zeros(shape, device=device), weight).shape == (*shape[:-1], 3)
