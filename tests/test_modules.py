"""Helpers for networks: how the inputs of a batch become arguments."""

import re
from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
from torch import nn

from pyro_sparsevd._modules import batch_tensor, map_tensors, named_leaves, run_network, tensors_of, with_tensors


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


Pair = namedtuple("Pair", "first second")


@dataclass(frozen=True)
class Frozen:
    first: torch.Tensor
    second: object = None


CONTAINERS = {  # a container of A and B, and the names of its leaves
    "tuple": ((A, None, B), ["x[0]", "x[1]", "x[2]"]),
    "list": ([A, [3, B]], ["x[0]", "x[1][0]", "x[1][1]"]),
    "dict": ({"a": A, 0: B}, ["x['a']", "x[0]"]),
    "UserDict": (UserDict(a=(A,), b=B), ["x['a'][0]", "x['b']"]),
    "named tuple": (Pair(A, B), ["x[0]", "x[1]"]),
    "dataclass": (Frozen(A, {"b": B}), ["x.first", "x.second['b']"]),
}


@pytest.mark.parametrize(("x", "names"), CONTAINERS.values(), ids=CONTAINERS)
def test_tensors_of_containers_have_names_and_can_be_replaced(x, names):
    assert [name for name, _ in named_leaves("x", x)] == names
    assert [id(t) for t in tensors_of(x)] == [id(A), id(B)]
    mapped = map_tensors(lambda t: t + 1, x)
    assert type(mapped) is type(x)
    torch.testing.assert_close(tensors_of(mapped), [A + 1, B + 1])
    assert [id(t) for t in tensors_of(x)] == [id(A), id(B)]
    assert tensors_of(with_tensors(x, [1, B])) == [B]


def test_a_mapping_that_cannot_be_changed_becomes_a_dict():
    assert map_tensors(id, MappingProxyType({"a": A})) == {"a": id(A)}


@pytest.mark.parametrize(
    ("x", "expected"),
    [(A[0], 0), ((A[0], B), 1), ((torch.tensor(1.0), A[0], B[0]), 1), ({"a": [A[0], A]}, 1)],
    ids=["one", "second", "of one dimension", "nested"],
)
def test_the_batch_is_that_of_the_first_tensor_of_two_dimensions(x, expected):
    assert batch_tensor("x", x) is tensors_of(x)[expected]
