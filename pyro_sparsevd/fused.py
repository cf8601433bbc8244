"""The loops over all weights that take most of a step's time, in one pass instead of one for each operation of torch.

They are written in C, and are there where a compiler was when the package was installed. They serve contiguous tensors
of float32 on a CPU; for all others, and without them, what torch computes is the same up to rounding.
"""

__all__ = ["add_noise", "divergence", "exp", "finish_gradients", "serve"]

import ctypes
import logging
import math
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .kernels import DAWSON, GROWTH, K1, K2, K3, KERNELS, Kernel, ard

logger = logging.getLogger(__name__)


def serve(*tensors: Tensor | None) -> bool:
    """Tells whether the loops are there, and for these tensors.

    Args:
        *tensors: The tensors, or None.

    Returns:
        Whether they are, which they are not for None.

    Example:
        >>> serve(torch.ones(2, dtype=torch.float64))
        False
    """
    return _LIBRARY is not None and all(map(_is_plain, tensors)) and not torch.compiler.is_compiling()


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
    """
    sums = torch.empty(-(-loc.numel() // _CHUNK), dtype=torch.float64)
    memory = ctypes.c_void_p() if value is None else _pointer(value)
    constants = _NUMBERS[kernel], ctypes.byref(_CONSTANTS)
    _call("divergence", (loc, variance, slope), *constants, memory, _pointer(sums))
    return sums.sum().to(loc.dtype)


def exp(x: Tensor, out: Tensor) -> Tensor:
    """Returns e to the power of x; where there is no loop, as a power of 2, which torch computes in half the time.

    Args:
        x: The exponents.
        out: Overwritten with the result, and returned.

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
        variance: The variance, overwritten with the noise over the standard deviation.
        noise: Standard normal noise.
    """
    _call("add_noise", (output, variance, noise))


def finish_gradients(
    grad: float, grad_loc: Tensor, grad_variance: Tensor, loc: Tensor, variance: Tensor, slope: Tensor
) -> None:
    """Turns twice the gradient in σ² into that in log σ², and adds the gradients of a divergence.

    Args:
        grad: The gradient of the divergence of each weight.
        grad_loc: The gradient in θ, in place.
        grad_variance: Twice the gradient in σ², overwritten with that in log σ².
        loc: The mean θ of each weight.
        variance: σ² of each weight.
        slope: Twice the slope in 1/α of each weight.
    """
    _call("finish_gradients", (grad_loc, grad_variance, loc, variance, slope), ctypes.c_float(grad))


def _is_plain(tensor: Tensor | None) -> bool:
    if type(tensor) is not Tensor and type(tensor) is not Parameter:
        return False
    return tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()


def _call(loop: str, tensors: Sequence[Tensor], *options: Any) -> None:
    count = tensors[0].numel()
    threads = torch.get_num_threads() if count >= _LARGE else 1
    getattr(_LIBRARY, loop)(*map(_pointer, tensors), ctypes.c_int64(count), threads, *options)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _load() -> ctypes.CDLL | None:
    spec = PathFinder.find_spec("_fused", [str(Path(__file__).parent)])
    if spec is None or spec.origin is None:
        return None
    try:
        return ctypes.CDLL(spec.origin)
    except OSError as error:
        logger.debug("%s cannot be loaded: %s", spec.origin, error)
        return None


# As in _fused.c.
class _Rational(ctypes.Structure):
    _fields_ = (("terms", ctypes.c_int32), ("numerator", 16 * ctypes.c_float), ("denominator", 16 * ctypes.c_float))


class _Constants(ctypes.Structure):
    _fields_ = (("k", 3 * ctypes.c_float), ("growth", _Rational), ("dawson", _Rational))


_LIBRARY = _load()
_NUMBERS = {kernel: number for number, kernel in enumerate([*KERNELS.values(), ard])}
_CONSTANTS = _Constants((K1, K2, K3), *((len(of[0]), *of) for of in (GROWTH[torch.float32], DAWSON[torch.float32])))
_CHUNK = ctypes.c_int32.in_dll(_LIBRARY, "chunk_size").value if _LIBRARY else 0
_LARGE = 2**15  # as for torch's own loops: below this, a second thread costs more than it saves
