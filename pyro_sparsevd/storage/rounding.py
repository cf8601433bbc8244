"""Weights as multiples of a step."""

__all__ = ["check_steps", "from_multiples", "quantized", "to_multiples"]

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .._modules import copied, require_deterministic


@torch.no_grad()
def quantized(net: nn.Module, steps: Mapping[str, float]) -> nn.Module:
    """Returns the network with its parameters rounded to multiples of their steps: what a quantised file will hold.

    Args:
        net: A plain network; it is not changed.
        steps: The step of each parameter to round, by its name.

    Returns:
        The rounded network.

    Raises:
        TypeError: If ``net`` is not a plain module.
        ValueError: If a name is not that of a floating-point parameter, a step not positive and finite, or a
            parameter not finite or more than 2^24 steps from zero.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> net.weight.data = torch.tensor([[0.3, -1.1]])
        >>> quantized(net, {"weight": 0.25}).weight.data
        tensor([[ 0.2500, -1.0000]])
    """
    require_deterministic(net)
    check_steps(net, steps)
    net = copied(net)
    for name, step in steps.items():
        parameter = net.get_parameter(name)
        parameter.copy_(from_multiples(to_multiples(name, parameter, step), step, parameter.dtype))
    return net


def check_steps(net: nn.Module, steps: Mapping[str, float]) -> None:
    """Refuses steps that are no steps, or for what is not a parameter of a network.

    Args:
        net: The network.
        steps: The steps by the names of the parameters.

    Raises:
        ValueError: If a name is not that of a parameter; of one that modules share, the first name counts. Or if a
            step is not positive and finite, as float32.

    Example:
        >>> check_steps(nn.Linear(2, 1), {"weight": 0.25})
    """
    known = dict(net.named_parameters())
    for name, step in steps.items():
        if name not in known:
            names = ", ".join(known) or "none"
            raise ValueError(f"steps: expected parameters of the network, of {names}, but got {name!r}")
        _checked_step(name, step)


def to_multiples(name: str, values: Tensor, step: float) -> Tensor:
    """Returns the nearest multiples of a step.

    Args:
        name: The name of the tensor, for errors.
        values: The tensor.
        step: The step; it is rounded to float32, as in a file.

    Returns:
        The multiples, int64.

    Raises:
        ValueError: As for :func:`quantized`.

    Example:
        >>> to_multiples("weight", torch.tensor([0.3, -1.1]), 0.25)
        tensor([ 1, -4])
    """
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
    """Returns multiples of a step.

    Args:
        multiples: The multiples.
        step: The step; it is rounded to float32, as in a file.
        dtype: The dtype of the result.

    Returns:
        The products, rounded once.

    Example:
        >>> from_multiples(torch.tensor([1, -4]), 0.25, torch.float32)
        tensor([ 0.2500, -1.0000])
    """
    return (multiples.double() * _as_float32(step)).to(dtype)


def _checked_step(name: str, step: float) -> float:
    step = _as_float32(step)
    if not 0 < step < math.inf:
        raise ValueError(
            f"{name}: expected a positive and finite step, but got {step}; leave the name out to keep its values"
        )
    return step


def _as_float32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()
