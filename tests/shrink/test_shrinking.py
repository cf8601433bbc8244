"""Shrinking: a smaller network with the same outputs."""

import copy
import io
import pickle
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from lab import nets
from torch import nn

from pyro_sparsevd.shrink.flow import Channelwise
from pyro_sparsevd.shrink.report import shrink_report
from pyro_sparsevd.shrink.shrink import SelectFeatures, shrink
from pyro_sparsevd.shrink.units import UnionFind, Units


class Block(nn.Module):
    def __init__(self, channels, hidden, inplace=False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x):
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += x
        return self.relu(out)


class Residual(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace))
        self.blocks = nn.Sequential(Block(8, 6, inplace), Block(8, 6, inplace))
        self.widen = nn.Conv2d(8, 10, 1, stride=2)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x = F.relu(self.widen(self.blocks(self.stem(x))))
        return self.head(x.mean((2, 3)))


class NormedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(7, 12)
        self.norm = nn.LayerNorm(12)
        self.fc2 = nn.Linear(12, 9)
        self.fc3 = nn.Linear(9, 4)

    def forward(self, x):
        return self.fc3(F.gelu(self.fc2(self.norm(torch.tanh(self.fc1(x))))))


class Concatenating(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Conv1d(2, 5, 3, padding=1)
        self.right = nn.Conv1d(2, 4, 1)
        self.mix = nn.Conv1d(2 + 5 + 4 + 5, 6, 1)
        self.head = nn.Linear(6 * 8, 3)

    def forward(self, x):
        left = self.left(x).relu()
        x = torch.cat([x, left, torch.sigmoid(self.right(x)), left], dim=1)
        x = F.max_pool1d(F.elu(self.mix(x)), 2)
        return self.head(x.view(x.size(0), -1))


class Sums(nn.Module):
    """Scalars, a gate, a difference, and a term of another layer of different depth."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.gate = nn.Linear(6, 8)
        self.b = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 2, bias=False)

    def forward(self, x):
        a = F.softplus(self.a(x))
        return self.head((2 - self.b(a) / 2) * torch.sigmoid(self.gate(x)) + a)


class Tokens(nn.Module):
    """Linear layers on the last of three dimensions, then attention."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x):
        x = x + self.down(F.silu(self.up(x)))
        x = self.attention(x, x, x)[0]
        return self.head(x.flatten(1))


class Rows(nn.Module):
    """Linear layers on the last of three dimensions, then what takes the middle one for the channels."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 6)
        self.pool = nn.MaxPool1d(3, stride=1, padding=1)
        self.third = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.third(self.pool(self.second(self.norm(self.first(x)).relu())).relu())
        return self.head(x.mean(1))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.twice = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)
        self.other.weight = self.tied.weight
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        x = self.twice(self.twice(self.first(x)).relu()).relu()
        return self.last(self.other(self.tied(x).relu()).relu())


class Functional(nn.Module):
    """A weight read past its module, slices, and a fixed size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.fc = nn.Linear(6 * 4, 5)
        self.read = nn.Linear(5, 5)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2).view(-1, 24)
        x = F.linear(self.fc(x), self.read.weight) + self.read(x[:, :5])
        return self.head(F.relu(x)[:, 1:4])


def grouped():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, groups=8, padding=1),
        nn.BatchNorm2d(16),
        nn.Hardswish(),
        nn.Conv2d(16, 12, 1),
        nn.ReLU(),
        nn.Conv2d(12, 9, 3, groups=3),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def pooled(pool, padding=0):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=padding),
        nn.Sigmoid(),
        pool,
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(2),
    )


