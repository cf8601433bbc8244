"""The log-uniform KL of unsampled weights, whose gradient the backward pass of their sampled outputs adds.

:mod:`~.divergence` has the formulas.
"""

__all__ = ["kl_log_uniform_total"]

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import divergence
from ..ops.divergence import Form
from ..ops.kernels import KERNELS
from .unsampled_weight import UnsampledWeight


def kl_log_uniform_total(weights: Sequence[UnsampledWeight], form: Form) -> Tensor:
    """Returns the sum of :func:`~.divergence.kl_log_uniform` over the elements of several weights, at least one.

    Where an output was sampled instead of a weight, the backward pass of that output adds the gradients of the first KL
    of the weight to its own in place.
    """
    totals, shared = [], []
    for w in weights:
        # An output that was sampled without a gradient passes none on.
        is_shared = w._kl_handle is not None and w._kl_handle.derivative is None and w._kl_zero.requires_grad
        if is_shared and w.base_dist.loc.dtype in (torch.float32, torch.float64):
            shared.append(w)
        else:
            totals.append(divergence.kl_log_uniform_total(w.base_dist.loc, w.log_variance, form))
    if shared:
        totals.append(_shared_kl(shared, form))
    return sum(totals[1:], start=totals[0])


def _shared_kl(weights: list[UnsampledWeight], form: Form) -> Tensor:
    handles = [w._kl_handle for w in weights if w._kl_handle is not None]
    locs = [w.base_dist.loc.detach() for w in weights]
    memory = handles[0].workspace.empty((sum(loc.numel() for loc in locs),), locs[0])
    total, derivatives = divergence.total_and_derivatives(locs, [h.variance for h in handles], KERNELS[form], memory)
    for handle, derivative in zip(handles, derivatives, strict=True):
        handle.derivative = derivative
    return sum((w._kl_zero for w in weights), start=total)
