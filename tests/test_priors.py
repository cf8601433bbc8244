"""Networks with priors against the networks themselves; data sets of any size; what is refused, and by what name."""

import abc
import collections
import copy
import functools
import io
import math
import pickle
import re
import types
import unittest.mock
import warnings
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import constraints
from torch.nn.utils import parametrizations

import pyro_sparsevd as svd
from pyro_sparsevd.distributions.util import map_tensors
from pyro_sparsevd.nn.sites import SitePrior, WeightPrior

# cuDNN wants the weights of a recurrent layer in one piece of memory, which weights that are drawn are not.
pytestmark = pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")


class Block(nn.Module):
    """Modules in modules, a parameter of its own and a buffer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 4, bias=False)))
        self.mix = nn.Parameter(torch.randn(4, 4))
        self.gain = nn.Parameter(torch.randn(4))
        self.register_buffer("shift", torch.randn(4, 4))

    def forward(self, x):
        return self.inner(x) + self.gain * (x @ (self.mix + self.shift))


class Tied(nn.Module):
    """An embedding whose weight is the output layer's, as in language models."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.output = nn.Linear(3, 6)
        self.output.weight = self.embedding.weight

    def forward(self, tokens):
        return self.output(self.embedding(tokens))


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.many = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4), torch.randn(4)])
        self.named = nn.ParameterDict({"a": torch.randn(4, 2)})
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x):
        for layer, weight in zip(self.layers, self.many, strict=False):
            x = torch.tanh(layer(x) @ weight)
        return (x + self.many[2]) @ self.named["a"]


class Attention(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **sizes)

    def forward(self, query, key, value):
        return self.attention(query, key, value)[0]


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def shared():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


def conv():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 2)
    )


def floats(*shape):
    return lambda: torch.randn(*shape, dtype=torch.float64)


def tokens():
    return torch.tensor([[1, 2, 5], [0, 0, 3]])


def transformer():
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)


NETS = {
    "linear": (lambda: nn.Linear(4, 3), [floats(5, 4)]),
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)), [floats(5, 4)]),
    "conv": (conv, [floats(3, 2, 4, 4)]),
    "transposed conv": (lambda: nn.ConvTranspose1d(2, 3, 3, groups=1), [floats(3, 2, 5)]),
    "nested": (Block, [floats(5, 4)]),
    "lists": (Lists, [floats(5, 4)]),
    "shared": (shared, [floats(5, 4)]),
    "tied": (Tied, [tokens]),
    "embedding": (lambda: nn.Embedding(6, 3, padding_idx=0), [tokens]),
    "bag": (lambda: nn.EmbeddingBag(6, 3), [tokens]),
    "bilinear": (lambda: nn.Bilinear(3, 4, 2), [floats(5, 3), floats(5, 4)]),
    "lstm": (lambda: Recurrent(nn.LSTM(3, 4, 2, bidirectional=True)), [floats(5, 2, 3)]),
    "bare lstm": (lambda: nn.LSTM(3, 4), [floats(5, 2, 3)]),
    "gru": (lambda: Recurrent(nn.GRU(3, 4, batch_first=True)), [floats(5, 2, 3)]),
    "rnn": (lambda: Recurrent(nn.RNN(3, 4)), [floats(5, 2, 3)]),
    "lstm cell": (lambda: nn.LSTMCell(3, 4), [floats(5, 3)]),
    "attention": (Attention, [floats(5, 2, 4)] * 3),
    "cross attention": (lambda: Attention(kdim=3, vdim=5), [floats(5, 2, 4), floats(6, 2, 3), floats(6, 2, 5)]),
    "transformer": (transformer, [floats(5, 2, 4)]),
    "evaluated transformer": (lambda: transformer().eval(), [floats(5, 2, 4)]),
}


@pytest.fixture(params=NETS)
def case(request, device):
    """A network in float64 and inputs for it."""
    make, inputs = NETS[request.param]
    return make().to(device, torch.float64), [make_input().to(device) for make_input in inputs]


def matrices(net):
    return [name for name, p in net.named_parameters() if p.dim() > 1]


