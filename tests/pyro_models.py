"""Pyro models of every kind, for the tests of what AutoNormal does and the guide does too."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn

from pyro_sparsevd import AutoSparseNormal, LogUniform

# AutoNormal and AutoSparseNormal side by side.


INIT_SCALE = 0.1


def auto_normal(model: Callable, **options: Any) -> AutoNormal:
    return AutoNormal(model, init_scale=INIT_SCALE, **options)


def auto_sparse_normal(model: Callable, **options: Any) -> AutoSparseNormal:
    return AutoSparseNormal(model, init_log_variance=2 * math.log(INIT_SCALE), **options)


GUIDES = [
    pytest.param(auto_normal, id="AutoNormal"),
    pytest.param(auto_sparse_normal, id="AutoSparseNormal"),
]


class Broadcasting(nn.Module):
    """A linear layer whose weight may have dimensions in front, one of them against the data."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x.unsqueeze(-2)).sum(-1) + self.bias


PROPER = pytest.param(LogUniform(1e-4, 10.0), id="proper")
IMPROPER = pytest.param(None, id="improper")
SMALL_WEIGHTS = ("0.weight", "2.weight")


def mixed_model(y: Tensor) -> None:
    w = pyro.sample("w", LogUniform(1e-4, 10.0).expand([3]).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(torch.zeros(2), 0.1).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(w.sum() + b, s.sum()), obs=y)


def two_weights(y: Tensor) -> Tensor:
    a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
    scale = pyro.param("scale", lambda: torch.tensor(0.7), constraint=dist.constraints.positive)
    with pyro.plate("data", len(y)):
        return pyro.sample("y", dist.Normal(a.sum() + b, scale), obs=y)


TWO_WEIGHTS_Y = [0.3, 0.9, 1.4, 1.1]


# Models of every kind.


def shapes_model() -> None:
    pyro.sample("scalar", dist.Normal(0.5, 1.0))
    pyro.sample("vector", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("matrix", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1)
    with rows:
        pyro.sample("row", dist.Normal(0.0, 1.0))
    with columns:
        pyro.sample("column", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with rows, columns:
        pyro.sample("cell", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))


def supports_model() -> None:
    pyro.sample("positive", dist.LogNormal(0.0, 1.0))
    pyro.sample("gamma", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
    pyro.sample("unit", dist.Beta(2.0, 3.0))
    pyro.sample("interval", dist.Uniform(-1.0, 3.0))
    pyro.sample("heavy", dist.HalfCauchy(torch.tensor(1.0)))
    pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    pyro.sample("cholesky", dist.LKJCholesky(3))
    with pyro.plate("plate", 2):
        pyro.sample("rate", dist.Exponential(1.0))
        pyro.sample("shares", dist.Dirichlet(torch.ones(4)))


def log_uniforms_model() -> None:
    pyro.sample("bounded", LogUniform(1e-6, 1e3).expand([2, 3]).to_event(2))
    pyro.sample("free", LogUniform(1e-6, 1e3))
    with pyro.plate("plate", 4):
        pyro.sample("each", LogUniform(1e-6, 1e3))


def hierarchy_model() -> None:
    centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
    width = pyro.sample("width", dist.LogNormal(0.0, 1.0))
    with pyro.plate("groups", 3, dim=-2):
        group = pyro.sample("group", dist.Normal(centre, width))
        with pyro.plate("data", 4, dim=-1):
            pyro.sample("y", dist.Normal(group, 1.0), obs=torch.arange(12.0).reshape(3, 4) / 6)


def subsampled_model() -> None:
    with pyro.plate("data", 12, subsample_size=5) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.arange(12.0)[index])


def subsampled_twice_model() -> None:
    rows = pyro.plate("rows", 6, subsample_size=3, dim=-2)
    columns = pyro.plate("columns", 4, subsample_size=2, dim=-1)
    with rows:
        row = pyro.sample("row", dist.Normal(0.0, 1.0))
    with columns:
        column = pyro.sample("column", dist.Normal(0.0, 1.0))
    with rows as i, columns as j:
        cell = pyro.sample("cell", dist.Normal(row + column, 1.0))
        pyro.sample("y", dist.Normal(cell, 1.0), obs=torch.arange(24.0).reshape(6, 4)[i][:, j] / 12)


def masked_and_scaled_model() -> None:
    with pyro.plate("plate", 3), poutine.mask(mask=torch.tensor([True, False, True])):
        pyro.sample("part", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=2.5):
        pyro.sample("heavy", dist.LogNormal(0.0, 1.0))
    with poutine.mask(mask=False):
        pyro.sample("free", dist.Normal(0.0, 1.0))


def markov_model() -> None:
    x: Any = 0.0
    for t in pyro.markov(range(3)):
        x = pyro.sample(f"x{t}", dist.Normal(x, 1.0))
        pyro.sample(f"y{t}", dist.Normal(x, 1.0), obs=torch.tensor(float(t)))


def factors_model() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("once", -(z**2))
    with pyro.plate("plate", 3):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.factor("each", -w.abs())


def partly_observed_model() -> None:
    with pyro.plate("plate", 3):
        mask = torch.tensor([True, False, True])
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.ones(3), obs_mask=mask)


def module_model() -> PyroModule:
    class Layer(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = PyroSample(dist.Normal(torch.zeros(2), 1.0).to_event(1))
            self.width = PyroSample(lambda self: dist.LogNormal(0.0, 1.0))

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()
            self.scale = PyroParam(torch.tensor(0.8), dist.constraints.positive)

        def forward(self) -> None:
            mean = self.layer.weight.sum(-1) + self.layer.width
            pyro.sample("y", dist.Normal(mean, self.scale), obs=torch.tensor(1.0))

    return Model()


ZOO = [
    pytest.param(lambda model=model: model, id=model.__name__.removesuffix("_model"))
    for model in (
        shapes_model, supports_model, log_uniforms_model, hierarchy_model, subsampled_model, subsampled_twice_model,
        masked_and_scaled_model, markov_model, factors_model, partly_observed_model,
    )
] + [pytest.param(module_model, id="module")]  # fmt: skip
