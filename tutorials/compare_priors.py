"""Priors side by side: error, held-out likelihood, calibration, compression at equal error, and time.

The digits train LeNet-300-100. The other data are for regression: scikit-learn's diabetes data, standardised, and a
small network; or 200 features, 20 of which matter, and a linear model, of which the best compression is 10. There
is no --resume: the comparison is one call that keeps no checkpoints, so a run that was killed starts again.
"""

import argparse
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from common import Data, add_data_options, bare_parser, load, positive, positive_number, prepare, tolerance, write
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import pyro_sparsevd as svd
from pyro_sparsevd import plots
from pyro_sparsevd.compare import compare_priors
from pyro_sparsevd.datasets import Split, hold_out
from pyro_sparsevd.nets import lenet_300_100

PRIORS = {
    "log-uniform": svd.LogUniform(),
    "relevance (ARD)": svd.EmpiricalNormal(),
    "normal, scale learnt": svd.EmpiricalNormal(()),
    "normal": dist.Normal(0.0, 1.0),
    "normal by fan-in": svd.fan_in_normal(),
    "Laplace": dist.Laplace(0.0, 1.0),
    "Student's t": dist.StudentT(3.0, 0.0, 1.0),
    "scale mixture": svd.scale_mixture(),
    "horseshoe": svd.horseshoe(),
    "group normal-Jeffreys, inputs": svd.group_normal_jeffreys((1,)),
}


class GaussianNoise(nn.Module):
    """The likelihood of a regression, with one standard deviation that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, mean: Tensor) -> dist.Normal:
        """Returns the distribution of the targets."""
        return dist.Normal(mean, self.log_scale.exp())


def linear() -> nn.Module:
    """Returns a linear model of 200 features."""
    return nn.Sequential(nn.Linear(200, 1), nn.Flatten(0))


def perceptron() -> nn.Module:
    """Returns a network of 550 weights for 10 features."""
    return nn.Sequential(nn.Linear(10, 50), nn.Tanh(), nn.Linear(50, 1), nn.Flatten(0))


def diabetes() -> tuple[Split, Split]:
    """Returns 332 and 110 patients (Efron et al., 2004): 10 features, and how far the disease went after a year."""
    found = load_diabetes(scaled=False)
    x, y = (torch.tensor(found[name], dtype=torch.float32) for name in ("data", "target"))
    train, test = hold_out(Split(x, y), 110)
    return _standardised(train, train), _standardised(test, train)


def synthetic() -> tuple[Split, Split]:
    """Returns 400 and 1,000 data with 200 features; 20 have weights of ±1 or ±½, the rest none; the noise is 1."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(shape, generator=generator) for shape in ((1400, 200), (1400,)))
    y = x[:, :20] @ torch.tensor([1.0, -1.0, 0.5, -0.5]).repeat(5) + noise
    return Split(x[:400], y[:400]), Split(x[400:], y[400:])


def _standardised(split: Split, by: Split) -> Split:
    x = (split.images - by.images.mean(0)) / by.images.std(0)
    return Split(x, (split.labels - by.labels.mean()) / by.labels.std())


def problem(args: argparse.Namespace) -> tuple[Data, Callable[[], nn.Module], Any]:
    """Returns data, network and likelihood, and settles the options that depend on the data."""
    if args.tolerance is None:  # on the digits hardly any prior but the best one is within a tenth of it
        args.tolerance = 1.0 if args.data == "digits" else 0.1
    if args.data == "digits":
        args.lr = 3e-3 if args.lr is None else args.lr
        return load(args), lenet_300_100, lambda logits: dist.Categorical(logits=logits)
    args.batch_size = 20 if args.batch_size is None else args.batch_size
    args.lr = 1e-2 if args.lr is None else args.lr
    if args.data == "diabetes":
        return prepare(args, diabetes, held_out=66), perceptron, GaussianNoise()
    return prepare(args, synthetic, held_out=100), linear, GaussianNoise()


def parse_args() -> argparse.Namespace:
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
    found = compare_priors(
        network,
        PRIORS,
        likelihood,
        data.train,
        data.validation,
        data.test,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        tolerance=args.tolerance,
        seeds=range(args.seed, args.seed + args.seeds),
    )
    print(f"\n{found}")
    write(args, plots.prior_comparison(found, title=f"priors on {args.data}"), found.to_dict())


if __name__ == "__main__":
    main()
