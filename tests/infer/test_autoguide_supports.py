"""The guide: supports, medians and quantiles, and the two parameterizations."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch.distributions import biject_to, transform_to

from checks import same_values, seeded
from problems import CASES, F64, SUPPORTS, Support, module_case, precise_likelihood, small_model
from pyro_sparsevd import AutoSparseNormal, LogUniform, SparseNormal, SparseVD_ELBO


def _guide_of(support: Support, guide_class: type = AutoSparseNormal) -> Any:
    case = support.case()
    guide = guide_class(case.model, **case.options)
    guide()
    return guide


def _randomise(guide: AutoSparseNormal) -> SparseNormal:
    q = guide.posteriors["x"]
    torch.manual_seed(4)
    with torch.no_grad():
        q.loc.copy_(0.5 * torch.randn_like(q.loc))
        q.log_variance.copy_(torch.randn_like(q.loc) - 1)
    return SparseNormal(q.loc.detach(), q.log_variance.detach())


@pytest.mark.parametrize("support", SUPPORTS.values(), ids=SUPPORTS)
class TestEverySupport:
    def test_samples_lie_in_the_support_with_the_density_of_changed_variables(self, support):
        guide = _guide_of(support)
        q = _randomise(guide)
        transform = biject_to(support.prior.support)
        for seed in range(5):
            torch.manual_seed(seed)
            z = q.rsample()
            torch.manual_seed(seed)
            site = poutine.trace(guide).get_trace().nodes["x"]
            assert support.prior.support.check(site["value"]).all()
            torch.testing.assert_close(site["value"], transform(z))
            jacobian = torch.autograd.functional.jacobian(lambda z: support.coordinates(transform(z)), z)
            expected = q.log_prob(z).sum() - torch.linalg.slogdet(jacobian.reshape(z.numel(), z.numel()))[1]
            assert site["fn"].event_shape == support.prior.event_shape
            torch.testing.assert_close(site["fn"].log_prob(site["value"]).sum(), expected)

    def test_real_sites_are_sparse_normals_and_constrained_ones_transformed(self, support):
        fn = poutine.trace(_guide_of(support)).get_trace().nodes["x"]["fn"]
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        assert isinstance(fn, SparseNormal if support.real else dist.TransformedDistribution)
        assert fn.has_rsample

    def test_median_and_quantiles_are_those_of_auto_normal(self, support):
        guide, normal = _guide_of(support), _guide_of(support, AutoNormal)
        q = _randomise(guide)
        with torch.no_grad():
            normal.locs.x_unconstrained.copy_(q.loc)
            normal.scales.x_unconstrained.copy_(transform_to(normal.scale_constraint).inv(q.scale))
        torch.testing.assert_close(guide.median()["x"], normal.median()["x"])
        probabilities = [0.05, 0.5, 0.9]
        quantiles = guide.quantiles(probabilities)["x"]
        expected = normal.quantiles(probabilities)["x"]
        torch.testing.assert_close(quantiles, torch.stack(list(expected)) if isinstance(expected, list) else expected)
        torch.testing.assert_close(quantiles[1], guide.median()["x"])

    def test_samples_are_those_of_auto_normal_from_the_same_noise(self, support):
        guide, normal = _guide_of(support), _guide_of(support, AutoNormal)
        q = _randomise(guide)
        with torch.no_grad():
            normal.locs.x_unconstrained.copy_(q.loc)
            normal.scales.x_unconstrained.copy_(transform_to(normal.scale_constraint).inv(q.scale))
        torch.testing.assert_close(seeded(guide)["x"], seeded(normal)["x"])
        sites = [poutine.trace(seeded, graph_type="flat").get_trace(g) for g in (guide, normal)]
        torch.testing.assert_close(sites[0].log_prob_sum(), sites[1].log_prob_sum())


class TestMedianAndQuantiles:
    def test_quantiles_of_a_scalar_and_a_tensor_of_probabilities_agree(self, device):
        case = module_case(device)
        guide = AutoSparseNormal(case.model, init_log_variance=0.0)
        one = guide.quantiles(0.975)["0.weight"]
        many = guide.quantiles(torch.tensor([0.025, 0.975], dtype=F64, device=device))["0.weight"]
        assert many.shape == (2, 3, 4)
        torch.testing.assert_close(one.reshape(3, 4), many[1])
        torch.testing.assert_close(many[1], guide.posteriors["0.weight"].loc.detach() + 1.959963984540054)

    @pytest.mark.parametrize(
        "ask", [lambda g, *a: g.median(*a), lambda g, *a: g.quantiles(0.5, *a)], ids=["median", "quantiles"]
    )
    @pytest.mark.parametrize("make", CASES)
    def test_medians_and_quantiles_run_the_model_once_where_they_must(self, ask, make, device):
        case = make(device)
        guide = AutoSparseNormal(case.model)
        result = ask(guide, *case.data)
        assert set(result) == set(case.sites)
        assert not any(value.requires_grad for value in result.values())
        assert same_values(ask(guide), result)

    def test_a_median_is_no_view_of_a_parameter(self, device):
        guide = AutoSparseNormal(small_model(device, precise_likelihood))
        guide.median()["0.weight"].zero_()
        assert guide.posteriors["0.weight"].loc.all()


class TestDiscreteLatents:
    @pytest.mark.parametrize(
        "prior",
        [dist.Bernoulli(0.5), dist.Categorical(torch.ones(3)), dist.Poisson(torch.ones(2)).to_event(1)],
        ids=lambda prior: type(prior).__name__,
    )
    def test_a_discrete_latent_is_an_error_that_names_the_site(self, prior):
        with pytest.raises(ValueError, match="discrete sample site 'coin'"):
            AutoSparseNormal(lambda: pyro.sample("coin", prior))()

    @pytest.mark.parametrize("latent", [dist.Bernoulli(0.5), dist.Normal(0.0, 1.0)], ids=["discrete", "data"])
    def test_a_first_call_that_failed_does_not_count(self, latent):
        def model(x=None):
            pyro.sample("first", dist.Normal(0.0, 1.0))
            pyro.sample("second", latent)
            return x.sum()

        guide = AutoSparseNormal(model)
        for _ in range(2):
            with pytest.raises((AttributeError, ValueError), match=r"second|sum"):
                guide(None if latent.has_rsample else torch.ones(()))

    def test_a_hidden_discrete_latent_is_no_error(self):
        def model():
            pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("coin", dist.Bernoulli(0.5))

        assert set(AutoSparseNormal(poutine.block(model, hide=["coin"]))()) == {"x"}


class TestParameterizations:
    @pytest.mark.parametrize("kl", ["approximate", "exact"])
    def test_both_parameterizations_are_one_posterior_with_one_loss(self, kl, device):
        case = module_case(device)
        additive, multiplicative = (
            AutoSparseNormal(case.model, parameterization=p) for p in ("additive", "multiplicative")
        )
        losses = []
        for guide in (additive, multiplicative):
            pyro.set_rng_seed(0)
            losses.append(SparseVD_ELBO(kl=kl)(case.model, guide)(*case.data))
        torch.testing.assert_close(losses[0], losses[1])
        for name, q in multiplicative.posteriors.items():
            torch.testing.assert_close(q.log_variance, additive.posteriors[name].log_variance)
        assert {name.split(".")[0] for name, _ in multiplicative.named_parameters()} == {"locs", "log_alphas"}

    def test_multiplicative_gradients_are_those_of_the_formula(self, device):
        loc, log_alpha = (
            torch.tensor([v], dtype=torch.float64, device=device, requires_grad=True) for v in (0.7, -2.0)
        )
        model = lambda: pyro.sample("w", LogUniform().expand([1]).to_event(1))  # noqa: E731
        guide = AutoSparseNormal(
            model, init_loc_fn=lambda site: loc.detach().clone(), parameterization="multiplicative"
        )
        guide()
        with torch.no_grad():
            guide.log_alphas.w_unconstrained.fill_(-2.0)
        pyro.set_rng_seed(3)
        weight = guide()["w"]
        pyro.set_rng_seed(3)
        noise = torch.randn(1, dtype=torch.float64, device=device)
        expected = loc * (1 + (0.5 * log_alpha).exp() * noise)
        gradients = torch.autograd.grad(weight.sum(), [guide.locs.w_unconstrained, guide.log_alphas.w_unconstrained])
        torch.testing.assert_close(weight, expected)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), [loc, log_alpha]))

    def test_the_multiplicative_parameterization_is_finite_at_a_mean_of_0(self, device):
        model = lambda: pyro.sample("w", LogUniform().expand([2]).to_event(1))  # noqa: E731
        zeros = torch.zeros(2, device=device)
        guide = AutoSparseNormal(model, init_loc_fn=lambda site: zeros, parameterization="multiplicative")
        loss = SparseVD_ELBO(kl="exact")(model, guide)()
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in guide.parameters())

    def test_an_unknown_parameterization_is_refused(self):
        with pytest.raises(
            ValueError, match="parameterization: expected 'additive' or 'multiplicative', but got 'divided'"
        ):
            AutoSparseNormal(lambda: None, parameterization="divided")
