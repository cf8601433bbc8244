"""Networks to be stored, and their comparison."""

import json

import torch
from torch import nn


def normalised_mlp():
    return nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def sparse_network(make, kept=0.1):
    torch.manual_seed(1)
    net = make()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d):
                module(torch.randn(10, module.num_features))
        for p in net.parameters():
            if p.dim() > 1:
                p *= torch.rand(p.shape) < kept
    return net


def assert_same_networks(a, b):
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, x in a.state_dict().items():
        y = b.state_dict()[name]
        assert x.dtype == y.dtype, name
        assert torch.equal(x.nan_to_num(12345.0), y.nan_to_num(12345.0)), name


def opened_file(data):
    """The table and the payload of a file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]["pyro_sparsevd"], data[8 + length : -8]
