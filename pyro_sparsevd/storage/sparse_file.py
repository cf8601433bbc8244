"""Saves a sparse network as one small file, and loads it, without pickle; :mod:`~.container` has the format."""

__all__ = ["StorageError", "load_sparse", "register_architecture", "save_sparse"]

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._modules import require_deterministic
from ..shrink.sparse_linear import check_indices
from .container import DTYPES, Entry, open_file, read_payload, read_table, write_file
from .range_coder import StorageError
from .rounding import check_steps
from .tensors import decode_tensors, encode_tensors


@torch.no_grad()
def save_sparse(
    net: nn.Module,
    path: str | Path,
    *,
    values: torch.dtype | Mapping[str, float] | None = None,
    architecture: str | None = None,
) -> None:
    """Writes the state of a sparse network to a small file, whole or not at all.

    Stored are all tensors of ``net.state_dict()``, buffers too; one that two modules share is stored once. Positions
    and values of what is not zero are entropy-coded. By default nothing but the sign of a
    zero is lost.

    Args:
        net: A deterministic network, such as :func:`~.pruning.prune` returns; it is not changed.
        path: The file. It holds its old content or all of the new at any moment.
        values: How the parameters are stored: as they are; rounded to float16, bfloat16, float32 or float64, where
            theirs is wider; or rounded to multiples of steps, a number for each name, as from
            :func:`~.quantization.quantization_steps`. Parameters without a step and all buffers stay as they are.
        architecture: The name that :func:`register_architecture` was given for the function that makes such a
            network. Then the file can be loaded without a network.

    Raises:
        ImportError: If constriction or safetensors is not installed.
        TypeError: If ``net`` is not a deterministic module, ``values`` is not one of these kinds, or the state holds
            more than tensors.
        ValueError: If a parameter is not finite or cannot be stored like this, or the network is not of the
            architecture. The message names the tensor.
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> net = nn.Linear(100, 10)
        >>> net.weight.data[net.weight.abs() < 0.09] = 0
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_sparse(net, f"{folder}/net.svd")
        ...     loaded = load_sparse(f"{folder}/net.svd", nn.Linear(100, 10))
        >>> torch.equal(loaded.weight, net.weight)
        True
    """
    state = _state(net)
    for name, parameter in net.named_parameters(remove_duplicate=False):
        _require_finite(name, parameter, ValueError)
    entries = _entries(net, state, values)
    if architecture is not None:
        _check_match(entries, _state(_build(architecture)))
    write_file(path, architecture or "", entries, encode_tensors(state, entries))


