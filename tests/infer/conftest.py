"""Fixtures of the tests of this folder."""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from problems import F64
from pyro_sparsevd import ImproperPriorWarning


@pytest.fixture
def improper() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImproperPriorWarning)
        yield


@pytest.fixture
def double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def on_device(device: torch.device) -> Iterator[None]:
    with torch.device(device) if device.type != "cpu" else nullcontext():  # the context slows every call of torch
        yield
