"""Shrinking: networks of several inputs, and of outputs that are no tensor."""

import copy

import pytest
import torch
from torch import nn

from inputs import KINDS, Output, moved
from pyro_sparsevd._modules import tensors_of
from pyro_sparsevd.shrink.report import shrink_report
from pyro_sparsevd.shrink.shrink import shrink
from shrinkable import close, mask, widths

FOLLOWED = {"tuple", "list", "names", "one dictionary"}  # the others mix positions or nodes


@pytest.mark.parametrize("name", KINDS)
def test_networks_of_any_inputs_have_the_same_outputs_when_smaller(name, device):
    kind = KINDS[name]
    net, x = kind.network().eval(), moved(kind.make(), device)
    net = mask(net, 0.5, 0.4).to(device)
    before = copy.deepcopy(x)
    smaller = shrink(net, x)
    report = shrink_report(net, smaller, x)
    assert not any("the network" in note for note in report.notes)
    assert (widths(smaller)[0] < widths(net)[0]) == (name in FOLLOWED)
    expected, found = kind.by_hand(net, x), kind.by_hand(smaller, x)
    assert type(found) is type(expected)
    close(kind.logits(found), kind.logits(expected))
    torch.testing.assert_close(tensors_of(x), tensors_of(before), rtol=0, atol=0)


def test_multiply_adds_are_those_of_an_example_of_the_batch():
    kind = KINDS["tuple"]
    net = kind.network()
    report = shrink_report(net, net, kind.make())
    assert [layer.multiply_adds for layer in report.before] == [4 * 8, 5 * 8, 8 * 3]


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, shift=None):
        x = self.first(x)
        return self.last(x if shift is None else x + shift)


@pytest.mark.parametrize("shift", [None, 2.0, torch.arange(20.0).view(5, 4)], ids=["left out", "number", "tensor"])
def test_arguments_are_taken_to_be_what_they_are_in_the_example(shift):
    net, x = Optional(), torch.randn(5, 3)
    net.first.weight.data[1] = 0
    inputs = x if shift is None else (x, shift)
    smaller = shrink(net, inputs)
    assert widths(smaller)[0] == (4 if isinstance(shift, torch.Tensor) else 3)
    for other in (x, torch.randn(5, 3)):
        close(smaller(other, shift), net(other, shift))


class Heads(nn.Module):
    """Gives two outputs in several forms, which read one unit of the hidden layer each; a third is read by none."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.first, self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 4)
        self.a.weight.data[:, :2] = 0
        self.b.weight.data[:, 1:] = 0

    def forward(self, x):
        hidden = self.first(x).relu()
        return self.form(self.a(hidden), self.b(hidden))


FORMS = {
    "tuple": lambda a, b: (a, b),
    "dict": lambda a, b: {"a": a, "b": b},
    "dataclass": Output,
    "nested": lambda a, b: {"a": [a, (b, None, "text")]},
    "with a constant": lambda a, b: (a, torch.ones(2), b),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_all_outputs_count_in_whatever_they_are(form):
    net, x = Heads(form), torch.randn(5, 3)
    smaller = shrink(net, x)
    assert widths(smaller)[0] == 2
    assert shrink_report(net, smaller, x).notes == ()
    expected, found = net(x), smaller(x)
    assert type(found) is type(expected)
    close(smaller.a(smaller.first(x).relu()), net.a(net.first(x).relu()))
    close(smaller.b(smaller.first(x).relu()), net.b(net.first(x).relu()))


@pytest.mark.parametrize("form", [lambda a, b: torch.distributions.Normal(a.sum(), 1.0), lambda a, b: "text"])
def test_a_network_without_an_output_to_compare_is_left_whole(form):
    net, x = Heads(form), torch.randn(5, 3)
    smaller = shrink(net, x)
    assert widths(smaller) == widths(net)
    assert "left whole" in shrink_report(net, smaller, x).notes[-1]


def test_a_network_whose_output_hides_a_tensor_is_left_whole():
    net, x = Heads(lambda a, b: (a, torch.distributions.Normal(b, 1.0, validate_args=False))), torch.randn(5, 3)
    smaller = shrink(net, x)
    assert widths(smaller) == widths(net)
    close(smaller(x)[1].loc, net(x)[1].loc)
