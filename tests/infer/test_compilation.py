"""A loss under torch.compile: the numbers that it has without."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from problems import loss_of, smooth_data


def _convolutional() -> nn.Module:
    layers = nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 6, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(54, 1)
    return nn.Sequential(*layers)


class _Doubled(nn.Module):
    """What contains a loss, and computes with it."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * self.loss(x.tanh(), y) + 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("contain", "options"),
    [(lambda loss: loss, {}), (_Doubled, {}), (_Doubled, {"local_reparam": False}), (_Doubled, {"num_particles": 2})],
    ids=["loss", "in-a-module", "drawn", "particles"],
)
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute:UserWarning",  # of the compiler's own
    "ignore:`torch.jit.script_method` is deprecated",
)
def test_loss_and_gradients_are_those_without(options, contain, backend, compiled, device):
    plain, other = (contain(loss_of(_convolutional, device, dtype=torch.float32, **options)) for _ in range(2))
    functions = plain, compiled(other, backend=backend)
    for seed, size in enumerate((8, 8, 5)):
        results = []
        for module, function in zip((plain, other), functions, strict=True):
            torch.manual_seed(seed)
            value = function(*(t[:size] for t in smooth_data(device, dtype=torch.float32)))
            results.append([value, *torch.autograd.grad(value, list(module.parameters()))])
        torch.testing.assert_close(*results)


def test_neither_import_nor_a_loss_without_it_touches_what_is_global():
    code = """
import os, sys, warnings, torch, pyro.distributions as dist
def state():
    validates = torch.distributions.Distribution._validate_args
    return validates, dict(os.environ), list(warnings.filters), "torch._dynamo" in sys.modules
before = state()
import pyro_sparsevd as svd
print(state() == before)
model = svd.Supervised(svd.bayesianize(torch.nn.Linear(2, 1)), lambda f: dist.Normal(f[:, 0], 1.0), 5)
svd.SparseVD_ELBO()(model, svd.AutoSparseNormal(model))(torch.zeros(5, 2), torch.zeros(5)).backward()
print(state() == before, before[-1])
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("True\nTrue False\n", "")
