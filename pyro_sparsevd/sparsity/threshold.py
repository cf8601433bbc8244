"""Error, likelihood and compression at each of several thresholds, and the choice of one."""

__all__ = ["SweepPoint", "choose_threshold", "smoothed_threshold", "threshold_grid", "threshold_sweep"]

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoGuide, AutoGuideList
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from .._modules import device_of, evaluation_mode
from ..infer.autoguide import AutoSparseNormal
from ..nn.batches import moved, pairs
from ..nn.deterministic import deterministic_model
from ..nn.supervised import Supervised
from ..poutine.observations import error_name, errors, observe
from .pruning import prune
from .summary import sparse_normal_parts, sparsify


class SweepPoint(NamedTuple):
    """A threshold and the error, likelihood and compression at it.

    Args:
        threshold: The log α above which weights are dropped, as it was given.
        error: The fraction of targets that are not the mode of their prediction, a vector such as a one-hot one as a
            whole, or for continuous targets the mean squared error; NaN for a prediction without mode or mean. Where
            an example has several targets, each counts that is not masked.
        nll: The mean negative log likelihood of an example, in nats; one observed at several sites counts as several.
        sparsity: The fraction of the weights that is dropped.
        compression: The number of weights over the number kept.
        error_name: What the error is: ``"error"``, a fraction, or ``"mean squared error"``.
    """

    threshold: float | Mapping[str, float]
    error: float
    nll: float
    sparsity: float
    compression: float
    error_name: str = "error"


def threshold_grid(guide: AutoSparseNormal) -> list[float]:
    """Returns thresholds that keep all weights, then a tenth fewer each time, at last none.

    They are those of all real sites together, whatever their prior, to be given as ``{"*": threshold}``.
    """
    log_alphas = torch.cat([guide.site_log_alphas[name].detach().flatten() for name in guide.real_sites]).sort().values
    steps = range(1 + math.ceil(math.log(len(log_alphas)) / -math.log(0.9)))
    kept = dict.fromkeys(math.ceil(len(log_alphas) * 0.9**step) for step in steps)
    found = log_alphas[torch.tensor(list(kept), device=log_alphas.device) - 1].tolist()
    return list(dict.fromkeys([math.inf, *found, -math.inf]))


