"""What is left of a site."""

__all__ = ["kept_parts"]

from typing import Any

import torch
from torch import Tensor

from .distributions.util import unwrap_independent


def kept_parts(q: Any, p: Any) -> tuple[Any, Any]:
    """Leaves to the divergence of a site what is not held at zero.

    Args:
        q: The site in a guide.
        p: The site in a model.

    Returns:
        Both, with the other weights masked where their prior has a density for each weight.

    Example:
        >>> site = {"fn": dist.Normal(0.0, 1.0)}
        >>> kept_parts(site, site) == (site, site)
        True
    """
    kept = getattr(unwrap_independent(q["fn"]), "kept", None)
    if kept is None or unwrap_independent(p["fn"]).batch_shape != kept.shape:
        return q, p
    return _masked(q, kept), _masked(p, kept)


def _masked(site: Any, kept: Tensor) -> Any:
    fn: Any = unwrap_independent(site["fn"])
    value = torch.where(kept, site["value"], 1.0)  # where 0 has no density
    return {**site, "fn": fn.mask(kept).to_event(len(site["fn"].event_shape)), "value": value}
