"""The loss under plates, scales and masks."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from checks import SIGMAS, assert_close, differentiable_loss, seeded
from operations import approximate_kl, exact_kl, log_normaliser, normal_to_normal
from problems import F64, NUM_DATA, model_and_guide, normal_likelihood, regression_data, small_network
from pyro_sparsevd import AutoSparseNormal, LogUniform, SparseNormal, SparseVD_ELBO


class TestScales:
    @pytest.mark.parametrize("kl", ["approximate", "exact"])
    def test_local_latents_of_a_subsample_count_for_the_whole_plate(self, kl, device):
        zero = torch.zeros((), dtype=F64, device=device)

        def model():
            with pyro.plate("data", NUM_DATA, subsample_size=5):
                pyro.sample("z", dist.Normal(zero, 1.0))
                pyro.sample("v", LogUniform(1e-30 + zero, 1e30).expand([2]).to_event(1))

        guide = AutoSparseNormal(model, init_loc_fn=lambda site: torch.full_like(site["fn"].sample(), 0.5))
        guide()
        with torch.no_grad():
            for q in guide.posteriors.values():
                q.log_variance.fill_(-1.0)
        half, variance = torch.full((NUM_DATA,), 0.5, dtype=F64), torch.full((NUM_DATA,), math.exp(-1), dtype=F64)
        formula = {"approximate": approximate_kl, "exact": exact_kl}[kl]
        expected = normal_to_normal(half, variance) + 2 * (formula(half, variance) + log_normaliser(half))
        assert abs(SparseVD_ELBO(kl).loss(model, guide) - expected) < 1e-9

    @pytest.mark.parametrize("prior", [LogUniform(), LogUniform(1e-30, 1e30), dist.Normal(0.0, 1.0)], ids=repr)
    @pytest.mark.parametrize("scale", [3.0, "tensor"])
    @pytest.mark.parametrize("kl", ["approximate", "exact", "monte_carlo"])
    def test_a_scale_of_model_and_guide_multiplies_the_loss(self, kl, scale, prior, device):
        model, guide = model_and_guide(device, prior=prior)
        guide(*regression_data(device))
        scale = torch.tensor(3.0, dtype=F64, device=device) if scale == "tensor" else scale
        elbo = SparseVD_ELBO(kl)
        expected = 3 * seeded(differentiable_loss, elbo, model, guide, *regression_data(device))
        terms = {name: 3 * term for name, term in elbo.terms.items()}
        scaled = poutine.scale(model, scale=scale), poutine.scale(guide, scale=scale)
        loss = seeded(differentiable_loss, elbo, *scaled, *regression_data(device))
        assert_close(loss, expected)
        assert_close(elbo.terms, terms)
        parameters = list(guide.parameters())
        assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters))

    def test_scales_of_model_and_guide_that_differ_are_each_respected(self, device):
        zeros = torch.zeros(3, dtype=F64, device=device)

        def model():
            with poutine.scale(scale=2.0):
                pyro.sample("w", dist.Normal(zeros, 1.0).to_event(1))

        def guide():
            pyro.sample("w", SparseNormal(zeros + 0.5, -1.0).to_event(1))

        q = SparseNormal(zeros + 0.5, -1.0)
        cross_entropy = 0.5 * (q.loc**2 + q.variance + math.log(2 * math.pi)).sum()
        expected = 2 * cross_entropy - q.entropy().sum()
        assert abs(SparseVD_ELBO().loss(model, guide) - expected.item()) < 1e-10

    def test_weights_with_different_scales_are_counted_each_with_its_own(self, device):
        zeros = torch.zeros(2, 3, dtype=F64, device=device)
        x = torch.ones(1, 3, dtype=F64, device=device)

        def sites(prior: bool) -> list[Any]:
            values = []
            for name, scale in (("a", 1.0), ("b", 2.0), ("c", 2.0)):
                with poutine.scale(scale=scale):
                    fn = LogUniform().expand([2, 3]) if prior else SparseNormal(zeros + 0.5, -1.0)
                    values.append(pyro.sample(name, fn.to_event(2)))
            return values

        def model():
            for value in sites(prior=True):
                F.linear(x, value)

        loss = SparseVD_ELBO().loss(model, lambda: sites(prior=False))
        q = SparseNormal(zeros + 0.5, -1.0)
        assert abs(loss - 5 * approximate_kl(q.loc, q.variance).item()) < 1e-10


class TestMasks:
    @pytest.mark.parametrize("prior", ["normal", "log-uniform"])
    @pytest.mark.parametrize("mask", ["tensor", True, False])
    def test_a_mask_of_model_and_guide_leaves_masked_latents_out(self, mask, prior, device):
        zeros = torch.zeros(4, dtype=F64, device=device)
        value = torch.tensor([True, False, True, True], device=device) if mask == "tensor" else mask
        fn = dist.Normal(zeros, 1.0) if prior == "normal" else LogUniform().expand([4])

        def model():
            with pyro.plate("plate", 4), poutine.mask(mask=value):
                pyro.sample("w", fn)

        def guide():
            with pyro.plate("plate", 4), poutine.mask(mask=value):
                pyro.sample("w", SparseNormal(zeros + 0.5, -1.0))

        q = SparseNormal(zeros + 0.5, -1.0)
        kept = {"tensor": 3, True: 4, False: 0}[mask]
        formula = normal_to_normal if prior == "normal" else approximate_kl
        expected = formula(q.loc, q.variance) * kept / 4
        assert abs(SparseVD_ELBO().loss(model, guide) - expected.item()) < 1e-10

    @pytest.mark.parametrize("mask", ["tensor", False])
    def test_masks_of_model_and_guide_that_differ_are_each_respected(self, mask, device):
        zeros = torch.zeros(4, dtype=F64, device=device)
        value = torch.tensor([True, False, False, True], device=device) if mask == "tensor" else mask
        q = SparseNormal(zeros + 0.5, -1.0)

        def model():
            with pyro.plate("plate", 4), poutine.mask(mask=value):
                pyro.sample("w", dist.Normal(zeros, 1.0))

        def guide():
            with pyro.plate("plate", 4):
                pyro.sample("w", q)

        cross_entropy = 0.5 * (q.loc**2 + q.variance + math.log(2 * math.pi))
        expected = (2 if mask == "tensor" else 0) * cross_entropy[0] - q.entropy().sum()
        assert abs(SparseVD_ELBO().loss(model, guide) - expected.item()) < 1e-10

    def test_a_mask_of_the_likelihood_leaves_data_out(self, device):
        model, guide = model_and_guide(device, log_variance=-70.0)
        x, y = regression_data(device)
        elbo = SparseVD_ELBO()
        mask = torch.arange(len(x), device=device) < 3
        likelihood = model.likelihood
        model.likelihood = lambda output: likelihood(output).mask(mask)
        elbo.loss(model, guide, x, y)
        expected = -NUM_DATA / len(x) * normal_likelihood(small_network(device)(x)).log_prob(y)[mask].sum()
        assert_close(elbo.terms["nll"], expected.detach(), 1e-9)

    @pytest.mark.parametrize("where", ["prior", "prior, before to_event", "both", "handler"])
    @pytest.mark.parametrize("mask", [False, True, torch.tensor([True, False, True])], ids=str)
    @pytest.mark.parametrize("prior", [LogUniform(), dist.Normal(0.0, 1.0)], ids=repr)
    def test_masks_leave_the_closed_form_and_its_mean(self, prior, mask, where):
        q = SparseNormal(torch.tensor([0.5, -1.0, 0.1], dtype=F64), torch.tensor([-1.0, 0.0, -2.0], dtype=F64))
        p = prior.expand([3])
        kl, entropy = torch.distributions.kl_divergence(q, p), q.entropy()
        counted = torch.as_tensor(mask).expand(3).double()

        def sampled(masked, fn):
            if masked and where == "prior, before to_event":
                pyro.sample("w", fn.mask(mask).to_event(1))
            elif masked and where in ("prior", "both"):
                with pyro.plate("plate", 3):
                    pyro.sample("w", fn.mask(mask))
            elif where in ("prior", "both", "handler"):
                with pyro.plate("plate", 3), poutine.mask(mask=mask if where == "handler" else True):
                    pyro.sample("w", fn)
            else:
                pyro.sample("w", fn.to_event(1))

        both = where in ("both", "handler")
        expected = (counted * kl).sum() + (0.0 if both else ((counted - 1) * entropy).sum())
        loss = SparseVD_ELBO("exact").loss(lambda: sampled(True, p), lambda: sampled(both, q))
        assert loss == pytest.approx(float(expected), abs=1e-10)
        sampling = SparseVD_ELBO("monte_carlo")
        losses = [sampling.loss(lambda: sampled(True, p), lambda: sampled(both, q)) for _ in range(400)]
        assert abs(np.mean(losses) - float(expected)) <= SIGMAS * np.std(losses) / 20 + 1e-10


def _outer_product(x, y):  # targets of shape (M,) and means of shape (M, 1)
    w = pyro.sample("w", LogUniform().expand([3]).to_event(1))
    with pyro.plate("data", 100, subsample=x):
        pyro.sample("y", dist.Normal((x @ w)[:, None], 1.0), obs=y)


def _latent_outside_of_plates(x, y):
    pyro.sample("w", LogUniform().expand([3]))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(2), obs=x)


class TestBatches:
    @pytest.mark.filterwarnings("ignore::pyro_sparsevd.distributions.ImproperPriorWarning")
    @pytest.mark.parametrize(("model", "site"), [(_outer_product, "y"), (_latent_outside_of_plates, "w")])
    def test_a_batch_that_no_plate_declares_is_refused_as_elsewhere_in_pyro(self, model, site, device):
        guide, data = AutoSparseNormal(model), (torch.ones(5, 3, device=device), torch.ones(5, device=device))
        with pytest.raises(ValueError, match=site):
            Trace_ELBO().loss(model, guide, *data)
        with pytest.raises(ValueError, match=f"^{site}: expected a batch of the sizes of its plates"):
            SparseVD_ELBO().loss(model, guide, *data)
        with pyro.validation_enabled(False):
            assert math.isfinite(SparseVD_ELBO().loss(model, guide, *data))

    def test_between_plates_any_size_is_fine_as_elsewhere_in_pyro(self, device):
        def model(x):
            with pyro.plate("rows", 4, dim=-2):
                pyro.sample("w", dist.Normal(torch.zeros(4, 3, device=device), 1.0))
                pyro.sample("y", dist.Normal(x, 1.0), obs=x)

        guide, x = AutoNormal(model), torch.ones(4, 3, device=device)
        assert math.isfinite(Trace_ELBO().loss(model, guide, x))
        assert math.isfinite(SparseVD_ELBO().loss(model, guide, x))
