"""Which parameters get a prior, and those that can have none."""

import collections
import copy
import functools
import math
import re
import types
import unittest.mock
import warnings

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.nn.utils import parametrizations

import pyro_sparsevd as svd
from checks import assert_same_function, conditioned, random_values, sites_of, with_values
from problems import MLP_NAMES, Tied

# cuDNN wants the weights of a recurrent layer in one piece of memory, which weights that are drawn are not.
pytestmark = pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")

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


class TestIncludeAndExclude:
    @pytest.mark.parametrize(("options", "chosen"), CHOICES.values(), ids=CHOICES)
    def test_include_and_exclude_choose(self, options, chosen, mlp, device):
        bnn = svd.bayesianize(mlp, **options)
        x = torch.randn(5, 2, 4, device=device)
        assert sorted(sites_of(bnn, x)) == sorted(chosen)
        assert [name for name, _ in bnn.named_parameters()] == [name for name in MLP_NAMES if name not in chosen]
        values = random_values(mlp, chosen)
        torch.testing.assert_close(conditioned(bnn, values, x), with_values(mlp, values)(x))

    def test_module_type_chooses_the_tied_weights_of_its_modules(self, device):
        net = Tied().to(device)
        tokens = torch.arange(6, device=device)
        for included in (nn.Linear, nn.Embedding):
            assert sites_of(svd.bayesianize(net, include=included), tokens) == ["embedding.weight"]

    def test_a_glob_may_name_a_tied_weight_by_any_of_its_names(self, device):
        net = Tied().to(device)
        names = [name for name, p in net.named_parameters(remove_duplicate=False) if p is net.embedding.weight]
        assert len(names) == 2
        for name in names:
            bnn = svd.bayesianize(net, include=name)
            assert sites_of(bnn, torch.arange(6, device=device)) == ["embedding.weight"]

    @pytest.mark.parametrize(("make", "names"), WEIGHTS.values(), ids=WEIGHTS)
    def test_weights_are_chosen_and_what_is_broadcast_or_normalises_is_not(self, make, names):
        net = make()
        assert svd.choose(net) == names
        assert list(svd.AutoSparseNormal(svd.bayesianize(net)).posteriors) == names
        others = {name for name, _ in net.named_parameters()} - set(names)
        assert {name for name, _ in svd.bayesianize(net).named_parameters()} == others

    def test_what_is_no_weight_gets_a_prior_where_it_is_included(self):
        net = Custom()
        assert svd.choose(net, include=["*token", "layer_scale"]) == ["class_token", "layer_scale"]
        assert svd.choose(net, include="*") == [name for name, _ in net.named_parameters()]
        assert svd.choose(net, include=Custom, exclude=nn.ParameterList) == ["out", "one", "heads"]


class TestBadPatterns:
    @pytest.mark.parametrize("option", ["include", "exclude", "prior"])
    @pytest.mark.parametrize("pattern", ["tail.*", "weight", "Head.weight", "head", nn.Conv2d], ids=str)
    def test_pattern_that_matches_nothing_is_refused_by_name(self, option, pattern, mlp):
        if option == "prior" and not isinstance(pattern, str):
            value = {"*": dist.Normal(0.0, 1.0), "body.2.*": dist.Normal(0.0, 1.0)}
            text = "body.2.*"
        else:
            value = (
                {pattern: dist.Normal(0.0, 1.0), "*": dist.Normal(0.0, 1.0)}
                if option == "prior"
                else ["head.*", pattern]
            )
            text = pattern
        with pytest.raises(
            ValueError, match=rf"{option}: expected a pattern .* {re.escape(repr(text))} .* body\.0\.weight, "
        ):
            svd.bayesianize(mlp, **{option: value})

    @pytest.mark.parametrize("option", ["include", "exclude"])
    @pytest.mark.parametrize("pattern", [5, [5], [None], ["head.*", 1.0]], ids=str)
    def test_pattern_of_another_type_is_refused_by_name(self, option, pattern, mlp):
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
    def test_empty_choice_is_refused_with_the_names_there_are(self, options, mlp):
        with pytest.raises(
            ValueError, match=re.escape(f"no parameter is left to give a prior, of {', '.join(MLP_NAMES)}")
        ):
            svd.bayesianize(mlp, **options)

    def test_network_without_parameters_is_refused(self):
        with pytest.raises(ValueError, match="no parameter is left to give a prior, of none"):
            svd.bayesianize(nn.ReLU())

    @pytest.mark.parametrize(
        "net", [None, lambda x: x, "net", [nn.Linear(2, 2)]], ids=["none", "function", "str", "list"]
    )
    def test_what_is_no_network_is_refused(self, net):
        with pytest.raises(TypeError, match=f"bayesianize: expected an nn.Module, but got {type(net).__name__}"):
            svd.bayesianize(net)


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


