"""What the scripts that compress a classifier share: from data to a pruned and fine-tuned network, and a figure."""

import time
from collections.abc import Callable, Mapping
from functools import partial

from common import (
    Data,
    categorical,
    classifier,
    finite,
    in_order,
    log_variance,
    natural,
    positive,
    positive_number,
    run_of,
    tolerance,
    warm_up_part,
    write,
)
from jsonargparse import ArgumentParser, Namespace
from lab.datasets import batches
from lab.recipes import fine_tune, score, train_dense, train_sparse
from matplotlib.figure import Figure
from torch import Tensor, nn

import pyro_sparsevd as sparsevd
from pyro_sparsevd import plots
from pyro_sparsevd.evaluation import sampled_predictions, scores
from pyro_sparsevd.sparsity import choose_threshold

THRESHOLDS = [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0]


def add_options(
    options: ArgumentParser,
    *,
    lr: float,
    init_log_variance: float = -8.0,
    dense_epochs: str = "a quarter of --epochs",
) -> None:
    """Adds the options of the training and of the threshold to a parser, whose help says how long the dense one is."""
    options.add_argument(
        "--lr", type=positive_number, default=lr, help="Adam's: constant, then linear to 0 (%(default)s)"
    )
    options.add_argument(
        "--init-log-variance",
        type=log_variance,
        default=init_log_variance,
        help="where log sigma^2 starts (%(default)s)",
    )
    options.add_argument(
        "--warm-up",
        type=warm_up_part,
        default=0.5,
        help="part of the epochs after which the KL weight is 1",
    )
    options.add_argument("--dense-epochs", type=positive, help=f"epochs of the dense network ({dense_epochs})")
    options.add_argument("--fine-tune", type=natural, help="epochs for the weights that are left (a ninth of --epochs)")
    options.add_argument(
        "--pretrained", action="store_true", help="start from the dense network instead of random initialisation"
    )
    options.add_argument(
        "--kl", choices=["approximate", "exact", "monte_carlo"], default="exact", help="the KL (%(default)s)"
    )
    options.add_argument(
        "--threshold",
        type=finite,
        help="log alpha above which weights are dropped (default: the smallest of several at which a smooth curve "
        "through the held-out likelihoods of the fine-tuned networks is close to its best)",
    )
    options.add_argument(
        "--threshold-tolerance",
        type=tolerance,
        default=0.05,
        help="how far above its minimum that curve of negative log likelihoods may be, as a fraction (%(default)s)",
    )


def prune_and_tune(
    model: sparsevd.Supervised, guide: sparsevd.AutoSparseNormal, data: Data, args: Namespace
) -> tuple[sparsevd.sparsity.SparsitySummary, float, nn.Module, nn.Module]:
    """Returns the summary at the threshold chosen, the threshold, and the pruned and the fine-tuned network.

    Once the threshold is chosen, the validation digits are there to fine-tune with, too.
    """
    tune = partial(fine_tune, likelihood=model.likelihood, epochs=args.fine_tune, run=run_of(args))
    threshold = choose_threshold(
        model,
        guide,
        in_order(data.validation),
        THRESHOLDS if args.threshold is None else [args.threshold],
        fine_tune=partial(tune, batches=batches(data.train, args.batch_size)),
        tolerance=args.threshold_tolerance,
    )
    summary = sparsevd.sparsify(guide, threshold)
    pruned = sparsevd.prune(model.network, guide, summary)
    return summary, threshold, pruned, tune(pruned, batches=batches(data.train_and_validation, args.batch_size))


def draw(
    networks: Mapping[str, nn.Module],
    guide: sparsevd.AutoSparseNormal,
    history: list[dict[str, float]],
    threshold: float,
    baseline: float,
) -> Figure:
    """Draws the first-layer weights of two networks, by what to call them, log alpha, and the training curves."""
    figure = Figure(figsize=(13, 10), layout="constrained")
    *images, histogram, curves = figure.subfigures(2, 2, wspace=0.05, hspace=0.05).flat  # type: ignore[union-attr]
    weights = {title: _first_weights(network) for title, network in networks.items()}
    limit = max(float(weight.abs().max()) for weight in weights.values())
    for part, (title, weight) in zip(images, weights.items(), strict=True):
        plots.weight_images(weight, limit=limit, title=f"weights of the first layer, {title}", figure=part)
    log_alphas = {name: q.log_alpha for name, q in guide.posteriors.items()}
    plots.log_alpha_histogram(log_alphas, threshold=threshold, title="which weights matter", figure=histogram)
    title = "validation error and compression at threshold 3"
    plots.training_curves(history, ["error", "compression"], baseline=baseline, title=title, figure=curves)
    return figure


