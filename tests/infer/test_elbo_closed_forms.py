"""The loss: where the closed form is the wrong one, or another than it seems."""

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal, AutoNormalMessenger, init_to_value
from torch import nn
from torch.distributions.transforms import AffineTransform, ComposeTransform, IndependentTransform

from checks import SIGMAS, assert_close, seeded
from problems import F64, model_and_guide, normal_likelihood, regression_data
from pyro_sparsevd import (
    AutoSparseNormal,
    EmpiricalBayesNormal,
    ImproperPriorWarning,
    LogUniform,
    SparseNormal,
    SparseVD_ELBO,
    Supervised,
    bayesianize,
    init_to_weights,
    sparsify,
)
from pyro_sparsevd.distributions.kl import kl_normal_log_uniform
from pyro_sparsevd.infer.dependence import is_factorised


def _against_the_order(prior_of_y: Callable = lambda x: dist.Normal(x, 1.0)) -> tuple[Callable, Callable]:
    """A model x, y, obs with the exact posterior as its guide, which samples y first."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        y = pyro.sample("y", prior_of_y(x))
        pyro.sample("obs", dist.Normal(y, 1.0), obs=torch.ones((), dtype=F64))

    def guide():
        y = pyro.sample("y", dist.Normal(torch.tensor(2 / 3, dtype=F64), (2 / 3) ** 0.5))
        pyro.sample("x", dist.Normal(y / 2, 0.5**0.5))

    return model, guide


class TestOrder:
    @pytest.mark.parametrize("kl", ["approximate", "exact", "monte_carlo"])
    def test_a_guide_against_the_models_order_has_the_loss_of_trace_elbo(self, kl):
        model, guide = _against_the_order()
        losses = torch.tensor([SparseVD_ELBO(kl).loss(model, guide) for _ in range(2_000)], dtype=F64)
        evidence = -dist.Normal(torch.zeros((), dtype=F64), 3**0.5).log_prob(torch.ones((), dtype=F64))
        assert abs(losses.mean() - evidence) < SIGMAS * losses.std() / len(losses) ** 0.5 + 1e-12

    def test_a_factorised_guide_keeps_its_closed_forms_in_any_order(self):
        zero = torch.zeros((), dtype=F64)

        def model():
            x = pyro.sample("x", dist.Normal(zero, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0))

        guide = AutoGuideList(model)
        guide.append(AutoSparseNormal(poutine.block(model, hide=["x"]), init_log_variance=-1.0))
        guide.append(AutoNormal(poutine.block(model, hide=["y"])))
        guide()
        with poutine.trace() as trace:
            guide()
        assert list(trace.trace.stochastic_nodes) == ["y", "x_unconstrained", "x"]
        values = {SparseVD_ELBO().loss(poutine.condition(model, {"x": zero}), guide.__getattr__("0")) for _ in range(5)}
        assert len(values) == 1
        assert is_factorised(guide)
        assert is_factorised(poutine.mask(guide.__getattr__("0").sparsified(sparsify(guide.__getattr__("0"))), True))
        guide.append(lambda: {})
        assert not is_factorised(guide)


class TestClosedForms:
    @pytest.mark.parametrize("kl", ["approximate", "exact"])
    @pytest.mark.parametrize(
        "make",
        [
            lambda q: dist.TransformedDistribution(q.to_event(1), []),
            lambda q: dist.TransformedDistribution(q, [IndependentTransform(ComposeTransform([]), 1)]),
            lambda q: dist.TransformedDistribution(
                dist.Normal(q.loc * 0, 1.0), AffineTransform(q.loc, -q.scale)
            ).to_event(1),
            lambda q: dist.TransformedDistribution(
                dist.Normal(q.loc / 2, q.scale / 2).to_event(1), [AffineTransform(0.0, 2.0), ComposeTransform([])]
            ),
        ],
        ids=["nothing", "identity", "location and scale", "both"],
    )
    def test_a_gaussian_by_transforms_has_the_closed_form(self, make, kl):
        q = SparseNormal(torch.tensor([0.3, -2.0, 0.0], dtype=F64), torch.tensor([-1.0, 0.5, -3.0], dtype=F64))
        losses = {
            SparseVD_ELBO(kl).loss(
                lambda: pyro.sample("w", LogUniform().expand([3]).to_event(1)), lambda: pyro.sample("w", make(q))
            )
            for _ in range(3)
        }
        expected = kl_normal_log_uniform(q, LogUniform(), kl).sum().item()
        assert all(abs(loss - expected) < 1e-10 for loss in losses)

    @pytest.mark.parametrize("make", [AutoNormal, AutoNormalMessenger])
    @pytest.mark.parametrize("prior", [LogUniform(), LogUniform(1e-3, 10.0), dist.Normal(0.0, 2.0)], ids=repr)
    def test_pyros_own_normal_guides_have_the_closed_form(self, make, prior):
        def model():
            pyro.sample("w", prior.expand([3]).to_event(1))

        guide = make(model, init_loc_fn=init_to_value(values={"w": torch.tensor([0.3, -2.0, 0.1])}), init_scale=0.2)
        guide()
        q = dist.Normal(torch.tensor([0.3, -2.0, 0.1]), 0.2)
        expected = torch.distributions.kl_divergence(q, prior.expand([3])).sum().item()
        elbo = SparseVD_ELBO("exact")
        for _ in range(3):
            assert elbo.loss(model, guide) == pytest.approx(expected, rel=1e-5)

    def test_the_variance_of_a_pooled_prior_is_that_of_the_kept_weights(self, device):
        model = Supervised(
            bayesianize(nn.Linear(50, 1, bias=False).to(device).double(), EmpiricalBayesNormal(())),
            normal_likelihood,
            9,
        )
        guide = AutoSparseNormal(model, init_log_variance=-4.0)
        loc = torch.where(torch.arange(50, device=device) < 5, 2.0, 1e-3).double()
        with torch.no_grad():
            guide.posteriors["weight"].loc.copy_(loc)
        x, y = torch.randn(9, 50, dtype=F64, device=device), torch.randn(9, dtype=F64, device=device)
        guide(x, y)
        sparse, elbo = guide.sparsified(sparsify(guide, {"weight": 0.0})), SparseVD_ELBO()
        elbo(model, sparse)(x, y).backward()
        q = guide.posteriors["weight"]
        second = (q.loc**2 + q.variance)[0, :5]
        assert_close(elbo.terms["kl"], (0.5 * (second.mean().log() - q.log_variance[0, :5])).sum().detach(), 1e-9)
        gradients = [p.grad for p in sparse.parameters() if p.grad is not None]
        assert all(bool(g.isfinite().all()) for g in gradients)

    @pytest.mark.parametrize("make", [AutoNormal, AutoSparseNormal])
    def test_a_plate_without_a_size_takes_data_of_any(self, make):
        data = torch.randn(17, dtype=F64)

        def model():
            loc = pyro.sample("loc", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            with pyro.plate("plate"):
                pyro.sample("y", dist.Normal(loc, 1.0), obs=data)

        guide = make(model)
        guide()
        loss, expected = (seeded(elbo.loss, model, guide) for elbo in (SparseVD_ELBO("monte_carlo"), Trace_ELBO()))
        assert loss == pytest.approx(expected, abs=1e-10)
        with pytest.raises(ValueError, match=r"^y: expected a value of shape \(\)"):
            SparseVD_ELBO().loss(
                lambda: pyro.sample("y", dist.Normal(pyro.sample("loc", dist.Normal(0.0, 1.0)), 1.0), obs=data), guide
            )


class TestDensities:
    def test_a_density_that_a_delta_adds_to_its_value_counts(self):
        zero = torch.zeros((), dtype=F64)

        def guide():
            u = pyro.sample("u", dist.Normal(zero + 0.3, 0.5), infer={"is_auxiliary": True})
            pyro.sample("w", dist.Delta(u, log_density=zero + 0.7))

        loss = SparseVD_ELBO().loss(lambda: pyro.sample("w", dist.Normal(zero, 1.0)), guide)
        expected = torch.distributions.kl_divergence(dist.Normal(zero + 0.3, 0.5), dist.Normal(zero, 1.0)) + 0.7
        assert loss == pytest.approx(expected.item(), abs=1e-10)

    def test_a_sampled_divergence_from_the_improper_prior_warns_once_by_site(self):
        def model():
            for name in "vw":
                pyro.sample(name, LogUniform().expand([3]).to_event(1))

        guide, elbo = AutoMultivariateNormal(model, init_loc_fn=init_to_weights), SparseVD_ELBO()
        with pytest.warns(ImproperPriorWarning, match=r"no closed form of the divergence") as found:
            elbo.loss(model, guide)
        assert [str(w.message)[0] for w in found] == ["v", "w"]
        elbo.loss(model, guide)  # a warning would be an error
        SparseVD_ELBO("monte_carlo").loss(model, guide)  # which asks for it

    @pytest.mark.parametrize("prior", [dist.Normal(0.0, 1.0), LogUniform()], ids=repr)
    def test_a_sampled_divergence_takes_both_densities_at_one_sample(self, prior, device):
        model, guide = model_and_guide(device, log_variance=0.0, prior=prior)
        with torch.no_grad():
            for q in guide.posteriors.values():
                q.loc.zero_()
        guide(*regression_data(device))
        spread = []
        for is_local in (True, False):
            elbo = SparseVD_ELBO("monte_carlo", local_reparam=is_local)
            kls = [(elbo.loss(model, guide, *regression_data(device)), elbo.terms["kl"].item())[1] for _ in range(300)]
            spread.append(np.std(kls))
        assert spread[0] <= 1.2 * spread[1] + 1e-12  # 0 against 0 where posterior and prior are the same
