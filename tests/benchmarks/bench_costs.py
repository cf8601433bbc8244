"""What particles, sites and weights cost, not run by default: ``pytest tests/benchmarks/bench_costs.py -n 0``.

Times are the least that a step took; nothing else may run.
"""

import time
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from lab.nets import vgg_like
from torch import Tensor, nn

import pyro_sparsevd as svd
from pyro_sparsevd.ops.workspace import Workspace
from pyro_sparsevd.poutine.lazy_weight import LazyWeight, kl_log_uniform_total


def _small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 1))


def _normal(output: Tensor) -> dist.Normal:
    return dist.Normal(output.squeeze(-1), 0.5)


def _loss(device: torch.device, make: Callable[[], nn.Module] = _small, **options: Any) -> Any:
    model = svd.Supervised(svd.bayesianize(make().to(device)), _normal, 24)
    return svd.SparseVD_ELBO(**options)(model, svd.AutoSparseNormal(model))


def _data(device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(24, 4, device=device)
    return x, x.sum(1).tanh()


def test_eight_particles_cost_no_more_than_eight_times_one(device):
    x, y = _data(device)
    one, eight = (_step_of(_loss(device, num_particles=particles), x, y) for particles in (1, 8))
    assert min(_ratio(eight, one, 5) for _ in range(3)) < 8


def test_many_sites_cost_little_more_than_their_arithmetic(device):
    sites = 200
    loss = _loss(device, lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(sites - 1)), nn.Linear(4, 1)))
    x, y = _data(device)
    parameters = list(loss.parameters())
    weights = [(q.loc, q.log_variance) for q in loss.guide.posteriors.values()]
    biases = [layer.bias for layer in loss.model.network]
    workspace = Workspace()

    def arithmetic() -> None:
        lazy = [LazyWeight(svd.SparseNormal(*weight, validate_args=False), "", workspace) for weight in weights]
        output = x
        for weight, bias in zip(lazy, biases, strict=True):
            output = F.linear(output, weight, bias)
        nll = -_normal(output).log_prob(y).sum()
        (nll + kl_log_uniform_total(lazy, "approximate")).backward()

    def by_hand() -> None:
        for parameter in parameters:
            parameter.grad = None
        arithmetic()

    step = _step_of(loss, x, y)
    extra = min(_seconds(step, 5) - _seconds(by_hand, 5) for _ in range(2))
    assert extra / sites < 0.15e-3


def test_a_step_of_15_million_weights_costs_little_more_than_two_dense(device):
    torch.manual_seed(1)
    dense = vgg_like().to(device)
    model = svd.Supervised(svd.bayesianize(dense), lambda logits: dist.Categorical(logits=logits), 50_000)
    loss = svd.SparseVD_ELBO()(model, svd.AutoSparseNormal(model))
    assert sum(p.numel() for p in dense.parameters() if p.dim() > 1) > 14e6
    x, y = torch.randn(100, 3, 32, 32, device=device), torch.randint(10, (100,), device=device)
    optimizers = [torch.optim.Adam(module.parameters(), 1e-4, fused=True) for module in (loss, dense)]

    def sparse_step() -> None:
        optimizers[0].zero_grad()
        loss(x, y).backward()
        optimizers[0].step()

    def dense_step() -> None:
        optimizers[1].zero_grad()
        F.cross_entropy(dense(x), y).backward()
        optimizers[1].step()

    assert _ratio(sparse_step, dense_step, 2) < 2.6


def _ratio(step: Callable[[], Any], other: Callable[[], Any], rounds: int) -> float:
    return _seconds(step, rounds) / _seconds(other, rounds)


def _seconds(step: Callable[[], Any], rounds: int) -> float:
    step()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


def _step_of(loss: Any, *args: Any) -> Callable[[], None]:
    def step() -> None:
        for parameter in loss.parameters():
            parameter.grad = None
        loss(*args).backward()

    return step
