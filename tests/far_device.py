"""A device without numbers, torch's ``meta``, in the place of an accelerator: what would make the host wait for it?"""

import traceback
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FAR = torch.device("meta")

# Operations whose result, or its shape, depends on numbers that the host must have.
_READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim"}
_COPIES = {"_to_copy", "copy_"}
_FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


class HostWaits(TorchDispatchMode):
    """Counts, by place, what makes the host wait for the far device: reads of its numbers, and copies to and fro.

    A number that is read is 1, a truth value is true; so are all in a copy on the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._calls = _Calls(self)

    @property
    def total(self) -> int:
        return self.places.total()

    def __enter__(self) -> "HostWaits":
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        by_mask = name == "index" and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
        if (name in _READS or by_mask) and tensors[0].device == FAR:
            self.note(name)
            if name in ("_local_scalar_dense", "equal"):
                return (
                    name == "equal" or tensors[0].dtype is torch.bool or (1.0 if tensors[0].is_floating_point() else 1)
                )
        if name == "_to_copy" and tensors[0].device == FAR and torch.device(kwargs.get("device") or FAR) != FAR:
            self.note(name)
            return torch.ones(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        if name not in _COPIES and any(t.device == FAR for t in tensors):
            args, kwargs = tree_map(_as_argument, (args, kwargs))
        result = func(*args, **kwargs)
        if name in _COPIES and len({t.device for t in (result, *tensors)}) > 1:
            self.note(name)
        return result

    def note(self, name: str) -> None:
        own = [f for f in traceback.extract_stack() if f.filename != __file__]
        outside = [f for f in own if "/torch/" not in f.filename or "/distributions/" in f.filename]
        self.places[f"{name}: {outside[-1].filename}:{outside[-1].lineno}: {outside[-1].line}"] += 1


class _Calls(TorchFunctionMode):
    """Notes tensors made on the far device of numbers on the host, which that device does not tell of."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        data = args[-1] if args else None
        if func in _FROM_NUMBERS and result.device == FAR and not isinstance(data, Tensor):
            self.waits.note(func.__name__)
        return result


def _as_argument(value: Any) -> Any:
    """A scalar on the host is an argument of the kernel, which this device's kernels refuse."""
    is_number = isinstance(value, Tensor) and value.device.type == "cpu" and value.dim() == 0
    return torch.empty_like(value, device=FAR) if is_number else value
