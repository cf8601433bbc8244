"""The posterior with dropped weights at zero."""

__all__ = ["KeptNormal", "SparsifiedGuide", "check_masks", "kept_parts", "unmasked"]

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution

from .distributions import SparseNormal, unwrap_independent


class SparsifiedGuide(nn.Module):
    """A guide whose dropped weights are zero: what is left after :func:`~.summary.sparsify`.

    It is a copy with parameters of its own: training may go on with the original, or with this one and a new
    optimiser, which has no momentum of the dropped weights; there these stay at zero, cost no divergence, and no step
    changes them.

    Args:
        guide: An :class:`~.guides.AutoSparseNormal`.
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


class KeptNormal(SparseNormal):
    """The posterior of weights of which some are held at zero.

    To a divergence and to a sampled output, these are weights of mean 0 and of the smallest variance of which single
    precision knows the inverse; what is drawn of them is zero.

    Args:
        loc: The means.
        log_variance: The log variances.
        kept: Which weights are not held at zero.

    Example:
        >>> KeptNormal(torch.ones(2), torch.zeros(2), torch.tensor([True, False])).sample() == 0
        tensor([False,  True])
    """

    def __init__(self, loc: Tensor, log_variance: Tensor, kept: Tensor) -> None:
        super().__init__(loc * kept, torch.where(kept, log_variance, -80.0), validate_args=False)
        self.kept = kept

    @property
    def noise_scale(self) -> Tensor:
        """The factor of the noise in a sample, 0 for weights that are held at zero."""
        return super().noise_scale * self.kept

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Samples the weights that are kept; the others are 0."""
        return super().rsample(torch.Size(sample_shape)) * self.kept

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Samples likewise, without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density of each weight, 0 where it is held at zero."""
        return torch.where(self.kept, super().log_prob(value), 0.0)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "KeptNormal":
        """Returns this distribution with its batch shape expanded."""
        new = super().expand(batch_shape, self._get_checked_instance(KeptNormal, _instance))
        new.kept = self.kept.expand(batch_shape)
        return new


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


def unmasked(distribution: Distribution) -> tuple[Any, Tensor | bool]:
    """Returns a distribution without its masks, and what they leave of it.

    Args:
        distribution: Any distribution.

    Returns:
        The distribution, and the mask of the elements of what :func:`~.distributions.unwrap_independent` makes of it.

    Example:
        >>> unmasked(dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(torch.tensor(False)))
        (Independent(Normal(loc: torch.Size([2]), scale: torch.Size([2])), 1), tensor([False]))
    """
    if isinstance(distribution, torch.distributions.Independent):
        base, mask = unmasked(distribution.base_dist)
        if base is distribution.base_dist:
            return distribution, mask
        return base.to_event(distribution.reinterpreted_batch_ndims), mask
    if isinstance(distribution, dist.MaskedDistribution):
        base, mask = unmasked(distribution.base_dist)
        own = distribution._mask
        if isinstance(own, Tensor):
            own = own.reshape(own.shape + (1,) * (len(unwrap_independent(base).batch_shape) - len(base.batch_shape)))
        return base, own & mask
    return distribution, True


def _masked(site: Any, kept: Tensor) -> Any:
    fn: Any = unwrap_independent(site["fn"])
    value = torch.where(kept, site["value"], 1.0)  # where 0 has no density
    return {**site, "fn": fn.mask(kept).to_event(len(site["fn"].event_shape)), "value": value}


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
        mask = mask & q.kept if isinstance(q, KeptNormal) else mask
        msg["fn"] = KeptNormal(q.loc, q.log_variance, mask).to_event(len(fn.event_shape))