def as_buffer(net, tensor):
    net.register_buffer("weight_initial", tensor)


def as_parameter(net, tensor):
    net.weight_initial = nn.Parameter(tensor)


def as_attribute(net, tensor):
    net.weight_initial = tensor


class TestWeightsHeldElsewhere:
    @pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
    def test_a_weight_kept_where_no_sample_takes_its_place_is_refused(self, hold):
        message = r"^1\.layer\.weight: expected a parameter that is read from its module, but '1\.cache' holds it, too"
        with pytest.raises(ValueError, match=message):
            svd.bayesianize(nn.Sequential(nn.ReLU(), Cached(hold)))
        assert svd.choose(Cached(hold), exclude="layer.*") == ["other.weight"]

    def test_a_function_that_is_not_copied_must_not_hold_modules(self):
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

    def test_an_optimiser_of_the_network_itself_is_no_second_place(self):
        net = nn.Sequential(nn.Linear(3, 2))
        net.optimizer = torch.optim.Adam(net.parameters())
        net.any = unittest.mock.MagicMock()  # has every attribute
        assert svd.choose(net) == ["0.weight"]

    def test_modules_in_lists_and_recurrent_layers_may_keep_their_weights(self):
        net = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
        net.layers, net.method, net.itself = [net[0]], functools.partial(net[0].forward), lambda: net.itself
        with pytest.raises(ValueError, match=r"^0\.weight: .* a function in 'itself' holds the module"):
            svd.choose(net)
        del net.itself
        assert svd.choose(net)[0] == "0.weight"
        bnn = svd.bayesianize(net, svd.LogUniform(1e-2, 1.0))
        with bnn._pyro_context:
            assert torch.equal(bnn.method(torch.ones(4)), bnn[0](torch.ones(4)))

    @pytest.mark.parametrize("add", [as_buffer, as_parameter, as_attribute])
    def test_what_a_network_calls_weight_initial_is_kept(self, add, device):
        net = nn.Linear(4, 3).to(device)
        add(net, torch.full((2,), 7.0, device=device))
        bnn = svd.bayesianize(net)
        assert bnn.weight_initial.tolist() == [7.0, 7.0]
        assert list(bnn.state_dict()) == [name for name in net.state_dict() if name != "weight"]
        assert_same_function(bnn, net, [torch.randn(5, 4, device=device)])


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


class TestModulesTakenIn:
    @pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
    def test_modules_taken_in_during_a_call_keep_their_names_and_weights(self, move):
        net, x = Moving(move).double(), torch.randn(4, 3, dtype=torch.double)
        original = svd.bayesianize(net)
        for bnn in (original, copy.deepcopy(original)):
            model = svd.Supervised(bnn, lambda mean: dist.Normal(mean, 1.0).to_event(1), 4)
            guide = svd.AutoSparseNormal(model, init_log_variance=-60.0)
            assert set(guide.posteriors) <= set(svd.choose(net))
            for _ in range(2):
                assert set(guide(x)) <= set(svd.choose(net))
                elbo = svd.SparseVD_ELBO(kl_weight=0.0)
                expected = -dist.Normal(net(x), 1.0).log_prob(x).sum()
                torch.testing.assert_close(elbo(model, guide)(x, x), expected, rtol=1e-8, atol=0)
        pruned = svd.prune(bnn, guide, svd.sparsify(guide, math.inf))
        torch.testing.assert_close(pruned(x), net(x))

    def test_a_layer_uses_the_weight_that_functional_call_gives_it(self):
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