def sites_of(bnn, *inputs):
    """Returns the latents in the order of their use, from a pass with values for none but shapes for all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", svd.ImproperPriorWarning)
        return poutine.trace(bnn).get_trace(*inputs).stochastic_nodes


def first(output):
    return output[0] if isinstance(output, tuple) else output


def conditioned(bnn, values, *inputs):
    return first(poutine.condition(bnn, data=values)(*inputs))


def with_values(net, values):
    net = copy.deepcopy(net)
    with torch.no_grad():
        for name, value in values.items():
            net.get_parameter(name).copy_(value)
    return net


def random_values(net, names=None):
    names = matrices(net) if names is None else names
    return {name: torch.randn_like(net.get_parameter(name)) for name in names}


def assert_same_function(bnn, net, inputs, names=None, rtol=1e-9):
    """Checks that the Bayesian network with weights given is the network with these weights: its own and others."""
    names = matrices(net) if names is None else names
    own = {name: net.get_parameter(name).detach() for name in names}
    for values in (own, random_values(net, names)):
        expected = first(with_values(net, values)(*inputs))
        torch.testing.assert_close(conditioned(copy.deepcopy(bnn), values, *inputs), expected, rtol=rtol, atol=rtol)


def torch_saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# Laws of all networks


def test_sites_are_the_parameters_of_two_or_more_dimensions(case):
    net, inputs = case
    bnn = svd.bayesianize(net)
    assert sorted(sites_of(bnn, *inputs)) == sorted(matrices(net))
    others = {name: p for name, p in net.named_parameters() if p.dim() < 2}
    kept = dict(bnn.named_parameters())
    assert list(kept) == list(others)
    for name, parameter in others.items():
        assert torch.equal(kept[name], parameter)
        assert kept[name] is not parameter


def test_network_computes_what_the_original_computes_with_the_same_weights(case):
    net, inputs = case
    assert_same_function(svd.bayesianize(net), net, inputs)


def test_original_is_untouched(case):
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


def test_modules_keep_their_names_their_order_and_their_classes(case):
    net, _ = case
    bnn = svd.bayesianize(net)
    assert isinstance(bnn, PyroModule)
    assert [name for name, _ in bnn.named_modules()] == [name for name, _ in net.named_modules()]
    for ours, theirs in zip(bnn.modules(), net.modules(), strict=True):
        plain = isinstance(theirs, nn.ReLU | nn.Tanh | nn.Flatten | nn.MaxPool2d | nn.Identity)
        assert isinstance(ours, PyroModule) != plain
        assert isinstance(ours, type(theirs))
        assert ours.training == theirs.training


def test_state_is_the_originals_without_the_weights(case):
    net, _ = case
    state = svd.bayesianize(net).state_dict()
    kept = {name: value for name, value in net.state_dict(keep_vars=True).items() if name not in all_names(net)}
    assert list(state) == list(kept)
    assert all(torch.equal(state[name], value) for name, value in kept.items())


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


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_compute_the_same_and_leave_the_original_working(copied, case):
    net, inputs = case
    mode = net.training
    bnn = svd.bayesianize(net)
    other = copied(bnn).train(mode)
    assert_same_function(other, net, inputs)
    assert_same_function(bnn.train(mode), net, inputs)


def test_copies_are_independent(case):
    net, inputs = case
    bnn = svd.bayesianize(net)
    before = conditioned(copy.deepcopy(bnn), values := random_values(net), *inputs)
    for other in (copy.deepcopy(bnn), pickle.loads(pickle.dumps(bnn))):
        with torch.no_grad():
            for tensor in [*other.parameters(), *other.buffers()]:
                tensor.zero_()
    torch.testing.assert_close(conditioned(bnn, values, *inputs), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_conversion_of_dtype_moves_priors_and_values(dtype, case):
    net, inputs = case
    other = torch.float64 if dtype == torch.float32 else torch.float32
    bnn = svd.bayesianize(net.to(other), svd.LogUniform(1e-3, 1.0)).to(dtype)
    net = net.to(dtype)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    trace = poutine.trace(bnn).get_trace(*inputs)
    for name in matrices(net):
        site = trace.nodes[name]
        assert site["value"].dtype == site["fn"].log_prob(site["value"]).dtype == dtype
        assert torch.equal(site["fn"].value, net.get_parameter(name))
    assert first(trace.nodes["_RETURN"]["value"]).dtype == dtype
    assert_same_function(bnn, net, inputs, rtol=1e-4 if dtype == torch.float32 else 1e-9)


def test_improper_density_of_the_weights_is_scored_once_each(case):
    net, inputs = case
    values = random_values(net)
    trace = poutine.trace(poutine.condition(svd.bayesianize(net), data=values)).get_trace(*inputs)
    expected = sum(-value.abs().log().sum() for value in values.values())
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_prior_of_each_weight_covers_the_weight_and_knows_its_value(case):
    net, inputs = case
    bnn = svd.bayesianize(net)
    trace = poutine.trace(poutine.condition(bnn, data=random_values(net))).get_trace(*inputs)
    for name in matrices(net):
        prior = trace.nodes[name]["fn"]
        parameter = net.get_parameter(name)
        assert isinstance(prior, WeightPrior)
        assert (prior.batch_shape, prior.event_shape) == ((), parameter.shape)
        assert torch.equal(prior.value, parameter)
        assert not prior.value.requires_grad


def test_weights_read_outside_of_a_pass_are_the_originals_values(case):
    net, _ = case
    bnn = svd.bayesianize(net)
    for name in all_names(net):
        path, _, attribute = name.rpartition(".")
        assert torch.equal(getattr(bnn.get_submodule(path), attribute), net.get_parameter(name))


def test_network_of_a_converted_network_is_of_the_same_function(case):
    net, inputs = case
    names = matrices(net)
    once = svd.bayesianize(net, include=names[0])
    twice = svd.bayesianize(once, include=names[1:]) if len(names) > 1 else copy.deepcopy(once)
    assert sorted(sites_of(copy.deepcopy(twice), *inputs)) == sorted(names)
    assert_same_function(twice, net, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_improper_prior_of_a_half_precision_network_draws_finite_weights(dtype, device):
    bnn = svd.bayesianize(nn.Linear(4, 3).to(device, dtype))
    with pytest.warns(svd.ImproperPriorWarning):
        weight = poutine.trace(bnn).get_trace(torch.zeros(1, 4, dtype=dtype, device=device)).nodes["weight"]["value"]
    assert weight.dtype == dtype
    assert weight.isfinite().all()


# One tensor, one site


def test_tied_layers_use_one_draw(device):
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


def test_shared_module_uses_one_draw(device):
    bnn = svd.bayesianize(shared().to(device), svd.LogUniform(1e-3, 1.0))
    assert bnn[0] is bnn[2]
    x = torch.randn(5, 4, device=device)
    trace = poutine.trace(bnn).get_trace(x)
    weight, bias = trace.nodes["0.weight"]["value"], bnn[0].bias
    assert trace.stochastic_nodes == ["0.weight"]
    expected = torch.tanh(x @ weight.T + bias) @ weight.T + bias
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], expected)


def test_two_passes_use_two_draws(device):
    bnn = svd.bayesianize(nn.Linear(4, 3).to(device), svd.LogUniform(1e-3, 1.0))
    x = torch.ones(1, 4, device=device)
    assert not torch.equal(bnn(x), bnn(x))


def test_copies_of_tied_layers_are_tied_among_themselves(device):
    bnn = svd.bayesianize(Tied().to(device), svd.LogUniform(1e-3, 1.0))
    for other in (copy.deepcopy(bnn), pickle.loads(pickle.dumps(bnn)), torch_saved(bnn)):
        assert sites_of(other, torch.arange(6, device=device)) == ["embedding.weight"]
        with torch.no_grad():
            other.embedding.get_buffer("weight_initial").zero_()
        assert (other.output.weight == 0).all()
    assert (bnn.output.weight != 0).any()


# What is chosen

MLP_NAMES = ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "head.weight", "head.bias"]


@pytest.fixture
def mlp(device):
    net = nn.Sequential()
    net.add_module("body", nn.Sequential(nn.Conv1d(2, 3, 1), nn.LayerNorm(4), nn.Flatten()))
    net.add_module("head", nn.Linear(12, 2))
    net.to(device)
    assert [name for name, _ in net.named_parameters()] == MLP_NAMES
    return net


CHOICES = {
    "default": ({}, ["body.0.weight", "head.weight"]),
    "glob": ({"include": "head.weight"}, ["head.weight"]),
    "glob of both": ({"include": "head.*"}, ["head.weight", "head.bias"]),
    "glob of all": ({"include": "*"}, MLP_NAMES),
    "glob of a bias": ({"include": "head.bias"}, ["head.bias"]),
    "glob of biases": ({"include": "*.bias"}, ["body.0.bias", "body.1.bias", "head.bias"]),
    "glob with a class of characters": ({"include": "body.[01].weight"}, ["body.0.weight", "body.1.weight"]),
    "type": ({"include": nn.Linear}, ["head.weight"]),
    "base type": ({"include": nn.modules.conv._ConvNd}, ["body.0.weight"]),
    "type without matrices": ({"include": nn.LayerNorm}, ["body.1.weight", "body.1.bias"]),
    "predicate": ({"include": lambda name, p: p.numel() == 2}, ["head.bias"]),
    "predicate on names": ({"include": lambda name, p: "bias" in name}, ["body.0.bias", "body.1.bias", "head.bias"]),
    "list": ({"include": [nn.LayerNorm, "head.w*"]}, ["body.1.weight", "body.1.bias", "head.weight"]),
    "tuple": ({"include": ("head.bias", "head.weight")}, ["head.weight", "head.bias"]),
    "generator": ({"include": (name for name in ["head.bias"])}, ["head.bias"]),
    "the same twice": ({"include": ["head.w*", nn.Linear]}, ["head.weight"]),
    "exclude glob": ({"exclude": "head.*"}, ["body.0.weight"]),
    "exclude type": ({"exclude": nn.Conv1d}, ["head.weight"]),
    "exclude predicate": ({"exclude": lambda name, p: p.dim() == 3}, ["head.weight"]),
    "exclude predicate of nothing": ({"exclude": lambda name, p: False}, ["body.0.weight", "head.weight"]),
    "exclude list": ({"exclude": ["head.*", "body.1.*"]}, ["body.0.weight"]),
    "include and exclude": (
        {"include": ["*.weight", "*.bias"], "exclude": ["*.bias", "body.1.*"]},
        ["body.0.weight", "head.weight"],
    ),
    "exclude type from all": ({"include": "*", "exclude": nn.Linear}, MLP_NAMES[:4]),
}


@pytest.mark.parametrize(("options", "chosen"), CHOICES.values(), ids=CHOICES)
def test_include_and_exclude_choose(options, chosen, mlp, device):
    bnn = svd.bayesianize(mlp, **options)
    x = torch.randn(5, 2, 4, device=device)
    assert sorted(sites_of(bnn, x)) == sorted(chosen)
    assert [name for name, _ in bnn.named_parameters()] == [name for name in MLP_NAMES if name not in chosen]
    values = random_values(mlp, chosen)
    torch.testing.assert_close(conditioned(bnn, values, x), with_values(mlp, values)(x))


@pytest.mark.parametrize("option", ["include", "exclude", "prior"])
@pytest.mark.parametrize("pattern", ["tail.*", "weight", "Head.weight", "head", nn.Conv2d], ids=str)
def test_pattern_that_matches_nothing_is_refused_by_name(option, pattern, mlp):
    if option == "prior" and not isinstance(pattern, str):
        value = {"*": dist.Normal(0.0, 1.0), "body.2.*": dist.Normal(0.0, 1.0)}
        text = "body.2.*"
    else:
        value = (
            {pattern: dist.Normal(0.0, 1.0), "*": dist.Normal(0.0, 1.0)} if option == "prior" else ["head.*", pattern]
        )
        text = pattern
    with pytest.raises(
        ValueError, match=rf"{option}: expected a pattern .* {re.escape(repr(text))} .* body\.0\.weight, "
    ):
        svd.bayesianize(mlp, **{option: value})


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("pattern", [5, [5], [None], ["head.*", 1.0]], ids=str)
def test_pattern_of_another_type_is_refused_by_name(option, pattern, mlp):
    with pytest.raises(TypeError, match=f"{option}: expected a glob, a module type or a predicate"):
        svd.bayesianize(mlp, **{option: pattern})


@pytest.mark.parametrize(
    "options",
    [
        {"exclude": "*"},
        {"include": []},
        {"include": "head.*", "exclude": nn.Linear},
        {"include": lambda name, p: False},
    ],
    ids=["all excluded", "none included", "one out of one", "predicate of nothing"],
)
def test_empty_choice_is_refused_with_the_names_there_are(options, mlp):
    with pytest.raises(ValueError, match=re.escape(f"no parameter is left to give a prior, of {', '.join(MLP_NAMES)}")):
        svd.bayesianize(mlp, **options)


def test_network_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameter is left to give a prior, of none"):
        svd.bayesianize(nn.ReLU())


def test_module_type_chooses_the_tied_weights_of_its_modules(device):
    net = Tied().to(device)
    tokens = torch.arange(6, device=device)
    for included in (nn.Linear, nn.Embedding):
        assert sites_of(svd.bayesianize(net, include=included), tokens) == ["embedding.weight"]


def test_a_glob_may_name_a_tied_weight_by_any_of_its_names(device):
    net = Tied().to(device)
    names = [name for name, p in net.named_parameters(remove_duplicate=False) if p is net.embedding.weight]
    assert len(names) == 2
    for name in names:
        bnn = svd.bayesianize(net, include=name)
        assert sites_of(bnn, torch.arange(6, device=device)) == ["embedding.weight"]


@pytest.mark.parametrize("net", [None, lambda x: x, "net", [nn.Linear(2, 2)]], ids=["none", "function", "str", "list"])
def test_what_is_no_network_is_refused(net):
    with pytest.raises(TypeError, match=f"bayesianize: expected an nn.Module, but got {type(net).__name__}"):
        svd.bayesianize(net)


class Custom(nn.Module):
    """Parameters of its own: weights, and what is broadcast."""

    def __init__(self):
        super().__init__()
        self.class_token, self.queries = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.zeros(1, 5, 4))
        self.layer_scale, self.gate = nn.Parameter(torch.ones(4, 1, 1)), nn.Parameter(torch.ones(1, 4, 1, 1))
        self.out, self.one, self.heads = (nn.Parameter(torch.ones(s)) for s in ((4, 1), (1, 4), (2, 4, 3)))
        self.many = nn.ParameterList([torch.ones(4, 4), torch.ones(1, 3, 4)])


class Derived(nn.Linear):
    """A layer of torch with parameters beside its weight."""

    def __init__(self):
        super().__init__(4, 1)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))


def bias_of_keys():
    return nn.MultiheadAttention(4, 2, add_bias_kv=True, kdim=3, vdim=3)


WEIGHTS = {  # a network, and the names of its weights
    "custom": (Custom, ["out", "one", "heads", "many.0"]),
    "derived": (Derived, ["weight"]),
    "one by one": (lambda: nn.Sequential(nn.Linear(1, 1), nn.Conv2d(1, 1, 1)), ["0.weight", "1.weight"]),
    "depthwise": (lambda: nn.Conv1d(4, 4, 1, groups=4), ["weight"]),
    "transposed": (lambda: nn.ConvTranspose2d(1, 4, 1), ["weight"]),
    "normalisations": (
        lambda: nn.Sequential(nn.LayerNorm((2, 4)), nn.RMSNorm((2, 4)), nn.BatchNorm1d(2), nn.Linear(4, 4)),
        ["3.weight"],
    ),
    "attention": (bias_of_keys, ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]),
    "projected": (lambda: nn.LSTM(3, 4, proj_size=2), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
    "bilinear": (lambda: nn.Bilinear(1, 1, 3), ["weight"]),
    "tied": (Tied, ["embedding.weight"]),
}


@pytest.mark.parametrize(("make", "names"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_are_chosen_and_what_is_broadcast_or_normalises_is_not(make, names):
    net = make()
    assert svd.nn.choose(net) == names
    assert list(svd.AutoSparseNormal(svd.bayesianize(net)).posteriors) == names
    others = {name for name, _ in net.named_parameters()} - set(names)
    assert {name for name, _ in svd.bayesianize(net).named_parameters()} == others


def test_what_is_no_weight_gets_a_prior_where_it_is_included():
    net = Custom()
    assert svd.nn.choose(net, include=["*token", "layer_scale"]) == ["class_token", "layer_scale"]
    assert svd.nn.choose(net, include="*") == [name for name, _ in net.named_parameters()]
    assert svd.nn.choose(net, include=Custom, exclude=nn.ParameterList) == ["out", "one", "heads"]


class Cached(nn.Module):
    def __init__(self, hold):
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 2)
        self.__dict__["cache"] = hold(self.layer.weight)


def _with_default(w):
    def function(x, *, w=w):
        return x @ w

    return function


def _with_attribute(w):
    def function(x):
        return x @ function.w

    function.w = w
    return function


def _times(self, x):
    return x @ self.w


HOLDERS = {
    "list": lambda w: [w],
    "tuple in a list": lambda w: [(1, w)],
    "dictionary": lambda w: {"w": w},
    "set in a dictionary": lambda w: {0: {w}},
    "itself": lambda w: w,
    "closure": lambda w: lambda x: x @ w,
    "default of a function": lambda w: lambda x, w=w: x @ w,
    "partial": lambda w: functools.partial(nn.functional.linear, weight=w),
    "keyword's default": lambda w: _with_default(w),
    "attribute of a function": lambda w: _with_attribute(w),
    "queue": lambda w: collections.deque([w]),
    "object": lambda w: types.SimpleNamespace(inner=types.SimpleNamespace(w=w)),
    "bound method": lambda w: types.MethodType(_times, types.SimpleNamespace(w=w)),
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_a_weight_that_is_also_kept_where_no_sample_takes_its_place_is_refused(hold):
    message = r"^1\.layer\.weight: expected a parameter that is read from its module, but '1\.cache' holds it, too"
    with pytest.raises(ValueError, match=message):
        svd.bayesianize(nn.Sequential(nn.ReLU(), Cached(hold)))
    assert svd.nn.choose(Cached(hold), exclude="layer.*") == ["other.weight"]


def test_a_function_that_is_not_copied_with_the_network_must_not_hold_its_modules():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.helper = types.SimpleNamespace(net=self)
            b, helper = self.b, self.helper
            self.functions = {"alias": lambda x: b(x), "by an object": lambda x: helper.net.a(x)}
            self.functions["cached"] = functools.lru_cache(None)(self.b.forward)

    for kept, name in (("alias", "b"), ("by an object", "a"), ("cached", "b")):
        net = Tied()
        net.functions = {kept: net.functions[kept]}
        with pytest.raises(ValueError, match=rf"^{name}\.weight: .* a function in 'functions' holds the module"):
            svd.bayesianize(net)


def test_an_optimiser_of_the_network_itself_is_no_second_place():
    net = nn.Sequential(nn.Linear(3, 2))
    net.optimizer = torch.optim.Adam(net.parameters())
    net.any = unittest.mock.MagicMock()  # has every attribute
    assert svd.nn.choose(net) == ["0.weight"]


def test_modules_in_lists_and_recurrent_layers_may_keep_their_weights():
    net = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    net.layers, net.method, net.itself = [net[0]], functools.partial(net[0].forward), lambda: net.itself
    with pytest.raises(ValueError, match=r"^0\.weight: .* a function in 'itself' holds the module"):
        svd.nn.choose(net)
    del net.itself
    assert svd.nn.choose(net)[0] == "0.weight"
    bnn = svd.bayesianize(net, svd.LogUniform(1e-2, 1.0))
    with bnn._pyro_context:
        assert torch.equal(bnn.method(torch.ones(4)), bnn[0](torch.ones(4)))


def test_a_parameter_of_a_class_of_its_own_is_refused_by_name():
    class Scaled(nn.Parameter):
        def scaled(self):
            return 2 * self

    net = nn.Linear(3, 2)
    net.weight = Scaled(net.weight.data)
    with pytest.raises(ValueError, match=r"^weight: expected an nn\.Parameter, but got a Scaled"):
        svd.bayesianize(net)


class Moving(nn.Module):
    """Takes layers into other modules while it runs."""

    def __init__(self, move):
        super().__init__()
        self.a, self.b, self.move = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), nn.Linear(3, 3), move

    def forward(self, x):
        return self.move(self, x)


def _one_after_the_other(net, x):
    for layer in (net.a[0], net.b):
        net.current = layer
        x = net.current(x).tanh()
    return x


MOVES = {
    "slices": lambda net, x: net.b(net.a[2:](net.a[:2](x))),
    "a new container": lambda net, x: nn.Sequential(net.b, net.a)(x),
    "one attribute for several": _one_after_the_other,
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_modules_that_others_take_in_during_a_call_keep_their_names_and_weights(move):
    net, x = Moving(move).double(), torch.randn(4, 3, dtype=torch.double)
    original = svd.bayesianize(net)
    for bnn in (original, copy.deepcopy(original)):
        model = svd.Supervised(bnn, lambda mean: dist.Normal(mean, 1.0).to_event(1), 4)
        guide = svd.AutoSparseNormal(model, init_log_variance=-60.0)
        assert set(guide.posteriors) <= set(svd.nn.choose(net))
        for _ in range(2):
            assert set(guide(x)) <= set(svd.nn.choose(net))
            elbo = svd.SparseVD_ELBO(kl_weight=0.0)
            expected = -dist.Normal(net(x), 1.0).log_prob(x).sum()
            torch.testing.assert_close(elbo(model, guide)(x, x), expected, rtol=1e-8, atol=0)
    pruned = svd.prune(bnn, guide, svd.sparsify(guide, math.inf))
    torch.testing.assert_close(pruned(x), net(x))


def test_a_layer_uses_the_weight_that_functional_call_gives_it():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            doubled = torch.func.functional_call(self.layer, {"weight": 2 * self.layer.weight}, (x,))
            return doubled - self.layer(x), self.layer.weight

    x = torch.randn(4, 3)
    original = svd.bayesianize(Scaled(), svd.LogUniform(1e-2, 1.0))
    for bnn in (original, copy.deepcopy(original)):
        for _ in range(2):
            output, weight = bnn(x)
            torch.testing.assert_close(output, x @ weight.T)


VIEWS = {
    "transposed": lambda w: w.t(),
    "rows": lambda w: w[1:],
    "reshaped": lambda w: w.view(2, 6),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_weights_tied_by_a_view_are_refused_by_name(view, kind):
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Module(), nn.Linear(2, 2))
    tied = view(net[0].weight.detach())
    net[2].register_parameter("tied", nn.Parameter(tied)) if kind == "parameter" else net[2].register_buffer(
        "tied", tied
    )
    with pytest.raises(ValueError, match=r"expected memory of its own, but it is a view of (0\.weight|2\.tied), and"):
        svd.bayesianize(net)
    assert svd.nn.choose(net, include="3.weight") == ["3.weight"]


def test_parameters_side_by_side_in_one_piece_of_memory_are_no_views():
    net, flat = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)), torch.randn(24)
    net[0].weight, net[1].weight = nn.Parameter(flat[:12].view(3, 4)), nn.Parameter(flat[12:].view(4, 3))
    assert svd.nn.choose(net) == ["0.weight", "1.weight"]


# The prior of each parameter


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({"*.weight": 1.0, "*.bias": 10.0}, {}, r"^prior: expected '\*\.bias' to match a chosen .*, but body\.0\.bias"),
        ({"body.*": 1.0, "head.*": 1.0}, {"include": "head.*"}, r"^prior: expected 'body\.\*' to match a chosen"),
        ({"*": 1.0, "head.*": 2.0}, {}, r"^prior: expected 'head\.\*' before the globs that match more"),
    ],
    ids=["biases", "not included", "shadowed"],
)
def test_a_prior_that_would_be_of_no_use_is_refused(table, options, message, mlp):
    table = {glob: dist.Normal(0.0, scale) for glob, scale in table.items()}
    with pytest.raises(ValueError, match=message):
        svd.bayesianize(mlp, table, **options)


def test_a_prior_of_biases_is_used_where_they_are_included(mlp):
    table = {"*.bias": dist.Normal(0.0, 10.0), "*": dist.Normal(0.0, 1.0)}
    bnn = svd.bayesianize(mlp, table, include="*")
    assert bnn.head._pyro_samples["bias"].prior.stddev.unique() == 10
    assert bnn.head._pyro_samples["weight"].prior.stddev.unique() == 1


@pytest.mark.parametrize("prior", [svd.LogUniform, {"*": svd.LogUniform}, dist.Normal], ids=["own", "table", "Pyro's"])
def test_the_class_of_a_prior_is_refused_by_the_parameters_name(prior):
    with pytest.raises(
        TypeError, match=r"^weight: expected a distribution as its prior, but got the class; write \w+\("
    ):
        svd.bayesianize(nn.Linear(2, 2), prior)


@pytest.mark.parametrize("prior", [svd.nn.horseshoe, svd.nn.fan_in_normal, lambda name: None])
def test_a_function_that_does_not_take_name_and_parameter_is_refused(prior):
    with pytest.raises(TypeError, match=r"^prior: expected a function of \(name, parameter\), but got <function"):
        svd.bayesianize(nn.Linear(2, 2), prior)


def priors_of(bnn, net, x):
    trace = poutine.trace(poutine.condition(bnn, data=random_values(net))).get_trace(x)
    return {name: trace.nodes[name]["fn"] for name in matrices(net)}


def assert_prior(prior, expected, shape):
    value = torch.rand(shape, device=prior.value.device) + 0.1
    assert prior.event_shape == shape
    torch.testing.assert_close(prior.log_prob(value), expected.log_prob(value).sum())


def test_one_distribution_is_the_prior_of_all(mlp, device):
    x = torch.randn(5, 2, 4, device=device)
    for name, prior in priors_of(svd.bayesianize(mlp, dist.Laplace(0.0, 2.0)), mlp, x).items():
        assert_prior(prior, dist.Laplace(0.0, 2.0), mlp.get_parameter(name).shape)


def test_first_pattern_that_matches_gives_the_prior(mlp, device):
    x = torch.randn(5, 2, 4, device=device)
    table = {"h*": dist.Normal(0.0, 3.0), "*t": svd.LogUniform(1e-4, 10.0)}
    priors = priors_of(svd.bayesianize(mlp, table), mlp, x)
    assert_prior(priors["head.weight"], dist.Normal(0.0, 3.0), (2, 12))
    assert_prior(priors["body.0.weight"], svd.LogUniform(1e-4, 10.0), (3, 2, 1))
    priors = priors_of(svd.bayesianize(mlp, dict(reversed(table.items()))), mlp, x)
    assert_prior(priors["head.weight"], svd.LogUniform(1e-4, 10.0), (2, 12))


def test_function_gives_the_prior_of_each_name_and_parameter(mlp, device):
    seen = {}

    def prior(name, parameter):
        seen[name] = parameter
        return dist.Normal(0.0, parameter[0].numel() ** -0.5)

    priors = priors_of(svd.bayesianize(mlp, prior), mlp, torch.randn(5, 2, 4, device=device))
    assert list(seen) == matrices(mlp)
    assert all(seen[name] is mlp.get_parameter(name) for name in seen)
    assert_prior(priors["head.weight"], dist.Normal(0.0, 12**-0.5), (2, 12))
    assert_prior(priors["body.0.weight"], dist.Normal(0.0, 2**-0.5), (3, 2, 1))


SHAPED_PRIORS = {
    "scalar": lambda d: dist.Normal(torch.zeros((), device=d), 2.0),
    "row": lambda d: dist.Normal(torch.arange(4.0, device=d), 2.0),
    "column": lambda d: dist.Normal(torch.arange(3.0, device=d).unsqueeze(-1), 2.0),
    "full": lambda d: dist.Normal(torch.randn(3, 4, device=d), 2.0),
    "event": lambda d: dist.Normal(torch.arange(4.0, device=d), 2.0).to_event(1),
    "full event": lambda d: dist.Normal(torch.randn(3, 4, device=d), 2.0).to_event(2),
    "multivariate": lambda d: dist.MultivariateNormal(torch.zeros(4, device=d), 2 * torch.eye(4, device=d)),
    "mixture": lambda d: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7], device=d)),
        dist.Normal(torch.zeros(2, device=d), torch.tensor([0.1, 1.0], device=d)),
    ),
    "masked": lambda d: dist.Normal(torch.zeros((), device=d), 1.0).mask(torch.tensor([True, False] * 2, device=d)),
    "transformed": lambda d: dist.LogNormal(torch.zeros((), device=d), 1.0),
    "inverse transform": lambda d: dist.Gumbel(torch.zeros((), device=d), 1.0),
    "bounded": lambda d: svd.LogUniform(torch.tensor([0.1, 0.2, 0.1, 0.1], device=d), 2.0),
    "positive": lambda d: dist.Gamma(torch.ones((), device=d), 1.0),
}


@pytest.mark.parametrize("make", SHAPED_PRIORS.values(), ids=SHAPED_PRIORS)
def test_prior_broadcasts_to_the_parameter_and_follows_the_network(make, device):
    net = nn.Linear(4, 3).to(device)
    prior = make(device)
    bnn = svd.bayesianize(net, prior).double()
    trace = poutine.trace(bnn).get_trace(torch.zeros(1, 4, dtype=torch.float64, device=device))
    site = trace.nodes["weight"]
    assert site["value"].shape == (3, 4)
    assert site["value"].dtype == torch.float64
    assert (site["fn"].batch_shape, site["fn"].event_shape) == ((), (3, 4))
    expected = prior.expand((3, 4)[: 2 - prior.event_dim]).log_prob(site["value"].float()).sum()
    torch.testing.assert_close(site["fn"].log_prob(site["value"]).float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "batch", "event"),
    [
        (lambda: svd.LogUniform(torch.full((3,), 0.1), 1.0), (3,), ()),
        (lambda: dist.Normal(torch.zeros(3, 4, 1), 1.0), (3, 4, 1), ()),
        (lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1), (), (3,)),
        (lambda: dist.Normal(torch.zeros(1, 2, 12), 1.0).to_event(3), (), (1, 2, 12)),
        (lambda: dist.MultivariateNormal(torch.zeros(5), torch.eye(5)), (), (5,)),
        (lambda: dist.Normal(torch.zeros(2, 1), 1.0).to_event(1), (2,), (1,)),
    ],
    ids=["batch", "too many dimensions", "event", "too many event dimensions", "multivariate", "event of one"],
)
def test_prior_that_does_not_broadcast_is_refused_by_the_parameters_name(make, batch, event, mlp):
    expected = (
        f"head.weight: expected a prior that broadcasts to shape (2, 12), but got batch shape {batch} "
        f"and event shape {event}"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        svd.bayesianize(mlp, make(), include="head.*")


@pytest.mark.parametrize("prior", [3.0, torch.ones(2, 12), "normal", {"*": 1.0}, lambda name, p: None])
def test_prior_that_is_no_distribution_is_refused_by_the_parameters_name(prior, mlp):
    with pytest.raises(TypeError, match=r"head\.weight: expected a distribution as its prior, but got"):
        svd.bayesianize(mlp, prior, include="head.*")


def test_parameter_without_a_prior_is_refused_by_name(mlp):
    with pytest.raises(ValueError, match=r"body\.0\.weight: expected a prior, but .*'head\.\*'"):
        svd.bayesianize(mlp, {"head.*": dist.Normal(0.0, 1.0)})
    assert svd.bayesianize(mlp, {"head.*": dist.Normal(0.0, 1.0)}, include="head.*") is not None


def test_prior_with_parameters_of_its_own_gets_their_gradient(device):
    scale = torch.tensor(2.0, device=device, requires_grad=True)
    bnn = svd.bayesianize(nn.Linear(4, 3).to(device), dist.Normal(torch.zeros((), device=device), scale))
    weight = torch.full((3, 4), 0.5, device=device)
    model = poutine.condition(bnn, data={"weight": weight})
    poutine.trace(model).get_trace(torch.zeros(1, 4, device=device)).log_prob_sum().backward()
    assert scale.grad.item() == pytest.approx(12 * (0.25 / 8 - 1 / 2), rel=1e-6)


# Parameters that can have no prior


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(module)


PARAMETRISED = {
    "weight norm": (parametrizations.weight_norm, "0.parametrizations.weight.original0"),
    "spectral norm": (parametrizations.spectral_norm, "0.parametrizations.weight.original"),
    "orthogonal": (parametrizations.orthogonal, "0.parametrizations.weight.original"),
    "old weight norm": (old_weight_norm, "0.weight_g"),
    "old spectral norm": (torch.nn.utils.spectral_norm, "0.weight_orig"),
}


@pytest.mark.parametrize(("parametrise", "name"), PARAMETRISED.values(), ids=PARAMETRISED)
def test_parametrised_weight_is_refused_by_name(parametrise, name, device):
    net = nn.Sequential(parametrise(nn.Linear(3, 3)), nn.Linear(3, 2)).to(device)
    for options in ({}, {"include": "0.*", "exclude": "0.bias"}):
        with pytest.raises(
            ValueError, match=re.escape(f"{name}: expected a plain parameter, but it is behind a param")
        ):
            svd.bayesianize(net, **options)


@pytest.mark.parametrize(("parametrise", "name"), PARAMETRISED.values(), ids=PARAMETRISED)
@pytest.mark.parametrize("options", [{"exclude": "0.*"}, {"include": "1.w*"}], ids=["exclude", "include"])
def test_parametrised_weight_that_is_not_chosen_works(parametrise, name, options, device):
    net = nn.Sequential(parametrise(nn.Linear(3, 3)), nn.Linear(3, 2)).to(device).eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    bnn = svd.bayesianize(net, svd.LogUniform(1e-3, 1.0), **options)
    x = torch.randn(5, 3, device=device)
    trace = poutine.trace(bnn).get_trace(x)
    assert trace.stochastic_nodes == ["1.weight"]
    assert name in dict(bnn.named_parameters())
    expected = net[0](x) @ trace.nodes["1.weight"]["value"].T + net[1].bias
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], expected)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


LAZY_OPTIONS = {
    "default": {},
    "glob": {"include": "*.weight"},
    "type": {"include": nn.Linear},
    "excluded": {"exclude": "0.*"},
    "not included": {"include": "1.weight"},
    "predicate": {"exclude": lambda name, p: name.startswith("0.")},
    "prior table": {"prior": {"*": dist.Normal(0.0, 1.0)}},
}


@pytest.mark.parametrize("options", LAZY_OPTIONS.values(), ids=LAZY_OPTIONS)
def test_lazy_module_is_refused_by_name_and_works_once_initialised(options, device):
    # Also where it would get no prior: Pyro's modules cannot hold parameters that have no shape yet.
    net = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)).to(device)
    with pytest.raises(ValueError, match=r"0\.(weight|bias): expected an initialised parameter; run the network once"):
        svd.bayesianize(net, **options)
    x = torch.zeros(1, 4, device=device)
    net(x)
    assert "1.weight" in sites_of(svd.bayesianize(net, **options), x)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_parameter_that_is_not_floating_point_is_refused_by_name(dtype, device):
    net = nn.Sequential(nn.Linear(3, 2)).to(device)
    net[0].codes = nn.Parameter(torch.zeros(2, 2, dtype=dtype, device=device), requires_grad=False)
    with pytest.raises(ValueError, match=rf"0\.codes: expected a floating-point parameter, but got {dtype}"):
        svd.bayesianize(net, include="*")
    bnn = svd.bayesianize(net)
    assert_same_function(bnn, net, [torch.randn(5, 3, device=device)], ["0.weight"])


def as_buffer(net, tensor):
    net.register_buffer("weight_initial", tensor)


def as_parameter(net, tensor):
    net.weight_initial = nn.Parameter(tensor)


def as_attribute(net, tensor):
    net.weight_initial = tensor


@pytest.mark.parametrize("add", [as_buffer, as_parameter, as_attribute])
def test_what_a_network_calls_weight_initial_is_kept(add, device):
    net = nn.Linear(4, 3).to(device)
    add(net, torch.full((2,), 7.0, device=device))
    bnn = svd.bayesianize(net)
    assert bnn.weight_initial.tolist() == [7.0, 7.0]
    assert list(bnn.state_dict()) == [name for name in net.state_dict() if name != "weight"]
    assert_same_function(bnn, net, [torch.randn(5, 4, device=device)])


# map_tensors


def test_map_tensors_changes_a_copy_in_depth(device):
    base = dist.Normal(torch.zeros(3, device=device), torch.ones(3, device=device))
    shift = torch.distributions.transforms.AffineTransform(torch.ones(3, device=device), 2.0)
    prior = dist.TransformedDistribution(base, [shift]).to_event(1).mask(torch.tensor(True, device=device))
    mapped = map_tensors(prior, lambda t: t.double() if t.is_floating_point() else t)
    value = torch.randn(3, dtype=torch.float64, device=device)
    assert mapped.sample().dtype == torch.float64
    assert mapped.log_prob(value).dtype == torch.float64
    torch.testing.assert_close(mapped.log_prob(value).float(), prior.log_prob(value.float()))
    assert prior.sample().dtype == torch.float32
    assert base.loc.dtype == torch.float32


def test_site_prior_is_made_anew_only_where_the_module_has_moved(device):
    bnn = svd.bayesianize(nn.Linear(4, 3).to(device))
    site = bnn._pyro_samples["weight"]
    assert isinstance(site, SitePrior)
    prior = site.of(bnn)
    assert site.of(bnn) is prior
    assert site.of(bnn.double()) is not prior
    assert site.of(bnn).value.dtype == torch.float64


def test_weight_prior_expands_without_its_value(device):
    prior = WeightPrior(svd.LogUniform(0.1, 1.0).expand([3, 4]), 2, torch.zeros(3, 4, device=device))
    wide = prior.expand([5])
    assert (wide.batch_shape, wide.event_shape) == ((5,), (3, 4))
    assert wide.sample().shape == (5, 3, 4)
    assert wide.support.base_constraint is constraints.real


# A network as a model of data


def normal(output):
    return dist.Normal(output, 0.5).to_event(1)


def categorical(output):
    return dist.Categorical(logits=output)


def regression(device, num_data=100, likelihood=normal, net=None):
    net = nn.Linear(4, 3) if net is None else net
    return svd.Supervised(svd.bayesianize(net.to(device), svd.LogUniform(1e-3, 1.0)), likelihood, num_data)


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize(
    ("likelihood", "make_target"),
    [(normal, lambda n: torch.randn(n, 3)), (categorical, lambda n: torch.arange(n) % 3)],
    ids=["normal", "categorical"],
)
def test_log_likelihood_of_a_batch_is_scaled_to_the_data_set(size, likelihood, make_target, device):
    model = regression(device, 100, likelihood)
    x, y = torch.randn(size, 4, device=device), make_target(size).to(device)
    trace = poutine.trace(model).get_trace(x, y)
    trace.compute_log_prob()
    site = trace.nodes["y"]
    assert site["is_observed"]
    assert site["scale"] == pytest.approx(100 / size)
    assert [frame.name for frame in site["cond_indep_stack"]] == ["data"]
    weight = trace.nodes["weight"]
    output = x @ weight["value"].T + model.network.bias
    expected = 100 / size * likelihood(output).log_prob(y).sum()
    torch.testing.assert_close(site["log_prob_sum"], expected)
    assert weight["scale"] == 1.0


def test_weights_keep_the_names_of_the_network_and_parameters_too(device):
    model = regression(device, net=nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)))
    trace = poutine.trace(model, param_only=False).get_trace(torch.randn(2, 4, device=device))
    assert [n for n in trace.stochastic_nodes if n.endswith("weight")] == ["0.weight", "1.weight"]
    assert trace.param_nodes == ["0.bias", "1.bias"]
    assert [name for name, _ in model.named_parameters()] == ["network.0.bias", "network.1.bias"]


def test_model_returns_the_output_of_the_network(device):
    model = regression(device)
    x = torch.randn(6, 4, device=device)
    weight = torch.randn(3, 4, device=device)
    for y in (None, torch.zeros(6, 3, device=device)):
        output = poutine.condition(model, data={"weight": weight})(x, y)
        torch.testing.assert_close(output, x @ weight.T + model.network.bias)


@pytest.mark.parametrize("size", [1, 10, 11, 250])
def test_prediction_takes_any_number_of_inputs(size, device):
    model = regression(device, num_data=10)
    trace = poutine.trace(model).get_trace(torch.randn(size, 4, device=device))
    assert trace.nodes["y"]["value"].shape == (size, 3)
    assert not trace.nodes["y"]["is_observed"]
    assert trace.nodes["_RETURN"]["value"].shape == (size, 3)


def test_likelihood_may_have_sample_dimensions_left_of_the_data(device):
    model = regression(device, likelihood=lambda output: normal(output.expand(5, *output.shape)))
    trace = poutine.trace(model).get_trace(torch.randn(6, 4, device=device), torch.randn(6, 3, device=device))
    trace.compute_log_prob()
    assert trace.nodes["y"]["log_prob"].shape == (5, 6)


@pytest.mark.parametrize("num_data", [0, -5, 2.5, 100.0, None, "100", torch.tensor(3)], ids=repr)
def test_bad_size_of_the_data_set_is_refused(num_data, device):
    with pytest.raises(ValueError, match=re.escape(f"num_data, a positive integer, but got {num_data!r}")):
        regression(device, num_data)


@pytest.mark.parametrize("network", [nn.Linear(4, 3), lambda x: x, None], ids=["module", "function", "none"])
def test_network_that_is_not_bayesian_is_refused(network):
    with pytest.raises(TypeError, match=rf"network = bayesianize\(net\), but got {type(network).__name__}"):
        svd.Supervised(network, normal, 10)


@pytest.mark.parametrize("likelihood", [None, "normal", 1.0], ids=["none", "str", "float"])
def test_likelihood_that_is_no_function_is_refused(likelihood, device):
    with pytest.raises(TypeError, match=f"expected a callable likelihood, but got {type(likelihood).__name__}"):
        svd.Supervised(svd.bayesianize(nn.Linear(4, 3).to(device)), likelihood, 10)


@pytest.mark.parametrize(
    ("inputs", "targets", "text"),
    [
        (0, 0, "x: expected at least one datum, but got an empty batch"),
        (0, None, "x: expected at least one datum, but got an empty batch"),
        (5, 4, "x and y: expected as many targets as inputs, but got 5 and 4"),
        (1, 5, "x and y: expected as many targets as inputs, but got 1 and 5"),
        (101, 101, "num_data: expected the size of the whole data set, but got 100 and a batch of 101"),
    ],
)
def test_bad_batches_are_refused(inputs, targets, text, device):
    x = torch.zeros(inputs, 4, device=device)
    y = None if targets is None else torch.zeros(targets, 3, device=device)
    with pytest.raises(ValueError, match=re.escape(text)):
        regression(device)(x, y)


@pytest.mark.parametrize(
    ("likelihood", "shape"),
    [
        (lambda output: dist.Normal(output, 1.0), (6, 3)),
        (lambda output: dist.Normal(output, 1.0).to_event(2), ()),
        (lambda output: dist.Normal(output.T, 1.0).to_event(1), (3,)),
        (lambda output: dist.Normal(output[:1], 1.0).to_event(1), (1,)),
        (lambda output: dist.Normal(0.0, 1.0), ()),
    ],
    ids=["forgotten event", "too many event dimensions", "transposed", "one for all", "constant"],
)
@pytest.mark.parametrize("observed", [True, False], ids=["observed", "predicted"])
def test_likelihood_of_another_batch_shape_is_refused(likelihood, shape, observed, device):
    x, y = torch.zeros(6, 4, device=device), torch.zeros(6, 3, device=device)
    text = f"likelihood: expected one distribution per datum, batch_shape (..., 6), but got {shape}; .to_event(n)"
    with pytest.raises(ValueError, match=re.escape(text)):
        regression(device, likelihood=likelihood)(x, y if observed else None)


class Named(nn.Module):
    """A network of two inputs in a dictionary."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(4, 4, 3)

    def forward(self, inputs):
        return self.layer(inputs["a"], inputs["b"])


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_inputs_are_a_tuple_of_arguments_or_one_dictionary(kind, device):
    model = regression(device, net=nn.Bilinear(4, 4, 3) if kind == "tuple" else Named())
    a, b = torch.randn(6, 4, device=device), torch.randn(6, 4, device=device)
    y = torch.randn(6, 3, device=device)
    x = (a, b) if kind == "tuple" else {"a": a, "b": b}
    (name,) = svd.AutoSparseNormal(model).posteriors
    weight = torch.randn(3, 4, 4, device=device)
    trace = poutine.trace(poutine.condition(model, data={name: weight})).get_trace(x, y)
    trace.compute_log_prob()
    bias = model.network.get_parameter(name.replace("weight", "bias"))
    expected = torch.nn.functional.bilinear(a, b, weight, bias)
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], expected)
    torch.testing.assert_close(trace.nodes["y"]["log_prob_sum"], 100 / 6 * normal(expected).log_prob(y).sum())
    assert svd.SparseVD_ELBO()(model, svd.AutoSparseNormal(model))(x, y).isfinite()
    assert len(pyro.infer.Predictive(model, guide=svd.AutoSparseNormal(model), num_samples=2)(x)["y"]) == 2


