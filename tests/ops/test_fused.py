"""The loops in C against what torch computes in float64, at the edges of float32, and as parts of a training step."""

import ctypes
import logging
import subprocess
import sysconfig
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_sparsevd as svd
from pyro_sparsevd.ops import fused
from pyro_sparsevd.ops.divergence import (
    add_gradients_,
    kl_ard,
    kl_log_uniform,
    kl_log_uniform_total,
    total_and_derivatives,
)
from pyro_sparsevd.ops.kernels import KERNELS, ard

needs_loops = pytest.mark.skipif(
    fused._LIBRARY is None, reason="no C compiler was at hand when the package was installed"
)
DIVERGENCES = {**KERNELS, "ard": ard}
SIZES = [0, 1, 255, 256, 257, 5_000]


def without_loops(monkeypatch):
    monkeypatch.setattr(fused, "_LIBRARY", None)


def in_float64(kernel, loc, variance):
    """Returns twice the divergences and twice their slopes, as torch computes them."""
    a = loc.double() ** 2 / variance.double()
    value, *scratch = (torch.empty_like(a) for _ in range(4))
    kernel(a, value, *scratch)
    return value, a


def guarded(size):
    """Returns memory for some numbers, and the numbers on its two sides."""
    memory = torch.full((size + 32,), 7.0)
    return memory.narrow(0, 16, size), (memory[:16], memory[16 + size :])


def is_untouched(sides):
    return all(bool((side == 7).all()) for side in sides)


