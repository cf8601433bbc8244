"""Loops over all weights in C, one pass each where torch makes one for every operation.

They exist where a compiler was found at installation, and serve contiguous float32 tensors on a CPU. What torch
computes instead differs by rounding, relatively by less than 5e-6. The library is loaded by ctypes and knows nothing of
Python, whose headers not every machine has.
"""

__all__ = ["add_noise", "divergence", "exp", "finish_gradients", "serve"]

import ctypes
import logging
import math
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .._compat import is_zero_tensor, num_dispatch_modes
from .kernels import DAWSON, GROWTH, K1, K2, K3, KERNELS, Kernel, ard

logger = logging.getLogger(__name__)


def serve(*tensors: Tensor | None) -> bool:
    """Tells whether the loops may be used on these tensors; None, for a gradient that is not needed, is refused.

    Nor may they be where torch's operations are compiled, traced or watched, since none of that sees what C writes.
    """
    if _LIBRARY is None or not all(map(_is_plain, tensors)):
        return False
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or num_dispatch_modes() > 0)


def divergence(
    kernel: Kernel, loc: Tensor, variance: Tensor, derivative: Tensor, value: Tensor | None = None
) -> Tensor:
    """Returns twice the sum of a divergence, and writes 2 dKL/da with a = 1/α, and 2 KL if wanted, of each weight."""
    sums = torch.empty(-(-loc.numel() // _CHUNK), dtype=torch.float64, device=loc.device)
    values = None if value is None else value.data_ptr()
    _call("divergence", (loc, variance, derivative), _NUMBERS[kernel], _CONSTANTS, values, sums.data_ptr())
    return sums.sum().to(loc.dtype)


def exp(x: Tensor, out: Tensor) -> Tensor:
    """Returns e to the power of x; where there is no loop, as a power of 2, which torch computes in half the time.

    ``out`` must not overlap ``x``.
    """
    if not serve(x, out):
        return torch.mul(x, 1 / math.log(2), out=out).exp2_()
    _call("exponential", (x, out))
    return out


def add_noise(output: Tensor, variance: Tensor, noise: Tensor) -> None:
    """Adds noise of a variance to an output, in place, and overwrites the variance with ε / √variance.

    A variance below the smallest normal number counts as that.
    """
    _call("add_noise", (output, variance, noise))


def finish_gradients(
    grad: float, grad_loc: Tensor, grad_variance: Tensor, loc: Tensor, variance: Tensor, derivative: Tensor
) -> None:
    """Turns twice the gradient in σ² into that in log σ², and adds the gradients of a divergence, in place.

    ``grad`` is the gradient of the divergence, the same for all weights; ``derivative`` is 2 dKL/da, with a = 1/α.
    """
    _call("finish_gradients", (grad_loc, grad_variance, loc, variance, derivative), grad)


def _is_plain(tensor: Tensor | None) -> bool:
    """Tells whether a tensor's numbers are contiguous in memory, as C reads them."""
    if type(tensor) is not Tensor and type(tensor) is not Parameter:
        return False
    is_own = not (tensor.is_neg() or is_zero_tensor(tensor))
    return is_own and tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()


def _call(loop: str, tensors: Sequence[Tensor], *options: Any) -> None:
    count = tensors[0].numel()
    if any(tensor.numel() != count for tensor in tensors):
        raise ValueError(f"{loop}: expected tensors of one size, but got {[tuple(t.shape) for t in tensors]}")
    threads = torch.get_num_threads() if count >= _LARGE else 1
    getattr(_LIBRARY, loop)(*(tensor.data_ptr() for tensor in tensors), count, threads, *options)


# As in _fused.c.
class _Rational(ctypes.Structure):
    _fields_ = (("terms", c_int32), ("numerator", 16 * c_float), ("denominator", 16 * c_float))


class _Constants(ctypes.Structure):
    _fields_ = (("k", 3 * c_float), ("growth", _Rational), ("dawson", _Rational))


_INTERFACE = 1
# How many tensors a loop takes; after them, the number of their elements and of threads, it takes the options.
_LOOPS: dict[str, tuple[int, list[Any]]] = {
    "divergence": (3, [c_int, ctypes.POINTER(_Constants), c_void_p, c_void_p]),
    "exponential": (2, []),
    "add_noise": (3, []),
    "finish_gradients": (5, [c_float]),
}


def _load() -> ctypes.CDLL | None:
    """Returns the library that was built from the C file as it is, if there is one."""
    spec = PathFinder.find_spec("_fused", [str(Path(__file__).parent)])
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        found = c_int32.in_dll(library, "interface").value
    except (OSError, ValueError) as error:
        logger.debug("%s cannot be used: %s", spec.origin, error)
        return None
    if found != _INTERFACE:
        logger.debug("%s cannot be used: it is of version %d, not %d; install again", spec.origin, found, _INTERFACE)
        return None
    for name, (tensors, options) in _LOOPS.items():
        loop = getattr(library, name)
        loop.argtypes, loop.restype = [*[c_void_p] * tensors, c_int64, c_int, *options], None
    return library


_LIBRARY = _load()
_NUMBERS = {kernel: number for number, kernel in enumerate([*KERNELS.values(), ard])}
_CONSTANTS = _Constants((K1, K2, K3), *((len(of[0]), *of) for of in (GROWTH[torch.float32], DAWSON[torch.float32])))
_CHUNK = c_int32.in_dll(_LIBRARY, "chunk_size").value if _LIBRARY else 0
_LARGE = 2**15  # as for torch's own loops: below this, a second thread costs more than it saves
