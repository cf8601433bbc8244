"""Every prior, from the network to the pruned network."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive, Trace_ELBO
from torch import nn
from torch.distributions import kl_divergence

import pyro_sparsevd as svd
from checks import same_values, seeded, state_of
from problems import F64, PRIORS, Prior, priors
from pyro_sparsevd.distributions.log_uniform import IMPROPER_LOG_NORMALIZER

pytestmark = pytest.mark.filterwarnings("ignore::pyro_sparsevd.ImproperPriorWarning")
WEIGHTS = ("0.weight", "2.weight")


def classes(output):
    return dist.Categorical(logits=output)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def model_of(prior: Prior, device):
    return svd.Supervised(svd.bayesianize(network().to(device), prior.make()), classes, num_data=40)


def loss_of(prior: Prior, device, log_variance=-3.0, **options):
    model = model_of(prior, device)
    return svd.SparseVD_ELBO(**options)(model, svd.AutoSparseNormal(model, init_log_variance=log_variance))


def data(device):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(20, 6, generator=generator), torch.randint(3, (20,), generator=generator)
    return x.to(device), y.to(device)


def half_sparse(prior: Prior, device):
    """A model, its guide, and a summary that drops half of the weights."""
    model = model_of(prior, device)
    guide = svd.AutoSparseNormal(model, init_log_variance=-4.0)
    guide(*data(device))
    return model, guide, svd.sparsify(guide, {"*weight": guide.posteriors["0.weight"].log_alpha.median().item()})


def test_every_prior_of_the_package_has_a_row():
    used = {name for prior in PRIORS.values() for name in prior.make.__code__.co_names}
    builders = {name for name in svd.nn.priors.__all__ if name.islower()} - {"named_prior"}  # which calls the others
    assert {*builders, "LogUniform", "EmpiricalBayesNormal"} <= used


@priors()
class TestEveryPrior:
    def test_it_trains_sparsifies_and_prunes(self, prior, device):
        loss = loss_of(prior, device, log_variance=-6.0)
        model, guide = loss.model, loss.guide
        first = loss(*data(device)).item()
        optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            loss(*data(device)).backward()
            optimizer.step()
        assert loss(*data(device)).item() < first
        assert guide.sparse_sites == (WEIGHTS if prior.sparse else ())
        summary = svd.sparsify(guide, {"*weight": 0.0})
        assert [site.name for site in summary.sites] == list(WEIGHTS)
        pruned = svd.prune(model.network, guide, summary)
        assert [type(module) for module in pruned.modules()] == [type(module) for module in network().modules()]
        assert pruned.state_dict().keys() == network().state_dict().keys()
        for site in WEIGHTS:
            expected = torch.where(guide.site_log_alphas[site] > 0, 0, guide.posteriors[site].loc)
            torch.testing.assert_close(pruned.get_parameter(site).data, expected.data)

    def test_it_follows_the_network_to_another_dtype_and_into_predictive(self, prior, device):
        x, y = data(device)
        loss = loss_of(prior, device).double()
        assert loss(x.double(), y).dtype == F64
        samples = Predictive(loss.model, guide=loss.guide, num_samples=3)(x.double())
        assert samples["y"].shape == (3, 20)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
    def test_original_and_copy_of_model_and_guide_work_alike(self, prior, copied, device):
        loss = loss_of(prior, device)
        expected = seeded(loss, *data(device)).item()
        other = copied(loss)
        assert seeded(other, *data(device)).item() == expected
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)
        assert seeded(loss, *data(device)).item() == expected

    def test_a_fresh_model_and_guide_take_the_state(self, prior, device):
        loss, fresh = loss_of(prior, device), loss_of(prior, device, log_variance=-9.0)
        loss(*data(device))
        with torch.no_grad():
            for parameter in loss.parameters():
                parameter.add_(0.1)
        fresh.load_state_dict(loss.state_dict())
        assert same_values(state_of(fresh), state_of(loss))
        assert seeded(fresh, *data(device)).item() == seeded(loss, *data(device)).item()


class TestDivergence:
    @priors(lambda prior: prior.density)
    def test_the_mean_loss_is_that_of_trace_elbo(self, prior, device):
        model, draws = model_of(prior, device), 250
        guide = svd.AutoSparseNormal(model, init_log_variance=-3.0)
        with torch.no_grad():
            losses = [
                torch.tensor([elbo.loss(model, guide, *data(device)) for _ in range(draws)], dtype=F64)
                for elbo in (svd.SparseVD_ELBO(kl="exact"), Trace_ELBO())
            ]
        difference = losses[0].mean() - losses[1].mean()
        if not prior.proper:  # whose divergence vanishes as α grows
            difference += IMPROPER_LOG_NORMALIZER * sum(guide.posteriors[site].loc.numel() for site in WEIGHTS)
        assert losses[1].isfinite().all()  # what bounds cut off the posterior is ignored in closed form
        assert difference.abs() < 4 * math.hypot(*(loss.std().item() / math.sqrt(draws) for loss in losses))

    @priors(lambda prior: prior.density)
    def test_the_sampled_loss_is_that_of_trace_elbo_from_one_seed(self, prior, device):
        model = model_of(prior, device).double()
        guide, (x, y) = svd.AutoSparseNormal(model, init_log_variance=-3.0), data(device)
        sampled, expected = (
            seeded(elbo.loss, model, guide, x.double(), y)
            for elbo in (svd.SparseVD_ELBO(kl="monte_carlo", local_reparam=False), Trace_ELBO())
        )
        if not prior.proper:
            expected -= IMPROPER_LOG_NORMALIZER * sum(guide.posteriors[site].loc.numel() for site in WEIGHTS)
        assert sampled == pytest.approx(expected, rel=1e-10)

    @priors(lambda prior: not prior.density)
    def test_a_sampled_divergence_without_a_density_names_the_site(self, prior, device):
        with pytest.raises(ValueError, match=r"weight: EmpiricalBayesNormal has no density.*kl=\"approximate\""):
            loss_of(prior, device, kl="monte_carlo")(*data(device))

    @priors(lambda prior: not prior.of_network)
    def test_a_model_without_a_network_takes_it(self, prior):
        fn = prior.make()
        fn = fn if fn.event_dim else fn.expand([6]).to_event(1)

        def model():
            w = pyro.sample("w", fn)
            pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=torch.tensor(1.0))

        guide = svd.AutoSparseNormal(model)
        assert math.isfinite(svd.SparseVD_ELBO().loss(model, guide))
        assert svd.sparsify(guide, {"w": math.inf}).kept == 6


class TestWeightsHeldAtZero:
    @priors(lambda prior: prior.by_weight)
    def test_they_cost_nothing(self, prior, device):
        model, guide, summary = half_sparse(prior, device)
        elbo = svd.SparseVD_ELBO(kl="exact")
        elbo(model, guide.sparsified(summary))(*data(device))
        cost = 0
        for site, layer in zip(WEIGHTS, (model.network[0], model.network[2]), strict=True):
            fn = layer._pyro_samples["weight"].of(layer).base_dist
            cost = cost + kl_divergence(guide.posteriors[site], fn)[summary.masks[site]].sum()
        torch.testing.assert_close(elbo.terms["kl"], cost)

    @pytest.mark.parametrize("kl", ["exact", "monte_carlo"])
    @priors(lambda prior: prior.density)
    def test_training_with_them_has_finite_gradients(self, prior, kl, device):
        model, guide, summary = half_sparse(prior, device)
        sparse = guide.sparsified(summary)
        svd.SparseVD_ELBO(kl=kl)(model, sparse)(*data(device)).backward()
        assert all(p.grad.isfinite().all() for p in sparse.parameters() if p.grad is not None)


def test_the_first_glob_that_matches_chooses_the_threshold_of_a_site():
    guide = svd.AutoSparseNormal(svd.bayesianize(network(), {"0.*": svd.LogUniform(), "*": dist.Normal(0.0, 1.0)}))
    assert [site.name for site in svd.sparsify(guide).sites] == ["0.weight"]
    summary = svd.sparsify(guide, {"2.*": -100.0, "*": 100.0})
    assert [(site.name, site.kept, site.threshold) for site in summary.sites] == [
        ("0.weight", 36, 100.0),
        ("2.weight", 0, -100.0),
    ]
    with pytest.raises(ValueError, match=r"threshold: expected sites of real numbers, of 0\.weight, .* got '\*\.bias'"):
        svd.sparsify(guide, {"*.bias": 3.0})