MNIST, IMAGE = (4, 1, 28, 28), (4, 2, 9, 9)
NETS = {
    "lenet-300-100": (nets.lenet_300_100, MNIST),
    "lenet-5": (nets.lenet_5_caffe, MNIST),
    "vgg-like": (lambda: nets.vgg_like(0.1), (4, 3, 32, 32)),
    "residual": (Residual, IMAGE),
    "residual in place": (lambda: Residual(inplace=True), IMAGE),
    "layer norm": (NormedMLP, (4, 7)),
    "concatenation": (Concatenating, (4, 2, 16)),
    "grouped": (grouped, IMAGE),
    "sums": (Sums, (4, 6)),
    "tokens": (Tokens, (3, 4, 6)),
    "rows": (Rows, (4, 8, 6)),
    "shared": (Shared, (4, 6)),
    "functional": (Functional, (4, 1, 6, 6)),
    "max pool, padded": (lambda: pooled(nn.MaxPool2d(3, 2, 1)), (4, 1, 12, 12)),
    "average pool, padded": (lambda: pooled(nn.AvgPool2d(3, 2, 1)), (4, 1, 12, 12)),
    "average pool, uncounted": (
        lambda: pooled(nn.AvgPool2d(3, 2, 1, count_include_pad=False), padding=1),
        (4, 1, 12, 12),
    ),
    "no biases": (
        lambda: nn.Sequential(
            nn.Linear(5, 9, bias=False), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 7, bias=False), nn.ReLU(),
            nn.Dropout(), nn.Linear(7, 2, bias=False),
        ),
        (4, 5),
    ),
    "padding": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 6, 3, padding="same"), nn.Sigmoid(), nn.Conv1d(6, 6, 3, padding=1), nn.Sigmoid(),
            nn.Conv1d(6, 5, 3, padding=2, padding_mode="circular"), nn.Softplus(), nn.Flatten(), nn.Linear(50, 3),
        ),
        (4, 2, 8),
    ),
    "other modules": (
        lambda: nn.Sequential(
            nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 8), nn.PReLU(8), nn.Linear(8, 6), nn.Softshrink(),
            nn.Linear(6, 5), nn.LogSoftmax(-1),
        ),
        (4, 6),
    ),
}  # fmt: skip