ONE, TWO = torch.zeros(5, 4), torch.zeros(6, 4)
INPUTS = {  # inputs, and what is said
    "list": ([ONE], TypeError, "x: expected a tensor, or a tuple or dictionary of tensors, but got list"),
    "array": (ONE.numpy(), TypeError, "x: expected a tensor, or a tuple or dictionary of tensors, but got ndarray"),
    "number in a tuple": ((ONE, 3), TypeError, r"x\[1\]: expected a tensor, .* but got int"),
    "list in a dictionary": ({"a": [1.0]}, TypeError, r"x\['a'\]: expected a tensor, .* but got list"),
    "scalar": (torch.tensor(1.0), ValueError, r"x: expected a tensor of shape \(M, ...\), but got a scalar"),
    "empty tuple": ((), ValueError, r"x: expected at least one tensor, but got \(\)"),
    "sizes": ((ONE, {"a": TWO}), ValueError, r"x\[1\]\['a'\]: expected 5 data, as in x\[0\], but got 6"),
}


@pytest.mark.parametrize(("x", "error", "message"), INPUTS.values(), ids=INPUTS)
def test_inputs_of_another_kind_are_refused_by_name(x, error, message):
    with pytest.raises(error, match=f"^{message}"):
        regression("cpu")(x)


@pytest.mark.parametrize("y", [[1.0] * 5, torch.zeros(5, 3).numpy()], ids=["list", "array"])
def test_targets_that_are_no_tensor_are_refused_by_name(y):
    with pytest.raises(TypeError, match=r"^y: expected a tensor, but got (list|ndarray); give torch.as_tensor\(y\)"):
        regression("cpu")(ONE, y)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.uint8], ids=str)
