"""Whatever a weight is given to: values and gradients are those of one sample, made in the plain way."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import pyro_sparsevd as svd
from problems import F64
from pyro_sparsevd.ops.memory import Workspace
from pyro_sparsevd.poutine.unsampled_weight import UnsampledWeight

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # torch.func.jvp's own use of it
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # a pass that only learns shapes
]


class _Round(torch.autograd.Function):
    """Quantisation with a straight-through gradient."""

    @staticmethod
    def forward(ctx, w):
        return (w / 0.05).round() * 0.05

    @staticmethod
    def backward(ctx, grad):
        return grad


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w.sign()

    @staticmethod
    def backward(ctx, grad):
        (w,) = ctx.saved_tensors
        return grad * (w.abs() <= 1)


class _Linear(torch.autograd.Function):
    """Calls in its forward pass what has a local form, and needs the same weight in its backward pass."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.T @ x


class _Cube(torch.autograd.Function):
    """Of the newer kind, which transforms of torch.func take."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w):
        return w**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (w,) = ctx.saved_tensors
        return 3 * grad * w**2


@torch.library.custom_op("pyro_sparsevd_tests::matmul", mutates_args=())
def _matmul(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.T


_matmul.register_autograd(
    lambda ctx, g: (g @ ctx.saved_tensors[1], g.T @ ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def _with_scripted(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x @ w.t()) + F.linear(x, w)


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", category=FutureWarning)  # newer torch deprecates what users still have
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    _scripted = torch.jit.script(_with_scripted)


def _ones(*shape: int, like: Tensor) -> Tensor:
    return torch.ones(shape, dtype=like.dtype, device=like.device)


def _copied_in_place(w: Tensor, x: Tensor) -> Tensor:
    copy = torch.empty(w.shape, dtype=w.dtype, device=w.device).copy_(w)
    copy[0].zero_()
    return x @ copy.mul_(2).T


def _changed_in_place(w: Tensor, x: Tensor) -> Tensor:
    before = w.sum(1)
    w = w.mul_(2)
    w[0].mul_(3)
    return x @ w.T + before


def _set_into(w: Tensor, x: Tensor) -> Tensor:
    full = torch.zeros(2, *w.shape, dtype=w.dtype, device=w.device)
    full[1] = w
    full[0, 0] = w[1]
    return full**2


def _second_derivative(w: Tensor, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(torch.tanh(x @ w.T).sum(), x, create_graph=True)
    return slope


def _gradient_penalty(w: Tensor, x: Tensor) -> Tensor:
    if not w.requires_grad:  # nor does the loss, where it is evaluated alone
        return w**3
    (slope,) = torch.autograd.grad((w**3).sum(), w, create_graph=True)
    return slope


def _attention(w: Tensor, x: Tensor) -> Tensor:
    eye = torch.eye(4, dtype=w.dtype, device=w.device)
    q = x[:, None]
    options = (4, 2, torch.cat([w, w, w, w]), None, None, None, False, 0.0, eye, None)
    return F.multi_head_attention_forward(q, q, q, *options)[0]


def _loop_over_time(w: Tensor, x: Tensor) -> Tensor:
    h = x[:, :3]
    for _ in range(3):
        h = torch.tanh(F.linear(F.pad(h, (0, 1)), w))
    return h


def _without_graph_first(w: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = w.abs().max() + F.linear(x, w).abs().max()
    return F.linear(x, w) / scale


_LAYER = nn.Linear(4, 3, bias=False)


def _in_memory(w: Tensor) -> Tensor:
    storage = w.untyped_storage()
    assert storage.data_ptr() == w.data_ptr()
    plain = torch.empty(0, dtype=w.dtype, device=w.device).set_(storage, 0, w.shape)
    return plain * torch.from_dlpack(w.detach())


def _clipped(w: Tensor, x: Tensor) -> Tensor:
    w.data = w.data.clamp(-0.1, 0.1)
    return F.linear(x, w) + w.square().sum()


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda w, x: x @ w.T,
    "einsum": lambda w, x: torch.einsum("bi,oi->bo", x, w),
    "index": lambda w, x: w[1],
    "index by tensor": lambda w, x: w[torch.tensor([0, 2, 0], device=w.device)],
    "boolean index": lambda w, x: w[torch.tensor([True, False, True], device=w.device)] ** 2,
    "stack": lambda w, x: torch.stack([w, 2 * w]),
    "cat and chunk": lambda w, x: torch.cat([w, w]).chunk(2)[1] ** 2,
    "iterate": lambda w, x: sum(row**2 for row in w),
    "views": lambda w, x: w.view(-1).reshape(4, 3).t().unsqueeze(0).expand(2, 3, 4) ** 2,
    "copied in place": _copied_in_place,
    "changed in place": _changed_in_place,
    "set into": _set_into,
    "added into": lambda w, x: torch.zeros(w.shape, dtype=w.dtype, device=w.device).add_(w) ** 2,
    "with its detached self": lambda w, x: w * w.detach() + w.data,
    "embedding": lambda w, x: F.embedding(torch.tensor([[0, 2], [1, 1]], device=w.device), w),
    "bilinear": lambda w, x: F.bilinear(x, x, w.expand(2, 3, 4)[:, :1].expand(2, 4, 4)),
    "attention": _attention,
    "linear of a function": lambda w, x: F.linear(x, torch.tanh(w)),
    "scaled rows": lambda w, x: F.linear(x, F.normalize(w, dim=1)),
    "linear as input": lambda w, x: F.linear(w, x),
    "singular values": lambda w, x: torch.linalg.svdvals(w),
    "straight-through rounding": lambda w, x: F.linear(x, _Round.apply(w)),
    "binarisation": lambda w, x: F.linear(x, _Sign.apply(w)),
    "own linear function": lambda w, x: _Linear.apply(x, w),
    "function with setup_context": lambda w, x: x @ _Cube.apply(w).T,
    "scripted": lambda w, x: _scripted(x, w),
    "custom operator": lambda w, x: _matmul(x, w),
    "vmap over data": lambda w, x: vmap(lambda a: F.linear(a, w))(x),
    "vmap over the weight": lambda w, x: vmap(lambda row: x @ row)(w),
    "vjp in data": lambda w, x: vjp(lambda a: torch.tanh(a @ w.T), x)[1](_ones(5, 3, like=w))[0],
    "vjp in the weight": lambda w, x: vjp(lambda v: torch.tanh(F.linear(x, v)), w)[1](_ones(5, 3, like=w))[0],
    "jvp in data": lambda w, x: jvp(lambda a: torch.tanh(F.linear(a, w)), (x,), (_ones(5, 4, like=w),))[1],
    "jvp in the weight": lambda w, x: jvp(lambda v: torch.tanh(x @ v.T), (w,), (_ones(3, 4, like=w),))[1],
    "grad in data": lambda w, x: grad(lambda a: torch.tanh(a @ w.T).sum())(x),
    "grad of each datum": lambda w, x: vmap(grad(lambda a: torch.tanh(w @ a).sum()))(x),
    "function within vmap": lambda w, x: vmap(lambda a: _Cube.apply(w) @ a)(x),
    "jacobian": lambda w, x: jacrev(lambda a: torch.tanh(F.linear(a, w)))(x),
    "hessian": lambda w, x: hessian(lambda a: torch.tanh(w @ a).sum())(x[0]),
    "second derivative": _second_derivative,
    "gradient penalty": _gradient_penalty,
    "checkpoint by argument": lambda w, x: checkpoint(lambda a, v: torch.tanh(a @ v.T), x, w, use_reentrant=False),
    "older checkpoint": lambda w, x: checkpoint(lambda a, v: F.linear(a, v), x, w, use_reentrant=True),
    "functional_call": lambda w, x: functional_call(_LAYER, {"weight": torch.where(w > 0, w, 0.1 * w)}, (x,)),
    "lists of numbers": lambda w, x: w * w.tolist()[0][0],
    "a number": lambda w, x: w * w[0, 0].item(),
    "its memory": lambda w, x: w * _in_memory(w),
    "other data": _clipped,
    "after a look without a graph": _without_graph_first,
}


def _hooked(w: Tensor, x: Tensor) -> Tensor:
    if w.requires_grad:
        w.register_hook(lambda grad: 3 * grad)
    return F.linear(x, w)


def _derivative_of_linear(w: Tensor, x: Tensor) -> Tensor:
    """Of which autograd knows no more than that it is a constant, were the output sampled."""
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.linear(x, w).sum(), x, create_graph=True)
    return slope**2 if slope.requires_grad else slope


def _derivative_of_nested(w: Tensor, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    output = torch.tanh(F.linear(F.pad(torch.tanh(F.linear(x, w)), (0, 1)), w.tanh()))
    return torch.autograd.grad(output.sum(), x, create_graph=True)[0]


def _inner_step(w: Tensor, x: Tensor) -> Tensor:
    if not w.requires_grad:
        return F.linear(x, w)
    (slope,) = torch.autograd.grad(F.linear(x, w).square().sum(), w, create_graph=True)
    return F.linear(x, w - 0.1 * slope)


REPEATED = {
    "hook on its gradient": _hooked,
    "derivative in the input of a linear operation": _derivative_of_linear,
    "derivative through two linear operations": _derivative_of_nested,
    "inner step of gradient descent": _inner_step,
    "loop over time": _loop_over_time,
    "twice": lambda w, x: F.linear(x, w) + F.linear(x**2, w),
    "linear, then otherwise": lambda w, x: F.linear(x, w) + w.sum(),
    "linear, then an own function": lambda w, x: F.linear(x, w) + F.linear(x, _Round.apply(w)),
    "linear, then vmap": lambda w, x: F.linear(x, w) + vmap(lambda a: w @ a)(x),
}


def _inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    loc, x = (torch.randn(shape, dtype=F64, device=device, requires_grad=True) for shape in ((3, 4), (5, 4)))
    return loc, (torch.randn(3, 4, dtype=F64, device=device) - 1).requires_grad_(), x


def _result(use: Callable, make: Callable, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    loc, log_variance, x = (t.detach().requires_grad_() for t in inputs)
    torch.manual_seed(3)
    output = use(make(loc, log_variance), x)
    generator = torch.Generator().manual_seed(7)
    (output * torch.randn(output.shape, generator=generator, dtype=F64).to(output)).sum().backward()
    return [output.detach(), loc.grad, log_variance.grad, x.grad]


class _Net(nn.Module):
    def __init__(self, use: Callable) -> None:
        super().__init__()
        self.weight, self.head, self.use = nn.Parameter(torch.randn(3, 4)), nn.Linear(3, 1), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.weight.clone() if self.use is _changed_in_place else self.weight, x).sum() + x[:, 0]


class TestEveryUse:
    @pytest.mark.parametrize("use", USES.values(), ids=USES)
    def test_a_weight_is_one_sample_with_its_gradient_whatever_it_is_given_to(self, use, device):
        def unsampled(loc: Tensor, log_variance: Tensor) -> Tensor:
            return UnsampledWeight(svd.SparseNormal(loc, log_variance), "w", Workspace())

        def sampled(loc: Tensor, log_variance: Tensor) -> Tensor:
            return svd.SparseNormal(loc, log_variance).rsample()

        inputs = _inputs(device)
        found, expected = (_result(use, make, inputs) for make in (unsampled, sampled))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("use", [*USES.values(), *REPEATED.values()], ids=[*USES, *REPEATED])
    def test_the_bound_has_the_same_gradient_with_and_without_sampled_outputs(self, use, device):
        torch.manual_seed(1)
        x = torch.randn(5, 4, dtype=F64, device=device)
        net = _Net(use).to(device).double()
        model = svd.Supervised(svd.bayesianize(net, include="weight"), lambda mean: dist.Normal(mean, 1.0), 5)
        guide = svd.AutoSparseNormal(model, init_log_variance=-2.0)
        results = []
        for local_reparam in (False, True):
            guide.zero_grad()
            elbo = svd.SparseVD_ELBO(kl="exact", local_reparam=local_reparam)
            torch.manual_seed(3)
            loss = elbo(model, guide)(x, x[:, 1])
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in guide.parameters())])
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


class TestMemory:
    def test_an_array_of_a_weight_that_needs_a_gradient_is_refused_by_name(self, device):
        loc, log_variance, _ = _inputs(device)
        weight = UnsampledWeight(svd.SparseNormal(loc, log_variance), "fc.weight", Workspace())
        for convert in (lambda w: w.numpy(), np.asarray):
            with pytest.raises(RuntimeError, match=r"^fc\.weight: .* use \.detach\(\)\.numpy\(\)"):
                convert(weight)
        assert np.array_equal(weight.detach().cpu().numpy(), weight.cpu().numpy(force=True))

    def test_other_data_of_a_weight_must_fit(self, device):
        weight = UnsampledWeight(svd.SparseNormal(*_inputs(device)[:2]), "fc.weight", Workspace())
        for data, error in ((3.0, TypeError), (torch.ones(3, 2), RuntimeError), (weight.data.float(), RuntimeError)):
            with pytest.raises(error, match=r"^fc\.weight: expected"):
                weight.data = data
        before = weight.detach().clone()
        weight.data = weight
        weight.data = (weight * 2).T.contiguous().T
        torch.testing.assert_close(weight.detach(), 2 * before)
        assert weight.detach().is_contiguous()
        assert not weight._noise.sample.requires_grad

    def test_nobody_gets_the_memory_of_a_weight_but_its_sample(self, device):
        weight = UnsampledWeight(svd.SparseNormal(*(t.detach() for t in _inputs(device)[:2])), "fc.weight", Workspace())
        capsule = weight.__dlpack__()
        torch.testing.assert_close(torch.utils.dlpack.from_dlpack(capsule), weight.detach(), rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="data pointer"):
            torch.utils.dlpack.to_dlpack(weight)

    def test_what_a_weight_holds_is_freed_with_it(self, device):
        """The graph refers to the sample, so the sample must not refer to the graph."""
        import gc
        import weakref

        loc, log_variance, x = _inputs(device)
        gc.disable()
        try:
            weight = UnsampledWeight(svd.SparseNormal(loc, log_variance), "w", Workspace())
            (x @ weight.T).sum().backward()
            alive: Any = weakref.ref(weight)
            del weight
            assert alive() is None
        finally:
            gc.enable()

    def test_a_second_derivative_through_sampled_outputs_is_refused_by_name(self, device):
        model = svd.Supervised(svd.bayesianize(nn.Linear(4, 1).to(device)), lambda f: dist.Normal(f[:, 0], 1.0), 5)
        guide = svd.AutoSparseNormal(model)
        x, y = torch.randn(5, 4, device=device), torch.randn(5, device=device)
        parameters = list(guide.parameters())
        with pytest.raises(
            RuntimeError, match=r"^weight: a sampled output has no second derivative; .*exclude='weight'"
        ):
            torch.autograd.grad(svd.SparseVD_ELBO()(model, guide)(x, y), parameters, create_graph=True)

    def test_a_weight_of_a_transposed_mean_is_contiguous_as_it_says(self, device):
        loc = torch.randn(4, 3, device=device).T
        weight = UnsampledWeight(svd.SparseNormal(loc, torch.zeros(3, 4, device=device)), "w", Workspace())
        assert weight.contiguous().view(-1).shape == (12,)
