"""What each layer does with a weight that is not drawn yet, as the table of docs/layers.md says."""

import copy
import math
import re
import warnings
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize, prune

import pyro_sparsevd as svd
from problems import priors
from pyro_sparsevd.poutine.unsampled_weight import UnsampledWeight

PAGE = Path(__file__).parents[2] / "docs" / "layers.md"
SIGMAS, SAMPLES = 6, 10_000  # which tells variances apart that differ by an eighth

pytestmark = pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")


class Net(nn.Module):
    """A network of any parts and any forward pass."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def own(function, *shape):
    return lambda: Net(function, w=nn.Parameter(torch.randn(shape)))


def first(layer):
    return lambda: Net(lambda net, x: net.layer(x)[0], layer=layer())


def attention():
    return Net(lambda net, x: net.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2, batch_first=True))


def encoder():
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)


def tied():
    net = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 6))
    net[1].weight = net[0].weight
    return net


def loop():
    def forward(net, x):
        hidden = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            hidden = torch.tanh(net.inner(step) + net.outer(hidden))
        return hidden

    return Net(forward, inner=nn.Linear(4, 3), outer=nn.Linear(3, 3))


def called():
    layer = nn.Linear(4, 3, bias=False)
    return Net(lambda net, x: functional_call(layer, {"weight": net.w}, (x,)), w=nn.Parameter(torch.randn(3, 4)))


# A row of the table: a network, the shape of its input, and which weights are drawn.
ATTENTION = {"self_attn.in_proj_weight", "self_attn.out_proj.weight"}
LAYERS = {
    "`Linear`, input of two dimensions": [(lambda: nn.Linear(4, 3), (5, 4), "none")],
    "`Linear`, input of more dimensions": [(lambda: nn.Linear(4, 3), (5, 2, 4), "none")],
    "`Conv1d`, `Conv2d`, `Conv3d`": [
        (lambda: nn.Conv1d(4, 3, 2), (2, 4, 5), "none"),
        (lambda: nn.Conv2d(4, 3, 2), (2, 4, 4, 3), "none"),
        (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 2, 3), "none"),
    ],
    "`ConvTranspose1d`, `ConvTranspose2d`, `ConvTranspose3d`": [
        (lambda: nn.ConvTranspose1d(4, 3, 2), (2, 4, 4), "none"),
        (lambda: nn.ConvTranspose2d(4, 3, 2), (2, 4, 3, 2), "none"),
        (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 2, 1, 2), "none"),
    ],
    "convolution in groups, depthwise, or with a `padding_mode`": [
        (lambda: nn.Conv2d(4, 6, 2, groups=2), (2, 4, 4, 3), "none"),
        (lambda: nn.Conv2d(4, 8, 2, groups=4), (2, 4, 4, 3), "none"),
        (lambda: nn.ConvTranspose1d(4, 6, 2, groups=2), (2, 4, 3), "none"),
        (lambda: nn.Conv1d(4, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 4), "none"),
    ],
    "module that calls `F.linear` or `F.conv1d` itself": [
        (own(lambda net, x: F.linear(x, net.w), 3, 4), (5, 4), "none"),
        (own(lambda net, x: F.conv1d(x, net.w, padding=1), 3, 4, 2), (2, 4, 3), "none"),
    ],
    "layer given its weight by `torch.func.functional_call`": [(called, (5, 4), "none")],
    "module that computes otherwise: `x @ w.T`, `einsum`, `F.linear(x, 2 * w)`": [
        (own(lambda net, x: x @ net.w.T, 3, 4), (5, 4), "all"),
        (own(lambda net, x: torch.einsum("ni,oi->no", x, net.w), 3, 4), (5, 4), "all"),
        (own(lambda net, x: F.linear(x, 2 * net.w), 3, 4), (5, 4), "all"),
    ],
    "`Embedding`, `EmbeddingBag`": [
        (lambda: nn.Embedding(6, 3), None, "all"),
        (lambda: nn.EmbeddingBag(6, 3), None, "all"),
    ],
    "`Bilinear`": [(lambda: Net(lambda net, x: net.b(x, x), b=nn.Bilinear(4, 4, 3)), (5, 4), "all")],
    "`RNN`, `LSTM`, `GRU` and their cells": [
        (first(lambda: nn.RNN(4, 3, batch_first=True)), (5, 2, 4), "all"),
        (first(lambda: nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True)), (5, 2, 4), "all"),
        (first(lambda: nn.GRU(4, 3, batch_first=True)), (5, 2, 4), "all"),
        (lambda: nn.RNNCell(4, 3), (5, 4), "all"),
        (first(lambda: nn.LSTMCell(4, 3)), (5, 4), "all"),
        (lambda: nn.GRUCell(4, 3), (5, 4), "all"),
    ],
    "`MultiheadAttention`": [(attention, (5, 2, 4), "all"), (lambda: attention().eval(), (5, 2, 4), "all")],
    "`TransformerEncoderLayer`": [(encoder, (5, 2, 4), ATTENTION), (lambda: encoder().eval(), (5, 2, 4), ATTENTION)],
    "one weight of two layers (tied)": [(tied, None, "all")],
    "one layer used twice in a pass (shared)": [
        (lambda: (lambda layer: nn.Sequential(layer, nn.Tanh(), layer))(nn.Linear(4, 4)), (5, 4), "all")
    ],
    "layer in a loop over time": [(loop, (5, 2, 4), "all")],
}
CASES = [pytest.param(*case, id=f"{row}-{i}") for row, cases in LAYERS.items() for i, case in enumerate(cases)]
SAMPLED = [case for case in CASES if case.values[2] == "none"]

REFUSED = {
    "`weight_norm`, `spectral_norm`, `orthogonal`": [
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
        lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    ],
    "any other `torch.nn.utils.parametrize`": [
        lambda: parametrize.register_parametrization(nn.Linear(4, 4), "weight", nn.Hardtanh())
    ],
    "`torch.nn.utils.prune`": [lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)],
    "`LazyLinear` and the like, not yet initialised": [lambda: nn.LazyLinear(4)],
}


class Recorder(Messenger):
    """Keeps the value of each latent, and the mean of what is observed: the output of the network."""

    def __init__(self):
        super().__init__()
        self.weights = {}

    def _pyro_post_sample(self, msg):
        if msg["name"] == "y":
            self.output = msg["fn"].base_dist.loc
        elif not msg["is_observed"] and msg["name"] != "data":
            self.weights[msg["name"]] = msg["value"]


def made(make, shape, device):
    torch.manual_seed(1)
    tokens = torch.tensor([[1, 2, 5], [0, 0, 3]], device=device)
    x = tokens if shape is None else torch.randn(shape, dtype=torch.float64, device=device)
    return make().to(device, torch.float64), x


def assert_same_mean(a, b):
    error = (a.mean(0) - b.mean(0)).abs()
    assert (error < SIGMAS * ((a.var(0) + b.var(0)) / SAMPLES).sqrt()).all()


class TestTableOfLayers:
    @pytest.mark.parametrize(("make", "shape", "drawn"), CASES)
    def test_weights_are_drawn_or_their_output_sampled_as_the_table_says(self, make, shape, drawn, device):
        net, x = made(make, shape, device)
        model = svd.Supervised(svd.bayesianize(net), lambda out: dist.Normal(out, 1.0).to_event(out.dim() - 1), 100)
        guide = svd.AutoSparseNormal(model, init_log_variance=-2.0)
        loss, y = svd.SparseVD_ELBO()(model, guide), net(x).detach()
        loss(x, y)  # which finds out what is used twice
        with Recorder() as record:
            loss(x, y).backward()
        expected = drawn if isinstance(drawn, set) else {"all": set(guide.posteriors), "none": set()}[drawn]
        sampled = {
            name for name, w in record.weights.items() if type(w) is UnsampledWeight and w._kl_handle is not None
        }
        assert set(record.weights) - sampled == expected
        assert all(p.grad.isfinite().all() and p.grad.any() for p in guide.parameters())
        if not sampled:
            values = {name: w.clone() if type(w) is UnsampledWeight else w for name, w in record.weights.items()}
            torch.testing.assert_close(record.output, functional_call(net, values, (x,)))

    @pytest.mark.parametrize(("make", "shape", "drawn"), SAMPLED)
    def test_sampled_outputs_have_the_moments_and_gradients_of_drawn_weights(self, make, shape, drawn, device):
        net, x = made(make, shape, device)
        bnn = svd.bayesianize(net)
        guide = svd.AutoSparseNormal(bnn, init_log_variance=-1.0)
        many = x.repeat(SAMPLES, *(1 for _ in shape[1:]))
        trace = poutine.trace(svd.local_reparam(guide)).get_trace(many)
        local = poutine.replay(bnn, trace=trace)(many).unflatten(0, (SAMPLES, len(x)))
        ((name, q),) = guide.posteriors.items()

        def output(loc, log_variance, noise):
            return functional_call(net, {name: loc + (log_variance / 2).exp() * noise}, (x,))

        def power(*args):
            return output(*args).square().sum()

        loc, log_variance = q.loc.detach(), q.log_variance.detach()
        noise = torch.randn(SAMPLES, *loc.shape, dtype=loc.dtype, device=device)
        slow = vmap(output, (None, None, 0))(loc, log_variance, noise)
        assert_same_mean(local, slow)
        assert_same_mean((local - local.mean(0)).square(), (slow - slow.mean(0)).square())
        gradients = torch.autograd.grad(local.square().sum() / SAMPLES, list(guide.parameters()))
        slow_gradients = vmap(grad(power, (0, 1)), (None, None, 0))(loc, log_variance, noise)
        for gradient, slow in zip(gradients, slow_gradients, strict=True):
            # The sampled ones vary less than the drawn ones.
            assert ((gradient - slow.mean(0)).abs() < SIGMAS * (2 / SAMPLES) ** 0.5 * slow.std(0)).all()

    @pytest.mark.parametrize("make", [make for makes in REFUSED.values() for make in makes])
    def test_what_has_no_plain_parameter_is_refused_by_name(self, make):
        with pytest.raises(ValueError, match=r"^0\.\S+: expected (a plain|an initialised) parameter"):
            svd.bayesianize(nn.Sequential(make()))

    def test_the_page_has_a_row_for_each_of_these(self):
        rows = re.findall(r"^\| (.+?) \| (local|sampled|both|refused)\b", PAGE.read_text(), re.M)
        kinds = {"none": "local", "all": "sampled", "some": "both"}
        expected = {
            row: kinds["some" if isinstance(drawn, set) else drawn] for row, [(*_, drawn), *_] in LAYERS.items()
        }
        assert dict(rows) == expected | dict.fromkeys(REFUSED, "refused")


class Skipping(nn.Module):
    """A network that leaves a layer out on demand."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.skip = True

    def forward(self, x):
        x = self.first(x).tanh()
        return self.last(x if self.skip else x + self.second(x).tanh())[:, 0]


