"""A network as an ONNX file, for runtimes without torch."""

__all__ = ["export_onnx"]

import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import validation_kept
from .._files import replacing
from .._modules import (
    batch_tensor,
    call_arguments,
    check_finite,
    evaluation_mode,
    named_leaves,
    require_deterministic,
    run_network,
    tensors_of,
    with_tensors,
)
from ..shrink.sparse_linear import SparseLinear


@torch.no_grad()
def export_onnx(net: nn.Module, path: str | Path, example_input: Any) -> None:
    """Writes a network, as it is in evaluation mode, to an ONNX file.

    The graph of a network with one input and one output calls them ``input`` and ``output``. Several inputs have the
    names of the arguments of ``forward``, and parts of one are ``argument_key`` or ``argument_0``; several outputs are
    ``output_0``, ``output_1``, or ``output_logits`` of a dictionary or dataclass. The batch may be of any size: it is
    the first dimension, called ``batch``, of all inputs that are as long as the first of two or more dimensions. The
    shapes of other inputs are fixed, and arguments that are no tensors have the values of the example. The weights are
    in the file. It is complete or absent at any moment, and there is no other file.

    References:
        | Open Neural Network Exchange, https://onnx.ai

    Args:
        net: A deterministic network, such as :func:`~.pruning.prune` returns; it is not changed.
        path: The file, which is replaced if it is there, in a folder that is there.
        example_input: A batch of one or more inputs, which are a tensor, a tuple or a mapping, as for
            :class:`~.supervised.Supervised`; of those with a batch only type and shape after the first dimension count.

    Raises:
        FileNotFoundError: If the folder is not there.
        ImportError: If onnxscript is not installed.
        RuntimeError: If torch cannot trace the network for batches of any size, such as one with branches on the values
            of its inputs.
        TypeError: If ``net`` is not a deterministic module, or its inputs or outputs are of a kind with no tensors.
        ValueError: If a weight is not finite or not dense, the network fails on ``example_input``, twice as long, or
            does something else with a batch of one, or no output has the batch.

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
        example = _Example(net, example_input)
        with _silence(), validation_kept():
            program = _traced(example)
            _check_a_batch_of_one(example, program)
            torch.onnx.export(
                program,
                (),
                new,
                dynamo=True,
                input_names=example.input_names,
                output_names=example.output_names,
                dynamic_shapes=(tuple({0: "batch"} if has else None for has in example.has_batch),),
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


class _Example:
    """A network and a batch that it accepts, twice as long as it was given."""

    def __init__(self, net: nn.Module, x: Any) -> None:
        size = len(batch_tensor("example_input", x))
        self.net, self.x = net, x
        self.has_batch = [t.shape[:1] == (size,) for t in tensors_of(x)]
        self.tensors = self.batch(lambda t: torch.cat([t, t]))  # checks another size, and is never of size 1
        given = " and ".join(f"{t.dtype} of shape {tuple(t.shape)}" for t in self.tensors)
        try:
            output = run_network(net, with_tensors(x, self.tensors))
        except Exception as error:
            raise ValueError(f"example_input: the network fails on {given}: {error}") from error
        shapes = [tuple(t.shape) for t in tensors_of(output)]
        if not shapes:
            raise TypeError(f"net: expected a network that returns tensors, but got {type(output).__name__}")
        if not any(shape[:1] == (2 * size,) for shape in shapes):
            found = " and ".join(map(str, shapes))
            raise ValueError(f"net: expected an output for each of {2 * size} inputs, but got {found}")
        args, kwargs = call_arguments(net, x)
        arguments = kwargs or inspect.signature(net.forward).bind(*args).arguments
        self.input_names = ["input"] if isinstance(x, Tensor) else _names(arguments)
        self.output_names = _names({"output": output})

    def batch(self, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Returns the tensors of the inputs, those with a batch as a function returns them."""
        return [function(t) if has else t for t, has in zip(tensors_of(self.x), self.has_batch, strict=True)]


def _names(values: Mapping[str, Any]) -> list[str]:
    leaves = [leaf for name, value in values.items() for leaf in named_leaves(name, value)]
    return [re.sub(r"\W+", "_", name).strip("_") for name, leaf in leaves if isinstance(leaf, Tensor)]


class _Flat(nn.Module):
    """A network as a function from the tensors of its inputs to those of its outputs; parameters keep their names."""

    net: nn.Module
    x: Any

    def __init__(self, net: nn.Module, x: Any) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = net._parameters, net._buffers, net._modules
        self.__dict__.update(net=net, x=x, training=net.training)

    def forward(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        output = run_network(self.net, with_tensors(self.x, tensors))
        return (
            (output,) if isinstance(output, Tensor) else tuple(tensors_of(output))
        )  # torch 2.9 traces the former alone


def _traced(example: _Example) -> torch.export.ExportedProgram:
    """Traces for batches of any size; torch.onnx would fix the size where a first try fails."""
    dim = torch.export.Dim("batch")
    shapes = (tuple({0: dim} if has else None for has in example.has_batch),)
    for strict in (False, True):  # the first supports more of Python, the second the length of a tensor
        try:
            flat = _Flat(example.net, example.x)
            return torch.export.export(flat, (tuple(example.tensors),), dynamic_shapes=shapes, strict=strict)
        except Exception as error:
            failure = error
    raise RuntimeError(
        "net: expected a network that torch.export can trace for batches of any size; take that size from x.shape[0], "
        f"and do without branches on values and loops over a batch: {failure}"
    ) from failure


def _check_a_batch_of_one(example: _Example, program: torch.export.ExportedProgram) -> None:
    """Refuses a network that differs for a batch of one; torch.export takes it for a batch of any size."""
    generator = torch.Generator().manual_seed(0)

    def one(t: Tensor) -> Tensor:
        return torch.rand(t[:1].shape, generator=generator).to(t) if t.is_floating_point() else t[:1]

    tensors = tuple(example.batch(one))
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        try:
            expected = _Flat(example.net, example.x)(tensors)
        except Exception:  # such as a graph of one node, which has not the edges of the example
            return
        torch.set_rng_state(state)
        found = program.module()(tensors)
    for a, b in zip(found, expected, strict=True):
        largest = float(b.double().abs().nan_to_num(0, 0, 0).max())  # of those that are finite
        if a.shape != b.shape or not torch.allclose(
            a.double(), b.double(), rtol=1e-2, atol=1e-2 * largest, equal_nan=True
        ):
            raise ValueError(
                "net: expected a network that treats a batch of one as it does larger ones, but its output is another, "
                f"of shape {tuple(b.shape)}; do without branches on x.shape[0]"
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