def _conclusion(summary: sparsevd.sparsity.SparsitySummary, sparse: float, dense: float, count: int) -> str:
    """Says what is left, and whether its error on so many test data differs from the dense network's beyond chance."""
    sd = ((sparse * (1 - sparse) + dense * (1 - dense)) / count) ** 0.5
    bounds = {dense: "no worse", dense + 2 * sd: "worse, but within two standard errors,"}
    verdict = next((words for bound, words in bounds.items() if sparse <= bound), "worse")
    left = f"{summary.kept:,} of {summary.total:,} weights are left, {summary.compression:.0f} times fewer"
    return f"{left}; the test error is {100 * sparse:.2f} %, {verdict} than the dense network's {100 * dense:.2f} %."


def _first_weights(network: nn.Module) -> Tensor:
    """Returns the weights of each unit of the first layer as an image."""
    weight = next(p for p in network.parameters() if p.dim() > 1).detach()
    if weight.dim() > 2:
        return weight.flatten(0, 1)
    side = int(weight.shape[1] ** 0.5)
    return weight.reshape(-1, side, side)


def train(
    args: Namespace, new_network: Callable[[], nn.Module], data: Data, settings: Mapping[str, str | float]
) -> tuple[nn.Module, sparsevd.Supervised, sparsevd.AutoSparseNormal, list[dict[str, float]]]:
    """Returns a dense network, and the model, the guide and the history of a sparse one.

    The settings are the options that determine the network: a run is resumed with the same ones only.
    """
    train = batches(data.train, args.batch_size)
    dense_epochs = args.dense_epochs or max(1, args.epochs // 4)
    args.fine_tune = args.epochs // 9 if args.fine_tune is None else args.fine_tune
    dense = new_network()
    train_dense(dense, categorical, train, epochs=dense_epochs, run=run_of(args, "dense", **settings))
    network = dense if args.pretrained else new_network()
    model, guide = classifier(network, len(data.train), args.init_log_variance)
    of_sparse = {"lr": args.lr, "kl": args.kl, "warm_up": args.warm_up}
    start = {"pretrained": args.pretrained, "init_log_variance": args.init_log_variance}
    history = train_sparse(
        model,
        guide,
        train,
        validation=in_order(data.validation),
        epochs=args.epochs,
        run=run_of(args, "sparse", **settings, **start),
        **of_sparse,
    )
    return dense, model, guide, history


def run(args: Namespace, new_network: Callable[[], nn.Module], data: Data, settings: Mapping[str, str | float]) -> None:
    """Trains a dense and a sparse network, prunes and fine-tunes, reports the errors, and draws."""
    start = time.perf_counter()
    dense, model, guide, history = train(args, new_network, data, settings)
    summary, threshold, pruned, tuned = prune_and_tune(model, guide, data, args)
    mean = sparsevd.prune(model.network, guide, sparsevd.sparsify(guide, float("inf")))
    test = in_order(data.test)
    networks = {"dense network": dense, "posterior mean": mean, "pruned network": pruned, "fine-tuned network": tuned}
    errors = {name: score(network, categorical, test) for name, network in networks.items()}
    errors["20 posterior samples"] = scores(sampled_predictions(model, guide, test))["error"]

    print(f"\n{summary}\n")
    for name, value in errors.items():
        print(f"test error of the {name:22s} {100 * value:5.2f} %")
    seconds = time.perf_counter() - start
    print(f"\nthreshold {threshold:g}, {seconds:.0f} s")
    print(_conclusion(summary, errors["fine-tuned network"], errors["dense network"], len(data.test)))
    before = "dense" if args.pretrained else "dense network, trained separately"
    baseline = score(dense, categorical, in_order(data.validation))
    figure = draw({before: dense, "pruned": tuned}, guide, history, threshold, baseline)
    write(args, figure, {"threshold": threshold, "errors": errors, "seconds": seconds, **summary.to_dict()})
