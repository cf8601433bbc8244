"""Checks of what goes into a bound."""

__all__ = ["blame_device", "blame_number", "check_auxiliary", "check_latent", "check_plates", "finite_value"]

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from .._compat import keystr, tree_flatten_with_path, tree_leaves


def finite_value(*values: Any) -> float | None:
    """Returns the sum of what was evaluated, if it and all arguments are finite; an accelerator is waited for once.

    Args:
        *values: The tensor that was evaluated, or none; and arguments of a model, any objects. Tuples, lists and
            dictionaries are looked into.

    Returns:
        The number, or None where a floating-point tensor holds NaN or infinities.

    Example:
        >>> finite_value(torch.tensor(2.0), [torch.ones(3)], "a"), finite_value(None, torch.tensor([torch.nan]))
        (2.0, None)
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


def blame_device(error: Exception, model: Callable, guide: Callable, args: Any, kwargs: Any) -> None:
    """Raises an error that names an argument, or parameter of the guide, on another device than the model, if one is.

    Args:
        error: What was raised.
        model: The model.
        guide: The guide.
        args: What both were called with.
        kwargs: What both were called with.

    Raises:
        ValueError: If the error may come of it.

    Example:
        >>> blame_device(RuntimeError(), lambda x: None, lambda x: None, (torch.zeros(1),), {})
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


def blame_number(error: Exception, model: Callable, guide: Callable, args: Any, kwargs: Any) -> None:
    """Raises an error that names the argument or parameter that is not finite, if one is.

    Args:
        error: What was raised.
        model: The model.
        guide: The guide.
        args: What both were called with.
        kwargs: What both were called with.

    Raises:
        ValueError: If something is not finite.

    Example:
        >>> blame_number(ValueError(), lambda x: None, lambda x: None, (torch.tensor(torch.inf),), {})
        Traceback (most recent call last):
            ...
        ValueError: x: expected finite numbers, but it holds NaN or infinities; a model ...
    """
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
    """Checks that a latent has a reparameterised guide, of the shape that it has in the model.

    Args:
        name: The name of the site.
        q: The site in the guide.
        p: The site in the model.

    Raises:
        ValueError: If it is enumerated, the guide not reparameterised, or the shapes differ.

    Example:
        >>> site = {"infer": {}, "fn": dist.Normal(0.0, 1.0)}
        >>> check_latent("w", site, site)
    """
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
    """Checks that the dimensions of a site's batch are those of its plates; others would be summed, or multiplied out.

    Args:
        name: The name of the site.
        site: The site.

    Raises:
        ValueError: If one is not.

    Example:
        >>> check_plates("w", {"fn": dist.Normal(torch.zeros(3), 1.0).to_event(1), "cond_indep_stack": ()})
    """
    batch_shape = site["fn"].batch_shape
    if not batch_shape or not is_validation_enabled():
        return
    plates = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    sizes = {plate.dim: plate.size for plate in plates}
    outermost = min(sizes, default=0)  # to the right of it, Pyro lets any size be
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
    """Checks that a site of the guide alone is marked as such, and reparameterised.

    Args:
        name: The name of the site.
        site: The site.

    Raises:
        ValueError: If it is not.

    Example:
        >>> site = {"is_observed": False, "infer": {"is_auxiliary": True}, "fn": dist.Normal(0.0, 1.0)}
        >>> check_auxiliary("w", site)
    """
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
        (name + keystr(path), leaf)
        for name, value in [*zip(names, args, strict=False), *kwargs.items()]
        for path, leaf in tree_flatten_with_path(value)[0]
        if isinstance(leaf, Tensor)
    ]


def _named_parameters(module: Callable) -> list[tuple[str, Tensor]]:
    return list(module.named_parameters()) if isinstance(module, torch.nn.Module) else []


_OF_STEP = "after a step, the gradient was not finite, whose place torch.autograd.detect_anomaly finds"
