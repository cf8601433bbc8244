"""Priors side by side: error, held-out scores, compression at equal error, and time.

The digits train LeNet-300-100. The other data are for regression: scikit-learn's diabetes data, standardised, and a
small network; or 200 features, 20 of which matter, and a linear model, of which the best compression is 10.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
from common import (
    Data,
    add_data_options,
    bare_parser,
    load,
    positive,
    positive_number,
    prepare,
    start,
    tolerance,
    write,
)
from jsonargparse import Namespace
from lab.datasets import batches, diabetes, sparse_regression
from lab.nets import lenet_300_100
from torch import nn

import pyro_sparsevd as sparsevd


def linear() -> nn.Module:
    """Returns a linear model of 200 features."""
    return nn.Sequential(nn.Linear(200, 1), nn.Flatten(0))


def perceptron() -> nn.Module:
    """Returns a network of 550 weights for 10 features."""
    return nn.Sequential(nn.Linear(10, 50), nn.Tanh(), nn.Linear(50, 1), nn.Flatten(0))


def problem(args: Namespace) -> tuple[Data, Callable[[], nn.Module], Any]:
    """Returns data, network and likelihood, and settles the options that depend on the data."""
    if args.tolerance is None:  # on the digits hardly any prior but the best one is within a tenth of it
        args.tolerance = 1.0 if args.data == "digits" else 0.1
    if args.data == "digits":
        args.lr = 3e-3 if args.lr is None else args.lr
        return load(args), lenet_300_100, lambda logits: dist.Categorical(logits=logits)
    args.batch_size = 20 if args.batch_size is None else args.batch_size
    args.lr = 1e-2 if args.lr is None else args.lr
    if args.data == "diabetes":
        return prepare(args, diabetes, held_out=66), perceptron, sparsevd.GaussianLikelihood()
    return prepare(args, sparse_regression, held_out=100), linear, sparsevd.GaussianLikelihood()


def parse_args() -> Namespace:
    """Reads the options."""
    options = bare_parser(str(__doc__), epochs=60, out="compare_priors.png")
    add_data_options(options)
    options.add_argument("--data", choices=("digits", "diabetes", "synthetic"), default="digits", help="(%(default)s)")
    options.add_argument("--seeds", type=positive, default=1, help="how many, from --seed (%(default)s)")
    options.add_argument("--lr", type=positive_number, help="learning rate (3e-3 for the digits, else 1e-2)")
    level = "validation error of the sparse networks over the best whole one's, minus 1 (digits 1, else 0.1)"
    options.add_argument("--tolerance", type=tolerance, help=level)
    args = options.parse_args()
    if args.data_dir is not None and args.data != "digits":
        options.error(f"argument --data-dir: expected it with --data digits only, but got it with --data {args.data}")
    return args


def main() -> None:
    """Runs the experiment."""
    args = parse_args()
    data, network, likelihood = problem(args)
    in_order = partial(batches, size=1_000, shuffle=False)
    found = sparsevd.compare_priors(
        lambda: network().to(args.device),
        likelihood,
        batches(data.train, args.batch_size),
        in_order(data.validation),
        test=in_order(data.test),
        priors=sparsevd.nn.PRIOR_NAMES,
        epochs=args.epochs,
        lr=args.lr,
        tolerance=args.tolerance,
        seeds=range(args.seed, args.seed + args.seeds),
    )
    print(f"\n{found}")
    write(args, found.plot(title=f"priors on {args.data}"), found.to_dict())


if __name__ == "__main__":
    start(main)
