"""Helpers of the distributions."""

import pyro.distributions as dist
import pytest
import torch

from operations import normal_of
from pyro_sparsevd import LogUniform
from pyro_sparsevd.distributions.sparse_normal import log_variance_of
from pyro_sparsevd.distributions.util import map_tensors, unwrap_independent


def test_map_tensors_changes_a_copy_in_depth(device):
    base = dist.Normal(torch.zeros(3, device=device), torch.ones(3, device=device))
    shift = torch.distributions.transforms.AffineTransform(torch.ones(3, device=device), 2.0)
    prior = dist.TransformedDistribution(base, [shift]).to_event(1).mask(torch.tensor(True, device=device))
    mapped = map_tensors(prior, lambda t: t.double() if t.is_floating_point() else t)
    value = torch.randn(3, dtype=torch.float64, device=device)
    assert mapped.sample().dtype == torch.float64
    assert mapped.log_prob(value).dtype == torch.float64
    torch.testing.assert_close(mapped.log_prob(value).float(), prior.log_prob(value.float()))
    assert prior.sample().dtype == torch.float32
    assert base.loc.dtype == torch.float32


def test_log_variance_of_either_normal(posterior):
    torch.testing.assert_close(log_variance_of(normal_of(posterior)), posterior.log_variance)
    assert log_variance_of(posterior) is posterior.log_variance


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: d.to_event(1), lambda d: d.to_event(1).to_event(1)])
def test_unwrap_independent_finds_the_innermost_distribution(wrap):
    base = LogUniform().expand([2, 3])
    assert unwrap_independent(wrap(base)) is base