def mask(net, density, whole_units):
    """Drops weights at random, and rows and columns of weights; randomises what else there is."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                rows = torch.rand(parameter.shape[0], *[1] * (parameter.dim() - 1)) < whole_units
                columns = torch.rand(1, parameter.shape[1], *[1] * (parameter.dim() - 2)) < whole_units
                parameter *= (torch.rand(parameter.shape) < density) & ~rows & ~columns
                parameter *= 1 / max(density, 0.1) ** 0.5
            else:
                parameter.uniform_(-1, 1)
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return net


def made(name, device, density=0.5, whole_units=0.4, seed=0):
    make, shape = NETS[name]
    torch.manual_seed(seed)
    net, x = make().eval(), torch.randn(shape)
    net(x)
    return mask(net, density, whole_units).to(device), x.to(device)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("density", "whole_units"), [(1.0, 0.0), (0.5, 0.4), (0.15, 0.3), (0.03, 0.0), (0.0, 0.0)])
def test_its_outputs_are_the_same(name, density, whole_units, device):
    for seed in range(1 if name in ("vgg-like", "lenet-300-100", "lenet-5") else 3):
        net, x = made(name, device, density, whole_units, seed)
        smaller = shrink(net, x)
        report = shrink_report(net, smaller, x)
        # A copy of the network would also have its outputs.
        assert not any("the network" in note for note in report.notes)
        for inputs in (x, 3 * torch.randn_like(x), torch.randn_like(x[:1])):
            close(smaller(inputs), net(inputs))


def widths(net):
    return [len(m.weight) for m in net.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]


def with_weights(net, *weights):
    """Sets the weights of all linear layers and convolutions to ones and zeros, and the biases to something."""
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    with torch.no_grad():
        for layer, weight in zip(layers, weights, strict=True):
            weight = torch.tensor(weight, dtype=layer.weight.dtype)
            layer.weight.copy_(weight.view(*weight.shape, *[1] * (layer.weight.dim() - 2)).expand_as(layer.weight))
            if layer.bias is not None:
                layer.bias.uniform_(0.5, 1)
    return net.eval()


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer, self.head = (
            nn.Linear(2, 4), nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 1)
        )  # fmt: skip

    def forward(self, x):
        x = self.stem(x)
        hidden = F.dropout(self.inner(x).relu(), training=self.training)
        return self.head(x + self.outer(hidden))


class Viewing(nn.Module):
    def __init__(self, view):
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 3, 3), nn.Linear(9, 2)
        self.view = view

    def forward(self, x):
        return self.head(self.view(self.conv(x)))


MLP = lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))  # noqa: E731
CASES = {
    "nothing is dead": (MLP, [[[1, 1]] * 3, [[1] * 3] * 2, [[1, 1]]], (5, 2), [3, 2, 1]),
    "one is constant": (MLP, [[[1, 0], [0, 0], [0, 1]], [[1] * 3] * 2, [[1, 1]]], (5, 2), [2, 2, 1]),
    "one is not read": (MLP, [[[1, 1]] * 3, [[1, 0, 1]] * 2, [[1, 1]]], (5, 2), [2, 2, 1]),
    # The second layer's first unit reads the constant one alone, and is so too.
    "constants of constants": (MLP, [[[1, 0], [0, 0], [0, 1]], [[0, 1, 0], [1, 1, 0]], [[1, 1]]], (5, 2), [1, 1, 1]),
    # Nobody reads the second layer's second unit, which alone reads the first layer's third.
    "unread by the unread": (MLP, [[[1, 1]] * 3, [[1, 1, 0], [1, 1, 1]], [[1, 0]]], (5, 2), [2, 1, 1]),
    "everything is constant": (MLP, [[[0, 0]] * 3, [[1] * 3] * 2, [[1, 1]]], (5, 2), [1, 1, 1]),
    "nothing is read": (MLP, [[[1, 1]] * 3, [[1] * 3] * 2, [[0, 0]]], (5, 2), [1, 1, 1]),
    "a constant at the border of padding stays": (
        lambda: nn.Sequential(nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Conv1d(3, 2, 3, padding=1)),
        [[[1], [0], [1]], [[1, 1, 0]] * 2], (5, 1, 8), [2, 2],
    ),
    "zero at the border of padding goes": (
        lambda: nn.Sequential(nn.Conv1d(1, 3, 3, bias=False), nn.ReLU(), nn.Conv1d(3, 2, 3, padding=1)),
        [[[1], [0], [1]], [[1, 1, 0]] * 2], (5, 1, 8), [1, 2],
    ),
    "a constant without padding goes": (
        lambda: nn.Sequential(nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Conv1d(3, 2, 3)),
        [[[1], [0], [1]], [[1, 1, 0]] * 2], (5, 1, 8), [1, 2],
    ),
    "a constant in circular padding goes": (
        lambda: nn.Sequential(nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Conv1d(3, 2, 3, padding=1, padding_mode="circular")),
        [[[1], [0], [1]], [[1, 1, 0]] * 2], (5, 1, 8), [1, 2],
    ),
    "a constant in padding of nothing goes": (
        lambda: nn.Sequential(nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Conv1d(3, 2, 1, padding="same")),
        [[[1], [0], [1]], [[1, 1, 0]] * 2], (5, 1, 8), [1, 2],
    ),
    "a constant in padded average pooling": (
        lambda: nn.Sequential(nn.Conv1d(1, 3, 3), nn.AvgPool1d(3, padding=1), nn.Conv1d(3, 2, 1)),
        [[[1], [0], [1]], [[1, 1, 0]] * 2], (5, 1, 8), [2, 2],
    ),
    "a constant in padded average pooling, flattened": (
        lambda: nn.Sequential(nn.Conv1d(1, 3, 3), nn.AvgPool1d(3, padding=1), nn.Flatten(), nn.Linear(6, 2)),
        [[[1], [0], [1]], [[1, 1, 1, 1, 0, 0]] * 2], (5, 1, 8), [1, 2],
    ),
    "a constant in padded max pooling": (
        lambda: nn.Sequential(nn.Conv1d(1, 3, 3), nn.MaxPool1d(3, padding=1), nn.Conv1d(3, 2, 1)),
        [[[1], [0], [1]], [[1, 1, 0]] * 2], (5, 1, 8), [1, 2],
    ),
    "a flattened channel is read at one position": (
        lambda: nn.Sequential(nn.Conv1d(1, 3, 3), nn.Flatten(), nn.Linear(9, 2)),
        [[[1]] * 3, [[0, 0, 0, 0, 1, 0, 0, 0, 0]] * 2], (5, 1, 5), [1, 2],
    ),
    **{
        f"a flattened channel is read at one position: {name}": (
            lambda view=view: Viewing(view), [[[1]] * 3, [[0, 0, 0, 0, 1, 0, 0, 0, 0]] * 2], (5, 1, 5), [1, 2],
        )
        for name, view in {
            "view by size(0)": lambda x: x.view(x.size(0), -1),
            "view by size()": lambda x: x.view(x.size()[0], -1),
            "reshape by shape": lambda x: x.reshape((x.shape[0], -1)),
            "torch.reshape": lambda x: torch.reshape(x, (x.shape[0], -1)),
            "flatten": lambda x: x.flatten(1),
            "torch.flatten": lambda x: torch.flatten(x, start_dim=1),
        }.items()
    },
    # Of depthwise channels: the first constant, the second unread afterwards.
    "depthwise": (
        lambda: nn.Sequential(nn.Conv1d(1, 4, 1), nn.Conv1d(4, 8, 3, groups=4), nn.Conv1d(8, 2, 1)),
        [[[0], [1], [1], [1]], [[1]] * 8, [[1, 1, 0, 0, 0, 1, 1, 0]] * 2], (5, 1, 5), [2, 4, 2],
    ),
    "of groups the second goes": (
        lambda: nn.Sequential(nn.Conv1d(1, 6, 1), nn.Conv1d(6, 6, 3, groups=3), nn.Conv1d(6, 2, 1)),
        [[[1]] * 6, [[1, 1]] * 6, [[1, 0, 0, 0, 0, 1]] * 2], (5, 1, 5), [4, 4, 2],
    ),
    # The channels of the group that is left: the first is not read before it, the second not after it.
    "of the last group channels go": (
        lambda: nn.Sequential(nn.Conv1d(1, 4, 1), nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(4, 2, 1)),
        [[[1]] * 4, [[0, 1], [0, 1], [1, 1], [1, 1]], [[1, 0, 0, 0]] * 2], (5, 1, 5), [1, 1, 2],
    ),
    "the last of groups after each other": (
        lambda: nn.Sequential(
            nn.Conv1d(1, 4, 1), nn.Conv1d(4, 4, 1, groups=2), nn.Conv1d(4, 8, 1, groups=4), nn.Conv1d(8, 2, 1),
        ),
        [[[1]] * 4, [[0, 1], [0, 1], [1, 1], [1, 1]], [[1]] * 8, [[1] + [0] * 7] * 2], (5, 1, 5), [1, 1, 1, 2],
    ),
    # Unit 0: not read. Unit 1: constant in the stem and the branch. Unit 2: in the stem only. Unit 3: neither.
    "a residual sum": (
        Skip,
        [[[1, 1], [0, 0], [0, 0], [1, 1]], [[0, 0, 1, 1]] * 3, [[1] * 3, [0] * 3, [1] * 3, [0] * 3], [[0, 1, 1, 1]]],
        (5, 2), [2, 3, 2, 1],
    ),
    # The head does not read unit 0 of the sum, but the inner layer that of the stem.
    "a residual sum read on the way": (
        Skip, [[[1, 1]] * 4, [[1, 0, 0, 0]] * 3, [[1] * 3, [0] * 3, [1, 0, 0], [0] * 3], [[0, 0, 1, 0]]],
        (5, 2), [2, 1, 2, 1],
    ),
}  # fmt: skip


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


def convolution(weight, **options):
    """A depthwise convolution with one weight that is not zero."""
    layer = nn.Conv2d(2, 2, 3, groups=2, **options)
    with torch.no_grad():
        layer.weight[:, :, [i for i in range(3) if i != weight]] = 0
    return layer


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


@pytest.mark.parametrize("name", NETS)
def test_the_network_is_left_as_it_was(name, device):
    net, x = made(name, device)
    before, inputs = copy.deepcopy(net.state_dict()), x.clone()
    smaller = shrink(net, x)
    assert torch.equal(x, inputs)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    own = {p.data_ptr() for p in net.state_dict().values()}
    assert not own & {p.data_ptr() for p in smaller.state_dict().values() if p.numel()}


def test_the_example_input_is_left_as_it_was(device):
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)).to(device)
    x = torch.tensor([[-1.0, 0.0, 1.0]], device=device)
    shrink_report(net, shrink(net, x), x)
    assert x.tolist() == [[-1, 0, 1]]


@pytest.mark.parametrize("inside", [True, False])
def test_it_shrinks_in_inference_mode(inside, device):
    make, weights, shape, expected = CASES["constants of constants"]
    with torch.inference_mode(inside):
        net, x = with_weights(make(), *weights).to(device), torch.randn(shape, device=device)
    with torch.inference_mode():
        smaller = shrink(net, x)
        report = shrink_report(net, smaller, x)
        assert (widths(smaller), report.notes) == (expected, ())
        close(smaller(x), net(x))
    smaller(x.clone()).sum().backward()


def test_a_network_that_keeps_what_it_computes(device):
    class Keeping(nn.Sequential):
        def forward(self, x):
            self.last = self[0](x)
            return self[1](self.last.relu())

    net, x = Keeping(nn.Linear(3, 4), nn.Linear(4, 2)).to(device), torch.randn(5, 3, device=device)
    mask(net, 0.0, 0.0)
    net(x)
    smaller = shrink(net, x)
    report = shrink_report(net, smaller, x)
    assert (widths(smaller), report.notes) == ([1, 2], ())
    assert net.last.requires_grad
    close(smaller(x), net(x))


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("sizes", [(4, 0, 2), (0, 3, 2), (4, 0, 0, 2)])
def test_layers_without_weights_stay(sizes, device):
    net = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(sizes))).to(device)
    x = torch.rand(2, sizes[0], device=device)
    smaller = shrink(net, x)
    report = shrink_report(net, smaller, x)
    assert widths(smaller) == list(sizes[1:])
    assert report.notes[0] == "0 (Linear): has no weights; left whole"
    assert torch.equal(smaller(x), net(x))


NAMES = ("flatten", "relu", "add", "mean", "view", "reshape", "div", "cat", "size")


class Named(nn.Module):
    """Layers whose other parts have the names of tensors' methods."""

    def __init__(self):
        super().__init__()
        self.first, self.other, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_and_buffers_have_any_name(name, device):
    class Net(Named):
        exec(f"def forward(self, {name}): return self.last(self.first({name}).relu() * self.{name})")

    net = Net().eval()
    net.register_buffer(name, torch.ones(1, 3))
    net, x = mask(net, 1.0, 0.3).to(device), torch.rand(4, 3, device=device)
    smaller = shrink(net, x)
    report = shrink_report(net, smaller, x)
    assert (widths(smaller), report.notes) == ([3, 3, 2], ())
    close(smaller(x), net(x))