class TestDivergences:
    @needs_loops
    @pytest.mark.parametrize(("name", "bound"), [("approximate", 1e-6), ("exact", 1e-5), ("ard", 1e-6)])
    def test_divergences_and_slopes_are_those_of_torch_in_float64(self, name, bound):
        rates = torch.linspace(-45, 45, 100_003)
        loc = torch.randn(100_003).sign() * torch.logspace(-6, 3, 100_003)
        variance = (rates.double() + 2 * loc.double().abs().log()).exp().float()
        variance.clamp_(1e-37, 1e37)
        slope, value = torch.empty_like(loc), torch.empty_like(loc)
        total = fused.divergence(DIVERGENCES[name], loc, variance, slope, value)
        true_value, true_derivative = in_float64(DIVERGENCES[name], loc, variance)
        torch.testing.assert_close(value.double(), true_value, rtol=bound, atol=0)
        torch.testing.assert_close(slope.double(), true_derivative, rtol=bound, atol=0)
        torch.testing.assert_close(total.double(), true_value.sum(), rtol=bound, atol=0)

    @pytest.mark.parametrize("log_variance", [-90.0, 88.4])
    def test_variances_at_the_ends_of_float32_have_finite_divergences(self, log_variance):
        loc = torch.tensor([0.0, 1e-25, 1e-3]).requires_grad_()
        log_variances = torch.full((3,), log_variance).requires_grad_()
        kl = kl_log_uniform(loc, log_variances, "exact")
        kl.sum().backward()
        expected = kl_log_uniform(loc.double(), log_variances.double(), "exact").float()
        torch.testing.assert_close(kl, expected, rtol=1e-4, atol=1e-6)
        assert loc.grad.isfinite().all()
        assert log_variances.grad.isfinite().all()

    @needs_loops
    @pytest.mark.parametrize("name", DIVERGENCES)
    def test_divergence_at_the_edges_is_that_of_torch(self, name):
        big = torch.finfo(torch.float32).max
        loc = torch.tensor([0.0, 1e-19, 1e-10, 1e19, 1e30, torch.inf, torch.nan, 1.0, 1.0, 1.0])
        variance = torch.tensor([1.0, 1.0, 1e-3, 1.0, 1.0, 1.0, 1.0, torch.nan, big, 0.0])
        slope, value = torch.empty_like(loc), torch.empty_like(loc)
        fused.divergence(DIVERGENCES[name], loc, variance, slope, value)
        a, (expected, *scratch) = loc * loc / variance, torch.empty(4, 10)
        DIVERGENCES[name](a, expected, *scratch)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-37, equal_nan=True)
        torch.testing.assert_close(slope, a, rtol=1e-5, atol=1e-37, equal_nan=True)

    @needs_loops
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("name", DIVERGENCES)
    def test_divergence_of_any_number_of_weights_writes_these_alone(self, name, size):
        loc, variance = torch.randn(size), torch.rand(size) + 0.1
        (slope, beside_derivative), (value, beside_value) = guarded(size), guarded(size)
        total = fused.divergence(DIVERGENCES[name], loc, variance, slope, value)
        true_value, true_derivative = in_float64(DIVERGENCES[name], loc, variance)
        torch.testing.assert_close(value.double(), true_value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(slope.double(), true_derivative, rtol=1e-5, atol=0)
        torch.testing.assert_close(total.double(), true_value.sum(), rtol=1e-5, atol=1e-7)
        assert is_untouched(beside_derivative)
        assert is_untouched(beside_value)

    @needs_loops
    def test_threads_change_no_bit(self):
        size, before = 3 * 2**15 + 17, torch.get_num_threads()
        loc, variance, noise = torch.randn(size), torch.rand(size), torch.randn(size)
        found = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                slope, output, std = torch.empty_like(loc), loc.clone(), variance.clone()
                total = fused.divergence(KERNELS["approximate"], loc, variance, slope)
                fused.add_noise(output, std, noise)
                found.append((total, slope, output, std, fused.exp(loc, torch.empty_like(loc))))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))

    @pytest.mark.parametrize("form", KERNELS)
    def test_kl_is_the_same_without_the_loops(self, form, monkeypatch):
        def evaluated():
            loc, log_variance = ((scale * torch.randn(300, 120, generator=generator)) for scale in (1, 3))
            loc.requires_grad_(), log_variance.requires_grad_()
            terms = [kl_log_uniform_total(loc, log_variance, form), kl_log_uniform(loc, log_variance, form).mean()]
            terms.append(kl_ard(loc, log_variance).sum())
            return [*terms, *(g for term in terms for g in torch.autograd.grad(term, (loc, log_variance)))]

        generator = torch.Generator().manual_seed(0)
        with_loops = evaluated()
        without_loops(monkeypatch)
        generator.manual_seed(0)
        for found, expected in zip(with_loops, evaluated(), strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)

    @pytest.mark.parametrize("form", KERNELS)
    def test_total_and_derivatives_are_the_same_without_the_loops(self, form, monkeypatch):
        locs = [torch.randn(shape) for shape in [(30, 40), (5,), (), (0, 3)]]
        variances = [torch.rand(loc.shape) + 0.1 for loc in locs]
        total, slopes = total_and_derivatives(locs, variances, KERNELS[form], torch.empty(1206))
        without_loops(monkeypatch)
        expected, true_derivatives = total_and_derivatives(locs, variances, KERNELS[form], torch.empty(1206))
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
        for slope, true_derivative in zip(slopes, true_derivatives, strict=True):
            torch.testing.assert_close(slope, true_derivative, rtol=1e-5, atol=0)


class TestExponentials:
    @needs_loops
    def test_exponential_to_the_last_digits_down_to_the_smallest_numbers(self):
        x = torch.linspace(-104, 88.72, 200_001)
        torch.testing.assert_close(
            fused.exp(x, torch.empty_like(x)).double(), x.double().exp(), rtol=2e-7, atol=1.5e-45
        )

    def test_exponential_at_the_edges(self):
        x = torch.tensor([0.0, -0.0, -torch.inf, -1e30, -104.0, 89.0, 1e30, torch.inf, torch.nan])
        torch.testing.assert_close(fused.exp(x, torch.empty_like(x)), x.exp(), rtol=0, atol=0, equal_nan=True)