@pytest.mark.parametrize("event_dim", [0, 1])
def test_targets_of_two_classes_may_be_integers_or_truth_values(dtype, event_dim):
    def likelihood(output):
        output = output if event_dim else output[:, 0]
        return dist.Bernoulli(logits=output).to_event(event_dim)

    model = regression("cpu", likelihood=likelihood)
    y = torch.arange(15).view(5, 3)[:, : 3 if event_dim else 1] % 2
    y = y if event_dim else y[:, 0]
    weight = {"weight": torch.randn(3, 4)}
    found = [
        poutine.trace(poutine.condition(model, data=weight)).get_trace(torch.ones(5, 4), targets).log_prob_sum()
        for targets in (y.to(dtype), y.float())
    ]
    torch.testing.assert_close(*found)


LOSSES = [nn.MSELoss(), torch.nn.functional.mse_loss, dist.Normal, dist.Bernoulli, nn.MSELoss, lambda out, y: None]


@pytest.mark.parametrize("likelihood", LOSSES)
def test_a_loss_or_a_class_is_no_likelihood(likelihood):
    with pytest.raises(
        TypeError, match=r"^Supervised: expected a likelihood, .*; write a function such as lambda out:"
    ):
        svd.Supervised(svd.bayesianize(nn.Linear(4, 3)), likelihood, 10)


