"""Helpers for networks: how the inputs of a batch become arguments."""

import re
from collections import UserDict

import pytest
import torch
from torch import nn

from pyro_sparsevd._modules import run_network


class TwoInputs(nn.Module):
    def forward(self, a, b=None, scale=1.0):
        return "two inputs", a, b, scale


class OneInput(nn.Module):
    def forward(self, inputs):
        return "one input", inputs


class AnyNames(nn.Module):
    def forward(self, *args, **kwargs):
        return args, kwargs


A, B = torch.ones(2, 3), torch.zeros(2, 3)
CALLS = {  # network, inputs, and what its forward gets
    "tensor": (TwoInputs, A, ("two inputs", A, None, 1.0)),
    "tuple": (TwoInputs, (A, B), ("two inputs", A, B, 1.0)),
    "list, as a DataLoader makes of a tuple": (TwoInputs, [A, B], ("two inputs", A, B, 1.0)),
    "dict of names": (TwoInputs, {"b": B, "a": A}, ("two inputs", A, B, 1.0)),
    "UserDict of names": (TwoInputs, UserDict(a=A, scale=2.0), ("two inputs", A, None, 2.0)),
    "dict of the one name": (OneInput, {"inputs": A}, ("one input", A)),
    "dict of other keys": (OneInput, {"a": A}, ("one input", {"a": A})),
    "dict of keys that are no names": (OneInput, {0: A}, ("one input", {0: A})),
    "dict in a tuple": (OneInput, ({"inputs": A},), ("one input", {"inputs": A})),
    "dict for any names": (AnyNames, {"a": A}, ((), {"a": A})),
}


@pytest.mark.parametrize(("network", "x", "expected"), CALLS.values(), ids=CALLS)
def test_inputs_become_arguments_of_the_network(network, x, expected):
    assert run_network(network(), x) == expected


@pytest.mark.parametrize(
    ("x", "text"),
    [
        ({"a": A, "c": B}, "a, b, scale, but got a, c: got an unexpected keyword argument 'c'"),
        ({"b": B}, "a, b, scale, but got b: missing a required argument: 'a'"),
    ],
    ids=["one more", "one missing"],
)
def test_a_dictionary_of_some_names_is_refused_by_name(x, text):
    with pytest.raises(TypeError, match=re.escape(text + "; a dictionary that is its one argument is given as (x,)")):
        run_network(TwoInputs(), x)
