"""Peak memory of a training step, above what the process holds before there is a network.

    python tests/benchmarks/peak_memory.py

Each row is a process of its own, of 20 steps at batch 100 on random images: Sparse VD written by hand in plain
PyTorch, and this package. Linux only.
"""

import subprocess
import sys
from pathlib import Path

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from lab.nets import lenet_5_caffe, lenet_300_100
from torch import nn

import pyro_sparsevd as svd

NETS = {"lenet-300-100": lenet_300_100, "lenet-5": lenet_5_caffe}


class ByHand(nn.Module):
    """A layer with the formulas of the paper, written the obvious way."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.log_variance = nn.Parameter(torch.full_like(layer.weight, -10.0))

    def forward(self, x):
        function = F.linear if isinstance(self.layer, nn.Linear) else F.conv2d
        mean = function(x, self.layer.weight, self.layer.bias)
        return mean + (function(x * x, self.log_variance.exp()) + 1e-8).sqrt() * torch.randn_like(mean)

    def kl(self):
        log_alpha = self.log_variance - torch.log(self.layer.weight**2 + 1e-8)
        return (0.63576 * torch.sigmoid(-1.8732 - 1.48695 * log_alpha) + 0.5 * F.softplus(-log_alpha)).sum()


def by_hand(net):
    """Returns the loss of a batch, by hand, and its parameters."""
    layers = [ByHand(m) if isinstance(m, nn.Linear | nn.Conv2d) else m for m in net]
    network = nn.Sequential(*layers)
    noisy = [m for m in layers if isinstance(m, ByHand)]
    return lambda x, y: 60_000 * F.cross_entropy(network(x), y) + sum(m.kl() for m in noisy), network.parameters()


def package(net, **options):
    """Returns the loss of a batch, by this package with options of its bound, and its parameters."""
    model = svd.Supervised(svd.bayesianize(net), lambda logits: dist.Categorical(logits=logits), 60_000)
    loss = svd.SparseVD_ELBO(**options)(model, svd.AutoSparseNormal(model))
    return loss, loss.parameters()


ROWS = {"by hand": by_hand, "pyro_sparsevd": package}


def status(name):
    """Returns an entry of this process's status, in MB."""
    return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").open() if line.startswith(name))


def measure(row, net):
    """Prints the peak of one row."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, y = torch.rand(100, 1, 28, 28), torch.randint(10, (100,))
    F.conv2d(x, torch.rand(1, 1, 3, 3, requires_grad=True)).sum().backward()  # what torch loads at first use
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    loss, parameters = ROWS[row](NETS[net]())
    optimizer = torch.optim.Adam(parameters, 1e-3, fused=True)
    for _ in range(20):
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()
    print(f"{net:15s}{row:15s}{status('VmHWM') - before:8.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(*sys.argv[1:])
    else:
        for net in NETS:
            for row in ROWS:
                subprocess.run([sys.executable, __file__, row, net], check=True)
