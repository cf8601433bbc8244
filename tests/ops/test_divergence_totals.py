"""The divergences summed in blocks, and with their gradients, against the terms."""

import math
from functools import partial

import pytest
import torch

from checks import value_and_gradients
from operations import DIVERGENCES, FORMS, TOTALS
from pyro_sparsevd.ops import memory
from pyro_sparsevd.ops.divergence import add_gradients_, kl_log_uniform, kl_log_uniform_total, total_and_derivatives
from pyro_sparsevd.ops.kernels import KERNELS

SIZES = [0, 1, 6, 7, 8, 13, 14, 15, 100]


class TestBlocks:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("form", FORMS)
    def test_total_in_blocks_is_the_sum_of_the_terms(self, form, size, device, small_blocks):
        loc = torch.randn(size, dtype=torch.float64, device=device)
        log_variance = torch.randn(size, dtype=torch.float64, device=device)
        terms = value_and_gradients(lambda a, b: kl_log_uniform(a, b, form).sum(), loc, log_variance)
        total = value_and_gradients(lambda a, b: kl_log_uniform_total(a, b, form), loc, log_variance)
        assert total[0].shape == ()
        for actual, expected in zip(total, terms, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("kl", DIVERGENCES)
    def test_terms_in_blocks_are_the_terms_in_one_piece(self, kl, size, device, monkeypatch):
        loc = torch.randn(size, dtype=torch.float64, device=device)
        log_variance = torch.randn(size, dtype=torch.float64, device=device)
        grad = torch.randn_like(loc)
        whole = value_and_gradients(kl, loc, log_variance, grad=grad)
        monkeypatch.setattr(memory, "_BLOCK", 7)
        memory._kept_scratch.cache_clear()
        memory._kept_memory.cache_clear()
        try:
            in_blocks = value_and_gradients(kl, loc, log_variance, grad=grad)
        finally:
            memory._kept_scratch.cache_clear()
            memory._kept_memory.cache_clear()
        for actual, expected in zip(in_blocks, whole, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-15)

    @pytest.mark.parametrize("kl", DIVERGENCES + TOTALS)
    def test_inputs_and_gradients_of_any_layout(self, kl, device, small_blocks):
        base = torch.randn(6, 10, dtype=torch.float64, device=device)
        layouts = {
            "transposed": (base.t(), torch.randn(6, 10, dtype=torch.float64, device=device).t()),
            "one of two": (base.t(), torch.randn(10, 6, dtype=torch.float64, device=device)),
            "strided": (base[:, ::3], torch.randn(6, 4, dtype=torch.float64, device=device)),
            "channels last": tuple(
                torch.randn(2, 3, 2, 2, dtype=torch.float64, device=device).to(memory_format=torch.channels_last)
                for _ in range(2)
            ),
            "expanded": (base, torch.zeros((), dtype=torch.float64, device=device).expand(6, 10)),
        }
        for name, (loc, log_variance) in layouts.items():
            a, b = (t.detach().requires_grad_() for t in (loc, log_variance))
            value = kl(a, b)
            value.sum().backward()  # the gradient of the terms is expanded from one number
            expected = value_and_gradients(kl, loc.contiguous(), log_variance.contiguous())
            for actual, wanted in zip((value, a.grad, b.grad), expected, strict=True):
                torch.testing.assert_close(
                    actual, wanted, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
                )

    @pytest.mark.parametrize("kl", DIVERGENCES)
    def test_gradient_of_the_terms_may_be_transposed(self, kl, device, small_blocks):
        loc = torch.randn(5, 9, dtype=torch.float64, device=device)
        log_variance = torch.randn(5, 9, dtype=torch.float64, device=device)
        grad = torch.randn(9, 5, dtype=torch.float64, device=device)
        _, *actual = value_and_gradients(kl, loc, log_variance, grad=grad.t())
        _, *expected = value_and_gradients(kl, loc, log_variance, grad=grad.t().contiguous())
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-14, atol=0)


class TestPiecesForLocalOperations:
    @pytest.mark.parametrize("form", FORMS)
    def test_total_and_derivatives_with_add_gradients_is_autograd_of_the_sum(self, form, device, small_blocks):
        shapes = [(3, 4), (5,), (), (2, 1, 3)]
        locs = [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes]
        log_variances = [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes]
        variances = [t.exp() for t in log_variances]
        memory = torch.full((sum(t.numel() for t in locs),), math.nan, dtype=torch.float64, device=device)
        total, slopes = total_and_derivatives(locs, variances, KERNELS[form], memory)
        expected = [
            value_and_gradients(partial(kl_log_uniform, form=form), *pair)
            for pair in zip(locs, log_variances, strict=True)
        ]
        torch.testing.assert_close(total, sum(value.sum() for value, _, _ in expected), rtol=1e-12, atol=0)

        grad = torch.tensor(0.7, dtype=torch.float64, device=device)
        for loc, variance, slope, (_, true_loc, true_log_variance) in zip(
            locs, variances, slopes, expected, strict=True
        ):
            before_loc, before_log_variance = torch.randn_like(loc), torch.randn_like(loc)
            grad_loc, grad_log_variance = before_loc.clone(), before_log_variance.clone()
            add_gradients_(grad_loc, grad_log_variance, loc, variance, slope, grad)
            torch.testing.assert_close(grad_loc, before_loc + 0.7 * true_loc, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(
                grad_log_variance, before_log_variance + 0.7 * true_log_variance, rtol=1e-12, atol=1e-12
            )

    @pytest.mark.parametrize(
        "wanted", [(True, True), (True, False), (False, True)], ids=["both", "loc", "log_variance"]
    )
    @pytest.mark.parametrize("scalar", [True, False], ids=["scalar grad", "grad of each"])
    def test_add_gradients_adds_the_gradients_that_are_wanted(self, wanted, scalar, device, small_blocks):
        loc, log_variance = (torch.randn(4, 6, dtype=torch.float64, device=device) for _ in range(2))
        grad = torch.randn((), dtype=torch.float64, device=device) if scalar else torch.randn_like(loc)
        memory = torch.empty(24, dtype=torch.float64, device=device)
        _, (slope,) = total_and_derivatives([loc], [log_variance.exp()], KERNELS["exact"], memory)
        _, *expected = value_and_gradients(
            partial(kl_log_uniform, form="exact"), loc, log_variance, grad=grad.expand(4, 6)
        )
        added = [torch.ones_like(loc) if want else None for want in wanted]
        add_gradients_(*added, loc, log_variance.exp(), slope, grad)
        for have, want in zip(added, expected, strict=True):
            if have is not None:
                torch.testing.assert_close(have, 1 + want, rtol=1e-12, atol=1e-12)

    def test_total_and_derivatives_refuses_lists_of_different_lengths(self, device):
        loc = torch.ones(2, device=device)
        with pytest.raises(ValueError, match="zip"):
            total_and_derivatives([loc, loc], [loc], KERNELS["exact"], torch.empty(4, device=device))
