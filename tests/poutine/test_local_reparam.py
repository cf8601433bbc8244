"""The handler of local reparameterisation, and the memory that its weights hold."""

import gc
import weakref
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor

from checks import assert_close
from operations import (
    LINEAR,
    ONE_OF_EACH,
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
from pyro_sparsevd.distributions.log_uniform import LogUniform
from pyro_sparsevd.ops.memory import Workspace
from pyro_sparsevd.poutine.kl import kl_log_uniform_total
from pyro_sparsevd.poutine.local_reparam import LocalReparamMessenger, local_reparam
from pyro_sparsevd.poutine.unsampled_weight import UnsampledWeight


def _three_layer_guide(device: torch.device) -> Callable[[], dict[str, Tensor]]:
    loc, log_variance = posterior_parameters(device)
    return lambda: {
        name: pyro.sample(name, SparseNormal(loc, log_variance).to_event(2)) for name in ("first", "second", "third")
    }


class TestHandler:
    def test_it_wraps_a_function(self, device):
        values = local_reparam(_three_layer_guide(device))()
        assert all(type(value) is UnsampledWeight for value in values.values())

    def test_it_decorates_a_function(self, device):
        guide = _three_layer_guide(device)

        @local_reparam
        def bare():
            return guide()

        @local_reparam(exclude={"second"})
        def with_options():
            return guide()

        assert [type(value) for value in bare().values()] == [UnsampledWeight, UnsampledWeight, UnsampledWeight]
        assert [type(value) for value in with_options().values()] == [UnsampledWeight, Tensor, UnsampledWeight]

    def test_it_is_a_context(self, device):
        guide = _three_layer_guide(device)
        with local_reparam(exclude=("first",)) as messenger:
            inside = guide()
        outside = guide()
        assert isinstance(messenger, LocalReparamMessenger)
        assert [type(value) for value in inside.values()] == [Tensor, UnsampledWeight, UnsampledWeight]
        assert all(type(value) is Tensor for value in outside.values())

    def test_an_excluded_site_is_drawn_as_usual(self, device):
        guide = _three_layer_guide(device)
        torch.manual_seed(3)
        excluded = local_reparam(guide, exclude={"first", "second", "third"})()
        torch.manual_seed(3)
        assert_close(excluded, guide(), 0.0)

    def test_replay_hands_the_weight_that_is_not_drawn_to_the_model(self, device, draws):
        loc, log_variance = posterior_parameters(device)
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
        assert_close(
            output, plain_output(Operation(F.linear, (), (), None), Inputs(x, loc, log_variance, None), seed=3)
        )

    def test_two_calls_give_two_weights(self, device):
        guide = local_reparam(_three_layer_guide(device))
        first, second = guide()["first"], guide()["first"]
        assert first is not second
        assert not torch.equal(first.clone(), second.clone())


ZEROS = torch.zeros(3, 4)


class TestWhichSites:
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
    def test_only_factorised_normal_latents_without_batch_dimensions_are_lazy(self, fn, options, is_lazy):
        value = local_reparam(lambda: pyro.sample("w", fn, **options))()
        assert (type(value) is UnsampledWeight) == is_lazy
        assert value.shape == fn.shape()

    def test_a_site_in_a_plate_is_drawn(self):
        @local_reparam
        def guide():
            with pyro.plate("plate", 2):
                return pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(1))

        assert type(guide()) is Tensor

    def test_a_value_that_another_handler_gave_is_kept(self):
        value = torch.randn(3, 4)
        guide = poutine.condition(_three_layer_guide(torch.device("cpu")), data={"first": value})
        assert local_reparam(guide)()["first"] is value


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
        weight = unsampled_weight(loc, log_variance, workspace=workspace)
        output = call(x, weight)
        loss = projected(output) + kl_log_uniform_total([weight], "approximate")
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
                parameter = unsampled_weight(*tensors[1:], workspace=workspace)
                loss = projected(call(tensors[0], parameter)) + kl_log_uniform_total([parameter], "exact")
                loss.backward()
            sums.append([t.grad for t in tensors])
        assert_close(*sums, 0.0)

    def test_two_graphs_alive_at_once_do_not_share_memory(self, call, x, weight, device):
        tensors, workspace = self._tensors(x, weight, device), Workspace()
        gradients = []
        for kept in (True, False):
            torch.manual_seed(3)
            losses = []
            for _ in range(2):
                parameter = unsampled_weight(*tensors[1:], workspace=workspace if kept else None)
                losses.append(projected(call(tensors[0], parameter)) + kl_log_uniform_total([parameter], "exact"))
            gradients.append([torch.autograd.grad(loss, tensors) for loss in losses])
        assert_close(*gradients, 0.0)


class TestGraph:
    @pytest.mark.parametrize("operation", ONE_OF_EACH)
    def test_the_graph_is_freed_without_the_garbage_collector(self, operation, device):
        inputs = inputs_of(operation, device)
        gc.collect()
        gc.disable()
        try:
            output, weight = sampled_output(operation, inputs, seed=3)
            loss = output.sum() + kl_log_uniform_total([weight], "exact")
            loss.backward()
            references = [weakref.ref(t) for t in (weight, weight._kl_zero, output, output.grad_fn, loss)]
            del output, weight, loss
            assert [reference() for reference in references] == [None] * len(references)
        finally:
            gc.enable()

    def test_a_weight_freed_before_its_output_leaves_the_backward_pass_intact(self, device):
        operation = LINEAR.values[0]
        inputs = inputs_of(operation, device)
        output, weight = sampled_output(operation, inputs, seed=3)
        reference = weakref.ref(weight)
        del weight
        assert reference() is None
        gradients = torch.autograd.grad(projected(output), inputs.trainable())
        expected = torch.autograd.grad(projected(plain_output(operation, inputs, seed=3)), inputs.trainable())
        assert_close(gradients, expected)