@pytest.mark.parametrize("name", NAMES)
def test_modules_have_any_name(name, device):
    class Net(Named):
        def forward(self, x):
            return self.last(getattr(self, name)(self.first(x), self.other(x)))

    net = Net()
    net.add_module(name, nn.Bilinear(3, 3, 3))
    net, x = net.to(device), torch.rand(4, 3, device=device)
    smaller = shrink(net, x)
    report = shrink_report(net, smaller, x)
    assert not any("the network" in note for note in report.notes)
    assert widths(smaller) == [3, 3, 2]
    close(smaller(x), net(x))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_a_selection_is_that_of_its_layer(training, device):
    net, x = nn.Sequential(nn.Linear(784, 40)).to(device), torch.randn(2, 784, device=device)
    nn.init.zeros_(net[0].weight)
    assert all(module.training is training for module in shrink(net.train(training), x).modules())


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_what_is_trained_stay(training, device):
    net, x = made("residual", device)
    net.train(training)
    net.stem[0].weight.requires_grad_(False)
    net.head.bias.requires_grad_(False)
    smaller = shrink(net, x)
    assert all(module.training is training for module in smaller.modules())
    trained = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    assert {
        name: p.requires_grad for name, p in smaller.named_parameters() if name in trained
    }.items() <= trained.items()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_stays(dtype, device):
    net, x = made("concatenation", device, density=0.2)
    net, x = net.to(dtype), x.to(dtype)
    smaller = shrink(net, x)
    assert {p.dtype for p in smaller.parameters()} == {dtype}
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(smaller(x), net(x), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("name", ["lenet-5", "residual", "concatenation"])
def test_it_is_copied_pickled_and_trained(name, device):
    net, x = made(name, device, density=0.2)
    smaller = shrink(net, x)
    file = io.BytesIO()
    torch.save(smaller, file)
    file.seek(0)
    for other in (copy.deepcopy(smaller), pickle.loads(pickle.dumps(smaller)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), smaller(x))
    assert [type(m) for m in smaller.children()] == [type(m) for m in net.children()]
    smaller.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in smaller.parameters())


