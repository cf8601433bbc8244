"""The divergence of lazy weights, whose gradient travels with the operation."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
    plain_output,
    posterior_parameters,
    projected,
    sampled_output,
    unsampled_weight,
)
from pyro_sparsevd import SparseNormal
from pyro_sparsevd.ops import divergence
from pyro_sparsevd.poutine.kl import kl_log_uniform_total
from pyro_sparsevd.poutine.local_reparam import local_reparam

# Torch's own plain operation says so.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

FORMS = ["approximate", "exact"]
OTHERS = ("linear-3d", "conv1d-same-even", "conv2d-grey", "conv2d-depthwise", "conv3d", "conv_transpose3d")
CARRIERS = [*ONE_OF_EACH, CHANNELS_LAST, *(p for p in OPERATIONS if p.id in OTHERS)]


def _plain_loss(operation: Operation, inputs: Inputs, form: Any, weight_of_output: float) -> Tensor:
    output = projected(plain_output(operation, inputs, seed=3))
    return weight_of_output * output + 0.7 * divergence.kl_log_uniform_total(inputs.loc, inputs.log_variance, form)


class TestGradients:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("weight_of_output", [1.3, 0.0], ids=["output-used", "output-weighs-nothing"])
    @pytest.mark.parametrize("operation", CARRIERS)
    def test_divergence_and_gradients_equal_the_plain_ones(self, operation, weight_of_output, form, device):
        inputs = inputs_of(operation, device)
        output, weight = sampled_output(operation, inputs, seed=3)
        kl = kl_log_uniform_total([weight], form)
        assert_close(kl, divergence.kl_log_uniform_total(inputs.loc, inputs.log_variance, form))
        gradients = torch.autograd.grad(weight_of_output * projected(output) + 0.7 * kl, inputs.trainable())
        expected = _plain_loss(operation, inputs, form, weight_of_output)
        assert_close(gradients, torch.autograd.grad(expected, inputs.trainable()))

    @pytest.mark.parametrize("frozen", [("loc",), ("log_variance",), ("x", "bias"), ("x", "loc")], ids=" ".join)
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("operation", ONE_OF_EACH)
    def test_divergence_gradients_are_right_with_inputs_frozen(self, operation, form, frozen, device):
        inputs = inputs_of(operation, device, frozen)
        output, weight = sampled_output(operation, inputs, seed=3)
        loss = 1.3 * projected(output) + 0.7 * kl_log_uniform_total([weight], form)
        expected = torch.autograd.grad(_plain_loss(operation, inputs, form, 1.3), inputs.trainable())
        assert_close(torch.autograd.grad(loss, inputs.trainable()), expected)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("operation", ONE_OF_EACH)
    def test_divergence_has_its_gradients_without_the_output_in_the_loss(self, operation, form, device):
        inputs = inputs_of(operation, device)
        _, weight = sampled_output(operation, inputs, seed=3)
        parameters = (inputs.loc, inputs.log_variance)
        gradients = torch.autograd.grad(kl_log_uniform_total([weight], form), parameters)
        expected = divergence.kl_log_uniform_total(*parameters, form)
        assert_close(gradients, torch.autograd.grad(expected, parameters))

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("operation", ONE_OF_EACH)
    def test_divergence_has_its_gradients_if_the_output_was_sampled_without(self, operation, form, device):
        inputs = inputs_of(operation, device)
        with torch.no_grad():
            _, weight = sampled_output(operation, inputs, seed=3)
        parameters = (inputs.loc, inputs.log_variance)
        gradients = torch.autograd.grad(kl_log_uniform_total([weight], form), parameters)
        expected = divergence.kl_log_uniform_total(*parameters, form)
        assert_close(gradients, torch.autograd.grad(expected, parameters))

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("operation", ONE_OF_EACH)
    def test_divergence_gradients_are_the_same_twice_from_a_retained_graph(self, operation, form, device):
        inputs = inputs_of(operation, device)
        output, weight = sampled_output(operation, inputs, seed=3)
        loss = 1.3 * projected(output) + 0.7 * kl_log_uniform_total([weight], form)
        expected = torch.autograd.grad(_plain_loss(operation, inputs, form, 1.3), inputs.trainable())
        for retain_graph in (True, True, False):
            assert_close(torch.autograd.grad(loss, inputs.trainable(), retain_graph=retain_graph), expected)

    def test_one_divergence_keeps_its_gradient_when_another_form_is_computed(self, device):
        inputs = inputs_of(LINEAR.values[0], device)
        _, weight = sampled_output(LINEAR.values[0], inputs, seed=3)
        parameters = (inputs.loc, inputs.log_variance)
        totals = {form: kl_log_uniform_total([weight], form) for form in FORMS}
        for form, total in totals.items():
            expected = torch.autograd.grad(divergence.kl_log_uniform_total(*parameters, form), parameters)
            assert_close(torch.autograd.grad(total, parameters, retain_graph=True), expected)

    def test_output_and_divergence_may_be_differentiated_apart(self, device):
        operation = LINEAR.values[0]
        inputs = inputs_of(operation, device)
        output, weight = sampled_output(operation, inputs, seed=3)
        kl = kl_log_uniform_total([weight], "exact")
        parameters = (inputs.loc, inputs.log_variance)
        apart = [torch.autograd.grad(part, parameters, retain_graph=True) for part in (projected(output), kl)]
        assert_close(apart[0], torch.autograd.grad(projected(plain_output(operation, inputs, seed=3)), parameters))
        expected = divergence.kl_log_uniform_total(*parameters, "exact")
        assert_close(apart[1], torch.autograd.grad(expected, parameters))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_a_draw_first_asked_for_without_a_gradient_has_one_for_others(self, mode, device):
        loc = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
        weight = unsampled_weight(loc, torch.zeros_like(loc))
        with mode():
            norm = torch.linalg.vector_norm(weight)
        (grad,) = torch.autograd.grad((weight * 2).sum(), loc)
        assert norm > 0
        assert (grad == 2).all()


@pytest.mark.parametrize("form", FORMS)
class TestSeveralWeights:
    def test_divergence_of_several_weights_used_in_every_way_is_the_sum(self, form, device):
        every = [inputs_of(p.values[0], device, seed=seed) for seed, p in enumerate([LINEAR, CONV2D, LINEAR, LINEAR])]
        weights = []
        for inputs, p in zip(every[:2], [LINEAR, CONV2D], strict=True):
            weights.append(sampled_output(p.values[0], inputs, seed=3)[1])
        drawn, unused = (unsampled_weight(inputs.loc, inputs.log_variance) for inputs in every[2:])
        drawn.clone()
        kl = kl_log_uniform_total([weights[0], drawn, unused, weights[1]], form)
        parameters = [t for inputs in every for t in (inputs.loc, inputs.log_variance)]
        expected = sum(divergence.kl_log_uniform_total(i.loc, i.log_variance, form) for i in every)
        assert_close(kl, expected)
        assert_close(torch.autograd.grad(kl, parameters), torch.autograd.grad(expected, parameters))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_divergence_of_low_precision_weights_is_the_plain_function(self, dtype, form, device):
        inputs = Inputs(*(t.detach().to(dtype).requires_grad_() for t in inputs_of(LINEAR.values[0], device)))
        _, weight = sampled_output(LINEAR.values[0], inputs, seed=3)
        kl = kl_log_uniform_total([weight], form)
        expected = divergence.kl_log_uniform_total(inputs.loc, inputs.log_variance, form)
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(kl.double(), expected.double(), rtol=tolerance, atol=tolerance)
        parameters = (inputs.loc, inputs.log_variance)
        gradients = torch.autograd.grad(kl, parameters)
        torch.testing.assert_close(
            gradients, torch.autograd.grad(expected, parameters), rtol=4 * tolerance, atol=tolerance
        )

    def test_divergence_of_weights_of_two_dtypes_has_the_lower_precision(self, form, device):
        double = inputs_of(LINEAR.values[0], device)
        single = Inputs(*(t.detach().float() for t in inputs_of(LINEAR.values[0], device, seed=2)))
        weights = [sampled_output(LINEAR.values[0], inputs, seed=3)[1] for inputs in (single, double)]
        kl = kl_log_uniform_total(weights, form)
        expected = sum(divergence.kl_log_uniform_total(i.loc, i.log_variance, form).double() for i in (single, double))
        torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=0)
        parameters = (double.loc, double.log_variance)
        plain = divergence.kl_log_uniform_total(*parameters, form)
        assert_close(torch.autograd.grad(kl, parameters), torch.autograd.grad(plain, parameters), 1e-5)


class TestOtherPosteriors:
    def test_divergence_of_an_expanded_posterior_reaches_what_was_expanded(self, device):
        loc = torch.linspace(-1, 1, 4, dtype=torch.float64, device=device).requires_grad_()
        weight = local_reparam(lambda: pyro.sample("w", SparseNormal(loc, -2.0).expand([3, 4]).to_event(2)))()
        F.linear(torch.ones(2, 4, dtype=torch.float64, device=device), weight)
        gradient = torch.autograd.grad(kl_log_uniform_total([weight], "exact"), loc)
        expected = 3 * divergence.kl_log_uniform_total(loc, torch.tensor(-2.0, device=device), "exact")
        assert_close(gradient, torch.autograd.grad(expected, loc))

    def test_divergence_of_a_plain_normal_reaches_its_scale(self, device):
        loc, log_variance = posterior_parameters(device)
        scale = (log_variance / 2).exp().detach().requires_grad_()
        weight = local_reparam(lambda: pyro.sample("w", dist.Normal(loc, scale).to_event(2)))()
        F.linear(torch.ones(2, 4, dtype=torch.float64, device=device), weight)
        gradients = torch.autograd.grad(kl_log_uniform_total([weight], "exact"), (loc, scale))
        expected = divergence.kl_log_uniform_total(loc, 2 * scale.log(), "exact")
        assert_close(gradients, torch.autograd.grad(expected, (loc, scale)))