def smoothed_threshold(nlls: Mapping[float, float], tolerance: float = 0.05, unit: float | None = None) -> float:
    """Returns the smallest threshold at which a smooth curve through noisy likelihoods is close to its minimum.

    ``nlls`` is the mean negative log likelihood of held-out data at each threshold; the best of several noisy ones is
    the best in part by luck. The curve is a quadratic in the threshold, by least squares, or a line where the quadratic
    would bend downwards. Likelihoods more than ``unit`` above the best, of networks that are broken, are left out, as
    are infinite and NaN ones. ``tolerance`` is how far above its minimum over the thresholds the curve may be, as a
    fraction of ``unit``: likelihood given up for compression. The unit is the best likelihood itself; give 1 nat for
    densities, which change by a constant with the unit of the targets. It warns if the threshold is the smallest or the
    largest of several, beyond which a better one may lie.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: expected a fraction that is not negative, but got {tolerance}")
    if not all(map(math.isfinite, nlls)):
        raise ValueError(f"thresholds: expected finite numbers, but got {list(nlls)}")
    finite = {threshold: nlls[threshold] for threshold in sorted(nlls) if math.isfinite(nlls[threshold])}
    if not finite:
        raise ValueError(f"thresholds: expected one with a finite negative log likelihood, but got {dict(nlls)}")
    best = min(finite.values())
    finite = {
        threshold: nll for threshold, nll in finite.items() if nll <= best + (abs(best) if unit is None else unit)
    }
    points = list(finite), list(finite.values())
    coefficients = np.polyfit(*points, min(2, len(finite) - 1))
    if len(coefficients) == 3 and coefficients[0] < 0:
        coefficients = np.polyfit(*points, 1)
    curve = dict(zip(finite, np.polyval(coefficients, points[0]), strict=True))
    lowest = min(curve.values())
    highest = lowest + tolerance * (abs(lowest) if unit is None else unit)
    chosen = next(threshold for threshold, nll in curve.items() if nll <= highest)
    if len(nlls) > 1 and chosen in (min(nlls), max(nlls)):
        end = "smallest" if chosen == min(nlls) else "largest"
        warnings.warn(f"thresholds: chose {chosen:g}, the {end} that was tried; try some beyond it", stacklevel=2)
    return chosen


def choose_threshold(
    model: Supervised,
    guide: AutoSparseNormal,
    data: Iterable[Any] | Callable[[], Iterable[Any]],
    thresholds: Iterable[float],
    *,
    fine_tune: Callable[[nn.Module], nn.Module],
    tolerance: float = 0.05,
) -> float:
    """Returns a threshold whose fine-tuned network predicts held-out data about as well as the best.

    The network of each threshold is pruned and fine-tuned, and :func:`smoothed_threshold` chooses by their mean
    negative log likelihoods.

    Args:
        model: The model.
        guide: Its guide.
        data: Batches ``(x, y)`` of held-out data: a ``DataLoader``, a list, or a function that returns the batches.
        thresholds: The thresholds to try, at least one; seven or more, evenly spaced, leave little to chance.
        fine_tune: A function that trains a pruned network and returns it, or a trained copy; ``lambda net: net`` to
            choose among networks as they are.
        tolerance: How much worse the likelihood may be than the best of the curve: a fraction of it for discrete
            targets, and nats per datum for real ones.

    Returns:
        The threshold.

    Raises:
        ValueError: As of :func:`smoothed_threshold`, or if ``data`` is empty or a batch is no pair.

    Example:
        >>> bnn = sparsevd.bayesianize(nn.Linear(4, 3))
        >>> model = sparsevd.Supervised(bnn, lambda logits: dist.Categorical(logits=logits), num_data=20)
        >>> guide, data = sparsevd.AutoSparseNormal(model), [(torch.rand(20, 4), torch.zeros(20))]
        >>> choose_threshold(model, guide, data, [3.0], fine_tune=lambda network: network)
        3.0
    """
    batches = list(data) if isinstance(data, Iterator) else data
    nlls, kind = {}, ""
    for threshold in thresholds:
        tuned = fine_tune(prune(model.network, guide, sparsify(guide, threshold)))
        with evaluation_mode(tuned):
            of_tuned = deterministic_model(tuned, model.likelihood)
            _, nlls[threshold], kind = _evaluate(of_tuned, batches, device_of(tuned), {})
    return smoothed_threshold(nlls, tolerance, unit=None if kind == "error" else 1.0)


@torch.no_grad()
def threshold_sweep(
    model: Callable,
    guide: AutoGuide,
    data: Iterable[Any] | Callable[[], Iterable[Any]],
    thresholds: Iterable[float | Mapping[str, float]],
) -> list[SweepPoint]:
    """Evaluates the sparse network of the posterior means at each threshold.

    Args:
        model: The model, such as a :class:`~.supervised.Supervised`, with an observed site. A module is evaluated in
            evaluation mode and left in the mode it was in.
        guide: Its guide.
        data: Batches: a ``DataLoader``, a list, or a function that returns the batches. Each is a pair ``(x, y)`` for
            a ``Supervised``, and for another model its arguments: a tuple, or a dictionary by name. They are moved to
            the device of the guide. Use data that the guide was not trained on.
        thresholds: The log α above which weights are dropped, each as for :func:`~.summary.sparsify`: one for all
            sites of a sparsifying prior, or by site.

    Returns:
        A point for each threshold, in their order.

    Raises:
        ValueError: If the model observes nothing or has a latent that the guide has not, targets are of another shape
            than their distribution, ``data`` is empty, a batch is no pair, a threshold is NaN, or there is none.

    Example:
        >>> bnn = sparsevd.bayesianize(nn.Linear(4, 3))
        >>> model = sparsevd.Supervised(bnn, lambda x: dist.Categorical(logits=x), 100)
        >>> guide = sparsevd.AutoSparseNormal(model)
        >>> points = threshold_sweep(model, guide, [(torch.randn(9, 4), torch.zeros(9))], [3.0, -20.0])
        >>> [point.sparsity for point in points]
        [0.0, 1.0]
    """
    batches = list(data) if isinstance(data, Iterator) else data
    parts = sparse_normal_parts(guide)
    medians = {name: value for part in parts for name, value in part.median().items()}
    others = [part for part in guide if part not in parts] if isinstance(guide, AutoGuideList) else []
    device = device_of(guide)
    points = []
    for threshold in thresholds:
        summary = sparsify(guide, threshold)
        sparse = {name: summary.masked(name, m) for name, m in medians.items()}
        error, nll, kind = _evaluate(model, batches, device, sparse, others)
        points.append(SweepPoint(threshold, error, nll, summary.sparsity, summary.compression, kind))
    if not points:
        raise ValueError("thresholds: expected at least one, but got none")
    return points


@torch.no_grad()
def _evaluate(
    model: Callable,
    data: Any,
    device: torch.device | None,
    sparse: dict[str, Tensor],
    others: Iterable[AutoGuide] = (),
) -> tuple[float, float, str]:
    """Returns mean error and mean negative log likelihood of the observed data, and what the error is."""
    error = nll = 0.0
    num_values = num_data = 0
    kind = "error"
    with evaluation_mode(model):
        for args, kwargs in _arguments(model, data, device):
            latents = {name: v for part in others for name, v in part.median(*args, **kwargs).items()} | sparse
            trace = poutine.trace(_LatentsMessenger(latents)(model)).get_trace(*args, **kwargs)
            for site in _observed(trace, latents):
                found = observe([site])
                of_values, kind = errors(found), error_name(found)
                error += float(of_values.sum())
                nll -= float(found.log_likelihoods.sum())
                num_values += len(of_values)
                num_data += found.log_likelihoods.numel()
    if num_data == 0:
        raise ValueError("data: expected at least one datum that is not masked, but got none")
    return error / num_values, nll / num_data, kind


def _arguments(model: Any, data: Any, device: torch.device | None) -> Iterator[tuple[tuple, dict]]:
    """Yields the arguments of the model of each batch, on a device."""
    if isinstance(model, Supervised):
        yield from ((pair, {}) for pair in pairs("data", data, device))
        return
    for batch in data() if callable(data) and not isinstance(data, Iterable) else data:
        found = moved(batch, device)
        if isinstance(found, Mapping):
            yield (), dict(found)
        else:
            yield found if isinstance(found, tuple) else (found,), {}


def _observed(trace: Any, latents: Mapping[str, Tensor]) -> list[Any]:
    sites = (trace.nodes[name] for name in trace.observation_nodes if name not in latents)
    observed = [s for s in sites if not (s["infer"].get("_deterministic") or isinstance(s["fn"], dist.Unit))]
    if not observed:
        raise ValueError("model: expected an observed site to evaluate; are the targets among the data?")
    for name, site in trace.iter_stochastic_nodes():
        if not site_is_subsample(site):
            raise ValueError(f"{name}: expected this latent of the model in the guide, which has no such site")
    return observed


class _LatentsMessenger(Messenger):
    """Conditions a model on values of its latents, subsampled where a plate is."""

    def __init__(self, latents: dict[str, Tensor]) -> None:
        super().__init__()
        self.latents = latents

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.latents and not msg["is_observed"]:
            event_dim = len(msg["fn"].event_shape)
            msg["value"] = pyro.subsample(self.latents[msg["name"]], event_dim=event_dim)
            msg["is_observed"] = True
