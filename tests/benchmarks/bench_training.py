"""Milliseconds of a training step of LeNet-300-100 by a plain loop, by fit and by Lightning, in turns.

python tests/benchmarks/bench_training.py [--rounds 7] [--threads 1]
"""

import argparse
import logging
import statistics
import time
import warnings

import lightning
import pyro.distributions as dist
import torch
from torch import nn

import pyro_sparsevd as sparsevd

STEPS, BATCH = 200, 100


def model_and_guide():
    layers = nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    bnn = sparsevd.bayesianize(nn.Sequential(*layers))
    model = sparsevd.Supervised(bnn, lambda logits: dist.Categorical(logits=logits), num_data=STEPS * BATCH)
    return model, sparsevd.AutoSparseNormal(model, init_log_variance=-8.0)


def plain(batches):
    loss = sparsevd.SparseVD_ELBO(kl="exact")(*model_and_guide())
    optimizer = torch.optim.Adam(loss.parameters(), 3e-3, fused=True)
    for x, y in batches:
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()


def fit(batches):
    sparsevd.fit(*model_and_guide(), batches, epochs=1)


def by_lightning(batches):
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(sparsevd.training.SparseVDModule(*model_and_guide()), loader)


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--threads", type=int, default=1)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    batches = [(torch.rand(BATCH, 784), torch.randint(10, (BATCH,))) for _ in range(STEPS)]
    ways = {"plain loop": plain, "fit": fit, "Lightning": by_lightning}
    taken = {name: [] for name in ways}
    for turn in range(args.rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way(batches)
            if turn:  # the first one loads and compiles
                taken[name].append(1e3 * (time.perf_counter() - start) / STEPS)
    for name, found in taken.items():
        ratio = statistics.median(a / b for a, b in zip(found, taken["plain loop"], strict=True))
        print(f"{name:12s}{statistics.median(found):8.2f} ms{ratio:8.2f} x")


if __name__ == "__main__":
    main()
