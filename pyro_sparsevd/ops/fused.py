"""The loops over all weights that take most of a step's time, in one pass instead of one for each operation of torch.

They are written in C, and are there where a compiler was when the package was installed. They serve contiguous tensors
of float32 on a CPU; for all others, and without them, what torch computes differs by rounding, relatively by less than
5e-6. The library is loaded through ctypes and knows nothing of Python, whose headers not every machine has.
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

from .kernels import DAWSON, GROWTH, K1, K2, K3, KERNELS, Kernel, ard

logger = logging.getLogger(__name__)


def serve(*tensors: Tensor | None) -> bool:
    """Tells whether the loops may be used.

    Args:
        *tensors: What for.

    Returns:
        False without a library, for None, and where something compiles, traces or watches torch's operations, which
        would not see what C writes.

    Example:
        >>> serve(torch.ones(2, dtype=torch.float64))
        False
    """
    return _LIBRARY is not None and all(map(_is_plain, tensors)) and not _are_watched()


def divergence(kernel: Kernel, loc: Tensor, variance: Tensor, slope: Tensor, value: Tensor | None = None) -> Tensor:
    """Evaluates a divergence and its slope for each weight.

    Args:
        kernel: The divergence, one of :mod:`~.kernels`.
        loc: The mean θ of each weight.
        variance: σ² of each weight.
        slope: Overwritten with twice the slope in 1/α of each weight.
        value: Overwritten with twice the divergence of each weight, unless only their sum is wanted.

    Returns:
        The sum of twice the divergences, a scalar.

    Raises:
        ValueError: If the sizes differ.
    """
    sums = torch.empty(-(-loc.numel() // _CHUNK), dtype=torch.float64, device=loc.device)
    values = None if value is None else value.data_ptr()
    _call("divergence", (loc, variance, slope), _NUMBERS[kernel], _CONSTANTS, values, sums.data_ptr())
    return sums.sum().to(loc.dtype)


def exp(x: Tensor, out: Tensor) -> Tensor:
    """Returns e to the power of x; where there is no loop, as a power of 2, which torch computes in half the time.

    Args:
        x: The exponents.
        out: Overwritten with the result, and returned; of the same shape, and other memory.

    Example:
        >>> exp(torch.zeros(2), out=torch.empty(2))
        tensor([1., 1.])
    """
    if not serve(x, out):
        return torch.mul(x, 1 / math.log(2), out=out).exp2_()
    _call("exponential", (x, out))
    return out


def add_noise(output: Tensor, variance: Tensor, noise: Tensor) -> None:
    """Adds noise of a variance to an output.

    Args:
        output: The output, in place.
        variance: The variance, which counts as the smallest normal number where it is below, overwritten with the
            noise over the standard deviation.
        noise: Standard normal noise.

    Raises:
        ValueError: If the sizes differ.
    """
    _call("add_noise", (output, variance, noise))


def finish_gradients(
    grad: float, grad_loc: Tensor, grad_variance: Tensor, loc: Tensor, variance: Tensor, slope: Tensor
) -> None:
    """Turns twice the gradient in σ² into that in log σ², and adds the gradients of a divergence.

    Args:
        grad: The gradient of the divergence, the same for all weights.
        grad_loc: The gradient in θ, in place.
        grad_variance: Twice the gradient in σ², overwritten with that in log σ².
        loc: The mean θ of each weight.
        variance: σ² of each weight.
        slope: Twice the slope in 1/α of each weight.

    Raises:
        ValueError: If the sizes differ.
    """
    _call("finish_gradients", (grad_loc, grad_variance, loc, variance, slope), grad)


def _is_plain(tensor: Tensor | None) -> bool:
    """Tells whether a tensor's numbers lie in memory one behind the other, as what they are."""
    if type(tensor) is not Tensor and type(tensor) is not Parameter:
        return False
    is_own = not (tensor.is_neg() or tensor._is_zerotensor())
    return is_own and tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()


def _are_watched() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


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
