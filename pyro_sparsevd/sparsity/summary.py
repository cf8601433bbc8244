"""``sparsify``: which weights a threshold keeps, as masks and a table; :mod:`~.threshold` chooses one."""

__all__ = ["SiteSparsity", "SparsitySummary", "sparse_normal_parts", "sparsify"]

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

import torch
from pyro.infer.autoguide.guides import AutoGuide
from torch import Tensor, nn

from .. import _tables as tables
from ..infer.autoguide import AutoSparseNormal
from ..nn.selection import first_match, require_matches


@dataclass(frozen=True)
class SiteSparsity:
    """How many weights of a site are kept: those with log α up to the threshold; it is ∞ where none are dropped."""

    name: str
    shape: tuple[int, ...]
    kept: int
    threshold: float

    @property
    def total(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that is dropped."""
        return 1 - self.kept / self.total if self.total else 0.0

    @property
    def compression(self) -> float:
        """The number of weights over the number of weights kept."""
        if self.total == 0:
            return 1.0
        return self.total / self.kept if self.kept else math.inf


@dataclass(frozen=True, eq=False)
class SparsitySummary:
    """What :func:`sparsify` found: masks, and a table when printed.

    Args:
        sites: The sites whose weights may be dropped.
        masks: The weights to keep, by the name of the site.
        num_parameters: The number of all latents and parameters of the model, biases and the like included.

    Example:
        >>> print(SparsitySummary((SiteSparsity("w", (10, 10), 20, 3.0),), {}, num_parameters=110))
        site              shape  kept  of weights  dropped %  compression  log alpha <=
        w               10 x 10    20         100      80.00          5.0          3.00
        sparse weights             20         100      80.00          5.0
        all parameters             30         110      72.73          3.7
    """

    sites: tuple[SiteSparsity, ...]
    masks: Mapping[str, Tensor] = field(repr=False)
    num_parameters: int

    @property
    def kept(self) -> int:
        """The number of weights kept."""
        return sum(site.kept for site in self.sites)

    @property
    def total(self) -> int:
        """The number of weights."""
        return sum(site.total for site in self.sites)

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that is dropped."""
        return self._totals()[0].sparsity

    @property
    def compression(self) -> float:
        """The number of weights over the number kept."""
        return self._totals()[0].compression

    @property
    def kept_parameters(self) -> int:
        """The number of all latents and parameters of the model that are left."""
        return self.num_parameters - self.total + self.kept

    def masked(self, site: str, value: Tensor) -> Tensor:
        """Returns a value of a site with its dropped weights at zero; of a site without a mask, as it is."""
        return torch.where(self.masks[site], value, 0) if site in self.masks else value

    def plot(self, *, title: str = "", figure: Any = None) -> Any:
        """Draws how many weights each site keeps, on ``figure`` or a new one, which it returns.

        Example:
            >>> SparsitySummary((SiteSparsity("w", (10, 10), 20, 3.0),), {}, 110).plot().axes[0].get_xlabel()
            'weights'
        """
        from ..plots import kept_weights  # matplotlib takes long to import

        return kept_weights({site.name: (site.kept, site.total) for site in self.sites}, title=title, figure=figure)

    def to_dict(self) -> dict[str, Any]:
        """Returns the sites and both totals as a dictionary of numbers, for a file.

        What may be infinite, which JSON cannot hold, is then None: a threshold, and the compression where nothing is
        kept.

        Example:
            >>> SparsitySummary((), {}, num_parameters=110).to_dict()["all_parameters"]
            {'kept': 110, 'total': 110, 'sparsity': 0.0, 'compression': 1.0}
        """
        more = {site.name: {"shape": list(site.shape), "threshold": _finite(site.threshold)} for site in self.sites}
        sites = {site.name: _counts(site) | more[site.name] for site in self.sites}
        weights, parameters = map(_counts, self._totals())
        return {"sites": sites, "sparse_weights": weights, "all_parameters": parameters}

    def __str__(self) -> str:
        return tables.as_text(self._cells()) + (f"\n{_NOTHING_KEPT}" if self.total and not self.kept else "")

    def _repr_html_(self) -> str:
        return tables.as_html(self._cells()) + (f"<p>{_NOTHING_KEPT}</p>" if self.total and not self.kept else "")

    def _cells(self) -> list[tuple[str, ...]]:
        sites = [(s.name, " x ".join(map(str, s.shape)), *_numbers(s), f"{s.threshold:.2f}") for s in self.sites]
        return [_HEADER, *sites, *((total.name, "", *_numbers(total), "") for total in self._totals())]

    def _totals(self) -> tuple[SiteSparsity, SiteSparsity]:
        """Returns the last rows of the table."""
        return (
            SiteSparsity("sparse weights", (self.total,), self.kept, math.inf),
            SiteSparsity("all parameters", (self.num_parameters,), self.kept_parameters, math.inf),
        )


@torch.no_grad()
def sparsify(guide: AutoGuide, threshold: float | Mapping[str, float] = 3.0) -> SparsitySummary:
    r"""Reads off the posterior which weights to keep: those with log α ≤ threshold.

    The paper's threshold, 3, is a binary dropout rate of 0.95. It is a knob: choose it on validation data, with
    :func:`~.threshold.threshold_sweep`. The signal-to-noise ratio \|θ\|/σ, by which weights with other priors are
    commonly dropped, is α to the power of -½: one below 1 is log α > 0. Where the prior has groups, as that of
    :func:`~.priors.group_normal_jeffreys`, a group is kept or dropped as a whole, by log Σσ² - log Σθ².

    References:
        | Variational Dropout Sparsifies Deep Neural Networks (Molchanov, Ashukha, Vetrov, 2017)
        | https://arxiv.org/abs/1701.05369

    Args:
        guide: An :class:`~.autoguide.AutoSparseNormal`, or an ``AutoGuideList`` with such parts.
        threshold: The largest log α of a weight that is kept: one for all sites whose prior makes them sparse, as
            the log-uniform one does and the normal one does not; or a mapping from the names of sites, with any
            prior, or globs on them to thresholds (the first that is the name or matches it counts), which keeps the
            sites that it leaves out whole.

    Returns:
        The summary.

    Raises:
        TypeError: If the guide has no factorised Gaussian part, or a threshold is not a number.
        ValueError: If a threshold is NaN, or no site of real numbers is of a name in the mapping.

    Example:
        >>> model = lambda: pyro.sample("w", sparsevd.LogUniform().expand([3]).to_event(1))
        >>> guide = sparsevd.AutoSparseNormal(model, init_loc_fn=lambda site: torch.tensor([0.0, 1e-4, 1.0]))
        >>> samples = guide()
        >>> sparsify(guide).masks["w"]
        tensor([False, False,  True])
    """
    parts = sparse_normal_parts(guide)
    thresholds = _thresholds(parts, threshold)
    sites, masks = [], {}
    for part in parts:
        for name, log_alpha in part.site_log_alphas.items():
            if name in thresholds:
                masks[name] = ~(log_alpha > thresholds[name])
                kept = int(masks[name].sum())
                sites.append(SiteSparsity(name, tuple(log_alpha.shape), kept, thresholds[name]))
    of_model = [part.num_model_parameters for part in parts]  # the same model, some of which handlers may hide
    num_parameters = sum(part.num_parameters for part in parts) - sum(of_model) + max(of_model)
    return SparsitySummary(tuple(sites), masks, num_parameters)


def sparse_normal_parts(guide: AutoGuide) -> list[AutoSparseNormal]:
    """Returns the guide itself, or the :class:`~.autoguide.AutoSparseNormal` parts of an ``AutoGuideList``."""
    parts = [m for m in guide.modules() if isinstance(m, AutoSparseNormal)] if isinstance(guide, nn.Module) else []
    if not parts:
        raise TypeError(f"guide: expected an AutoSparseNormal or a list with one, but got {type(guide).__name__}")
    return parts


def _thresholds(parts: list[AutoSparseNormal], threshold: float | Mapping[str, float]) -> dict[str, float]:
    """Returns a threshold for each site to sparsify: those with a sparsifying prior, and those that are named."""
    sparse = [name for part in parts for name in part.sparse_sites]
    real = [name for part in parts for name in part.real_sites]
    if not isinstance(threshold, Mapping | SupportsFloat):
        raise TypeError(f"threshold: expected a number or a mapping, but got {threshold!r}")
    if isinstance(threshold, Mapping):
        require_matches(threshold, real, "threshold: expected sites of real numbers")
        found = {name: threshold[first] for name in real if (first := first_match(threshold, name)) is not None}
    else:
        found = dict.fromkeys(sparse, threshold)
    for name, value in found.items():
        if not isinstance(value, SupportsFloat):
            raise TypeError(f"threshold: expected a number for {name}, but got {value!r}")
        if math.isnan(value):
            raise ValueError(f"threshold: expected a number for {name}, but got NaN")
    return {name: float(found.get(name, math.inf)) for name in real if name in found or name in sparse}


_NOTHING_KEPT = (
    "No weight is kept. Unless the targets do not depend on the inputs, the training lost what there was to learn: "
    "raise the KL weight slowly (LinearWarmup)."
)
_HEADER = ("site", "shape", "kept", "of weights", "dropped %", "compression", "log alpha <=")


def _counts(of: SiteSparsity) -> dict[str, Any]:
    return {"kept": of.kept, "total": of.total, "sparsity": of.sparsity, "compression": _finite(of.compression)}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _numbers(of: SiteSparsity) -> tuple[str, ...]:
    return f"{of.kept:,}", f"{of.total:,}", f"{100 * of.sparsity:.2f}", f"{of.compression:.1f}"
