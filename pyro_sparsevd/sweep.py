"""Error, likelihood and compression against the threshold."""

__all__ = ["SweepPoint", "threshold_sweep"]

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoGuide
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .guides import sparse_normal_parts
from .plain import evaluation_mode
from .summary import sparsify


class SweepPoint(NamedTuple):
    """A threshold and what it costs.

    Args:
        threshold: The log α above which weights are dropped, as it was given.
        error: The fraction of targets that are not the mode of their prediction, or for continuous targets the mean
            squared error; NaN for a prediction without mode or mean.
        nll: The mean negative log likelihood of a datum, in nats.
        sparsity: The fraction of the weights that is dropped.
        compression: The number of weights over the number kept.
    """

    threshold: float | Mapping[str, float]
    error: float
    nll: float
    sparsity: float
    compression: float


@torch.no_grad()
def threshold_sweep(
    model: Callable,
    guide: AutoGuide,
    data: Iterable[Sequence[Any]],
    thresholds: Iterable[float | Mapping[str, float]],
) -> list[SweepPoint]:
    """Evaluates the sparse network of the posterior means at each of several thresholds.

    Args:
        model: The model, such as a :class:`~.priors.Supervised`, with an observed site. A module is evaluated in
            evaluation mode and left in the mode it was in.
        guide: Its guide.
        data: Batches, each the arguments of the model: ``[(x, y)]``, or a ``DataLoader``. Take data that were not
            trained on.
        thresholds: The log α above which weights are dropped, each as for :func:`~.summary.sparsify`: one for all
            sites of a sparsifying prior, or by site.

    Returns:
        A point for each threshold, in their order.

    Raises:
        ValueError: If the model observes nothing, ``data`` is empty or a threshold is NaN.

    Example:
        >>> model = svd.Supervised(svd.bayesianize(nn.Linear(4, 3)), lambda x: dist.Categorical(logits=x), 100)
        >>> guide = svd.AutoSparseNormal(model)
        >>> points = threshold_sweep(model, guide, [(torch.randn(9, 4), torch.zeros(9))], [3.0, -20.0])
        >>> [point.sparsity for point in points]
        [0.0, 1.0]
    """
    batches = list(data) if isinstance(data, Iterator) else data
    parts = sparse_normal_parts(guide)
    medians = {name: value for part in parts for name, value in part.median().items()}
    points = []
    with evaluation_mode(model):
        for threshold in thresholds:
            summary = sparsify(guide, threshold)
            error, nll = _evaluate(model, {name: summary.masked(name, m) for name, m in medians.items()}, batches)
            points.append(SweepPoint(threshold, error, nll, summary.sparsity, summary.compression))
    return points


def _evaluate(model: Callable, latents: dict[str, Tensor], batches: Iterable[Sequence[Any]]) -> tuple[float, float]:
    """Returns the mean error and the mean negative log likelihood of the observed data, given the latents."""
    conditioned = _LatentsMessenger(latents)(model)
    error = nll = 0.0
    count = 0
    for batch in batches:
        trace = poutine.trace(conditioned).get_trace(*batch)
        sites = (trace.nodes[name] for name in trace.observation_nodes if name not in latents)
        observed = [site for site in sites if not site["infer"].get("_deterministic")]
        if not observed:
            raise ValueError("model: expected an observed site to evaluate; are the targets among the data?")
        for site in observed:
            fn, value = site["fn"], site["value"]
            log_prob = fn.log_prob(value).double()
            mask = torch.as_tensor(True if site["mask"] is None else site["mask"], device=log_prob.device)
            mask = mask.expand_as(log_prob)
            error += float(_errors(fn, value)[mask].sum())
            nll -= float(log_prob[mask].sum())
            count += int(mask.sum())
    if count == 0:
        raise ValueError("data: expected at least one datum that is not masked, but got none")
    return error / count, nll / count


def _errors(fn: Any, value: Tensor) -> Tensor:
    """Returns the error of each datum, of the batch shape."""
    event_dim = len(fn.event_shape)
    try:
        errors = (fn.mode != value).double() if fn.support.is_discrete else (fn.mean - value).double() ** 2
    except NotImplementedError:
        return value.new_full(value.shape[: value.dim() - event_dim], math.nan, dtype=torch.double)
    return errors.flatten(errors.dim() - event_dim).mean(-1) if event_dim else errors


class _LatentsMessenger(Messenger):
    """Conditions a model on latents, of which a plate that is subsampled takes its part."""

    def __init__(self, latents: dict[str, Tensor]) -> None:
        super().__init__()
        self.latents = latents

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.latents and not msg["is_observed"]:
            event_dim = len(msg["fn"].event_shape)
            msg["value"] = pyro.subsample(self.latents[msg["name"]], event_dim=event_dim)
            msg["is_observed"] = True