def skipping(prior=None, device="cpu"):
    torch.manual_seed(1)
    bnn = svd.bayesianize(Skipping().to(device), prior)
    model = svd.Supervised(bnn, lambda mean: dist.Normal(mean, 1.0), 10)
    return model, svd.AutoSparseNormal(model, init_log_variance=-2.0), torch.randn(5, 6, device=device)


class TestSkippedLayers:
    @priors(lambda prior: prior.by_weight)
    @pytest.mark.parametrize("local_reparam", [True, False])
    def test_a_layer_that_a_pass_skips_costs_its_divergence_and_feels_no_data(self, prior, local_reparam, device):
        model, guide, x = skipping(prior.make(), device)
        loss = svd.SparseVD_ELBO(kl="exact", local_reparam=local_reparam)(model, guide)
        parameters = [value for name, value in guide.named_parameters() if "second" in name]
        site = model.network.second._pyro_samples["weight"].of(model.network.second)
        cost = torch.distributions.kl_divergence(guide.posteriors["second.weight"], site.base_dist).sum()
        alone = torch.autograd.grad(cost, parameters)
        torch.testing.assert_close(torch.autograd.grad(loss(x, x[:, 0]), parameters), alone)
        model.network.skip = False
        of_loc, _ = torch.autograd.grad(loss(x, x[:, 0]), parameters)
        assert not torch.allclose(of_loc, alone[0])

    @priors()
    def test_passes_that_skip_a_layer_and_others_train_by_turns(self, prior, device):
        for elbo in (svd.SparseVD_ELBO(), Trace_ELBO())[: 1 + prior.density]:
            model, guide, x = skipping(prior.make(), device)
            svi = SVI(model, guide, Adam({"lr": 1e-2}), elbo)  # which would warn of sites that only one of the two has
            for step in range(4):
                model.network.skip = step % 2 == 0
                assert math.isfinite(svi.step(x, x[:, 0]))
            assert "second.weight" in guide.posteriors

    def test_a_network_that_skips_layers_is_copied_and_pruned(self, device):
        model, guide, x = skipping(device=device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", svd.ImproperPriorWarning)
            assert "second.weight" in poutine.trace(copy.deepcopy(model)).get_trace(x).nodes
        svd.SparseVD_ELBO()(model, guide)(x, x[:, 0])
        plain = svd.prune(model.network, guide, svd.sparsify(guide, float("inf")))
        plain.skip = False
        torch.testing.assert_close(plain.second.weight, guide.median()["second.weight"])

    def test_a_part_that_was_replaced_after_all_has_no_site(self, device):
        model, _, x = skipping(svd.LogUniform(1e-4, 1.0), device)
        model.network.second = nn.Linear(6, 6).to(device)
        assert "second.weight" not in poutine.trace(model).get_trace(x).nodes
