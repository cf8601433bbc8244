"""Weights rounded to multiples of a step."""

__all__ = ["as_float32", "check_steps", "from_multiples", "quantized", "to_multiples"]

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .._modules import copied, require_deterministic


@torch.no_grad()
def quantized(net: nn.Module, steps: Mapping[str, float]) -> nn.Module:
    """Returns a copy of a network with parameters rounded to multiples of their steps, as a quantised file has them."""
    require_deterministic(net)
    check_steps(net, steps)
    net = copied(net)
    for name, step in steps.items():
        parameter = net.get_parameter(name)
        parameter.copy_(from_multiples(to_multiples(name, parameter, step), step, parameter.dtype))
    return net


def check_steps(net: nn.Module, steps: Mapping[str, float]) -> None:
    """Refuses steps that are not positive and finite as float32, or not of a parameter by its first name."""
    known = dict(net.named_parameters())
    for name, step in steps.items():
        if name not in known:
            names = ", ".join(known) or "none"
            raise ValueError(f"steps: expected parameters of the network, of {names}, but got {name!r}")
        _checked_step(name, step)


def to_multiples(name: str, values: Tensor, step: float) -> Tensor:
    """Returns the nearest multiples (int64) of a step, which is rounded to float32 as in a file."""
    if not values.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor to quantise, but got {values.dtype}")
    step = _checked_step(name, step)
    multiples = (values.detach().double() / step).round()
    if not (multiples.abs() < 2**24).all():
        largest = float(values.detach().abs().max())
        raise ValueError(
            f"{name}: expected values below {2**24 * step:g}, 2^24 times the step, but got {largest:g}; use a larger "
            "step, or leave this tensor out of the steps"
        )
    return multiples.long()


def from_multiples(multiples: Tensor, step: float, dtype: torch.dtype) -> Tensor:
    """Returns multiples of a step, which is rounded to float32 as in a file; the products are rounded once."""
    return (multiples.double() * as_float32(step)).to(dtype)


def _checked_step(name: str, step: float) -> float:
    step = as_float32(step)
    if not 0 < step < math.inf:
        raise ValueError(
            f"{name}: expected a positive and finite step, but got {step}; leave the name out to keep its values"
        )
    return step


def as_float32(number: float) -> float:
    """Returns a number rounded to float32; infinity if it is too large."""
    return torch.tensor(number, dtype=torch.float32).item()