@torch.no_grad()
def load_sparse(path: str | Path, net: nn.Module | None = None) -> nn.Module:
    """Reads the state of a sparse network.

    The file is checked to its end before anything of the network is changed.

    Args:
        path: A file of :func:`save_sparse`.
        net: The network whose state it is to be, in place, on its device and in its dtypes; or None to make one by
            the registered function whose name is in the file. That uses no random numbers of torch's generator.

    Returns:
        The network.

    Raises:
        ImportError: If constriction or safetensors is not installed.
        TypeError: If ``net`` is neither a deterministic module nor None.
        FileNotFoundError: If there is no such file.
        StorageError: If the file is damaged, of an unknown format or architecture, or of another network: one whose
            dtypes cannot hold its values, or that has one tensor where the file has several, is another. The message
            names the file and, where there is one, the tensor.

    Example:
        >>> import tempfile
        >>> net = nn.Linear(4, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_sparse(net, f"{folder}/net.svd")
        ...     loaded = load_sparse(f"{folder}/net.svd", nn.Linear(4, 3))
        >>> torch.equal(loaded.weight, net.weight)
        True
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise StorageError(f"{path}: expected a file, but it is a folder or a device")
    try:
        with open_file(path) as file:
            architecture, entries = read_table(file)
            net = _build(architecture) if net is None else net
            state = _state(net)
            _check_match(entries, state)
            sizes = (entry.size * entry.stored.itemsize for entry in entries if not entry.is_tied)
            tensors = decode_tensors(read_payload(file, _SLACK + 4 * sum(sizes)), entries)
        values = {name: _converted(name, tensor, state[name]) for name, tensor in tensors.items()}
        _check_values(net, state, values)
    except StorageError as error:
        raise StorageError(f"{path}: {error}") from error
    net.load_state_dict(values)
    return net


def register_architecture(name: str, factory: Callable[[], nn.Module]) -> None:
    """Makes files that name an architecture loadable without a network, in this process.

    Args:
        name: The name.
        factory: A function that returns a new network, of any weights.

    Raises:
        ValueError: If the name is empty or not printable, or stands for another function.

    Example:
        >>> register_architecture("two-three", two_three := lambda: nn.Linear(2, 3))
        >>> register_architecture("two-three", lambda: nn.Linear(3, 2))
        Traceback (most recent call last):
        ...
        ValueError: two-three: expected a new name, but it is that of another function; choose a different one
    """
    if not (name and name.isprintable()):
        raise ValueError(f"name: expected a printable name, but got {name!r}")
    if _ARCHITECTURES.setdefault(name, factory) is not factory:
        raise ValueError(f"{name}: expected a new name, but it is that of another function; choose a different one")


_ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {}
_FLOATS = [dtype for dtype in DTYPES if dtype.is_floating_point]
_SLACK = 2**16  # bytes: the values of tiny tensors may take this more than four times their size
_ADVICE = "load into a network like the one that was saved"


def _build(architecture: str) -> nn.Module:
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES) or "none"
        raise StorageError(
            f"expected a known architecture, of {known}, but got {architecture!r}; pass a network, or call "
            "register_architecture before"
        )
    with torch.random.fork_rng(devices=[]):
        return _ARCHITECTURES[architecture]()


def _state(net: nn.Module) -> dict[str, Tensor]:
    require_deterministic(net)
    state = net.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, but the network's state has a {type(tensor).__name__}")
        if is_lazy(tensor):
            raise TypeError(f"{name}: expected a tensor of a known shape; call the network once on an example before")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name}: expected a dense tensor of data, not complex, but got {tensor.dtype}, {tensor.layout} on "
                f"{tensor.device}; use the network before its weights were converted"
            )
    return state


def _entries(net: nn.Module, state: dict[str, Tensor], values: torch.dtype | Mapping[str, float] | None) -> list[Entry]:
    if isinstance(values, Mapping):
        check_steps(net, values)
    elif not (values is None or any(values is dtype for dtype in _FLOATS)):
        known = ", ".join(map(str, _FLOATS))
        raise TypeError(f"values: expected a floating-point dtype, of {known}, steps or None, but got {values!r}")
    parameters = dict(net.named_parameters())
    entries: list[Entry] = []
    first = _first_names(state)
    numbers = {name: number for number, name in enumerate(state)}
    for name, tensor in state.items():
        dtype, stored, step = tensor.dtype, tensor.dtype, 0.0
        if name in parameters and isinstance(values, Mapping) and name in values:
            stored, step = torch.int32, float(values[name])
        elif name in parameters and isinstance(values, torch.dtype) and values.itemsize < dtype.itemsize:
            stored = values
        same_as = -1 if first[name] == name else numbers[first[name]]
        entries.append(Entry(name, dtype, tuple(tensor.shape), stored, step, same_as))
    return entries


def _first_names(state: dict[str, Tensor]) -> dict[str, str]:
    """Returns, for each tensor, the first name that it has in the state."""
    first: dict[tuple, str] = {}
    names = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        names[name] = first.setdefault(place if tensor.numel() else (name,), name)
    return names


def _check_match(entries: list[Entry], state: dict[str, Tensor]) -> None:
    for name in sorted(state.keys() - {entry.name for entry in entries}):
        raise StorageError(f"{name}: expected this tensor of the network, but it is not in the file; {_ADVICE}")
    for entry in entries:
        if entry.name not in state:
            raise StorageError(f"{entry.name}: expected a tensor that the network has, but it has none; {_ADVICE}")
        tensor = state[entry.name]
        if entry.shape != tuple(tensor.shape):
            raise StorageError(
                f"{entry.name}: expected the network's shape {tuple(tensor.shape)}, but got {entry.shape}; {_ADVICE}"
            )
        if entry.dtype.is_floating_point != tensor.is_floating_point():
            raise StorageError(f"{entry.name}: expected the network's {tensor.dtype}, but got {entry.dtype}; {_ADVICE}")


def _converted(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """Returns a tensor of the file on the device and in the dtype of the network's."""
    result = tensor.to(like)
    held = Tensor.isfinite if tensor.is_floating_point() else Tensor.long
    if not torch.equal(held(result), held(tensor.to(like.device))):
        raise StorageError(f"{name}: expected values of the network's {like.dtype}, but some are beyond it; {_ADVICE}")
    return result


def _check_values(net: nn.Module, state: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, _ in net.named_parameters(remove_duplicate=False):
        if name in values:
            _require_finite(name, values[name], StorageError)
    for name, first in _first_names(state).items():
        if not torch.allclose(values[name], values[first], rtol=0, atol=0, equal_nan=True):
            raise StorageError(
                f"{name}: expected the values of {first}, as the network has one tensor for both, but the file has "
                f"others; {_ADVICE}"
            )
    try:
        check_indices(net, values)
    except ValueError as error:
        raise StorageError(str(error)) from error


def _require_finite(name: str, tensor: Tensor, error: type[ValueError]) -> None:
    if not tensor.isfinite().all():
        count = int((~tensor.isfinite()).sum())
        raise error(f"{name}: expected finite weights, but {count} of {tensor.numel()} are not; train it again")
