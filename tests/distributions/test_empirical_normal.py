"""The normal prior whose variances are fitted: its divergence, and what it is."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence

import pyro_sparsevd as svd
from operations import random_posterior
from pyro_sparsevd import EmpiricalBayesNormal, SparseNormal


class TestDivergence:
    @pytest.mark.parametrize("group_dims", [None, (), (0,), (1,), (0, 1), (2, 0)])
    def test_the_scale_of_an_empirical_prior_is_the_best_of_each_group(self, group_dims):
        q = random_posterior((3, 4, 2))
        prior = EmpiricalBayesNormal(group_dims).expand((3, 4, 2))
        pooled = [] if group_dims is None else [dim for dim in range(3) if dim not in group_dims]
        moment = q.loc**2 + q.variance
        best = (moment.mean(pooled, keepdim=True) if pooled else moment).sqrt()
        total = kl_divergence(q, prior).sum()
        torch.testing.assert_close(total, kl_divergence(q, dist.Normal(torch.zeros(()).double(), best)).sum())
        for factor in (0.9, 1.1):
            assert kl_divergence(q, dist.Normal(torch.zeros(()).double(), best * factor)).sum() > total

    @pytest.mark.parametrize("group_dims", [None, (), (0,)])
    def test_gradients_of_an_empirical_divergence_are_right_and_finite_at_0(self, group_dims):
        prior = EmpiricalBayesNormal(group_dims).expand((3, 4))
        q = random_posterior((3, 4))
        inputs = q.loc.requires_grad_(), q.log_variance.requires_grad_()
        kl = lambda loc, log_variance: kl_divergence(SparseNormal(loc, log_variance), prior).sum()  # noqa: E731
        assert torch.autograd.gradcheck(kl, inputs)
        zeros = torch.zeros(3, 4, requires_grad=True), torch.full((3, 4), -20.0, requires_grad=True)
        value = kl(*zeros)
        assert value.abs() < 1e-5
        assert all(g.isfinite().all() for g in torch.autograd.grad(value, zeros))

    def test_automatic_relevance_is_the_divergence_of_that_name(self):
        q = random_posterior((3, 4), torch.float32)
        expected = svd.divergence.kl_ard(q.loc, q.log_variance)
        torch.testing.assert_close(kl_divergence(q, EmpiricalBayesNormal().expand((3, 4))), expected)

    def test_each_part_of_a_plate_has_groups_of_its_own(self, device):
        q = SparseNormal(torch.randn(3, 4, 5, device=device), torch.randn(3, 4, 5, device=device))
        for group_dims in [(0,), (1,), ()]:
            prior = EmpiricalBayesNormal(group_dims).expand([4, 5])
            parts = [SparseNormal(*pair) for pair in zip(q.loc, q.log_variance, strict=True)]
            alone = torch.stack([kl_divergence(part, prior) for part in parts])
            torch.testing.assert_close(kl_divergence(q, prior.expand([3, 4, 5])), alone)


class TestDistribution:
    @pytest.mark.parametrize("group_dims", [None, (), (0,), (1, 0)])
    def test_an_empirical_prior_has_shapes_samples_and_copies_but_no_density(self, group_dims):
        prior = EmpiricalBayesNormal(group_dims).expand([3, 4]).to_event(2)
        assert prior.sample((2,)).shape == (2, 3, 4)
        for twin in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):
            assert twin.base_dist.group_dims == group_dims
            assert twin.event_shape == (3, 4)
        assert f"group_dims={group_dims}, batch_shape: (3, 4)" in repr(prior.base_dist)
        with pytest.raises(NotImplementedError, match="EmpiricalBayesNormal has no density"):
            prior.log_prob(torch.zeros(3, 4))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: EmpiricalBayesNormal((-1,)), r"group_dims: expected .* counted from 0.* got \(-1,\)"),
            (lambda: EmpiricalBayesNormal((0, 0)), r"group_dims: expected distinct dimensions"),
            (lambda: EmpiricalBayesNormal((2,)).expand([3, 4]), r"shape \(3, 4\), but got \(2,\)"),
            (
                lambda: svd.bayesianize(nn.Sequential(nn.Linear(6, 5)), EmpiricalBayesNormal((5,))),
                r"0\.weight: expected a prior .*\(5,\)",
            ),
        ],
        ids=["negative dimension", "same dimension", "missing dimension", "of a network"],
    )
    def test_bad_dimensions_are_refused(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()
