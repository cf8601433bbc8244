"""What the examples in docstrings and in the README find in their namespace."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_sparsevd as svd


@pytest.fixture(autouse=True)
def _doctest_namespace(doctest_namespace: dict) -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    doctest_namespace.update(dist=dist, nn=nn, pyro=pyro, svd=svd, torch=torch)
