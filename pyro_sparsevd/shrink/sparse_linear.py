"""Linear layers that store and multiply only the weights that are left."""

__all__ = ["SparseLinear", "check_indices", "to_sparse"]

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._modules import copied, require_deterministic


class SparseLinear(nn.Module):
    """An ``nn.Linear`` whose weight is stored in compressed sparse rows (CSR); for inference only.

    Its buffers are dense, so that it is copied, converted and saved as any module. A state loads if it has as many
    weights left.
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        _warn_silently()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().to_sparse_csr()
        # The kernels take 32-bit indices, and would convert others at each call.
        self.register_buffer("crow_indices", weight.crow_indices().int())
        self.register_buffer("col_indices", weight.col_indices().int())
        self.register_buffer("values", weight.values().clone())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The dense weight, computed at each access, for modules that read the weight of one of their layers."""
        return self._csr(self.values).to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the outputs, of shape ``(..., out_features)``, for inputs of shape ``(..., in_features)``."""
        if (dtype := _half_precision(x, self.values)) is None:
            return self._multiplied(x, self.values, self.bias)
        # Autocast does not support sparse weights, and CPUs have no half-precision kernels for them.
        inner = torch.float32 if x.device.type == "cpu" else dtype
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(inner)
            return self._multiplied(x.to(inner), self.values.to(inner), bias).to(dtype)

    def extra_repr(self) -> str:
        """Returns the sizes, for ``repr``."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, kept={self.values.numel()}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _warn_silently()

    def _multiplied(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        # Sparse rows times contiguous dense columns is the fast order of the product.
        columns = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).T.contiguous()
        weight = self._csr(values)
        y = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
        return y.T.reshape(*x.shape[:-1], self.out_features).contiguous()

    def _csr(self, values: Tensor) -> Tensor:
        # Created at each call, which takes microseconds: torch cannot copy or convert modules with CSR tensors.
        size = self.out_features, self.in_features
        return torch.sparse_csr_tensor(self.crow_indices, self.col_indices, values, size, check_invariants=False)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        try:
            self._check_state(state_dict, prefix)
        except ValueError as error:
            lists[-1].append(str(error))  # load_state_dict raises an error with it
        else:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    def _check_state(self, state: Mapping[str, Any], prefix: str) -> None:
        """Refuses indices out of bounds, at which torch would read and write."""
        own = {name: self.get_buffer(name) for name in ("crow_indices", "col_indices", "values")}
        parts = {name: state.get(prefix + name, buffer) for name, buffer in own.items()}
        for name, part in parts.items():
            if part.shape != own[name].shape:
                raise ValueError(
                    f"{prefix}{name}: expected shape {tuple(own[name].shape)}, but got {tuple(part.shape)}; "
                    "load the state of a layer with as many weights left"
                )
        rows, columns = (parts[name].to(self.values.device, torch.int64) for name in ("crow_indices", "col_indices"))
        size = self.out_features, self.in_features
        try:
            torch.sparse_csr_tensor(rows, columns, self.values, size, check_invariants=True)
        except RuntimeError as error:
            raise ValueError(
                f"{prefix}col_indices: expected indices within a weight of {size[0]} x {size[1]}, but {error}"
            ) from error


def to_sparse(net: nn.Module, layout: str = "csr") -> nn.Module:
    """Returns a copy of a sparse network whose linear layers store and multiply only the weights that are not zero.

    It is for inference. Whether it is faster depends on the weights left and the size of the batch: measure it. Layers
    with hooks, or of classes derived from ``nn.Linear``, stay as they are, as all others do.

    Args:
        net: A deterministic network, such as :func:`~.pruning.prune` returns; it is not changed.
        layout: How to store weights; only ``"csr"`` is supported.

    Returns:
        The copy, in which each ``nn.Linear`` is a :class:`SparseLinear`.

    Raises:
        TypeError: If ``net`` is not a deterministic module.
        ValueError: If ``layout`` is another.

    Example:
        >>> linear = nn.Linear(4, 3)
        >>> linear.weight.data[:, 1:] = 0
        >>> to_sparse(linear)
        SparseLinear(4, 3, bias=True, kept=3)
    """
    require_deterministic(net)
    if layout != "csr":
        raise ValueError(f'layout: expected "csr", but got {layout!r}')
    layers = [module for module in net.modules() if type(module) is nn.Linear]
    return copied(net, {m: SparseLinear(m) for m in layers if not (m._forward_hooks or m._forward_pre_hooks)})


def check_indices(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuses a state, whole or in part, with indices out of bounds, as ``load_state_dict`` does when it loads it."""
    for name, module in net.named_modules():
        if isinstance(module, SparseLinear):
            module._check_state(state, f"{name}." if name else "")


def _half_precision(x: Tensor, values: Tensor) -> torch.dtype | None:
    """Returns the half precision that a dense layer would compute in, if it needs handling here."""
    device, dtypes = x.device.type, {x.dtype, values.dtype}
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) if dtypes <= {torch.float32, *_HALVES} else None
    return x.dtype if device == "cpu" and x.dtype in _HALVES and len(dtypes) == 1 else None


_HALVES = torch.float16, torch.bfloat16


def _warn_silently() -> None:
    """Triggers torch's warning about CSR tensors being in beta, once per process, where it is not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()