def test_a_likelihood_that_returns_no_distribution_is_refused():
    with pytest.raises(TypeError, match="expected a function that returns a distribution, but it gave Tensor"):
        regression("cpu", likelihood=lambda output: output)(ONE)


class Application(PyroModule):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, *args):
        return self.part(*args)


@pytest.mark.parametrize("part", ["network", "layer"])
def test_a_used_network_that_another_module_takes_in_is_refused_by_the_names_of_its_site(part):
    model = regression("cpu", net=nn.Linear(4, 3) if part == "network" else nn.Sequential(nn.Linear(4, 3)))
    model(ONE)
    Application(model.network if part == "network" else model.network[0])
    with pytest.raises(ValueError, match=r"^(0\.)?weight: expected this site to keep its name, .* it part\.weight"):
        model(ONE)


def test_a_model_may_be_taken_in_before_it_is_used():
    application = Application(regression("cpu"))
    guide = svd.AutoSparseNormal(application)
    assert list(guide.posteriors) == ["part.network.weight"]
    assert svd.SparseVD_ELBO()(application, guide)(ONE, torch.zeros(5, 3)).isfinite()


class Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.layer(x.to(next(self.parameters()).device))


def test_a_network_that_asks_for_its_first_parameter_is_told_that_there_is_none():
    with pytest.raises(
        RuntimeError, match=r"^network: expected parameters where it calls next\(self\.parameters\(\)\)"
    ):
        regression("cpu", net=Asking())(ONE)


