"""The posterior with dropped weights at zero."""

__all__ = ["SparsifiedGuide", "check_masks"]

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from ..distributions.sparse_normal import MaskedNormal
from ..distributions.util import unwrap_independent


class SparsifiedGuide(nn.Module):
    """A guide whose dropped weights are zero: what is left after :func:`~.summary.sparsify`.

    It is a copy with parameters of its own: training may go on with the original, or with this one and a new
    optimiser, which has no momentum of the dropped weights; there these stay at zero, cost no divergence, and no step
    changes them.

    Args:
        guide: An :class:`~.autoguide.AutoSparseNormal`.
        masks: The weights to keep, by the name of the site.

    Raises:
        ValueError: If a mask does not fit the guide.

    Example:
        >>> guide = svd.AutoSparseNormal(lambda: pyro.sample("w", svd.LogUniform().expand([3]).to_event(1)))
        >>> samples = guide()
        >>> samples = SparsifiedGuide(guide, {"w": torch.tensor([True, False, True])})()
        >>> samples["w"] == 0
        tensor([False,  True, False])
    """

    def __init__(self, guide: Any, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        check_masks({name: q.batch_shape for name, q in guide.posteriors.items()}, masks)
        self.guide = guide.copy_with_same_model()
        self._mask_numbers = {name: f"mask_{number}" for number, name in enumerate(masks)}
        for name, number in self._mask_numbers.items():
            self.register_buffer(number, masks[name].clone())
            with torch.no_grad():
                self.guide._plain_parameters_of(name)[0].mul_(masks[name])  # so that a new summary drops them, too

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples all latents, those that were dropped as 0.

        Args:
            *args: As for the model.
            **kwargs: As for the model.

        Returns:
            The value of each latent by the name of its site.
        """
        with _MaskMessenger({name: getattr(self, number) for name, number in self._mask_numbers.items()}):
            return self.guide(*args, **kwargs)


def check_masks(shapes: Mapping[str, torch.Size], masks: Mapping[str, Tensor]) -> None:
    """Checks that masks are of a guide's sites.

    Args:
        shapes: The shapes of the guide's sites, by name.
        masks: The weights to keep, by the name of the site.

    Raises:
        ValueError: If a site or a shape differs.

    Example:
        >>> check_masks({"w": torch.Size([3])}, {"v": torch.ones(3)})
        Traceback (most recent call last):
            ...
        ValueError: v: the summary has this site, but the guide has w; are they of the same model?
    """
    for name, mask in masks.items():
        if name not in shapes:
            known = ", ".join(shapes) or "none"
            raise ValueError(
                f"{name}: the summary has this site, but the guide has {known}; are they of the same model?"
            )
        if mask.shape != shapes[name]:
            raise ValueError(
                f"{name}: expected a mask of shape {tuple(shapes[name])}, as in the guide, but the summary has "
                f"{tuple(mask.shape)}; are they of the same model?"
            )


class _MaskMessenger(Messenger):
    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def _pyro_sample(self, msg: Any) -> None:
        mask = self.masks.get(msg["name"])
        if mask is None:
            return
        fn = msg["fn"]
        mask = pyro.subsample(mask, event_dim=len(fn.event_shape))
        q: Any = unwrap_independent(fn)
        mask = mask & q.kept if isinstance(q, MaskedNormal) else mask
        msg["fn"] = MaskedNormal(q.loc, q.log_variance, mask).to_event(len(fn.event_shape))