@needs_loops
class TestNoiseAndGradients:
    @pytest.mark.parametrize("size", SIZES)
    def test_noise_is_that_of_the_formula(self, size):
        (output, beside_output), (variance, beside_variance) = guarded(size), guarded(size)
        noise = torch.randn(size)
        mean, true_variance = output.copy_(torch.randn(size)).clone(), variance.copy_(torch.rand(size)).clone()
        fused.add_noise(output, variance, noise)
        torch.testing.assert_close(output, mean + true_variance.sqrt() * noise, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(variance, noise / true_variance.sqrt(), rtol=1e-6, atol=0)
        assert is_untouched(beside_output)
        assert is_untouched(beside_variance)

    def test_noise_of_no_variance_is_finite_and_of_no_number_is_none(self):
        output, variance = torch.ones(4), torch.tensor([0.0, -1e-9, torch.nan, torch.inf])
        fused.add_noise(output, variance, torch.ones(4))
        assert output.isnan().tolist() == variance.isnan().tolist() == [False, False, True, False]
        assert output[:2].tolist() == [1.0, 1.0]
        assert variance[:2].isfinite().all()

    @pytest.mark.parametrize("size", SIZES)
    def test_finished_gradients_are_those_of_torch(self, size):
        loc, slope, variance = torch.randn(size), torch.rand(size), torch.rand(size) + 0.1
        (grad_loc, beside_loc), (grad_variance, beside_variance) = guarded(size), guarded(size)
        true_loc = grad_loc.copy_(torch.randn(size)).clone()
        true_log_variance = grad_variance.copy_(torch.randn(size)).clone().mul_(variance).mul_(0.5)
        add_gradients_(true_loc, true_log_variance, loc, variance, slope, torch.tensor(0.3))
        fused.finish_gradients(0.3, grad_loc, grad_variance, loc, variance, slope)
        torch.testing.assert_close(grad_loc, true_loc, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad_variance, true_log_variance, rtol=1e-5, atol=1e-6)
        assert is_untouched(beside_loc)
        assert is_untouched(beside_variance)


NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 3)), (40,)),
    "grey": (lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)), (1, 8, 8)),
    "channels": (lambda: nn.Sequential(nn.Conv2d(4, 20, 3), nn.ReLU(), nn.Flatten(), nn.Linear(720, 3)), (4, 8, 8)),
    "frozen means": (lambda: nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)), (40,)),
}


class TestTrainingStep:
    @pytest.mark.parametrize("kl", [*KERNELS, "monte_carlo"])
    @pytest.mark.parametrize("name", NETWORKS)
    def test_a_step_is_the_same_without_the_loops(self, name, kl, monkeypatch):
        make, shape = NETWORKS[name]
        model = svd.Supervised(svd.bayesianize(make()), lambda out: dist.Categorical(logits=out), num_data=90)
        guide = svd.AutoSparseNormal(model, init_log_variance=-3.0)
        loss = svd.SparseVD_ELBO(kl=kl)(model, guide)
        x, y = torch.randn(30, *shape), torch.randint(3, (30,))
        loss(x, y)
        if name == "frozen means":
            guide.locs.requires_grad_(False)
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            loss.zero_grad()
            value = loss(x, y)
            value.backward()
            results.append([value.detach(), *(p.grad.clone() for p in loss.parameters() if p.grad is not None)])
            without_loops(monkeypatch)
        assert len(results[0]) > 4
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_another_default_device_makes_no_difference(self):
        model = svd.Supervised(svd.bayesianize(nn.Linear(40, 3)), lambda out: dist.Categorical(logits=out), num_data=90)
        loss = svd.SparseVD_ELBO()(model, svd.AutoSparseNormal(model))
        x, y = torch.randn(30, 40), torch.randint(3, (30,))
        loss(x, y)
        torch.manual_seed(0)
        expected = loss(x, y)
        torch.manual_seed(0)
        with torch.device("meta"):
            assert torch.equal(loss(x, y), expected)

    def test_a_mean_that_is_no_number_stops_training(self):
        model = svd.Supervised(svd.bayesianize(nn.Linear(300, 3)), lambda out: dist.Categorical(logits=out), num_data=9)
        guide = svd.AutoSparseNormal(model)
        loss = svd.SparseVD_ELBO()(model, guide)
        x, y = torch.randn(9, 300), torch.randint(3, (9,))
        loss(x, y)
        with torch.no_grad():
            guide.posteriors["weight"].log_variance[1, 2] = torch.nan
        with pytest.raises(ValueError, match="finite"):
            loss(x, y)