class SavesItself(nn.Linear):
    """A layer that writes its state itself, as torch_geometric's does."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.weight.detach()
        destination[f"{prefix}bias"] = self.bias.detach()


def test_the_state_of_layers_that_write_it_themselves_loads_back():
    model = regression("cpu", net=nn.Sequential(SavesItself(4, 3)))
    for module in (model, copy.deepcopy(model), model.network):
        assert not any(name.endswith("weight") for name in module.state_dict())
        assert str(module.load_state_dict(module.state_dict())) == "<All keys matched successfully>"
    guide = svd.AutoSparseNormal(model)
    pruned = svd.prune(model.network, guide, svd.sparsify(guide))
    assert list(pruned.state_dict()) == ["0.weight", "0.bias"]
    assert not pruned._state_dict_hooks


# The padding row of an embedding

PADDED = {
    "embedding": lambda: nn.Embedding(6, 3, padding_idx=0),
    "last row": lambda: nn.Embedding(6, 3, padding_idx=-1),
    "bag": lambda: nn.EmbeddingBag(6, 3, padding_idx=2),
}
PRIORS = {
    "log-uniform": svd.LogUniform(1e-4, 1.0),
    "improper": svd.LogUniform(),
    "normal": dist.Normal(0.5, 1.0),
    "rows": dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
    "horseshoe": svd.nn.horseshoe(),
    "empirical": svd.EmpiricalBayesNormal((0,)),
}


@pytest.mark.filterwarnings("ignore::pyro_sparsevd.distributions.ImproperPriorWarning")
@pytest.mark.parametrize("make", PADDED.values(), ids=PADDED)
@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_the_padding_row_is_zero_in_every_sample_and_costs_no_divergence(make, prior):
    torch.manual_seed(0)
    net = nn.Sequential(make(), nn.Linear(3, 2))
    bnn = svd.bayesianize(net, {"0.*": prior, "*": dist.Normal(0.0, 1.0)})
    model = svd.Supervised(bnn, lambda out: dist.Normal(out, 1.0).to_event(out.dim() - 1), 10)
    guide, x = svd.AutoSparseNormal(model, init_log_variance=-2.0), torch.tensor([[1, 2, 5], [0, 0, 3]])
    others = torch.arange(6) != net[0].padding_idx
    for weight in (guide(x)["0.weight"], poutine.trace(model).get_trace(x).nodes["0.weight"]["value"]):
        assert torch.equal((weight != 0).all(1), others)
        assert torch.equal((weight != 0).any(1), others)
    y = torch.zeros(model(x).shape)
    loss = svd.SparseVD_ELBO(kl="exact")(model, guide)
    optimizer = torch.optim.Adam(guide.parameters(), 0.1)
    loss(x, y).backward()
    optimizer.step()
    assert not guide.median()["0.weight"][~others].any()
    summary = svd.sparsify(guide, {"0.weight": 50.0})
    assert not summary.masks["0.weight"][~others].any()
    assert not svd.prune(bnn, guide, summary)[0].weight[~others].any()
    assert not guide.sparsified(svd.sparsify(guide, float("inf")))(x)["0.weight"][~others].any()


@pytest.mark.parametrize("prior", [svd.LogUniform(1e-8, 99.0), dist.Normal(0.5, 1.0)], ids=["log-uniform", "normal"])
@pytest.mark.parametrize("elbo", [svd.SparseVD_ELBO(kl="exact"), svd.SparseVD_ELBO(kl="monte_carlo"), Trace_ELBO()])
def test_the_divergence_of_a_padded_embedding_is_that_of_its_other_rows(prior, elbo):
    torch.manual_seed(0)
    padded, plain = nn.Embedding(6, 3, padding_idx=0).double(), nn.Embedding(5, 3).double()
    plain.weight.data = padded.weight.data[1:].clone()
    losses = []
    for net, tokens in ((padded, torch.tensor([1, 2, 5])), (plain, torch.tensor([0, 1, 4]))):
        model = svd.Supervised(svd.bayesianize(net, prior), lambda out: dist.Normal(out, 1.0).to_event(1), 3)
        guide = svd.AutoSparseNormal(model, init_log_variance=-20.0, init_scale=math.exp(-10))
        torch.manual_seed(1)
        losses.append(elbo.differentiable_loss(model, guide, tokens, torch.zeros(3, 3).double()))
        losses[-1].backward()
        assert all(p.grad.isfinite().all() for p in guide.parameters())
    # Sampled bounds differ by their noise, of variance 1/2 for each of the 15 weights.
    sigma = 0 if elbo.__dict__.get("kl") == "exact" else (2 * 15 / 2) ** 0.5
    assert abs(losses[0] - losses[1]) < 5 * sigma + 1e-3


def test_a_padding_row_of_other_numbers_or_of_a_tied_weight_is_a_row_like_others():
    net = nn.Embedding(6, 3, padding_idx=0)
    net.weight.data[0] = 1.0
    tied = Tied()
    tied.embedding.padding_idx = 0
    tied.embedding.weight.data[0] = 0.0
    for network, name in ((net, "weight"), (tied, "embedding.weight")):
        guide = svd.AutoSparseNormal(svd.bayesianize(network))
        assert guide(tokens())[name][0].all()


# Parameters that are not sites


def trained(model, x, y, steps=3):
    guide = svd.AutoSparseNormal(model)
    inference = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), svd.SparseVD_ELBO())
    return [inference.step(x, y) for _ in range(steps)], guide


def stored_tensors():
    return dict(pyro.get_param_store().named_parameters())


def test_models_in_one_process_train_biases_of_their_own(device):
    models = [regression(device) for _ in range(3)]
    biases = [model.network.bias for model in models]
    x = torch.randn(8, 4, device=device)
    for number, model in enumerate(models):
        before = [bias.detach().clone() for bias in biases]
        trained(model, x, torch.randn(8, 3, device=device))
        for other, bias in enumerate(biases):
            assert torch.equal(bias, before[other]) == (other != number)
    stored = stored_tensors()
    names = [name for bias in biases for name, value in stored.items() if value is bias]
    assert names == ["bias", "bias_2", "bias_3"]
    assert [model.network.bias is bias for model, bias in zip(models, biases, strict=True)] == [True] * 3


def test_models_trained_in_turns_do_what_they_do_alone(device):
    x, y = torch.randn(8, 4, device=device), torch.randn(8, 3, device=device)
    first_net, second_net = nn.Linear(4, 3), nn.Linear(4, 3)

    def run(nets, turns):
        pyro.clear_param_store()
        models = [regression(device, net=net) for net in nets]
        guides = [svd.AutoSparseNormal(model) for model in models]
        steps = [
            SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), svd.SparseVD_ELBO()).step
            for model, guide in zip(models, guides, strict=True)
        ]
        for number in turns:
            pyro.set_rng_seed(number)
            steps[number](x, y)
        return [model.network.bias.detach() for model in models]

    together = run([first_net, second_net], [0, 1, 0, 1, 1, 0])
    torch.testing.assert_close(together[0], run([first_net], [0, 0, 0])[0])
    pyro.clear_param_store()
    alone = run([first_net, second_net], [1, 1, 1])
    torch.testing.assert_close(together[1], alone[1])
    torch.testing.assert_close(alone[0], first_net.bias.detach().to(device))


def test_one_model_keeps_its_names_over_many_passes(device):
    model = regression(device)
    x, y = torch.randn(8, 4, device=device), torch.randn(8, 3, device=device)
    for _ in range(3):
        model(x, y)
        model(x)
    assert list(stored_tensors()) == ["bias"]


def test_copy_of_a_trained_model_trains_parameters_of_its_own(device):
    model = regression(device)
    x, y = torch.randn(8, 4, device=device), torch.randn(8, 3, device=device)
    trained(model, x, y)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = model.network.bias.detach().clone()
        assert torch.equal(other.network.bias, before)
        trained(other, x, y)
        assert torch.equal(model.network.bias, before)
        assert not torch.equal(other.network.bias, before)


class _Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.heads = nn.ModuleDict()

    def forward(self, x):
        return {name: head(self.body(x)) for name, head in self.heads.items()}


def test_what_a_network_gets_later_takes_part():
    bnn = svd.bayesianize(_Heads())
    for name in "ab":
        bnn.heads[name] = svd.bayesianize(nn.Linear(6, 3))
    assert sites_of(bnn, torch.randn(2, 4)) == ["body.weight", "heads.a.weight", "heads.b.weight"]
    bnn = svd.bayesianize(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.LeakyReLU()))
    bnn[2].negative_slope = PyroSample(dist.Beta(1.0, 1.0))
    assert sites_of(bnn, torch.randn(2, 4)) == ["0.weight", "2.negative_slope"]
    assert [isinstance(module, PyroModule) for module in bnn] == [True, False, True]


@pytest.mark.parametrize("name", ["data", "y"])
def test_a_weight_called_as_a_site_of_the_model_is_refused(name):
    net = nn.Sequential()
    net.register_parameter(name, nn.Parameter(torch.ones(2, 2)))
    with pytest.raises(ValueError, match=f"a parameter of the network is called '{name}', as a site of the model is"):
        svd.Supervised(svd.bayesianize(net), lambda x: dist.Normal(x, 1.0), num_data=3)


def test_frozen_weights_get_a_prior_only_where_they_are_asked_for():
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    net[0].requires_grad_(False)
    x = torch.randn(2, 4)
    assert sites_of(svd.bayesianize(net), x) == ["1.weight"]
    assert sites_of(svd.bayesianize(net, include=nn.Linear), x) == ["0.weight", "1.weight"]
    with pytest.raises(ValueError, match=r"no parameter is left .*frozen ones \(requires_grad=False\) get one only"):
        svd.bayesianize(net.requires_grad_(False))
    with pytest.raises(ValueError, match=r"no parameter is left to give a prior, of [^;]*$"):
        svd.bayesianize(net, include="*", exclude="*")


@pytest.mark.parametrize("route", ["pass", "svi", "torch"])
def test_frozen_parameters_stay_frozen_and_others_train(route, device):
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    net[0].bias.requires_grad_(False)
    net[1].weight.requires_grad_(False)
    model = regression(device, net=net)
    parameters = dict(model.network.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    x, y = torch.randn(8, 4, device=device), torch.randn(8, 3, device=device)
    if route == "pass":
        model(x, y)
        model(x)
    elif route == "svi":
        trained(model, x, y)
    else:
        loss = svd.SparseVD_ELBO()(model, svd.AutoSparseNormal(model))
        optimizer = torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], lr=0.1)
        loss(x, y).backward()
        optimizer.step()
    after = dict(model.network.named_parameters())
    frozen = {"0.bias", "1.weight"}
    assert {name for name, p in after.items() if not p.requires_grad} == frozen
    assert frozen.isdisjoint(stored_tensors())
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert moved == (set() if route == "pass" else {"1.bias", "2.bias"})
    assert all(after[name] is p for name, p in parameters.items())


def test_frozen_parameters_stay_frozen_outside_of_a_supervised_too():
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    net[0].bias.requires_grad_(False)
    bnn = svd.bayesianize(net, svd.LogUniform(1e-3, 1.0))

    def model(x):
        mean = bnn(x)
        with pyro.plate("data", 5):
            return pyro.sample("y", normal(mean), obs=torch.zeros(5, 3))

    SVI(model, svd.AutoSparseNormal(bnn), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(ONE)
    for network in (bnn, copy.deepcopy(bnn), pickle.loads(pickle.dumps(bnn))):
        network(ONE)
        assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["0.bias"]
    assert "0.bias" not in stored_tensors()
    assert torch.equal(bnn[0].bias, net[0].bias)
    assert not torch.equal(bnn[1].bias, net[1].bias)


@pytest.mark.parametrize("route", ["svi", "torch"])
def test_parameter_that_is_not_contiguous_is_trained_in_place(route, device):
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.shift = nn.Parameter(torch.zeros(3, 6).t())

        def forward(self, x):
            return self.layer(x) + self.shift

    net = Shift().to(device)
    model = svd.Supervised(svd.bayesianize(net, svd.LogUniform(1e-3, 1.0), exclude="shift"), normal, 100)
    shift = model.network.shift
    assert not shift.is_contiguous()
    x, y = torch.randn(6, 4, device=device), torch.randn(6, 3, device=device)
    if route == "svi":
        trained(model, x, y, steps=1)
    else:
        loss = svd.SparseVD_ELBO()(model, svd.AutoSparseNormal(model))
        loss(x, y).backward()
        torch.optim.Adam(loss.parameters(), lr=0.1).step()
    assert model.network.shift is shift
    torch.testing.assert_close(shift.detach().abs(), torch.full((6, 3), 0.1, device=device))  # Adam's first step


def test_both_routes_of_training_fit_a_line(device):
    x = torch.randn(200, 4, device=device)
    y = x @ torch.randn(4, 3, device=device) + torch.tensor([1.0, -2.0, 3.0], device=device)
    model = regression(device, num_data=200)
    guide = svd.AutoSparseNormal(model)
    loss = svd.SparseVD_ELBO()(model, guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    start = loss(x, y).item()
    for _ in range(200):
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()
    assert loss(x, y).item() < 0.2 * start
    torch.testing.assert_close(
        model.network.bias.detach(), torch.tensor([1.0, -2.0, 3.0], device=device), rtol=0, atol=0.2
    )


def test_parameters_of_two_likelihoods_are_trained_apart(device):
    class Likelihood(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def forward(self, output):
            return dist.Normal(output.squeeze(-1), self.log_scale.exp())

    x, y = torch.randn(20, 4, device=device), 5 * torch.randn(20, device=device)
    models = [svd.Supervised(svd.bayesianize(nn.Linear(4, 1)), Likelihood(), 20).to(device) for _ in range(2)]
    for model in models:
        svi = SVI(model, svd.AutoSparseNormal(model), pyro.optim.Adam({"lr": 0.1}), svd.SparseVD_ELBO())
        for _ in range(3):
            svi.step(x, y)
    assert all(model.likelihood.log_scale > 0.1 for model in models)


def test_a_module_type_takes_what_its_modules_hold():
    net = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 3))
    assert set(svd.nn.choose(net, exclude=nn.MultiheadAttention)) == {"1.weight"}
    assert set(svd.nn.choose(net, include=nn.MultiheadAttention)) == {"0.in_proj_weight", "0.out_proj.weight"}


def test_a_pruned_weight_is_refused():
    net = nn.Linear(4, 3)
    torch.nn.utils.prune.l1_unstructured(net, "weight", amount=2)
    with pytest.raises(ValueError, match="weight_orig: expected a plain parameter"):
        svd.bayesianize(net)


@pytest.mark.parametrize("event_dim", [0, 1])
def test_targets_of_another_shape_than_their_distribution_are_refused(event_dim):
    bnn = svd.bayesianize(nn.Sequential(nn.Linear(3, 2)), svd.LogUniform(1e-4, 1.0))
    model = svd.Supervised(bnn, lambda out: dist.Normal(out[:, : event_dim + 1].squeeze(1), 1.0).to_event(event_dim), 8)
    x, y = torch.randn(8, 3), torch.randn(8, 2)[:, : event_dim + 1].squeeze(1)
    model(x, y)
    with pytest.raises(ValueError, match=r"^y: expected targets of shape \(8,(?: 2)?\), but got \(8, 1, 1\)"):
        model(x, y.reshape(8, -1)[:, :1, None])


def test_any_name_of_a_tied_weight_chooses_its_prior():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    net[1].weight = net[0].weight
    bnn = svd.bayesianize(net, {"1.*": svd.LogUniform(), "*": dist.Normal(0.0, 1.0)})
    assert isinstance(bnn[0]._pyro_samples["weight"].prior, svd.LogUniform)


def test_a_prior_by_type_of_module_is_refused():
    with pytest.raises(TypeError, match=r"^prior: expected globs on the names of parameters as keys, but got <class"):
        svd.bayesianize(nn.Linear(2, 2), {nn.Linear: svd.LogUniform()})


def _with_odd_parameters(device):
    """One frozen bias, and a kernel left out of the prior whose memory is not contiguous."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)).to(device)
    net = net.to(memory_format=torch.channels_last)
    net[0].bias.requires_grad_(False)
    model = svd.Supervised(svd.bayesianize(net, exclude="0.*"), lambda out: dist.Categorical(logits=out), 60)
    return model, svd.AutoSparseNormal(model)


