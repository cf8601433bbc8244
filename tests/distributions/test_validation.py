"""Validation that nothing waits for."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import AffineTransform, Distribution

from pyro_sparsevd import LogUniform, SparseNormal
from pyro_sparsevd._compat import validation_deferred
from pyro_sparsevd.distributions.validation import deferred_log_prob, parameters_are_valid, raise_invalid


class Case(NamedTuple):
    """A distribution of a parameter, good and bad (not where it is checked in any case), and values in and outside."""

    make: Callable[[Any], Any]
    good: Any
    bad: Any
    values: Any
    outside: Any


ONES = torch.ones(3)
CASES = {
    "normal": Case(lambda scale: dist.Normal(torch.zeros(3), scale), ONES, -ONES, ONES, ONES * math.nan),
    "event": Case(lambda scale: dist.Normal(torch.zeros(3), scale).to_event(1), ONES, -ONES, ONES, ONES * math.nan),
    "bernoulli": Case(lambda p: dist.Bernoulli(p), ONES / 2, 1.5 * ONES, ONES, 3 * ONES),
    "categorical": Case(
        lambda logits: dist.Categorical(logits=logits), ONES, ONES * math.nan, torch.tensor(2), torch.tensor(3)
    ),
    "poisson": Case(lambda rate: dist.Poisson(rate), ONES, -ONES, ONES, 0.5 * ONES),
    "gamma": Case(lambda rate: dist.Gamma(2 * ONES, rate), ONES, -ONES, ONES, -ONES),
    "beta": Case(lambda a: dist.Beta(a, 2 * ONES).to_event(1), ONES, -ONES, ONES / 2, 2 * ONES),
    "dirichlet": Case(lambda a: dist.Dirichlet(a), ONES, -ONES, ONES / 3, ONES),
    "log-normal": Case(lambda scale: dist.LogNormal(torch.zeros(3), scale), ONES, -ONES, ONES, -ONES),
    "masked": Case(lambda scale: dist.Normal(torch.zeros(3), scale).mask(ONES > 0), ONES, -ONES, ONES, ONES * math.nan),
    "expanded": Case(lambda scale: dist.Laplace(0.0, scale).expand([2, 3]), ONES, -ONES, ONES, ONES * math.nan),
    "mixture": Case(
        lambda scale: dist.MixtureSameFamily(dist.Categorical(ONES), dist.Normal(torch.zeros(2, 3), scale)),
        *(ONES, -ONES, torch.ones(2), torch.ones(2) * math.nan),
    ),
    "student": Case(lambda df: dist.StudentT(df), ONES, -ONES, ONES, ONES * math.nan),
    "log-uniform": Case(lambda low: LogUniform(low, 10.0), ONES, ONES, 2 * ONES, ONES * math.nan),
    "sparse normal": Case(lambda s: SparseNormal(torch.zeros(3), s), ONES, ONES * math.nan, ONES, ONES * math.nan),
}
case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@case
def test_valid_values_have_the_density_they_have(case):
    expected = case.make(case.good).log_prob(case.values)
    with validation_deferred():
        fn = case.make(case.good)
        found = deferred_log_prob("y", fn, case.values)
        raise_invalid("y", fn, case.values)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@case
@pytest.mark.parametrize("made", ["before", "meanwhile"])
def test_a_density_is_nan_where_torch_refuses_a_value(case, made):
    fn = case.make(case.good)
    with pytest.raises(ValueError, match="Expected value argument"):
        fn.log_prob(case.outside)
    with validation_deferred():
        fn = case.make(case.good) if made == "meanwhile" else fn
        found = deferred_log_prob("y", fn, case.outside)
        with pytest.raises(ValueError, match=r"^y: Expected value argument"):
            raise_invalid("y", fn, case.outside)
    assert found.isnan().all()
    assert found.shape == fn.batch_shape


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.bad is not case.good])
def test_a_density_is_nan_where_torch_refuses_a_parameter(case):
    with pytest.raises(ValueError, match="Expected parameter"):
        case.make(case.bad)
    with validation_deferred():
        fn = case.make(case.bad)
        assert not parameters_are_valid(fn)
        assert deferred_log_prob("y", fn, case.values).isnan().all()
        with pytest.raises(ValueError, match=r"^y: Expected parameter"):
            raise_invalid("y", fn, case.values)


@pytest.mark.parametrize("by", ["argument", "default"])
def test_without_validation_a_distribution_is_taken_as_it_is(by):
    soft = torch.tensor([0.3, 0.5, 1.0])
    before = Distribution._validate_args
    Distribution.set_default_validate_args(by == "argument")
    try:
        with validation_deferred():
            fn = dist.Bernoulli(ONES / 2, validate_args=False if by == "argument" else None).to_event(1).expand([2])
            assert parameters_are_valid(fn) is None
            torch.testing.assert_close(deferred_log_prob("y", fn, soft), torch.full((2,), 3 * math.log(0.5)))
            raise_invalid("y", fn, soft)
    finally:
        Distribution.set_default_validate_args(before)


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(4, 3), 1.0], ids=["event", "batch", "number"])
def test_a_value_of_another_shape_is_refused_by_name(value):
    fn = dist.Normal(torch.zeros(2, 3), 1.0).to_event(1)
    with validation_deferred(), pytest.raises(ValueError, match=r"^y: expected a (value of shape \(2, 3\)|tensor)"):
        deferred_log_prob("y", fn, value)


FREE = {  # whose densities check nothing, or not all
    "hidden Markov": (
        lambda: dist.DiscreteHMM(torch.zeros(2), torch.zeros(2, 2), dist.Normal(torch.zeros(2), 1.0)),
        torch.arange(6.0),
    ),
    "Gaussian, hidden Markov": (
        lambda: dist.GaussianHMM(
            dist.MultivariateNormal(torch.zeros(1), torch.eye(1)),
            torch.eye(1),
            dist.MultivariateNormal(torch.zeros(1), torch.eye(1)),
            torch.eye(1),
            dist.MultivariateNormal(torch.zeros(1), torch.eye(1)),
        ),
        torch.zeros(7, 1),
    ),
    "NaN is not observed": (lambda: dist.NanMaskedNormal(torch.zeros(2), 1.0), torch.tensor([1.0, math.nan])),
    "masked": (lambda: dist.Poisson(torch.ones(2)).mask(False), torch.tensor([0.5, -1.0])),
    "a list as its shape": (lambda: dist.TruncatedPolyaGamma(torch.tensor(1.0)).expand([2]), torch.ones(2)),
}


@pytest.mark.parametrize(("make", "value"), FREE.values(), ids=FREE)
def test_what_torch_does_not_check_is_not_checked(make, value):
    expected = make().log_prob(value)
    with validation_deferred():
        torch.testing.assert_close(deferred_log_prob("y", make(), value), expected)


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda: dist.TransformedDistribution(dist.Exponential(1.0), [AffineTransform(5.0, 1.0)]), torch.tensor(1.0)),
        (lambda: dist.TransformedDistribution(dist.Bernoulli(0.3), [AffineTransform(0.0, 10.0)]), torch.tensor(3.0)),
    ],
)
def test_what_is_within_a_distribution_is_checked(make, value):
    with pytest.raises(ValueError, match="Expected value argument"):
        make().log_prob(value)
    with validation_deferred():
        assert deferred_log_prob("y", make(), value).isnan()


def test_the_default_is_restored_after_an_error():
    before = Distribution._validate_args
    with pytest.raises(KeyError), validation_deferred(), validation_deferred():
        raise KeyError
    assert Distribution._validate_args is before


def test_gradients_are_those_of_the_density():
    scale = torch.ones(3, requires_grad=True)
    with validation_deferred():
        fn = dist.Normal(torch.zeros(3), scale)
    deferred_log_prob("y", fn, 2 * ONES).sum().backward()
    torch.testing.assert_close(scale.grad, 3 * ONES)  # (y² - σ²) / σ³