class TestWhatTheLoopsServe:
    @needs_loops
    def test_whom_the_loops_serve(self, device):
        plain = torch.ones(4, 4)
        assert fused.serve(plain, nn.Parameter(plain), plain[1:], torch.empty(0))
        refused = {
            "none": None,
            "double": plain.double(),
            "half": plain.half(),
            "transposed": plain.t(),
            "expanded": torch.ones(()).expand(4, 4),
            "strided": plain[:, ::2],
            "channels last": torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
            "meta": plain.to("meta"),
            "sparse": plain.to_sparse(),
            "negated view": torch._neg_view(plain),
            "zeros without memory": torch._efficientzerotensor(16).view(4, 4),
            "subclass": plain.as_subclass(type("Subclass", (torch.Tensor,), {})),
        }
        assert [name for name, tensor in refused.items() if fused.serve(plain, tensor)] == []
        assert fused.serve(plain.to(device)) == (device.type == "cpu")

    def test_without_a_library_they_serve_nobody(self, monkeypatch):
        without_loops(monkeypatch)
        assert not fused.serve(torch.ones(2))

    def test_compilers_see_what_torch_computes(self, compiled):
        loc, log_variance = torch.randn(40), torch.randn(40)
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        total = compiled(lambda a, b: a.exp() + fused.exp(b, torch.empty_like(b)), backend=backend)(loc, log_variance)
        torch.testing.assert_close(total, loc.exp() + log_variance.exp())
        assert any("exp2" in graph.code for graph in graphs)

    @pytest.mark.parametrize("trace", ["make_fx", "jit"])
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit")
    def test_tracers_see_what_torch_computes(self, trace):
        def variance(log_variance):
            return fused.exp(log_variance, torch.empty_like(log_variance)) + 0

        example = torch.zeros(4)
        traced = make_fx(variance)(example) if trace == "make_fx" else torch.jit.trace(variance, example)
        torch.testing.assert_close(traced(torch.ones(4)), torch.ones(4).exp())

    @needs_loops
    def test_sizes_that_differ_are_an_error(self):
        with pytest.raises(ValueError, match=r"exponential: expected tensors of one size, but got \[\(4,\), \(2,\)\]"):
            fused.exp(torch.zeros(4), torch.zeros(2))


def finder_of(path):
    return SimpleNamespace(find_spec=lambda *_: ModuleSpec("_fused", None, origin=str(path)))


class TestLoading:
    def test_library_that_was_not_built_is_none(self, monkeypatch):
        monkeypatch.setattr(fused, "PathFinder", SimpleNamespace(find_spec=lambda *_: None))
        assert fused._load() is None

    def test_library_that_cannot_be_loaded_is_none_and_logged(self, monkeypatch, tmp_path, caplog):
        broken = tmp_path / "_fused.so"
        broken.write_bytes(b"no library")
        monkeypatch.setattr(fused, "PathFinder", finder_of(broken))
        with caplog.at_level(logging.DEBUG, logger="pyro_sparsevd.ops.fused"):
            assert fused._load() is None
        assert str(broken) in caplog.text

    @needs_loops
    @pytest.mark.parametrize("interface", ["const int interface = -1;", "int other;"], ids=["another", "none"])
    def test_library_of_another_version_is_none_and_logged(self, interface, monkeypatch, tmp_path, caplog):
        source, library = tmp_path / "other.c", tmp_path / "other.so"
        source.write_text(interface)
        subprocess.run(
            [sysconfig.get_config_var("CC").split()[0], "-shared", "-fPIC", source, "-o", library], check=True
        )
        monkeypatch.setattr(fused, "PathFinder", finder_of(library))
        with caplog.at_level(logging.DEBUG, logger="pyro_sparsevd.ops.fused"):
            assert fused._load() is None
        assert "cannot be used" in caplog.text

    @needs_loops
    def test_constants_lie_in_memory_as_c_expects_them(self):
        assert ctypes.sizeof(fused._Rational) == 4 * (1 + 16 + 16)
        assert ctypes.sizeof(fused._Constants) == 3 * 4 + 2 * ctypes.sizeof(fused._Rational)