def test_frozen_and_strided_parameters_have_names_for_optimisers_and_keep_their_state(device, tmp_path):
    x, y = torch.randn(6, 3, 6, 6, device=device), torch.zeros(6, device=device)
    rates = lambda name: {"lr": 1e-3 if "log_variances" in name else 1e-2}  # noqa: E731

    def steps(svi, number):
        torch.manual_seed(number)
        return [svi.step(x, y) for _ in range(number)]

    model, guide = _with_odd_parameters(device)
    optimizer = pyro.optim.Adam(rates)
    svi = SVI(model, guide, optimizer, svd.SparseVD_ELBO())
    frozen, kernel = model.network[0].bias.clone(), model.network[0].weight.detach().clone()
    steps(svi, 3)
    assert torch.equal(model.network[0].bias, frozen)
    assert not model.network[0].bias.requires_grad
    assert not torch.equal(model.network[0].weight, kernel)
    assert not model.network[0].weight.is_contiguous()
    assert "0.weight" in optimizer.get_state()
    assert None not in optimizer.get_state()
    optimizer.save(tmp_path / "optimizer.pt")
    states = copy.deepcopy((model.state_dict(), guide.state_dict()))
    expected = steps(svi, 4)

    pyro.clear_param_store()
    model, guide = _with_odd_parameters(device)
    model.load_state_dict(states[0])
    guide.load_state_dict(states[1])
    optimizer = pyro.optim.Adam(rates)
    optimizer.load(tmp_path / "optimizer.pt")
    assert steps(SVI(model, guide, optimizer, svd.SparseVD_ELBO()), 4) == expected