def test_shrinking_again_changes_nothing(device):
    net, x = made("vgg-like", device)
    smaller = shrink(net, x)
    assert {k: v.shape for k, v in shrink(smaller, x).state_dict().items()} == {
        k: v.shape for k, v in smaller.state_dict().items()
    }


ELEMENTWISE = (
    *(nn.Identity, nn.Dropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.Tanh, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink),
    *(
        nn.Hardtanh,
        nn.Hardsigmoid,
        nn.Hardswish,
        nn.AlphaDropout,
        nn.FeatureAlphaDropout,
        lambda: nn.Threshold(0.1, 2.0),
    ),
)
POOLINGS = (nn.MaxPool1d, nn.AvgPool1d, nn.MaxPool2d, nn.AvgPool2d, nn.MaxPool3d, nn.AvgPool3d)
ADAPTIVE = (nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)


@pytest.mark.parametrize(
    ("operation", "ndim"),
    [(make(), 2) for make in ELEMENTWISE]
    + [(make(3, stride, padding=1), i // 2 + 3) for i, make in enumerate(POOLINGS) for stride in (1, 2)]
    + [(make(2), i // 2 + 3) for i, make in enumerate(ADAPTIVE)],
    ids=lambda value: str(value),
)
def test_constants_go_through_activations_and_pooling(operation, ndim, device):
    convolution = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[ndim]
    sizes = ((3, 4), (4, 4)) if ndim == 2 else ((3, 4, 1), (4, 4, 1))
    net = nn.Sequential(convolution(*sizes[0]), operation, convolution(*sizes[1]), nn.Flatten()).to(device).eval()
    with torch.no_grad():
        net[0].weight[:2] = 0
    x = torch.randn(4, 3, *[6] * (ndim - 2), device=device)
    smaller = shrink(net, x)
    assert len(smaller[0].weight) == (4 if "Avg" in repr(operation) and getattr(operation, "padding", 0) else 2)
    close(smaller(x), net(x))


NOTES = {
    "layer norm": ["norm (LayerNorm): units cannot be followed through it; left whole"],
    "shared": [
        "twice (Linear): called more than once; left whole",
        "twice (Linear): called more than once; left whole",
        "tied (Linear): shares its weights; left whole",
        "other (Linear): shares its weights; left whole",
    ],
    "residual": [],
}


@pytest.mark.parametrize("name", NOTES)
def test_what_stays_whole_is_noted(name, device):
    net, x = made(name, device, density=0.0)
    smaller = shrink(net, x)
    report = shrink_report(net, smaller, x)
    assert list(report.notes) == NOTES[name]
    assert all(f"note: {note}" in str(report) for note in NOTES[name])
    close(smaller(x), net(x))


def test_all_around_a_module_that_is_not_followed_stays(device):
    net, x = made("layer norm", device, density=0.0)
    assert widths(shrink(net, x)) == [12, 1, 4]


class Odd(nn.Module):
    """Something between two layers, of eight units at eight places."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 8, 1), nn.Linear(8, 2)
        self.norm = nn.BatchNorm1d(8, track_running_stats=False)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self, self.first(x)))


ODD = {
    "mean over units": (lambda net, x: x.mean(1), ["mean"]),
    "a fixed size": (lambda net, x: x.view(-1, 8, 8).mean(2), ["view"]),
    "a flattening with a fixed size": (lambda net, x: x.view(-1, 64)[:, ::8], ["view"]),
    "a number of channels": (lambda net, x: x.mean(2) * x.shape[1], ["getattr_1", "mul"]),
    "division": (lambda net, x: (x / x).mean(2), ["truediv"]),
    "dropout of zero": (lambda net, x: F.dropout(0 * x).mean(2), ["dropout"]),
    "statistics of the batch": (lambda net, x: net.norm(x).mean(2), ["norm (BatchNorm1d)"]),
    "an index": (lambda net, x: x[:, :, 0], ["getitem"]),
}


@pytest.mark.parametrize("name", ODD)
def test_functions_that_are_not_followed_are_noted(name, device):
    between, noted = ODD[name]
    net = mask(Odd(between).eval(), 1.0, 0.2).to(device)
    smaller = shrink(net, torch.randn(4, 2, 8, device=device))
    report = shrink_report(net, smaller, torch.randn(4, 2, 8, device=device))
    assert [note.split(":")[0] for note in report.notes] == noted
    assert len(smaller.first.weight) == 8


def test_numbers_too_large_stay_too_large(device):
    class Large(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x) * 1e30 * 1e30)

    net, x = with_weights(Large(nn.Linear(2, 2), nn.Linear(2, 1)), [[0, 0], [0, 0]], [[0.1, 0.1]]), torch.ones(3, 2)
    assert torch.equal(shrink(net, x)(x), net(x))
    assert net(x).isinf().all()


def test_numbers_too_large_for_half_precision_are_so_in_between(device):
    class Large(nn.Sequential):
        def forward(self, x):
            x = self[0](x)
            return self[1](x * 1e3 * 1e3 * 1e-6)

    net = with_weights(Large(nn.Linear(2, 2), nn.Linear(2, 1)), [[0, 0], [1, 1]], [[0.1, 0.1]]).to(device).half()
    x = torch.ones(3, 2, device=device).half()
    assert torch.equal(shrink(net, x)(x), net(x))
    assert net(x).isinf().all()


def test_constants_are_so_up_to_rounding():
    known = torch.tensor([[[0.1, 0.1 + 1e-15], [0.1, 0.1 + 1e-6]]], dtype=torch.float64)
    units = Units.along(1, known, torch.tensor([1, 2]))
    assert units.constant[0, 0, 0] != units.constant[0, 0, 1]
    assert units.unit_constants(1).isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_small_difference_at_the_border_is_one(dtype, device):
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 1, 3)
    )
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight.zero_()
            layer.bias.zero_()
        net[0].weight[1], net[0].bias[0] = 1, 1
        net[2].weight[0, 0], net[2].weight[0, 0, 1, 1], net[2].weight[1, 1] = 0.05, 4, 1
        net[4].weight[:] = 1
    net, x = net.to(device, dtype), torch.rand(1, 1, 6, 6, device=device, dtype=dtype)
    smaller = shrink(net, x)
    assert widths(smaller) == [2, 2, 1]
    assert torch.equal(smaller(x), net(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_beside_what_is_not_followed(dtype, device):
    class Net(Sized):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.last(self.norm(self.fc(x) + x))

    net, x = Net().to(device, dtype).eval(), torch.randn(4, 3, device=device, dtype=dtype)
    smaller = shrink(net, x)
    report = shrink_report(net, smaller, x)
    assert report.notes == ()
    assert torch.equal(smaller(x), net(x))


@pytest.mark.parametrize(
    ("pool", "shape"),
    [
        (lambda x: x.mean(-1), (2, 5, 4)),
        (lambda x: x.mean((2, 3)), (2, 5, 1, 4)),
        (lambda x: F.max_pool1d(x, 6), (2, 5, 4)),
    ],
)
def test_what_pools_over_units_stays_whole(pool, shape, device):
    class Net(nn.Sequential):
        def forward(self, x):
            return self[1](pool(self[0](x).relu()).flatten(1))

    net, x = Net(nn.Linear(4, 6), nn.Linear(5, 2)).to(device), torch.rand(shape, device=device)
    mask(net, 0.5, 0.3)
    smaller = shrink(net, x)
    assert widths(smaller) == [6, 2]
    close(smaller(x), net(x))


def test_a_function_cannot_make_a_constant_of_the_unknown():
    units = Units.along(1, torch.tensor([[torch.nan, 0.1]]), torch.tensor([0, 0]))
    known = Channelwise(torch.nan_to_num, None).forward([units], (4, 2), UnionFind()).constant
    assert known.isnan().tolist() == [[True, False]]


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


class Sized(Branching):
    """The traced number differs from that of the smaller network."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.fc(x)) * self.fc.out_features


class Random(Sized):
    def forward(self, x):
        return self.last(F.dropout(self.fc(x)))


class Overwriting(Sized):
    def forward(self, x):
        hidden = self.fc(x)
        F.relu(hidden, inplace=True)
        return self.last(hidden)


class Optional(Sized):
    def forward(self, x, shift=None):
        x = self.fc(x)
        return self.last(x if shift is None else x + 1)


@pytest.mark.parametrize(
    ("make", "note"),
    [
        (Branching, "the network: torch.fx cannot follow it"),
        (Random, "the network: torch.fx cannot follow it"),
        (Optional, "the network: torch.fx cannot follow it"),
        (Overwriting, "reads a tensor changed in place"),
        (Sized, "its own code depends on the sizes of layers"),
    ],
)
def test_a_network_that_cannot_be_followed_is_copied(make, note, device):
    net, x = make().to(device).eval(), torch.randn(4, 3, device=device)
    if make is Sized:
        mask(net, 0.0, 0.0)
    smaller = shrink(net, x)
    report = shrink_report(net, smaller, x)
    assert note in report.notes[-1]
    assert smaller is not net
    state = smaller.state_dict()
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


def test_modules_with_hooks_parametrisations_or_of_subclasses_stay(device):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(
        nn.Linear(4, 4), Doubled(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4),
        nn.Linear(4, 2),
    )  # fmt: skip
    net[3].register_forward_hook(lambda module, inputs, output: output.flip(1))
    for i in (0, 1, 3, 4):
        mask(net[i], 0.4, 0.3)
    net, x = net.to(device), torch.randn(5, 4, device=device)
    smaller = shrink(net, x)
    report = shrink_report(net, smaller, x)
    assert [note.split(":")[0] for note in report.notes] == ["linear", "2 (ParametrizedLinear)", "3 (Linear)"]
    assert widths(smaller) == [4, 4, 4, 4, 2]
    close(smaller(x), net(x))


def test_the_report_refuses_a_network_of_other_layers(device):
    net, x = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).to(device), torch.randn(5, 3, device=device)
    with pytest.raises(ValueError, match="after: expected a smaller network of the 2 layers of before, but got 1"):
        shrink_report(net, nn.Linear(3, 1).to(device), x)


def test_the_report_counts_units_parameters_and_multiply_adds(device):
    make, weights, shape, _ = CASES["constants of constants"]
    net, x = with_weights(make(), *weights).to(device), torch.randn(shape, device=device)
    smaller = shrink(net, x)
    report = shrink_report(net, smaller, x)
    assert str(report).split("\n")[-1].split() == ["network", "20", "->", "7", "14", "->", "4"]
    assert report.to_dict() == {
        "layers": {
            "0": {
                "before": {"units": 3, "parameters": 9, "multiply_adds": 6},
                "after": {"units": 1, "parameters": 3, "multiply_adds": 2},
            },
            "2": {
                "before": {"units": 2, "parameters": 8, "multiply_adds": 6},
                "after": {"units": 1, "parameters": 2, "multiply_adds": 1},
            },
            "4": {
                "before": {"units": 1, "parameters": 3, "multiply_adds": 2},
                "after": {"units": 1, "parameters": 2, "multiply_adds": 1},
            },
        },
        "network": {"parameters": {"before": 20, "after": 7}, "multiply_adds": {"before": 14, "after": 4}},
        "notes": [],
    }


class Causal(nn.Module):
    """Attention that masks what comes later by a buffer."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

    def forward(self, x):
        x = self.down(self.up(x).relu())
        return torch.softmax(x @ x.transpose(1, 2) + self.mask, -1) @ x


def test_a_mask_may_be_infinite(device):
    net, x = mask(Causal().eval(), 0.5, 0.3).to(device), torch.randn(2, 4, 6, device=device)
    smaller = shrink(net, x)
    assert widths(smaller)[0] < 8
    close(smaller(x), net(x))
    net.mask[0, 0] = torch.nan
    with pytest.raises(ValueError, match="mask: expected numbers, but 1 of 16 are NaN; train it again"):
        shrink(net, x)


def test_bad_input_is_refused():
    net = nets.lenet_300_100()
    with pytest.raises(TypeError, match="net: expected a torch module, but got str"):
        shrink("net", torch.rand(1, 784))
    with pytest.raises(TypeError, match="example_input: expected a tensor, but got list"):
        shrink(net, [1.0])
    with pytest.raises(ValueError, match=r"example_input: .* accepts, but got one of shape \(2, 700\), torch.float32"):
        shrink(net, torch.rand(2, 700))
    net[3].weight.data[4, 5] = torch.nan
    with pytest.raises(ValueError, match=r"3\.weight: expected finite numbers, but 1 of 30000"):
        shrink(net, torch.rand(2, 784))
    norm = nn.Sequential(nn.BatchNorm1d(3))
    norm[0].running_var[0] = torch.inf
    with pytest.raises(ValueError, match=r"0\.running_var: expected finite"):
        shrink(norm, torch.rand(2, 3))
