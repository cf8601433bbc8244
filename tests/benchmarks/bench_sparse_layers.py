"""Inference, not run by default: ``pytest tests/benchmarks/bench_sparse_layers.py -n 0`` with nothing else running.

A table for each density and batch size: passes per second of LeNet-300-100 as it is, with random weights at zero, with
these left out of the multiplication, and without the units that make no difference. Random zeros leave more units
alive than pruning does, so a pruned network of the same density shrinks further. With
``--benchmark-columns=median,ops --benchmark-sort=name`` the tables are narrow.
"""

import pytest
import torch
from lab.nets import lenet_300_100

from pyro_sparsevd.shrink.shrink import shrink
from pyro_sparsevd.shrink.sparse_linear import to_sparse


def _masked(net, density):
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.dim() > 1:
                weight *= torch.rand_like(weight) < density
    return net


NETS = {
    "dense": lambda net, density, x: net,
    "masked": lambda net, density, x: _masked(net, density),
    "csr": lambda net, density, x: to_sparse(_masked(net, density)),
    "shrunk": lambda net, density, x: shrink(_masked(net, density), x),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("batch", [1, 32, 1000])
@pytest.mark.parametrize("density", [0.01, 0.02, 0.1])
def test_throughput(benchmark, device, density, batch, net):
    x = torch.rand(batch, 1, 28, 28, device=device)
    network = NETS[net](lenet_300_100().to(device).eval(), density, x)
    benchmark.group = f"density {density:g}, batch {batch}"

    def run():
        output = network(x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return output

    with torch.inference_mode():
        output = benchmark.pedantic(run, rounds=30, iterations=max(1, 200 // batch), warmup_rounds=5)
    benchmark.extra_info["images per second"] = batch / benchmark.stats["median"]
    assert output.shape == (batch, 10)
