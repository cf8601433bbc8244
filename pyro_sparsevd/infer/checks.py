"""Validation of what a bound is given: devices, finite numbers, latents and plates."""

__all__ = [
    "check_auxiliary",
    "check_latent",
    "check_plates",
    "finite_value",
    "is_waited_for",
    "raise_device_error",
    "raise_nonfinite",
]

import inspect
import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from .._compat import tree_leaves
from .._modules import named_leaves


def finite_value(*values: Any) -> float | None:
    """Returns the value of a scalar tensor, if it and all arguments are finite, else None.

    The first of ``values`` is the scalar, or None, which counts as 0; the others are arguments of a model, any objects,
    of which tuples, lists and dictionaries are looked into. An accelerator is waited for once.
    """
    found, *arguments = values
    leaves = (leaf for a in arguments for leaf in ((a,) if isinstance(a, Tensor) else tree_leaves(a)))
    tensors = (leaf.detach() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())
    parts = [part for t in tensors for part in (t.unbind() if t.is_nested else (t,))]
    start = 0.0 if found is None else found.detach()
    # A sum may overflow where its terms are finite, but is much cheaper.
    value = float(sum((0 * part.sum() for part in parts), start=start))
    if math.isfinite(value):
        return value
    value = float(start)
    return value if math.isfinite(value) and all(bool(torch.isfinite(part).all()) for part in parts) else None


def is_waited_for(guide: Callable, args: Any, kwargs: Any) -> bool:
    """Tells whether who reads a number of a pass waits for it: whether its tensors are on an accelerator."""
    of_guide = guide.parameters() if isinstance(guide, nn.Module) else ()
    first = next((leaf for leaf in chain(args, of_guide, tree_leaves(kwargs)) if isinstance(leaf, Tensor)), None)
    return first is not None and first.device.type != "cpu"


def raise_device_error(error: Exception, model: Callable, guide: Callable, args: Any, kwargs: Any) -> None:
    """Raises an error that names an argument, or parameter of the guide, on another device than the model.

    It does so where the error that was raised speaks of devices.
    """
    of_model, of_guide = _named_parameters(model), _named_parameters(guide)
    devices = {value.device for _, value in of_model or of_guide}
    for name, value in [*_named_tensors(model, args, kwargs), *of_guide] if devices else ():
        words = {"device", value.device.type, *(device.type for device in devices)}
        if value.device not in devices and any(word in str(error) for word in words):
            expected = " or ".join(map(str, devices))
            raise ValueError(
                f"{name}: expected a tensor on {expected}, as the model, but it is on {value.device}"
            ) from error


def raise_nonfinite(error: Exception, model: Callable, guide: Callable, args: Any, kwargs: Any) -> None:
    """Raises an error that names the first argument or parameter that is not finite, if there is one."""
    for named, hint in (
        (_named_tensors(model, args, kwargs), "a model that treats them itself needs check_finite=False of its bound"),
        (_named_parameters(model), _OF_STEP),
        (_named_parameters(guide), _OF_STEP),
    ):
        for name, value in named:
            parts = value.unbind() if value.is_nested else (value,)
            if not (value.is_meta or all(bool(torch.isfinite(part).all()) for part in parts)):
                raise ValueError(f"{name}: expected finite numbers, but it holds NaN or infinities; {hint}") from error


def check_latent(name: str, q: Any, p: Any) -> None:
    """Refuses a latent that is enumerated, not reparameterised, or of another shape in the guide than in the model."""
    if any(site["infer"].get("enumerate") or site["infer"].get("_enumerate_dim") is not None for site in (q, p)):
        raise ValueError(
            f"{name}: expected a continuous latent, but it is enumerated; use TraceEnum_ELBO or observe it"
        )
    if not q["fn"].has_rsample:
        raise ValueError(
            f"{name}: expected a reparameterised guide, but {type(q['fn']).__name__} has no rsample; a discrete latent "
            "needs TraceEnum_ELBO, or must be observed or summed out"
        )
    shapes = [(site["fn"].batch_shape, site["fn"].event_shape) for site in (q, p)]
    if shapes[0] != shapes[1] and is_validation_enabled():
        (q_batch, q_event), (p_batch, p_event) = ((tuple(batch), tuple(event)) for batch, event in shapes)
        raise ValueError(
            f"{name}: expected batch shape {p_batch} and event shape {p_event} in the guide, as in the model, but got "
            f"{q_batch} and {q_event}; give both the same plates and .to_event()"
        )


def check_plates(name: str, site: Any) -> None:
    """Refuses a site with a batch dimension that is no plate's, which would be summed, or multiplied out."""
    batch_shape = site["fn"].batch_shape
    if not batch_shape or not is_validation_enabled():
        return
    plates = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    sizes = {plate.dim: plate.size for plate in plates}
    outermost = min(sizes, default=0)  # Pyro allows any size in dimensions to the right of it
    of_dims = zip(range(-len(batch_shape), 0), batch_shape, strict=True)
    # A plate without a size, which Pyro notes as -1, takes any.
    wrong = [dim for dim, size in of_dims if sizes.get(dim, 1 if dim < outermost else size) not in (size, -1)]
    if wrong:
        expected = ", ".join(f"{plate.name} (dimension {plate.dim})" for plate in plates)
        raise ValueError(
            f"{name}: expected a batch of the sizes of its plates ({expected or 'none'}), but got batch shape "
            f"{tuple(batch_shape)}; use .to_event(), or a plate for dimension {wrong[0]}"
        )


def check_auxiliary(name: str, site: Any) -> None:
    """Refuses a site of the guide alone that is not marked as auxiliary, or not reparameterised."""
    if site["is_observed"]:
        return
    if not site["infer"].get("is_auxiliary"):
        raise ValueError(f"{name}: the guide has this site, but the model has none; mark it as auxiliary or remove it")
    if not site["fn"].has_rsample:
        raise ValueError(
            f"{name}: expected a reparameterised auxiliary site, but {type(site['fn']).__name__} has no rsample, and "
            "the gradient would miss a part"
        )


def _named_tensors(model: Callable, args: Any, kwargs: Any) -> list[tuple[str, Tensor]]:
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = []
    names += [f"argument {i}" for i in range(len(names), len(args))]
    return [
        (leaf_name, leaf)
        for name, value in [*zip(names, args, strict=False), *kwargs.items()]
        for leaf_name, leaf in named_leaves(name, value)
        if isinstance(leaf, Tensor)
    ]


def _named_parameters(module: Callable) -> list[tuple[str, Tensor]]:
    return list(module.named_parameters()) if isinstance(module, torch.nn.Module) else []


_OF_STEP = "after a step, the gradient was not finite, whose place torch.autograd.detect_anomaly finds"
