"""Checks that samples can take the place of a network's parameters."""

__all__ = ["check_parameter", "check_references"]

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache, partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .weights import is_reparametrised


def check_parameter(net: nn.Module, name: str) -> None:
    """Refuses a parameter whose samples make no weight: of another class or dtype, or behind a parametrisation."""
    parameter = net.get_parameter(name)
    if type(parameter) is not nn.Parameter and not isinstance(parameter, nn.UninitializedParameter):
        raise ValueError(
            f"{name}: expected an nn.Parameter, but got a {type(parameter).__name__}, of whose methods a sample would "
            "have none; exclude it"
        )
    if not parameter.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point parameter, but got {parameter.dtype}")
    if is_reparametrised(net, name):
        raise ValueError(
            f"{name}: expected a plain parameter, but it is behind a parametrisation (weight_norm, spectral_norm, "
            "pruning, ...), and samples of its parts make no weight; remove that or exclude the parameter"
        )


def check_references(net: nn.Module, names: Collection[str]) -> None:
    """Refuses parameters that a network may read where no sample takes their place.

    Those are parameters that an object or a function holds, too, or that share memory with others.
    """
    chosen = {id(net.get_parameter(name)): name for name in names}
    aliases = [name for name, p in net.named_parameters(remove_duplicate=False) if id(p) in chosen]
    modules = {id(m): name for name in reversed(aliases) for m in _modules_above(net, name)}
    for holder, value, is_copied in _held_elsewhere(net):
        if id(value) in chosen:
            raise ValueError(
                f"{chosen[id(value)]}: expected a parameter that is read from its module, but {holder!r} holds it, "
                "too, where no sample takes its place; read it where it is used, or exclude it"
            )
        if id(value) in modules and not is_copied:
            raise ValueError(
                f"{modules[id(value)]}: expected a parameter that is read from its module, but a function in "
                f"{holder!r} holds the module, and a copy of the network would use the one of this network; make the "
                "function a method, remove it if it is a hook, or exclude the parameter"
            )
    for name, other in _overlaps([*net.named_parameters(), *net.named_buffers()]):
        if not {name, other}.isdisjoint(names):
            raise ValueError(
                f"{other}: expected memory of its own, but it is a view of {name}, and their samples would differ; "
                "share the parameter itself and transpose it where it is used, or exclude both"
            )


def _modules_above(net: nn.Module, name: str) -> Iterator[nn.Module]:
    """Yields the modules that hold a parameter, from the network down."""
    parts = name.split(".")
    yield from (net.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))


def _held_elsewhere(net: nn.Module) -> Iterator[tuple[str, Any, bool]]:
    """Yields the tensors and modules that attributes refer to, each with whether a copy of the network copies it."""
    seen: set[tuple[int, bool]] = set()
    for path, module in net.named_modules():
        own = ("_parameters", "_modules", "_buffers", "_flat_weights" if isinstance(module, nn.RNNBase) else "")
        for attribute, value in vars(module).items():
            todo = [] if attribute in own or isinstance(value, (nn.Module, *_WITHOUT_TENSORS)) else [(value, True)]
            while todo:
                value, is_copied = todo.pop()
                if isinstance(value, Tensor | nn.Module):
                    yield f"{path}.{attribute}" if path else attribute, value, is_copied
                elif (id(value), is_copied) not in seen:
                    seen.add((id(value), is_copied))
                    is_copied = is_copied and not isinstance(value, _NOT_COPIED)
                    todo += [(part, is_copied) for part in _parts(value) if not isinstance(part, _WITHOUT_TENSORS)]


def _parts(value: Any) -> list[Any]:
    """Returns what a value refers to, as far as a network may read a weight there."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset | deque):
        return list(value)
    attributes = getattr(value, "__dict__", None)
    parts = list(attributes.values()) if isinstance(attributes, dict) else []
    if isinstance(value, FunctionType):
        keywords = value.__kwdefaults__ or {}
        parts += [*_contents(value.__closure__ or ()), *(value.__defaults__ or ()), *keywords.values()]
    elif isinstance(value, partial):
        parts += [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, MethodType):
        parts.append(value.__self__)
    return parts


def _contents(cells: Iterable[CellType]) -> Iterator[Any]:
    for cell in cells:
        with suppress(ValueError):  # a variable that is not assigned yet
            yield cell.cell_contents


def _overlaps(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    """Yields the names of tensors whose memory begins within that of another, with the other's first."""
    spans = sorted((str(t.device), t.data_ptr(), t.data_ptr() + _extent(t), name) for name, t in tensors if t.numel())
    widest = ("", 0, 0, "")
    for device, start, end, name in spans:
        if device == widest[0] != "meta" and start < widest[2]:
            yield widest[3], name
        widest = (device, start, end, name) if device != widest[0] or end > widest[2] else widest


def _extent(tensor: Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


# An optimiser holds parameters to change them; no forward pass reads them there.
_WITHOUT_TENSORS = (str, bytes, int, float, complex, type, ModuleType, type(None), Optimizer)
_NOT_COPIED = (FunctionType, type(cache(int)))  # copy.deepcopy returns these as they are
