"""Fixtures of the tests of this folder."""

import pytest
from torch import nn

from problems import MLP_NAMES


@pytest.fixture
def mlp(device):
    net = nn.Sequential()
    net.add_module("body", nn.Sequential(nn.Conv1d(2, 3, 1), nn.LayerNorm(4), nn.Flatten()))
    net.add_module("head", nn.Linear(12, 2))
    net.to(device)
    assert [name for name, _ in net.named_parameters()] == MLP_NAMES
    return net
