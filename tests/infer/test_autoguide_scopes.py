"""The guide: sites that handlers of the model rename."""

import torch
from pyro.contrib.autoname import scope
from torch import nn

from pyro_sparsevd import AutoSparseNormal, bayesianize


class TwoNetworks(nn.Module):
    """Two networks with a site of one name, which a handler tells apart."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (bayesianize(nn.Linear(4, size)) for size in (4, 2))

    def forward(self, x):
        with scope(prefix="first"):
            x = self.first(x)
        with scope(prefix="second"):
            return self.second(x)


def test_sites_of_one_name_that_a_handler_tells_apart(device):
    guide = AutoSparseNormal(TwoNetworks().to(device))
    sample = guide(torch.randn(3, 4, device=device))
    assert {name: value.shape for name, value in sample.items()} == {"first/weight": (4, 4), "second/weight": (2, 4)}
