"""Shrinking: a smaller network with the same outputs."""

import copy
import io
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn

from pyro_sparsevd.shrink.report import shrink_report
from pyro_sparsevd.shrink.shrink import shrink
from shrinkable import CASES, NETS, close, made, mask, widths, with_weights


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
