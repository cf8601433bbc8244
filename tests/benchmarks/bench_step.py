"""Benchmarks, not run by default: ``pytest tests/benchmarks/bench_step.py -n 0`` with nothing else running."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from lab.nets import lenet_5_caffe, lenet_300_100

import pyro_sparsevd as svd

NETS = {"lenet-300-100": lenet_300_100, "lenet-5": lenet_5_caffe}


@pytest.fixture(params=NETS)
def problem(request, device):
    bnn = svd.bayesianize(NETS[request.param]().to(device))
    model = svd.Supervised(bnn, lambda logits: dist.Categorical(logits=logits), num_data=60_000)
    x, y = torch.rand(100, 1, 28, 28, device=device), torch.randint(10, (100,), device=device)
    return model, svd.AutoSparseNormal(model), x, y


@pytest.mark.parametrize("kl", ["approximate", "exact"])
def test_step_of_a_torch_optimizer(benchmark, problem, kl):
    model, guide, x, y = problem
    loss = svd.SparseVD_ELBO(kl=kl)(model, guide)
    loss(x, y)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-3, fused=True)

    def step():
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()

    benchmark.pedantic(step, rounds=30, warmup_rounds=5)
    assert all(p.isfinite().all() for p in loss.parameters())


def test_step_of_svi(benchmark, problem):
    model, guide, x, y = problem
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), svd.SparseVD_ELBO())
    loss = benchmark.pedantic(svi.step, (x, y), rounds=30, warmup_rounds=5)
    assert loss > 0


@pytest.mark.parametrize("form", ["approximate", "exact"])
def test_kl_forward_and_backward_of_a_million_weights(benchmark, device, form):
    loc = torch.randn(1_000_000, device=device, requires_grad=True)
    log_variance = torch.full_like(loc, -8.0, requires_grad=True)

    def both():
        loc.grad = log_variance.grad = None
        svd.divergence.kl_log_uniform_total(loc, log_variance, form).backward()

    benchmark.pedantic(both, rounds=30, warmup_rounds=5)
    assert loc.grad.isfinite().all()


def test_sparsify(benchmark, problem):
    _, guide, _, _ = problem
    summary = benchmark.pedantic(svd.sparsify, (guide,), rounds=30, warmup_rounds=5)
    assert summary.total > 0
