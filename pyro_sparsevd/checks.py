"""Checks of what goes into a bound."""

__all__ = ["blame", "check_auxiliary", "check_latent", "check_plates", "is_finite"]

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves


def is_finite(*arguments: Any) -> bool:
    """Tells whether arguments of a model hold no floating-point tensor with NaN or infinities.

    Args:
        *arguments: Any objects; tuples, lists and dictionaries are looked into.

    Returns:
        False for such a tensor.

    Example:
        >>> is_finite(torch.tensor([1.0, torch.nan])), is_finite("a"), is_finite(torch.ones(3))
        (False, True, True)
    """
    leaves = (leaf for a in arguments for leaf in ((a,) if isinstance(a, Tensor) else tree_leaves(a)))
    tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())
    parts = (part for t in tensors for part in (t.unbind() if t.is_nested else (t,)))
    # A sum may overflow where its terms are finite, but is much cheaper.
    return all(math.isfinite(t.detach().sum()) or bool(torch.isfinite(t).all()) for t in parts)


def blame(error: ValueError, model: Callable, guide: Callable, args: Any, kwargs: Any) -> None:
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
        >>> blame(ValueError(), lambda x: None, lambda x: None, (torch.tensor(torch.inf),), {})
        Traceback (most recent call last):
            ...
        ValueError: x: expected finite numbers, but it holds NaN or infinities
    """
    arguments = [
        (name + keystr(path), leaf)
        for name, value in _named_arguments(model, args, kwargs)
        for path, leaf in tree_flatten_with_path(value)[0]
    ]
    for name, value in [*arguments, *_named_parameters(model), *_named_parameters(guide)]:
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name}: expected finite numbers, but it holds NaN or infinities") from error


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
    """Checks that a site of the guide alone is marked as such.

    Args:
        name: The name of the site.
        site: The site.

    Raises:
        ValueError: If it is not.

    Example:
        >>> check_auxiliary("w", {"is_observed": False, "infer": {"is_auxiliary": True}})
    """
    if not (site["is_observed"] or site["infer"].get("is_auxiliary")):
        raise ValueError(f"{name}: the guide has this site, but the model has none; mark it as auxiliary or remove it")


def _named_arguments(model: Callable, args: Any, kwargs: Any) -> list[tuple[str, Any]]:
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = []
    names += [f"argument {i}" for i in range(len(names), len(args))]
    return [*zip(names, args, strict=False), *kwargs.items()]


def _named_parameters(module: Callable) -> list[tuple[str, Tensor]]:
    return list(module.named_parameters()) if isinstance(module, torch.nn.Module) else []
