"""Shrinking: constants, rounding, what is not followed, and the report."""

import pytest
import torch
import torch.nn.functional as F
from lab import nets
from torch import nn

from pyro_sparsevd.shrink.flow import Channelwise
from pyro_sparsevd.shrink.report import shrink_report
from pyro_sparsevd.shrink.shrink import shrink
from pyro_sparsevd.shrink.units import UnionFind, Units
from shrinkable import CASES, close, made, mask, widths, with_weights

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


@pytest.mark.parametrize(
    ("make", "note"),
    [
        (Branching, "the network: torch.fx cannot follow it"),
        (Random, "the network: torch.fx cannot follow it"),
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
    with pytest.raises(TypeError, match="example_input: expected a tensor, or a tuple or dictionary of tensors"):
        shrink(net, "x")
    with pytest.raises(ValueError, match=r"example_input: expected at least one tensor, but got \[1.0\]"):
        shrink(net, [1.0])
    with pytest.raises(ValueError, match=r"example_input: .* accepts, but got one of shape .* and shape .*: .*takes"):
        shrink(net, (torch.rand(2, 784), torch.rand(2, 784)))
    with pytest.raises(ValueError, match=r"example_input: .* accepts, but got one of shape \(2, 700\), torch.float32"):
        shrink(net, torch.rand(2, 700))
    net[3].weight.data[4, 5] = torch.nan
    with pytest.raises(ValueError, match=r"3\.weight: expected finite numbers, but 1 of 30000"):
        shrink(net, torch.rand(2, 784))
    norm = nn.Sequential(nn.BatchNorm1d(3))
    norm[0].running_var[0] = torch.inf
    with pytest.raises(ValueError, match=r"0\.running_var: expected finite"):
        shrink(norm, torch.rand(2, 3))