def test_targets_that_would_broadcast_over_a_datum_are_refused(device):
    bnn = svd.bayesianize(nn.Linear(4, 3), svd.LogUniform(1e-4, 1.0)).to(device)
    model = svd.Supervised(bnn, lambda out: dist.Normal(out, 1.0).to_event(1), 9)
    x = torch.ones(5, 4, device=device)
    with pytest.raises(ValueError, match=re.escape("y: expected targets of shape (5, 3), but got (5, 1)")):
        model(x, torch.ones(5, 1, device=device))


class _Abstract(nn.Module, abc.ABC):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    @abc.abstractmethod
    def forward(self, x): ...


class _Concrete(_Abstract):
    def forward(self, x):
        return self.linear(x)


UNFIT = {  # a network, and what is said
    "metaclass": (
        lambda: nn.Sequential(_Concrete()),
        r"^0: expected a module that Pyro can make a PyroModule, but _Conc",
    ),
    "compiled": (lambda: torch.compile(nn.Linear(3, 2)), r"^net: expected a module in Python, but it is compiled"),
    "compiled part": (lambda: nn.Sequential(torch.compile(nn.Linear(3, 2))), r"^0: expected a module in Python"),
    "traced": (lambda: nn.Sequential(torch.fx.symbolic_trace(nn.Linear(3, 2))), r"^0: expected a module in Python"),
    "scripted": (lambda: nn.Sequential(torch.jit.script(nn.Linear(3, 2))), r"^0: expected a module in Python"),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(("make", "message"), UNFIT.values(), ids=UNFIT)
def test_modules_that_pyro_cannot_make_its_own_are_refused_by_name(make, message):
    with pytest.raises(TypeError, match=message):
        svd.bayesianize(make())


def test_a_padding_row_that_another_guide_samples_counts_as_any_other(device):
    bnn = svd.bayesianize(nn.Embedding(3, 2, padding_idx=0).to(device), dist.Normal(0.0, 1.0))
    prior = bnn._pyro_samples["weight"].of(bnn)
    value = torch.ones(3, 2, device=device)
    torch.testing.assert_close(prior.log_prob(value), dist.Normal(0.0, 1.0).log_prob(value).sum())
    value[0] = 0
    torch.testing.assert_close(prior.log_prob(value), dist.Normal(0.0, 1.0).log_prob(value[1:]).sum())


class _OnlyDensity(dist.TorchDistribution):
    arg_constraints: ClassVar = {}

    def __init__(self, mean):
        self.mean_ = mean
        super().__init__(mean.shape, validate_args=False)

    def log_prob(self, value):
        return -((value - self.mean_) ** 2)

    def sample(self, sample_shape=()):
        return self.mean_


def test_a_likelihood_without_a_support_is_taken(device):
    model = svd.Supervised(svd.bayesianize(nn.Linear(4, 1).to(device)), lambda f: _OnlyDensity(f[:, 0]), 5)
    loss = svd.SparseVD_ELBO()(model, svd.AutoSparseNormal(model))
    assert loss(torch.ones(5, 4, device=device), torch.zeros(5, device=device)).isfinite()


def test_a_constrained_parameter_of_a_likelihood_is_one_parameter(device):
    scale = nn.Parameter(torch.tensor(2.0, device=device))

    def likelihood(f):
        return dist.Normal(f[:, 0], pyro.param("sigma", scale, constraint=dist.constraints.positive))

    model = svd.Supervised(svd.bayesianize(nn.Linear(4, 1).to(device)), likelihood, 5)
    svi = pyro.infer.SVI(model, svd.AutoSparseNormal(model), pyro.optim.Adam({"lr": 0.1}), svd.SparseVD_ELBO())
    for _ in range(3):
        svi.step(torch.ones(5, 4, device=device), torch.zeros(5, device=device))
    assert [name for name in pyro.get_param_store() if name.startswith("sigma")] == ["sigma"]
