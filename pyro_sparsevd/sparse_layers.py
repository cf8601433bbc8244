"""Linear layers that store and multiply only the weights that are left."""

__all__ = ["SparseLinear", "to_sparse"]

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .plain import check_plain


class SparseLinear(nn.Module):
    """An ``nn.Linear`` whose weight is stored in compressed sparse rows (CSR), for inference: nothing of it is trained.

    It holds dense buffers, so it is copied, converted and saved as any module; a state fits as many weights left.

    Args:
        linear: The layer whose non-zero weights to take.

    Example:
        >>> SparseLinear(nn.Linear(4, 3))
        SparseLinear(4, 3, bias=True, kept=12)
    """

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        _warn_unheard()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().to_sparse_csr()
        # What multiplies them has 32-bit indices, and would convert others at each call.
        self.register_buffer("crow_indices", weight.crow_indices().int())
        self.register_buffer("col_indices", weight.col_indices().int())
        self.register_buffer("values", weight.values().clone())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.register_load_state_dict_post_hook(_check)
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew, for modules that read that of a layer of theirs."""
        return self._csr().to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the outputs, of shape ``(..., out_features)``, for inputs of shape ``(..., in_features)``."""
        # Rows of sparse weights times columns of dense inputs, each whole in memory, are the fast way round.
        columns = x.reshape(-1, x.shape[-1]).T.contiguous()
        weight, bias = self._csr(), self.bias
        y = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
        return y.T.reshape(*x.shape[:-1], self.out_features).contiguous()

    def extra_repr(self) -> str:
        """Returns the sizes, for ``repr``."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, kept={self.values.numel()}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _warn_unheard()

    def _csr(self, check: bool = False) -> Tensor:
        # Made at each call, in microseconds: torch neither copies nor converts a module that holds one.
        parts, size = (self.crow_indices, self.col_indices, self.values), (self.out_features, self.in_features)
        return torch.sparse_csr_tensor(*parts, size, check_invariants=check)


def to_sparse(net: nn.Module, layout: str = "csr") -> nn.Module:
    """Returns a copy of a sparse network whose linear layers store and multiply only the weights that are not zero.

    It is for inference. Whether it is faster depends on the weights left and the size of the batch: measure it. Layers
    with hooks, or of classes derived from ``nn.Linear``, stay as they are, as all others do.

    Args:
        net: A plain network, such as :func:`~.pruning.prune` returns; it is not changed.
        layout: How to store weights; ``"csr"`` is what there is.

    Returns:
        The copy, in which each ``nn.Linear`` is a :class:`SparseLinear`.

    Raises:
        TypeError: If ``net`` is not a plain module.
        ValueError: If ``layout`` is another.

    Example:
        >>> linear = nn.Linear(4, 3)
        >>> linear.weight.data[:, 1:] = 0
        >>> to_sparse(linear)
        SparseLinear(4, 3, bias=True, kept=3)
    """
    check_plain(net)
    if layout != "csr":
        raise ValueError(f'layout: expected "csr", but got {layout!r}')
    linear = (m for m in net.modules() if type(m) is nn.Linear and not (m._forward_hooks or m._forward_pre_hooks))
    return copy.deepcopy(net, {id(m): SparseLinear(m) for m in linear})


def _check(layer: SparseLinear, keys: Any) -> None:
    """Refuses indices out of bounds, which torch would read and write at."""
    layer._csr(check=True)


def _warn_unheard() -> None:
    """Makes torch's first CSR tensor of a process, of which it warns, where nobody hears the warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()
