"""What a network, or samples from a posterior, predict of data."""

__all__ = ["Predictions", "network_predictions", "sampled_predictions"]

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from pyro.nn import PyroModule
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution

from .._modules import evaluation_mode, require_deterministic, same_random_numbers
from ..nn.batches import pairs
from ..nn.supervised import Supervised
from ..poutine.observations import Observations, class_log_probs, errors, observe
from ..poutine.trace import Sites, SiteTrace

_NUM_DRAWS = 500


@dataclass(frozen=True, eq=False)
class Predictions:
    """What S networks predict of N data, and the targets; :func:`~.metrics.scores` makes numbers of them.

    A datum has several targets where ``to_event`` of the likelihood makes them one; E is the number of all of them.
    What the likelihood masks is left out.

    Args:
        log_likelihoods: The log density of each datum given each network, in nats, of shape ``(S, N)``.
        targets: The targets, of shape ``(E,)``, or ``(E, ...)`` for vectors; the numbers of the classes where there
            are finitely many values.
        errors: Of shape ``(E,)``; 1 where the mode of the mean prediction is not the target, or for real targets the
            squared distance of its mean; NaN where it has none.
        log_probs: The log-probabilities of the C values that a target may have, of shape ``(S, E, C)``; None where
            they are not finitely many.
        draws: Samples of the mean prediction of real targets, as many of each network, of shape ``(D, E)``, or
            ``(D, E, ...)`` for vectors; None for others.

    Example:
        >>> likelihood = lambda logits: dist.Categorical(logits=logits)
        >>> batches = [(torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])), (torch.rand(2, 4), torch.tensor([2, 0]))]
        >>> found = network_predictions(nn.Linear(4, 3), likelihood, batches)
        >>> found.log_likelihoods.shape, found.log_probs.shape, found.targets
        (torch.Size([1, 7]), torch.Size([1, 7, 3]), tensor([0, 1, 2, 0, 1, 2, 0]))
    """

    log_likelihoods: Tensor
    targets: Tensor
    errors: Tensor
    log_probs: Tensor | None = None
    draws: Tensor | None = None


@torch.no_grad()
def network_predictions(
    network: nn.Module, likelihood: Callable[[Any], Distribution], batches: Iterable[Any] | Callable[[], Iterable[Any]]
) -> Predictions:
    """Returns what a deterministic network predicts.

    Args:
        network: The network; it is evaluated in evaluation mode and left in the mode it was in.
        likelihood: A function from its output to the distribution of the targets, as for
            :class:`~.supervised.Supervised`.
        batches: Pairs (x, y) of inputs and targets: a ``DataLoader``, a list, a generator, or a function that returns
            one of these. The inputs x are a tensor, a tuple of the network's arguments, or a dictionary. They are moved
            to the network's device.

    Returns:
        The predictions, with S = 1. Draws are the same at every call; torch's generators are left as they were.

    Raises:
        TypeError: If the network is Bayesian or no module, or as of ``Supervised`` for inputs and targets.
        ValueError: If there is no batch, or one is no pair; or if targets do not fit the likelihood.

    Example:
        >>> likelihood, batches = sparsevd.GaussianLikelihood(), [(torch.rand(9, 4), torch.rand(9, 1))]
        >>> found = network_predictions(nn.Linear(4, 1), likelihood, batches)
        >>> sorted(sparsevd.evaluation.scores(found))
        ['coverage', 'crps', 'nll', 'rmse']
    """
    require_deterministic(network)
    model = Supervised(_Deterministic(network), likelihood, num_data=1)
    with evaluation_mode(network):
        return _predictions(model, [lambda x, y: {}], batches, _device_of(network))


@torch.no_grad()
def sampled_predictions(
    model: Supervised,
    guide: Callable[..., Any],
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    num_samples: int = 20,
) -> Predictions:
    """Returns what S networks predict whose weights are samples of the posterior, the same for all batches.

    Args:
        model: The model; it is evaluated in evaluation mode and left in the mode it was in.
        guide: Its guide, also one that ``guide.sparsified(summary)`` returns.
        batches: As for :func:`network_predictions`; of any size, also larger than ``num_data``.
        num_samples: S, the number of samples.

    Returns:
        The predictions.

    Raises:
        TypeError: As of ``Supervised`` for inputs and targets.
        ValueError: If ``num_samples`` is not a positive integer, or the guide lacks a latent of the model; and as of
            :func:`network_predictions`.

    Example:
        >>> bnn = sparsevd.bayesianize(nn.Linear(4, 1))
        >>> model = sparsevd.Supervised(bnn, sparsevd.GaussianLikelihood(), num_data=9)
        >>> guide, batches = sparsevd.AutoSparseNormal(model), [(torch.rand(9, 4), torch.rand(9, 1))]
        >>> sampled_predictions(model, guide, batches, num_samples=5).log_likelihoods.shape
        torch.Size([5, 9])
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples <= 0:
        raise ValueError(f"num_samples: expected a positive integer, but got {num_samples!r}")
    return _predictions(model, [guide] * num_samples, batches, _device_of(model, guide))


class _Deterministic(PyroModule):
    """A network without latents, as what ``Supervised`` takes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.__dict__["network"] = network  # past PyroModule, which would put its parameters into Pyro's store

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)


def _device_of(*parts: Any) -> torch.device | None:
    parameters = chain.from_iterable(part.parameters() for part in parts if isinstance(part, nn.Module))
    return next((p.device for p in parameters), None)


def _predictions(model: Supervised, guides: list[Any], batches: Any, device: torch.device | None) -> Predictions:
    """Returns the predictions given a pass of each guide, the same for all batches."""
    found: list[Predictions] = []
    latents: list[Sites] = []
    with evaluation_mode(model):
        for x, y in pairs("batches", batches, device):
            latents = latents or [_sites(guide, {}, x, y) for guide in guides]
            sites = [_sites(model, values, x, y) for values in latents]
            for name in sites[0]:
                _require_latent(name, sites[0][name], latents[0])
            found.append(_of_batch(observe([site["y"] for site in sites]), seed=len(found)))
    return _joined(found)


def _sites(function: Any, values_from: Sites, x: Any, y: Any) -> Sites:
    with SiteTrace(values_from) as trace:
        function(x, y)
    return trace.found


def _require_latent(name: str, site: Any, latents: Sites) -> None:
    if not (site["is_observed"] or name in latents or site_is_subsample(site)):
        raise ValueError(f"{name}: expected this latent of the model in the guide; is it the guide of this model?")


def _of_batch(found: Observations, seed: int) -> Predictions:
    classes = class_log_probs(found)
    if classes is not None:
        log_probs, labels = classes
        wrong = log_probs.logsumexp(0).argmax(-1) != labels
        return Predictions(found.log_likelihoods, labels, wrong.double(), log_probs)
    draws = None if found.parts[0].support.is_discrete else _draws(found, seed)
    return Predictions(found.log_likelihoods, found.select(found.values), errors(found), draws=draws)


def _draws(found: Observations, seed: int) -> Tensor:
    count = math.ceil(_NUM_DRAWS / len(found.parts))
    with same_random_numbers():
        torch.manual_seed(seed)  # so that scores of the same network are the same
        return torch.cat([found.select(part.sample((count,)), leading=1) for part in found.parts])


def _joined(found: list[Predictions]) -> Predictions:
    together: dict[str, Any] = {}
    for name, dim in (("log_likelihoods", 1), ("targets", 0), ("errors", 0), ("log_probs", 1), ("draws", 1)):
        values = [getattr(part, name) for part in found]
        together[name] = None if values[0] is None else torch.cat(values, dim)
    return Predictions(**together)
