"""Priors with scales: their sites, and groups that are kept or dropped as a whole."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_sparsevd as svd
from problems import Tied
from pyro_sparsevd.distributions import ImproperPriorWarning
from pyro_sparsevd.distributions.log_uniform import Jeffreys
from pyro_sparsevd.nn.scales import HierarchicalPrior, Scale


def _trace(bnn, x):
    return pyro.poutine.trace(bnn).get_trace(x)


class TestSites:
    def test_a_weight_is_normal_given_its_scales(self):
        bnn = svd.bayesianize(nn.Linear(4, 3), svd.horseshoe(0.5))
        trace = _trace(bnn, torch.zeros(1, 4))
        local, shared = trace.nodes["weight_local_scale"], trace.nodes["weight_global_scale"]
        assert (local["value"].shape, shared["value"].shape) == ((3, 4), (1, 1))
        torch.testing.assert_close(trace.nodes["weight"]["fn"].base_dist.scale, local["value"] * shared["value"])
        assert float(shared["fn"].base_dist.scale.unique()) == 0.5

    def test_scales_of_a_convolution_are_by_filter(self):
        bnn = svd.bayesianize(nn.Conv2d(3, 5, 2), svd.group_normal_jeffreys())
        assert svd.AutoSparseNormal(bnn).posteriors["weight_group_scale"].batch_shape == (5, 1, 1, 1)

    def test_a_tied_weight_has_one_set_of_scales(self):
        bnn = svd.bayesianize(Tied(), svd.horseshoe())
        trace = _trace(bnn, torch.tensor([1, 2]))
        assert sorted(trace.stochastic_nodes) == [
            "embedding.weight",
            "embedding.weight_global_scale",
            "embedding.weight_local_scale",
        ]

    def test_a_name_that_is_taken_is_left_alone(self):
        net = nn.Linear(4, 3)
        net.weight_global_scale = "mine"
        bnn = svd.bayesianize(net, svd.horseshoe())
        assert bnn.weight_global_scale == "mine"
        assert "weight_global_scale_" in svd.AutoSparseNormal(bnn).posteriors
        pruned = svd.prune(bnn, guide := svd.AutoSparseNormal(bnn), svd.sparsify(guide))
        assert (pruned.weight_global_scale, list(pruned.state_dict())) == ("mine", ["weight", "bias"])


class TestInitialScales:
    def test_scales_start_where_the_weights_are(self):
        net = nn.Linear(50, 3)
        guide = svd.AutoSparseNormal(svd.bayesianize(net, svd.group_normal_jeffreys()))
        root_mean_square = net.weight.detach().square().mean().sqrt()
        torch.testing.assert_close(guide.median()["weight_group_scale"], root_mean_square.expand(3, 1))
        guide = svd.AutoSparseNormal(svd.bayesianize(net, svd.horseshoe()))
        torch.testing.assert_close(guide.median()["weight_local_scale"], torch.ones(3, 50))
        torch.testing.assert_close(guide.median()["weight_global_scale"], root_mean_square.expand(1, 1))

    def test_a_group_of_one_weight_that_starts_near_zero_can_grow(self):
        x = torch.randn(200, 10)
        y = x[:, 0] + 0.1 * torch.randn(200)
        net = nn.Sequential(nn.Linear(10, 1), nn.Flatten(0))
        with torch.no_grad():
            net[0].weight[0, 0] = 1e-4
        bnn = svd.bayesianize(net, svd.group_normal_jeffreys((1,)))
        model = svd.Supervised(bnn, lambda mean: dist.Normal(mean, 0.1), num_data=200)
        guide = svd.AutoSparseNormal(model)
        loss = svd.SparseVD_ELBO()(model, guide)
        optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
        for _ in range(400):
            optimizer.zero_grad()
            loss(x, y).backward()
            optimizer.step()
        assert float(guide.median()["0.weight"][0, 0]) == pytest.approx(1.0, abs=0.1)

    def test_a_weight_of_zeros_has_positive_scales(self):
        net = nn.Linear(4, 3)
        nn.init.zeros_(net.weight)
        model = svd.Supervised(
            svd.bayesianize(net, svd.group_normal_jeffreys()), lambda o: dist.Categorical(logits=o), 10
        )
        guide = svd.AutoSparseNormal(model)
        assert svd.SparseVD_ELBO()(model, guide)(torch.ones(2, 4), torch.zeros(2)).isfinite()


class TestGroups:
    @pytest.mark.parametrize(
        "prior", [svd.group_normal_jeffreys((1,)), svd.EmpiricalBayesNormal((1,))], ids=["scales", "empirical"]
    )
    def test_inputs_without_influence_are_dropped_as_a_whole(self, prior, device):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(300, 8, generator=generator)
        y = x[:, [1, 5]].sum(1) + 0.1 * torch.randn(300, generator=generator)
        bnn = svd.bayesianize(nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 1)).to(device), prior)
        model = svd.Supervised(bnn, lambda out: dist.Normal(out.squeeze(-1), 0.1), num_data=300)
        guide = svd.AutoSparseNormal(model, init_log_variance=-8.0)
        elbo = svd.SparseVD_ELBO()
        loss = elbo(model, guide)
        optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
        for step in range(1_200):
            elbo.kl_weight = svd.LinearWarmup(0, 400)(step)
            optimizer.zero_grad()
            loss(x.to(device), y.to(device)).backward()
            optimizer.step()
        mask = svd.sparsify(guide, 1.0).masks["0.weight"]
        assert torch.equal(mask, mask[:1].expand_as(mask))
        assert mask[0].nonzero().flatten().tolist() == [1, 5]

    def test_log_alpha_of_a_group_is_that_of_its_pooled_moments(self):
        guide = svd.AutoSparseNormal(
            svd.bayesianize(nn.Conv2d(3, 5, 2), svd.EmpiricalBayesNormal((0,))), init_log_variance=-1.0
        )
        q = guide.posteriors["weight"]
        expected = (q.variance.sum((1, 2, 3)) / q.loc.square().sum((1, 2, 3))).log()
        torch.testing.assert_close(guide.site_log_alphas["weight"], expected[:, None, None, None].expand(5, 3, 2, 2))


class TestJeffreys:
    def test_the_divergence_of_a_scale_is_its_negative_entropy(self):
        posterior = dist.LogNormal(torch.tensor([-1.0, 2.0]), torch.tensor([0.1, 2.0]))
        z = posterior.sample((20_000,))
        kl = (posterior.log_prob(z) - Jeffreys().expand([2]).log_prob(z)).mean(0)
        entropy_of_log = 0.5 * torch.log(2 * torch.pi * torch.e * torch.tensor([0.1, 2.0]) ** 2)
        torch.testing.assert_close(kl, -entropy_of_log, atol=5 * 0.7 / 20_000**0.5, rtol=0)

    def test_samples_of_the_improper_scale_prior_are_positive_and_warn_once(self):
        prior = Jeffreys().expand([3]).to_event(1)
        with pytest.warns(ImproperPriorWarning, match="improper"):
            assert (prior.sample((100,)) > 0).all()
        assert prior.sample().shape == (3,)


BAD = {
    "none": (lambda: HierarchicalPrior({}), "scales: expected at least one"),
    "real": (lambda: HierarchicalPrior({"s": Scale(dist.Normal(0.0, 1.0), ())}), "s: expected a prior of the positive"),
    "bounded": (
        lambda: HierarchicalPrior({"s": Scale(dist.Beta(1.0, 1.0), ())}),
        "s: expected a prior of the positive",
    ),
    "shape": (lambda: HierarchicalPrior({"s": Scale(dist.HalfCauchy(torch.ones(3)), ())}), "without a shape"),
    "dims": (lambda: svd.group_normal_jeffreys(()), "group_dims: expected distinct dimensions"),
    "negative": (lambda: svd.group_normal_jeffreys((-1,)), "counted from 0"),
    "scale": (lambda: svd.horseshoe(0.0), "global_scale: expected a positive"),
    "network": (
        lambda: svd.bayesianize(nn.Sequential(nn.Linear(2, 2)), svd.group_normal_jeffreys((3,))),
        r"0\.weight: expected a weight with the dimensions \(3,\), but its shape is \(2, 2\)",
    ),
}


class TestRefusals:
    @pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
    def test_bad_arguments_are_refused(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()
