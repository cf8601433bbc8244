"""Networks with priors against the networks themselves."""

import copy
import pickle

import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn

import pyro_sparsevd as svd
from checks import assert_same_function, conditioned, first_of, matrices_of, random_values, sites_of, torch_saved
from problems import NETWORKS, Tied, shared
from pyro_sparsevd.nn.sites import WeightPrior

# cuDNN wants the weights of a recurrent layer in one piece of memory, which weights that are drawn are not.
pytestmark = pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS)
def case(request, device):
    """A network in float64 and inputs for it."""
    return request.param.on(device)


def all_names(net):
    """Returns every name of the tensors that are weights by default."""
    return [name for name, p in net.named_parameters(remove_duplicate=False) if p.dim() > 1]


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda bnn: pickle.loads(pickle.dumps(bnn)),
    "torch.save": torch_saved,
    "train and eval": lambda bnn: bnn.eval().train(bnn.training),
    "state dict": lambda bnn: bnn.load_state_dict(bnn.state_dict()) and bnn,
    "zero grad": lambda bnn: bnn.zero_grad() or bnn,
    "requires grad": lambda bnn: bnn.requires_grad_(True),
    "same dtype": lambda bnn: bnn.to(torch.float64),
}


class TestEveryNetwork:
    def test_sites_are_the_parameters_of_two_or_more_dimensions(self, case):
        net, inputs = case
        bnn = svd.bayesianize(net)
        assert sorted(sites_of(bnn, *inputs)) == sorted(matrices_of(net))
        others = {name: p for name, p in net.named_parameters() if p.dim() < 2}
        kept = dict(bnn.named_parameters())
        assert list(kept) == list(others)
        for name, parameter in others.items():
            assert torch.equal(kept[name], parameter)
            assert kept[name] is not parameter

    def test_network_computes_what_the_original_does_with_the_same_weights(self, case):
        net, inputs = case
        assert_same_function(svd.bayesianize(net), net, inputs)

    def test_original_is_untouched(self, case):
        net, inputs = case
        state, classes = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
        parameters, flags = list(net.parameters()), [p.requires_grad for p in net.parameters()]
        bnn = svd.bayesianize(net)
        conditioned(bnn, random_values(net), *inputs)
        with torch.no_grad():
            for tensor in [*bnn.parameters(), *bnn.buffers()]:
                tensor.zero_()
        assert [type(m) for m in net.modules()] == classes
        assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
        assert [p.requires_grad for p in net.parameters()] == flags
        assert list(net.state_dict()) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())

    def test_modules_keep_their_names_their_order_and_their_classes(self, case):
        net, _ = case
        bnn = svd.bayesianize(net)
        assert isinstance(bnn, PyroModule)
        assert [name for name, _ in bnn.named_modules()] == [name for name, _ in net.named_modules()]
        for ours, theirs in zip(bnn.modules(), net.modules(), strict=True):
            plain = isinstance(theirs, nn.ReLU | nn.Tanh | nn.Flatten | nn.MaxPool2d | nn.Identity)
            assert isinstance(ours, PyroModule) != plain
            assert isinstance(ours, type(theirs))
            assert ours.training == theirs.training

    def test_state_is_the_originals_without_the_weights(self, case):
        net, _ = case
        state = svd.bayesianize(net).state_dict()
        kept = {name: value for name, value in net.state_dict(keep_vars=True).items() if name not in all_names(net)}
        assert list(state) == list(kept)
        assert all(torch.equal(state[name], value) for name, value in kept.items())

    @pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
    def test_copies_compute_the_same_and_leave_the_original_working(self, copied, case):
        net, inputs = case
        mode = net.training
        bnn = svd.bayesianize(net)
        other = copied(bnn).train(mode)
        assert_same_function(other, net, inputs)
        assert_same_function(bnn.train(mode), net, inputs)

    def test_copies_are_independent(self, case):
        net, inputs = case
        bnn = svd.bayesianize(net)
        before = conditioned(copy.deepcopy(bnn), values := random_values(net), *inputs)
        for other in (copy.deepcopy(bnn), pickle.loads(pickle.dumps(bnn))):
            with torch.no_grad():
                for tensor in [*other.parameters(), *other.buffers()]:
                    tensor.zero_()
        torch.testing.assert_close(conditioned(bnn, values, *inputs), before)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_conversion_of_dtype_moves_priors_and_values(self, dtype, case):
        net, inputs = case
        other = torch.float64 if dtype == torch.float32 else torch.float32
        bnn = svd.bayesianize(net.to(other), svd.LogUniform(1e-3, 1.0)).to(dtype)
        net = net.to(dtype)
        inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
        trace = poutine.trace(bnn).get_trace(*inputs)
        for name in matrices_of(net):
            site = trace.nodes[name]
            assert site["value"].dtype == site["fn"].log_prob(site["value"]).dtype == dtype
            assert torch.equal(site["fn"].value, net.get_parameter(name))
        assert first_of(trace.nodes["_RETURN"]["value"]).dtype == dtype
        assert_same_function(bnn, net, inputs, rtol=1e-4 if dtype == torch.float32 else 1e-9)

    def test_improper_density_of_the_weights_is_scored_once_each(self, case):
        net, inputs = case
        values = random_values(net)
        trace = poutine.trace(poutine.condition(svd.bayesianize(net), data=values)).get_trace(*inputs)
        expected = sum(-value.abs().log().sum() for value in values.values())
        torch.testing.assert_close(trace.log_prob_sum(), expected)

    def test_prior_of_each_weight_covers_the_weight_and_knows_its_value(self, case):
        net, inputs = case
        bnn = svd.bayesianize(net)
        trace = poutine.trace(poutine.condition(bnn, data=random_values(net))).get_trace(*inputs)
        for name in matrices_of(net):
            prior = trace.nodes[name]["fn"]
            parameter = net.get_parameter(name)
            assert isinstance(prior, WeightPrior)
            assert (prior.batch_shape, prior.event_shape) == ((), parameter.shape)
            assert torch.equal(prior.value, parameter)
            assert not prior.value.requires_grad

    def test_weights_read_outside_of_a_pass_are_the_originals_values(self, case):
        net, _ = case
        bnn = svd.bayesianize(net)
        for name in all_names(net):
            path, _, attribute = name.rpartition(".")
            assert torch.equal(getattr(bnn.get_submodule(path), attribute), net.get_parameter(name))

    def test_network_of_a_converted_network_is_of_the_same_function(self, case):
        net, inputs = case
        names = matrices_of(net)
        once = svd.bayesianize(net, include=names[0])
        twice = svd.bayesianize(once, include=names[1:]) if len(names) > 1 else copy.deepcopy(once)
        assert sorted(sites_of(copy.deepcopy(twice), *inputs)) == sorted(names)
        assert_same_function(twice, net, inputs)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_improper_prior_of_a_half_precision_network_draws_finite_weights(self, dtype, device):
        bnn = svd.bayesianize(nn.Linear(4, 3).to(device, dtype))
        with pytest.warns(svd.ImproperPriorWarning):
            weight = (
                poutine.trace(bnn).get_trace(torch.zeros(1, 4, dtype=dtype, device=device)).nodes["weight"]["value"]
            )
        assert weight.dtype == dtype
        assert weight.isfinite().all()


