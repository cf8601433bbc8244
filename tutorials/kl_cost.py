"""What the form of the KL divergence costs: the approximate, the exact and the Monte Carlo one on LeNet-300-100.

For each form and seed: the time of a training step, and error and compression of the pruned network at a threshold.
The steps that are timed take turns, so that a drift of the machine hits all forms; nothing else should run.
"""

import statistics
from typing import Any

import torch
from common import categorical, classifier, finite, in_order, load, parser, positive, run_of, start, write
from lab.datasets import batches
from lab.nets import lenet_300_100
from lab.recipes import score, train_sparse
from matplotlib.figure import Figure
from torch.utils.benchmark import Timer
from torch.utils.data import TensorDataset

import pyro_sparsevd as sparsevd
from pyro_sparsevd import plots
from pyro_sparsevd.infer.kl import KL

FORMS: tuple[KL, ...] = ("approximate", "exact", "monte_carlo")


def milliseconds_per_step(
    train: TensorDataset, batch_size: int, device: torch.device, rounds: int = 7
) -> dict[str, float]:
    """Returns the median time of a step with each form."""
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    timers = {}
    for form in FORMS:
        model, guide = classifier(lenet_300_100().to(device), len(train))
        loss = sparsevd.SparseVD_ELBO(kl=form)(model, guide)
        optimizer = torch.optim.Adam(loss.parameters(), 1e-3, fused=True)
        names = {"loss": loss, "optimizer": optimizer, "batch": train[:batch_size]}
        timers[form] = Timer("optimizer.zero_grad(); loss(*batch).backward(); optimizer.step()", globals=names)
    for _ in range(rounds):
        for form, timer in timers.items():
            times[form].append(timer.timeit(5).mean)
    return {form: 1e3 * statistics.median(values) for form, values in times.items()}


def main() -> None:
    """Runs the experiment."""
    options = parser(str(__doc__), epochs=60, out="kl_cost.png")
    options.add_argument("--seeds", type=positive, default=3, help="how many, from --seed (%(default)s)")
    options.add_argument("--threshold", type=finite, default=2.0, help="log alpha above which weights are dropped")
    args = options.parse_args()
    data = load(args)
    step_times = milliseconds_per_step(data.train, args.batch_size, args.device)
    results: dict[str, dict[str, Any]] = {}
    figure = Figure(figsize=(15, 4), layout="constrained")
    parts: Any = figure.subfigures(1, len(FORMS))
    for form, part in zip(FORMS, parts, strict=True):
        errors, compressions = [], []
        for seed in range(args.seed, args.seed + args.seeds):
            torch.manual_seed(seed)
            model, guide = classifier(lenet_300_100().to(args.device), len(data.train))
            train, validation = batches(data.train, args.batch_size), in_order(data.validation)
            run = run_of(args, f"{form}-{seed}", seed=seed)
            common: dict[str, Any] = {"epochs": args.epochs, "validation": validation}
            history = train_sparse(model, guide, train, kl=form, run=run, **common)
            summary = sparsevd.sparsify(guide, args.threshold)
            network = sparsevd.prune(model.network, guide, summary)
            errors.append(score(network, categorical, in_order(data.test)))
            compressions.append(summary.compression)
        plots.training_curves(
            history, ["error", "compression"], title=f"{form} KL, the last seed, threshold 3", figure=part
        )
        results[form] = {"milliseconds": step_times[form], "errors": errors, "compressions": compressions}

    print(f"\n{'KL':12s}{'ms/step':>9s}{'compression':>13s}{'range':>16s}{'test error':>12s}{'range':>16s}")
    for name, found in results.items():
        c, e = found["compressions"], [100 * value for value in found["errors"]]
        ranges = f"{statistics.mean(c):13.1f}{min(c):8.1f} - {max(c):5.1f}{statistics.mean(e):10.2f} %"
        print(f"{name:12s}{found['milliseconds']:9.2f}{ranges}{min(e):8.2f} - {max(e):5.2f}")
    write(args, figure, {"results": results})


if __name__ == "__main__":
    start(main)