LAZY_OPTIONS = {
    "default": {},
    "glob": {"include": "*.weight"},
    "type": {"include": nn.Linear},
    "excluded": {"exclude": "0.*"},
    "not included": {"include": "1.weight"},
    "predicate": {"exclude": lambda name, p: name.startswith("0.")},
    "prior table": {"prior": {"*": dist.Normal(0.0, 1.0)}},
}


class TestNoPlainParameter:
    @pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
    @pytest.mark.parametrize("kind", ["parameter", "buffer"])
    def test_weights_tied_by_a_view_are_refused_by_name(self, view, kind):
        net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Module(), nn.Linear(2, 2))
        tied = view(net[0].weight.detach())
        net[2].register_parameter("tied", nn.Parameter(tied)) if kind == "parameter" else net[2].register_buffer(
            "tied", tied
        )
        with pytest.raises(
            ValueError, match=r"expected memory of its own, but it is a view of (0\.weight|2\.tied), and"
        ):
            svd.bayesianize(net)
        assert svd.choose(net, include="3.weight") == ["3.weight"]

    def test_parameters_side_by_side_in_one_piece_of_memory_are_no_views(self):
        net, flat = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)), torch.randn(24)
        net[0].weight, net[1].weight = nn.Parameter(flat[:12].view(3, 4)), nn.Parameter(flat[12:].view(4, 3))
        assert svd.choose(net) == ["0.weight", "1.weight"]

    def test_a_parameter_of_a_class_of_its_own_is_refused_by_name(self):
        class Scaled(nn.Parameter):
            def scaled(self):
                return 2 * self

        net = nn.Linear(3, 2)
        net.weight = Scaled(net.weight.data)
        with pytest.raises(ValueError, match=r"^weight: expected an nn\.Parameter, but got a Scaled"):
            svd.bayesianize(net)

    @pytest.mark.parametrize(("parametrise", "name"), PARAMETRISED.values(), ids=PARAMETRISED)
    def test_parametrised_weight_is_refused_by_name(self, parametrise, name, device):
        net = nn.Sequential(parametrise(nn.Linear(3, 3)), nn.Linear(3, 2)).to(device)
        for options in ({}, {"include": "0.*", "exclude": "0.bias"}):
            with pytest.raises(
                ValueError, match=re.escape(f"{name}: expected a plain parameter, but it is behind a param")
            ):
                svd.bayesianize(net, **options)

    @pytest.mark.parametrize(("parametrise", "name"), PARAMETRISED.values(), ids=PARAMETRISED)
    @pytest.mark.parametrize("options", [{"exclude": "0.*"}, {"include": "1.w*"}], ids=["exclude", "include"])
    def test_parametrised_weight_that_is_not_chosen_works(self, parametrise, name, options, device):
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

    @pytest.mark.parametrize("options", LAZY_OPTIONS.values(), ids=LAZY_OPTIONS)
    def test_lazy_module_is_refused_by_name_and_works_once_initialised(self, options, device):
        # Also where it would get no prior: Pyro's modules cannot hold parameters that have no shape yet.
        net = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)).to(device)
        with pytest.raises(
            ValueError, match=r"0\.(weight|bias): expected an initialised parameter; run the network once"
        ):
            svd.bayesianize(net, **options)
        x = torch.zeros(1, 4, device=device)
        net(x)
        assert "1.weight" in sites_of(svd.bayesianize(net, **options), x)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64], ids=str)
    def test_parameter_that_is_not_floating_point_is_refused_by_name(self, dtype, device):
        net = nn.Sequential(nn.Linear(3, 2)).to(device)
        net[0].codes = nn.Parameter(torch.zeros(2, 2, dtype=dtype, device=device), requires_grad=False)
        with pytest.raises(ValueError, match=rf"0\.codes: expected a floating-point parameter, but got {dtype}"):
            svd.bayesianize(net, include="*")
        bnn = svd.bayesianize(net)
        assert_same_function(bnn, net, [torch.randn(5, 3, device=device)], ["0.weight"])