class TestOneTensorOneSite:
    def test_tied_layers_use_one_draw(self, device):
        net = Tied().to(device)
        bnn = svd.bayesianize(net, svd.LogUniform(1e-3, 1.0))
        with torch.no_grad():
            bnn.output.bias.zero_()
        tokens = torch.arange(6, device=device)
        for _ in range(2):
            trace = poutine.trace(bnn).get_trace(tokens)
            weight = trace.nodes["embedding.weight"]["value"]
            assert trace.stochastic_nodes == ["embedding.weight"]
            torch.testing.assert_close(trace.nodes["_RETURN"]["value"], weight @ weight.T)

    def test_shared_module_uses_one_draw(self, device):
        bnn = svd.bayesianize(shared().to(device), svd.LogUniform(1e-3, 1.0))
        assert bnn[0] is bnn[2]
        x = torch.randn(5, 4, device=device)
        trace = poutine.trace(bnn).get_trace(x)
        weight, bias = trace.nodes["0.weight"]["value"], bnn[0].bias
        assert trace.stochastic_nodes == ["0.weight"]
        expected = torch.tanh(x @ weight.T + bias) @ weight.T + bias
        torch.testing.assert_close(trace.nodes["_RETURN"]["value"], expected)

    def test_two_passes_use_two_draws(self, device):
        bnn = svd.bayesianize(nn.Linear(4, 3).to(device), svd.LogUniform(1e-3, 1.0))
        x = torch.ones(1, 4, device=device)
        assert not torch.equal(bnn(x), bnn(x))

    def test_copies_of_tied_layers_are_tied_among_themselves(self, device):
        bnn = svd.bayesianize(Tied().to(device), svd.LogUniform(1e-3, 1.0))
        for other in (copy.deepcopy(bnn), pickle.loads(pickle.dumps(bnn)), torch_saved(bnn)):
            assert sites_of(other, torch.arange(6, device=device)) == ["embedding.weight"]
            with torch.no_grad():
                other.embedding.get_buffer("weight_initial").zero_()
            assert (other.output.weight == 0).all()
        assert (bnn.output.weight != 0).any()
