"""Observed values: how likely they are, and how far off is what is predicted of them."""

__all__ = ["Observations", "class_log_probs", "error_name", "errors", "observe"]

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributions.util import unmasked, unwrap_independent
from .trace import density


class Observations(NamedTuple):
    """An observed site given each of S samples of the latents: N data of E values, without those that are masked.

    A datum has several values where ``to_event`` makes them one, and counts unless all of them are masked.
    """

    log_likelihoods: Tensor  # of each datum, in nats, of shape (S, N)
    parts: tuple[Any, ...]  # S distributions of single values, of the shape of ``seen``
    values: Tensor  # of the shape of their samples
    seen: Tensor  # which are not masked

    def select(self, found: Tensor, leading: int = 0) -> Tensor:
        """Returns the numbers of the E values, where those of all values follow a number of leading dimensions."""
        ends = found.shape[:leading], found.shape[leading + self.seen.dim() :]
        return found.reshape(ends[0] + (-1,) + ends[1]).index_select(leading, self.seen.flatten().nonzero()[:, 0])


def observe(sites: Sequence[Any]) -> Observations:
    """Collects an observed site of S traces of a model; raises ValueError for values that do not fit it."""
    log_likelihoods, parts = [], []
    for site in sites:
        fn, value = site["fn"], site["value"]
        log_prob = density(site["name"], fn, value, site["cond_indep_stack"]).double()
        without_masks, own_mask = unmasked(fn)
        part: Any = unwrap_independent(without_masks)
        within = part.batch_shape[len(fn.batch_shape) :]  # the values of a datum
        seen = torch.as_tensor(own_mask, device=log_prob.device).expand(log_prob.shape + within)
        if site["mask"] is not None:
            mask = torch.as_tensor(site["mask"], device=log_prob.device)
            seen = seen & mask.reshape(mask.shape + (1,) * len(within))
        counted = seen.flatten(log_prob.dim()).any(-1) if within else seen
        log_likelihoods.append(log_prob[counted])
        parts.append(part.expand(seen.shape))
    return Observations(torch.stack(log_likelihoods), tuple(parts), value.expand(parts[0].shape()), seen)


def class_log_probs(found: Observations) -> tuple[Tensor, Tensor] | None:
    """Returns the log-probabilities of C classes, of shape (S, E, C), and the E classes that were observed.

    The classes are the values of a distribution of finitely many; None for another one.
    """
    try:
        classes = found.parts[0].enumerate_support(expand=False)
    except NotImplementedError:
        return None
    log_probs = torch.stack([part.log_prob(classes) for part in found.parts])
    matches = classes == found.values
    if found.parts[0].event_shape:
        matches = matches.all(-1)
    if not found.select(matches.any(0)).all():
        raise ValueError("targets: expected classes of the likelihood, but some are none of them")
    labels = found.select(matches.long().argmax(0))
    return found.select(log_probs, leading=2).movedim(1, -1).double().log_softmax(-1), labels


def errors(found: Observations) -> Tensor:
    """Returns the error of what the mean of the S distributions predicts, for each of the E values.

    That is whether its mode is another, a vector as a whole; or for real numbers, the squared distance of its mean, for
    a vector the mean of those of its elements. NaN where there is no mode or mean.
    """
    try:
        if not found.parts[0].support.is_discrete:
            mean = torch.stack([part.mean for part in found.parts]).mean(0)
            return found.select((mean - found.values).double().square())[..., None].flatten(1).mean(-1)
        if (classes := class_log_probs(found)) is not None:
            return (classes[0].logsumexp(0).argmax(-1) != classes[1]).double()
        return found.select((_mode(found.parts) != found.values).double())
    except NotImplementedError:
        return torch.full_like(found.select(found.seen), math.nan, dtype=torch.double)


def error_name(found: Observations) -> str:
    """Returns what the mean of the errors is: ``"error"``, a fraction, or ``"mean squared error"``."""
    try:
        return "error" if found.parts[0].support.is_discrete else "mean squared error"
    except NotImplementedError:
        return "error"


def _mode(parts: tuple[Any, ...]) -> Tensor:
    """Returns the mode of a mixture of unimodal distributions of integers, which is between the modes of the parts.

    Where these are more than 1,000 apart, it is the best of that many integers between them. NotImplementedError if a
    part has none.
    """
    modes = torch.stack([part.mode for part in parts])
    if not modes.isfinite().all():
        raise NotImplementedError("expected modes that are finite")
    lowest, highest = modes.amin(0), modes.amax(0)
    best, best_log_prob = lowest, torch.full_like(lowest, -math.inf)
    count = min(int((highest - lowest).max()), 1_000)
    for step in range(count + 1):
        value = torch.minimum(lowest + ((highest - lowest).max() * (step / max(count, 1))).round(), highest)
        log_prob = torch.stack([part.log_prob(value) for part in parts]).logsumexp(0)
        best = torch.where(log_prob > best_log_prob, value, best)
        best_log_prob = torch.maximum(best_log_prob, log_prob)
    return best
