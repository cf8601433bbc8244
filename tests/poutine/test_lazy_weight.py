"""Every use of a lazy weight that samples no output, against one sample of the weight."""

import warnings
from contextlib import nullcontext

import pyro
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from checks import assert_close
from operations import (
    CONV2D,
    ONE_OF_EACH,
    Inputs,
    inputs_of,
    plain_output,
    posterior_parameters,
    projected,
    sampled_output,
    unsampled_weight,
)
from pyro_sparsevd import SparseNormal
from pyro_sparsevd.infer.checks import finite_value
from pyro_sparsevd.poutine.local_reparam import local_reparam
from pyro_sparsevd.poutine.unsampled_weight import RepeatedUseError

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


class TestDraws:
    @pytest.mark.parametrize("use", OTHER_USES)
    def test_another_use_draws_once_and_computes_with_that_draw(self, use, device, draws):
        loc, log_variance = posterior_parameters(device)
        x = torch.randn(5, 4, dtype=torch.float64, device=device)
        weight = unsampled_weight(loc, log_variance)
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
            assert_close(gradients, torch.autograd.grad(expected.sum(), (loc, log_variance)))

    @pytest.mark.parametrize(("make", "kind"), DRAWING_MODULES)
    def test_modules_without_a_local_form_use_one_draw_of_each_weight(self, make, kind, device, draws):
        torch.manual_seed(1)
        module = make().to(device).double()
        x = torch.randn(5, 2, 4, dtype=torch.float64, device=device)
        tokens = torch.tensor([[0, 5, 2], [1, 1, 3]], device=device)
        inputs = {"tokens": (tokens,), "once": (x,), "twice": (x, x), "step": (x[0],), "self-attention": (x, x, x)}[
            kind
        ]
        weights = {
            n: unsampled_weight(p, torch.full_like(p, -2.0), n) for n, p in module.named_parameters() if p.dim() > 1
        }
        local = {"linear1.weight", "linear2.weight"} & weights.keys()
        torch.manual_seed(3)
        output = functional_call(module, weights, inputs)
        assert sorted(map(id, draws)) == sorted(id(w.base_dist) for name, w in weights.items() if name not in local)
        if not local:
            expected = functional_call(module, {name: w.clone() for name, w in weights.items()}, inputs)
            assert_close(output, expected)

    def test_a_linear_layer_after_a_draw_uses_that_draw(self, device, draws):
        loc, log_variance = posterior_parameters(device)
        x = torch.randn(5, 4, dtype=torch.float64, device=device)
        weight = unsampled_weight(loc, log_variance)
        drawn = weight.clone()
        outputs = [F.linear(x, weight), F.linear(x, weight)]
        assert all(torch.equal(output, F.linear(x, drawn)) for output in outputs)
        assert len(draws) == 1

    def test_a_draw_of_a_weight_made_without_a_gradient_has_none(self, device):
        loc = torch.randn(3, 4, device=device, requires_grad=True)
        with torch.no_grad():
            weight = unsampled_weight(loc, torch.zeros_like(loc))
        assert not (weight * 2).requires_grad

    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("use", DRAWN.values(), ids=DRAWN)
    def test_where_no_output_can_be_sampled_the_weight_is_drawn_once(self, use, device):
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


class TestWithoutNumbers:
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
    def test_what_can_be_known_without_numbers_is_right_and_draws_nothing(self, ask, device, draws):
        loc, log_variance = posterior_parameters(device)
        assert ask(unsampled_weight(loc, log_variance)) == ask(loc)
        assert draws == []

    @pytest.mark.parametrize("show", [repr, str, "{}".format], ids=["repr", "str", "format"])
    def test_it_is_shown_by_site_and_shape_without_a_draw(self, show, device, draws):
        assert show(unsampled_weight(*posterior_parameters(device))) == "UnsampledWeight('w', shape=(3, 4))"
        assert draws == []


class TestSecondUse:
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
    def test_a_second_use_after_a_local_one_is_an_error_that_names_the_site(self, second, device):
        weight = unsampled_weight(*posterior_parameters(device), site="net.weight")
        F.linear(torch.ones(2, 4, dtype=torch.float64, device=device), weight)
        with pytest.raises(
            RepeatedUseError, match=r"^net\.weight: used more than once.*exclude=\{'net\.weight'\}"
        ) as info:
            second(weight)
        assert info.value.site == "net.weight"

    def test_a_second_convolution_raises_an_error_that_names_the_site(self, device):
        operation = CONV2D.values[0]
        inputs = inputs_of(operation, device)
        _, weight = sampled_output(operation, inputs, seed=3)
        with pytest.raises(RepeatedUseError, match=r"^w: used more than once"):
            operation.call(inputs.x, weight, inputs.bias)


class TestOperands:
    def test_a_lazy_bias_is_drawn_and_its_layer_still_samples_its_output(self, device, draws):
        loc, log_variance = posterior_parameters(device)
        x = torch.randn(5, 4, dtype=torch.float64, device=device)
        bias = unsampled_weight(loc[:, 0], log_variance[:, 0], "bias")
        torch.manual_seed(3)
        output = F.linear(x, unsampled_weight(loc, log_variance), bias)
        assert draws == [bias.base_dist]
        torch.manual_seed(3)
        value = SparseNormal(loc[:, 0], log_variance[:, 0]).rsample()
        mean, variance = F.linear(x, loc, value), F.linear(x**2, log_variance.exp())
        noise = torch.empty(mean.shape, dtype=mean.dtype, device=device).normal_()
        expected = mean + variance.sqrt() * noise
        assert_close(output, expected)
        trainable = (loc, log_variance)
        gradients = torch.autograd.grad(projected(output), trainable)
        assert_close(gradients, torch.autograd.grad(projected(expected), trainable))

    def test_an_input_that_is_a_lazy_weight_itself_is_drawn(self, device, draws):
        loc, log_variance = posterior_parameters(device)
        x, weight = unsampled_weight(loc, log_variance, "x"), unsampled_weight(loc, log_variance, "w")
        output = F.linear(x, weight)
        assert torch.equal(output, F.linear(x.clone(), weight.clone()))
        assert sorted(map(id, draws)) == sorted(map(id, [x.base_dist, weight.base_dist]))

    @pytest.mark.parametrize("operation", ONE_OF_EACH)
    def test_autocast_computes_the_noise_in_full_precision(self, operation, device):
        inputs = Inputs(*(t.detach().float().requires_grad_() for t in inputs_of(operation, device)))
        inputs.log_variance.data.fill_(-30)  # x² σ² of float16 would underflow
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output, _ = sampled_output(operation, inputs._replace(x=inputs.x.bfloat16()), seed=3)
        expected = plain_output(operation, inputs._replace(x=inputs.x.bfloat16().float()), seed=3)
        assert output.dtype == torch.bfloat16  # as of the plain operation, but rounded only once
        torch.testing.assert_close(output, expected.bfloat16(), rtol=1e-2, atol=1e-2)
        gradients = torch.autograd.grad(projected(output.float()), inputs.trainable())
        assert all(g.isfinite().all() for g in gradients)
        assert gradients[2].any()

    @pytest.mark.parametrize("bad", [False, True])
    def test_nested_arguments_are_checked(self, bad, device):
        parts = [torch.ones(2, 3, device=device), torch.ones(4, 3, device=device)]
        parts[1][0, 0] = torch.nan if bad else 1
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
            assert (finite_value(None, torch.nested.nested_tensor(parts)) is None) == bad
