"""The posterior against torch's Normal."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin

from checks import SAMPLES, assert_mean
from operations import normal_of, tensor64
from pyro_sparsevd import SparseNormal
from pyro_sparsevd.ops import divergence


class TestNormal:
    def test_posterior_is_a_normal_distribution(self, posterior):
        assert isinstance(posterior, torch.distributions.Normal)
        assert isinstance(posterior, dist.Normal)
        assert isinstance(posterior, TorchDistributionMixin)

    @pytest.mark.parametrize(
        "what", ["mean", "mode", "scale", "stddev", "variance", "batch_shape", "event_shape", "support"]
    )
    def test_posterior_has_the_attributes_of_the_normal(self, what, posterior):
        actual, expected = getattr(posterior, what), getattr(normal_of(posterior), what)
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(actual, expected)
        else:
            assert actual == expected

    @pytest.mark.parametrize("what", ["log_prob", "cdf", "icdf", "entropy"])
    def test_posterior_has_the_functions_of_the_normal_and_their_gradients(self, what, posterior):
        shape = (5, *posterior.batch_shape)
        value = {"icdf": torch.rand, "entropy": None}.get(what, torch.randn)
        args = (
            () if value is None else (value(shape, dtype=torch.float64, device=posterior.loc.device).requires_grad_(),)
        )
        results = []
        for q in (posterior, normal_of(posterior)):
            result = getattr(q, what)(*args)
            inputs = [posterior.log_variance] if what == "entropy" else [*args, posterior.loc, posterior.log_variance]
            results.append((result, *torch.autograd.grad(result.sum(), inputs)))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)

    def test_posterior_draws_what_the_normal_draws_with_its_gradients(self, posterior):
        results = []
        for q in (posterior, normal_of(posterior)):
            pyro.set_rng_seed(3)
            draw = q.rsample((6,))
            results.append((draw, *torch.autograd.grad((draw**3).sum(), (posterior.loc, posterior.log_variance))))
        assert results[0][0].shape == (6, *posterior.batch_shape)
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)

    def test_draws_have_the_moments_of_the_posterior_and_their_gradients(self, device):
        loc = tensor64([0.0, -1.5, 0.3], device)
        log_variance = tensor64([0.0, 1.0, -4.0], device)
        # one copy of the parameters for each draw gives the gradient of each draw
        locs, log_variances = (t.expand(SAMPLES, 3).clone().requires_grad_() for t in (loc, log_variance))
        draws = SparseNormal(locs, log_variances).rsample()
        first = torch.autograd.grad(draws.sum(), (locs, log_variances), retain_graph=True)
        second = torch.autograd.grad((draws**2).sum(), (locs, log_variances))
        assert_mean(draws.detach(), loc, "mean")
        assert_mean(draws.detach() ** 2, loc**2 + log_variance.exp(), "second moment")
        assert torch.equal(first[0], torch.ones_like(locs))
        assert_mean(first[1], 0.0, "gradient of the mean in log variance")
        assert_mean(second[0], 2 * loc, "gradient of the second moment in loc")
        assert_mean(second[1], log_variance.exp(), "gradient of the second moment in log variance")

    def test_sample_has_no_gradient(self, posterior):
        assert not posterior.sample().requires_grad

    def test_log_alpha_of_the_posterior_is_that_of_its_parameters(self, posterior):
        torch.testing.assert_close(posterior.log_alpha, divergence.log_alpha(posterior.loc, posterior.log_variance))
        torch.testing.assert_close(posterior.log_alpha, (posterior.variance / posterior.loc**2).log())

    @pytest.mark.parametrize("log_variance", [-80.0, 80.0])
    def test_density_is_exact_at_extreme_variances(self, log_variance, device):
        q = SparseNormal(tensor64(0.0, device), tensor64(log_variance, device))
        value = math.exp(0.5 * log_variance)
        expected = -0.5 * (1 + log_variance + math.log(2 * math.pi))
        assert q.log_prob(tensor64(value, device)).item() == pytest.approx(expected, rel=1e-12)


class TestShapesAndCopies:
    def test_posterior_expands_to_a_posterior(self, posterior):
        shape = (5, *posterior.batch_shape)
        wide = posterior.expand(shape)
        assert type(wide) is type(posterior)
        assert wide.batch_shape == wide.sample().shape == shape
        assert torch.equal(wide.log_variance, posterior.log_variance.expand(shape))
        value = torch.randn(shape, dtype=torch.float64, device=posterior.loc.device)
        torch.testing.assert_close(wide.log_prob(value), posterior.log_prob(value))
        event = wide.to_event()
        torch.testing.assert_close(event.log_prob(value), posterior.log_prob(value).sum())
        with pytest.raises(RuntimeError, match="expand"):
            wide.expand([7, 9])

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["deepcopy", "pickle"]
    )
    def test_copies_of_the_posterior_are_equal(self, copied, device):
        q = SparseNormal(torch.randn(3, device=device), torch.randn(3, device=device))
        other = copied(q)
        assert type(other) is SparseNormal
        assert torch.equal(other.loc, q.loc)
        assert torch.equal(other.log_variance, q.log_variance)
        assert other.sample().shape == (3,)

    @pytest.mark.parametrize(
        ("loc", "log_variance"), [(0.0, 1.0), ("tensor", 1.0), (0.0, "tensor"), ("tensor", "tensor")], ids=str
    )
    def test_numbers_and_tensors_make_a_posterior_of_the_tensors_dtype(self, loc, log_variance, device):
        numbers = torch.full((2,), 0.5, dtype=torch.float64, device=device)
        loc, log_variance = (numbers if value == "tensor" else value for value in (loc, log_variance))
        q = SparseNormal(loc, log_variance)
        expected = (
            torch.float64 if any(value is numbers for value in (loc, log_variance)) else torch.get_default_dtype()
        )
        assert q.loc.dtype == q.log_variance.dtype == q.rsample().dtype == expected

    @pytest.mark.parametrize(
        ("loc", "log_variance", "batch"), [((), (), ()), ((3,), (2, 1), (2, 3)), ((4, 1, 3), (2, 1), (4, 2, 3))]
    )
    def test_shapes_are_inferred_without_tensors(self, loc, log_variance, batch, device):
        inferred = SparseNormal.infer_shapes(loc=loc, log_variance=log_variance)
        assert inferred == (batch, ())
        q = SparseNormal(torch.zeros(loc, device=device), torch.zeros(log_variance, device=device))
        assert q.batch_shape == inferred[0]

    def test_repr_of_the_posterior_names_its_parameters(self, device):
        text = repr(SparseNormal(0.5, -4.0))
        assert text == "SparseNormal(loc: 0.5, log_variance: -4.0)"


class TestValidation:
    @pytest.mark.parametrize("bad", ["loc", "log_variance"])
    def test_nan_parameters_are_refused_by_name_with_validation_and_only_then(self, bad, device):
        values = {"loc": torch.zeros(2, device=device), "log_variance": torch.zeros(2, device=device)}
        values[bad][0] = math.nan
        with pytest.raises(ValueError, match=f"Expected parameter {bad}"):
            SparseNormal(**values, validate_args=True)
        assert SparseNormal(**values, validate_args=False).batch_shape == (2,)

    @pytest.mark.parametrize("validate_args", [True, False])
    def test_values_are_checked_with_validation_and_only_then(self, validate_args, device):
        q = SparseNormal(torch.zeros(2, device=device), torch.zeros(2, device=device), validate_args=validate_args)
        value = torch.full((3, 2), math.nan, device=device)
        for checked in (q, q.expand([3, 2])):
            if validate_args:
                with pytest.raises(ValueError, match="within the support"):
                    checked.log_prob(value)
            else:
                assert checked.log_prob(value).isnan().all()

    def test_shapes_that_do_not_broadcast_are_refused(self, device):
        with pytest.raises(RuntimeError, match=r"size|shape"):
            SparseNormal(torch.zeros(2, device=device), torch.zeros(3, device=device))
