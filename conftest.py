"""What every test shares: a device, a seed, an empty parameter store; and the names that examples in docstrings use."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_sparsevd as sparsevd


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="the device to run the tests on")
    parser.addoption("--data-dir", help="the folder of full MNIST, for tests/benchmarks/bench_compress.py")


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _isolated():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


@pytest.fixture(autouse=True)
def _names_of_examples(doctest_namespace):
    doctest_namespace.update(dist=dist, nn=nn, pyro=pyro, sparsevd=sparsevd, torch=torch)


@pytest.fixture
def compiled():
    """``torch.compile``, which switches the validation of distributions off in the whole process."""
    validates = torch.distributions.Distribution._validate_args
    yield torch.compile
    torch.distributions.Distribution.set_default_validate_args(validates)
    torch.compiler.reset()
