"""Shrinking: all that is dead is removed, and nothing else."""

import pytest
import torch
from torch import nn

from pyro_sparsevd.shrink.report import shrink_report
from pyro_sparsevd.shrink.shrink import SelectFeatures, shrink
from shrinkable import CASES, close, convolution, made, mask, widths, with_weights


@pytest.mark.parametrize("name", CASES)
def test_it_removes_all_that_is_dead_and_nothing_else(name, device):
    make, weights, shape, expected = CASES[name]
    net, x = with_weights(make(), *weights).to(device), torch.randn(shape, device=device)
    smaller = shrink(net, x)
    assert widths(smaller) == expected
    close(smaller(x), net(x))


@pytest.mark.parametrize("seed", range(20))
def test_it_removes_what_a_repeated_search_removes(seed, device):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(6, 9), nn.ELU(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 2)
    )
    mask(net, density=0.15, whole_units=0.1)
    used = [net[i].weight.ne(0) for i in (0, 2, 4, 6)]
    alive = [torch.ones(len(u), dtype=torch.bool) for u in used]
    for _ in range(10):
        for i in range(3):
            inputs = alive[i - 1] if i else torch.ones(6, dtype=torch.bool)
            alive[i] &= (used[i] & inputs).any(1)
            alive[i] &= (used[i + 1] & alive[i + 1][:, None]).any(0)
    x = torch.randn(4, 6, device=device)
    assert widths(shrink(net.to(device), x)) == [max(1, int(units.sum())) for units in alive]


class Pooled(nn.Module):
    """A unit that is constant but for padding, a pooling, and a linear layer."""

    def __init__(self, padded, pool):
        super().__init__()
        self.first, self.padded, self.pool, self.last = nn.Conv2d(1, 2, 3, padding=1), padded, pool, nn.Linear(2, 1)

    def forward(self, x):
        return self.last(self.pool(self.padded(self.first(x).relu()).relu()).flatten(1))


ANY_SIZE = {
    "a global mean": (lambda: Pooled(nn.Conv2d(2, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1)), 4, [2, 2, 1]),
    "a mean over places": (lambda: Pooled(nn.Conv2d(2, 2, 3, padding="same"), Mean()), 4, [2, 2, 1]),
    "a maximum": (lambda: Pooled(nn.Conv2d(2, 2, 3, padding=1), nn.AdaptiveMaxPool2d(1)), 1, [2, 2, 1]),
    "one place alone": (lambda: Pooled(nn.Conv2d(2, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1)), 1, [2, 2, 1]),
    "a padded average": (lambda: Pooled(nn.AvgPool2d(3, 2, padding=1), nn.AdaptiveAvgPool2d(1)), 2, [2, 1]),
    "padding at the end of some sizes": (
        lambda: Pooled(convolution(2, padding=1, stride=2), nn.AdaptiveAvgPool2d(1)), 4, [2, 2, 1],
    ),
    "a kernel that no padding meets": (
        lambda: Pooled(convolution(1, padding=(1, 0)), nn.AdaptiveAvgPool2d(1)), 4, [1, 1, 1],
    ),
    "nothing padded": (lambda: Pooled(nn.Conv2d(2, 2, 3), nn.AdaptiveAvgPool2d(1)), 4, [1, 1, 1]),
}  # fmt: skip


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


@pytest.mark.parametrize("name", ANY_SIZE)
def test_outputs_are_the_same_for_inputs_of_other_sizes(name, device):
    make, size, expected = ANY_SIZE[name]
    net = make().to(device).eval()
    with torch.no_grad():
        net.first.weight[0], net.first.bias[0] = 0, 1
        net.last.weight[:] = 1
        for layer in net.padded.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.abs_()
                layer.bias.fill_(0.1)
                if layer.groups == 1:
                    layer.weight[0, 1] = layer.weight[1, 0] = 0
    smaller = shrink(net, torch.rand(1, 1, size, size, device=device))
    assert widths(smaller) == expected
    for other in (3, 4, 8, 9, 32):
        x = torch.rand(2, 1, other, other, device=device)
        close(smaller(x), net(x))


def test_positions_that_nobody_reads_are_left_out(device):
    net, x = made("lenet-5", device, density=1.0, whole_units=0.0)
    with torch.no_grad():
        net[7].weight[:, : 20 * 16] = 0
        net[7].weight[:, 20 * 16 :: 2] = 0
    smaller = shrink(net, x)
    assert widths(smaller) == [20, 30, 500, 10]
    assert smaller[7].layer.in_features == 30 * 8
    close(smaller(x), net(x))


def test_input_features_that_nobody_reads_are_left_out(device):
    net, x = made("lenet-300-100", device, density=1.0, whole_units=0.0)
    with torch.no_grad():
        net[1].weight[:, 100:] = 0
    smaller = shrink(net, x)
    assert smaller[1].layer.weight.shape == (300, 100)
    assert isinstance(smaller[1], SelectFeatures)
    close(smaller(x), net(x))


def test_input_channels_that_nobody_reads_are_left_out(device):
    net = nn.Sequential(nn.Conv2d(128, 40, 3), nn.ReLU(), nn.Conv2d(40, 3, 3)).to(device)
    x = torch.randn(2, 128, 8, 8, device=device)
    with torch.no_grad():
        net[0].weight[:, ::2] = 0
    smaller = shrink(net, x)
    assert smaller[0].layer.weight.shape == (40, 64, 3, 3)
    close(smaller(x), net(x))


def test_of_groups_nothing_is_selected(device):
    net = nn.Sequential(nn.Conv1d(256, 64, 3, groups=2)).to(device)
    with torch.no_grad():
        net[0].weight[:, ::2] = 0
    x = torch.randn(2, 256, 8, device=device)
    smaller = shrink(net, x)
    report = shrink_report(net, smaller, x)
    assert (smaller[0].weight.shape, report.notes) == ((64, 128, 3), ())
    close(smaller(x), net(x))


def test_of_inputs_that_nobody_reads_one_is_left(device):
    net, x = nn.Sequential(nn.Linear(784, 40)).to(device), torch.randn(2, 784, device=device)
    nn.init.zeros_(net[0].weight)
    smaller = shrink(net, x)
    assert smaller[0].layer.weight.shape == (40, 1)
    close(smaller(x), net(x))


def test_a_selection_that_saves_little_is_not_made():
    net = nn.Sequential(nn.Linear(50, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight[:, 1:] = 0
    assert shrink(net, torch.randn(3, 50))[0].in_features == 50
