"""A network as an ONNX file, for runtimes without torch."""

__all__ = ["export_onnx"]

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import validation_kept
from .._files import replacing
from .._modules import check_finite, evaluation_mode, require_deterministic
from ..shrink.sparse_linear import SparseLinear


@torch.no_grad()
def export_onnx(net: nn.Module, path: str | Path, example_input: Tensor) -> None:
    """Writes a network, as it is in evaluation mode, to an ONNX file.

    The graph has one input, ``input``, and one output, ``output``, whose first dimension, ``batch``, may be of any
    size. The weights are in the file. It is complete or absent at any moment, and there is no other file.

    References:
        | Open Neural Network Exchange, https://onnx.ai

    Args:
        net: A deterministic network, such as :func:`~.pruning.prune` returns; it is not changed.
        path: The file, which is replaced if it is there, in a folder that is there.
        example_input: A batch of one or more inputs; only its type and its shape after the first dimension count.

    Raises:
        FileNotFoundError: If the folder is not there.
        ImportError: If onnxscript is not installed.
        RuntimeError: If torch cannot trace the network for batches of any size, such as one with branches on the values
            of its inputs.
        TypeError: If ``net`` is not a deterministic module, or ``example_input`` or the network's output not a tensor.
        ValueError: If a weight is not finite or not dense, the network fails on ``example_input``, twice as long, or
            does something else with a batch of one.

    Example:
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_onnx(nn.Linear(4, 3), Path(folder) / "net.onnx", torch.zeros(1, 4))
        ...     print(os.listdir(folder))
        ['net.onnx']
    """
    require_deterministic(net)
    _check_dense(net)
    check_finite(net)
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: expected a file in a folder that is there, but {path.parent} is not")
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'export_onnx: expected onnxscript; pip install "pyro-sparsevd[export]" installs it'
        ) from error
    with evaluation_mode(net), replacing(path) as new:
        batch = _checked_batch(net, example_input)
        with _silence(), validation_kept():
            program = _traced(net, batch)
            _check_a_batch_of_one(net, program, batch)
            torch.onnx.export(
                program,
                (),
                new,
                dynamo=True,
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=({0: "batch"},),
                external_data=False,
                verbose=False,
            )


def _check_dense(net: nn.Module) -> None:
    for name, module in net.named_modules():
        if isinstance(module, SparseLinear):
            raise ValueError(
                f"{name or 'net'}: expected dense weights, but got a SparseLinear; export the dense network"
            )
    for name, value in chain(net.named_parameters(), net.named_buffers()):
        if value.layout != torch.strided:
            raise ValueError(f"{name}: expected dense weights, but got {value.layout}; export the dense network")


def _checked_batch(net: nn.Module, example_input: Any) -> Tensor:
    if not isinstance(example_input, Tensor):
        raise TypeError(f"example_input: expected a tensor, but got {type(example_input).__name__}")
    if example_input.dim() == 0 or len(example_input) == 0:
        raise ValueError(f"example_input: expected one or more inputs, but got shape {tuple(example_input.shape)}")
    batch = torch.cat([example_input, example_input])  # checks another batch size, and is never of size 1
    shape = tuple(batch.shape)
    try:
        output = net(batch)
    except Exception as error:
        raise ValueError(f"example_input: the network fails on {batch.dtype} of shape {shape}: {error}") from error
    if not isinstance(output, Tensor):
        raise TypeError(f"net: expected a network that returns one tensor, but got {type(output).__name__}")
    if output.shape[:1] != batch.shape[:1]:
        raise ValueError(f"net: expected an output for each of {len(batch)} inputs, but got {tuple(output.shape)}")
    return batch


def _traced(net: nn.Module, batch: Tensor) -> torch.export.ExportedProgram:
    """Traces for batches of any size; torch.onnx would fix the size where a first try fails."""
    for strict in (False, True):  # the first supports more of Python, the second the length of a tensor
        try:
            return torch.export.export(net, (batch,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict)
        except Exception as error:
            failure = error
    raise RuntimeError(
        "net: expected a network that torch.export can trace for batches of any size; take that size from x.shape[0], "
        f"and do without branches on values and loops over a batch: {failure}"
    ) from failure


def _check_a_batch_of_one(net: nn.Module, program: torch.export.ExportedProgram, batch: Tensor) -> None:
    """Refuses a network that differs for a batch of one; torch.export takes it for a batch of any size."""
    one = batch[:1]
    if one.is_floating_point():
        one = torch.rand(one.shape, generator=torch.Generator().manual_seed(0)).to(one)
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        expected = net(one)
        torch.set_rng_state(state)
        found = program.module()(one)
    largest = float(expected.double().abs().nan_to_num(0, 0, 0).max())  # of those that are finite
    if found.shape != expected.shape or not torch.allclose(
        found.double(), expected.double(), rtol=1e-2, atol=1e-2 * largest, equal_nan=True
    ):
        raise ValueError(
            "net: expected a network that treats a batch of one as it does larger ones, but its output is another, of "
            f"shape {tuple(expected.shape)}; do without branches on x.shape[0]"
        )


@contextmanager
def _silence() -> Iterator[None]:
    """Silences the logging and the warnings of the exporter."""
    logger, level = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
