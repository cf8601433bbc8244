"""Accuracy, calibration and uncertainty of classifiers: of a network, or of samples from a posterior."""

__all__ = [
    "Uncertainty",
    "entropies",
    "network_log_probs",
    "ood_auroc",
    "sampled_log_probs",
    "sampled_traces",
    "uncertainty",
]

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from .._modules import evaluation_mode
from ..nn.supervised import Supervised
from ..training.loop import logits
from ..training.split import Split


@dataclass(frozen=True)
class Uncertainty:
    r"""Scores of the mean prediction p̄ over the samples, as :func:`uncertainty` returns them; prints as a table.

    References:
        | Verification of Forecasts Expressed in Terms of Probability (Brier, 1950)
        | https://doi.org/10.1175/1520-0493(1950)078%3C0001:VOFEIT%3E2.0.CO;2
        | Obtaining Well Calibrated Probabilities Using Bayesian Binning (Naeini, Cooper, Hauskrecht, 2015)
        | https://doi.org/10.1609/aaai.v29i1.9602

    Args:
        error: The fraction of data whose most probable class is not the label.
        nll: The negative log likelihood :math:`-\frac 1 N \sum_n \log \bar p_{n y_n}`, in nats per example.
        brier: The Brier score :math:`\frac 1 N \sum_{nc} (\bar p_{nc} - [y_n = c])^2`, from 0 to 2.
        calibration_error: The expected calibration error :math:`\sum_b \frac{N_b} N |\mathrm{accuracy}_b -
            \mathrm{confidence}_b|`, from 0 to 1, over 15 bins of equal width in the confidence :math:`\max_c \bar p_c`.
        predictive_entropy: The mean over the data, in nats, see :func:`entropies`.
        mutual_information: Likewise; 0 for a single network.
        ood_auroc: How well the confidence separates out-of-distribution data, see :func:`ood_auroc`; None without.

    Example:
        >>> print(Uncertainty(0.01, 0.03, 0.015, 0.005, 0.06, 0.0))
        error                0.01000
        nll                  0.03000
        brier                0.01500
        calibration error    0.00500
        predictive entropy   0.06000
        mutual information   0.00000
    """

    error: float
    nll: float
    brier: float
    calibration_error: float
    predictive_entropy: float
    mutual_information: float
    ood_auroc: float | None = None

    def __str__(self) -> str:
        found = {name.replace("_", " "): value for name, value in asdict(self).items() if value is not None}
        return "\n".join(f"{name:19s} {value:8.5f}" for name, value in found.items())


@torch.no_grad()
def uncertainty(log_probs: Tensor, labels: Tensor, ood_log_probs: Tensor | None = None) -> Uncertainty:
    """Scores predictions against labels.

    Args:
        log_probs: The log-probabilities of the C classes, by S networks for N data, of shape ``(S, N, C)``.
        labels: The classes, integers from 0 to C - 1, of shape ``(N,)``.
        ood_log_probs: The log-probabilities for out-of-distribution data, of shape ``(S', N', C)``.

    Raises:
        ImportError: If torchmetrics is not installed.
        ValueError: If probabilities are not of that shape or do not sum to 1, or the labels do not fit.

    Example:
        >>> log_probs = torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.3], [0.2, 0.8]]]).log()
        >>> found = uncertainty(log_probs, torch.tensor([0, 1]), ood_log_probs=torch.full((1, 5, 2), 0.5).log())
        >>> found.error, found.ood_auroc
        (0.0, 1.0)
    """
    mean = _mean(log_probs)
    count, classes = mean.shape
    if labels.shape != (count,) or labels.is_floating_point() or labels.min() < 0 or labels.max() >= classes:
        got = f"{labels.dtype} of shape {tuple(labels.shape)}"
        raise ValueError(f"labels: expected {count} integers from 0 to {classes - 1}, but got {got}")
    entropy, information = entropies(log_probs)
    ood_mean = None if ood_log_probs is None else _mean(ood_log_probs, "ood_log_probs")
    labels = labels.long()
    return Uncertainty(
        error=float((mean.argmax(-1) != labels).double().mean()),
        nll=float(F.nll_loss(mean, labels)),
        brier=float((mean.exp() - F.one_hot(labels, classes)).square().sum(-1).mean()),
        calibration_error=_calibration_error(mean, labels),
        predictive_entropy=float(entropy.mean()),
        mutual_information=float(information.mean()),
        ood_auroc=None if ood_mean is None else ood_auroc(-mean.amax(-1), -ood_mean.amax(-1)),
    )


def network_log_probs(network: nn.Module, split: Split, batch_size: int = 1_000) -> Tensor:
    """Returns the log-probabilities that a classifier predicts, in double precision, of shape ``(1, N, C)``.

    The network returns class logits; it is evaluated in evaluation mode and left in the mode it was in.

    Example:
        >>> network_log_probs(nn.Linear(4, 3), Split(torch.rand(5, 4), torch.arange(5))).shape
        torch.Size([1, 5, 3])
    """
    return logits(network, split, batch_size).double().log_softmax(-1)[None]


@torch.no_grad()
def sampled_log_probs(
    model: Supervised, guide: Callable, split: Split, num_samples: int = 20, batch_size: int = 1_000
) -> Tensor:
    """Returns the predictions of S posterior samples for all data, in evaluation mode.

    Args:
        model: A model whose network returns class logits; it is left in the mode it was in.
        guide: Its guide, also one that ``guide.sparsified(summary)`` returns.
        split: The data.
        num_samples: S, the number of samples.
        batch_size: The number of examples in a forward pass.

    Returns:
        The log-probabilities, in double precision, of shape ``(S, N, C)``.

    Raises:
        ValueError: If ``num_samples`` is not positive, or the guide lacks a latent of the model.

    Example:
        >>> bnn = sparsevd.bayesianize(nn.Linear(4, 3))
        >>> model = Supervised(bnn, lambda x: dist.Categorical(logits=x), num_data=100)
        >>> guide, split = sparsevd.AutoSparseNormal(model), Split(torch.rand(5, 4), torch.arange(5))
        >>> sampled_log_probs(model, guide, split, num_samples=2).shape
        torch.Size([2, 5, 3])
    """
    if num_samples <= 0:
        raise ValueError(f"num_samples: expected a positive integer, but got {num_samples!r}")
    parts = split.chunks(min(batch_size, model.num_data))  # the model refuses more than all data
    samples = (sampled_traces(model, guide, parts) for _ in range(num_samples))
    logits = [torch.cat([trace.nodes["_RETURN"]["value"] for trace in traces]) for traces in samples]
    return torch.stack(logits).double().log_softmax(-1)


@torch.no_grad()
def sampled_traces(model: Supervised, guide: Callable, batches: Sequence[tuple[Tensor, Tensor]]) -> list[Any]:
    """Returns the trace of the model on each batch, in evaluation mode, given one sample of the guide."""
    with evaluation_mode(model):
        latents = poutine.trace(guide).get_trace(*batches[0])
        traces = [poutine.trace(poutine.replay(model, trace=latents)).get_trace(*batch) for batch in batches]
    for name, site in traces[0].iter_stochastic_nodes():
        if name not in latents and not site_is_subsample(site):
            raise ValueError(f"{name}: expected this latent of the model in the guide; is it the guide of this model?")
    return traces


def entropies(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns predictive entropy, and mutual information of label and weights, in nats, each of shape ``(N,)``.

    The latter is the part of the former that is due to uncertainty about the weights.

    .. math:: \mathrm H[\bar p_n] = -\sum_c \bar p_{nc} \log \bar p_{nc}, \quad
        \mathrm I_n = \mathrm H[\bar p_n] - \frac 1 S \sum_s \mathrm H[p_{sn}], \quad 0 \log 0 = 0

    References:
        | Bayesian Active Learning for Classification and Preference Learning (Houlsby et al., 2011)
        | https://arxiv.org/abs/1112.5745

    Args:
        log_probs: The log-probabilities, of shape ``(S, N, C)``.

    Example:
        >>> entropies(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).log())
        (tensor([0.6931], dtype=torch.float64), tensor([0.6931], dtype=torch.float64))
    """
    entropy = torch.special.entr(_mean(log_probs).exp()).sum(-1)
    information = entropy - torch.special.entr(log_probs.double().exp()).sum(-1).mean(0)
    return entropy, information.clamp(min=0)  # below 0 by rounding alone


def ood_auroc(scores: Tensor, ood_scores: Tensor) -> float:
    """Returns the area under the ROC curve: how likely out-of-distribution data score higher, where ties count half.

    References:
        | A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks (Hendrycks,
          Gimpel, 2017)
        | https://arxiv.org/abs/1610.02136

    Args:
        scores: The uncertainty of predictions in distribution, of shape ``(N,)``; say, an entropy.
        ood_scores: The same for out-of-distribution data, of shape ``(N',)``.

    Raises:
        ImportError: If torchmetrics is not installed.
        ValueError: If scores are empty, not of one dimension, or NaN.

    Example:
        >>> ood_auroc(torch.tensor([0.1, 0.2]), torch.tensor([0.2, 5.0, 3.0, 0.0]))
        0.6875
    """
    for name, value in (("scores", scores), ("ood_scores", ood_scores)):
        if value.dim() != 1 or not len(value) or value.isnan().any():
            raise ValueError(f"{name}: expected numbers of shape (data,), but got shape {tuple(value.shape)} or NaN")
    both = torch.cat([scores, ood_scores])
    # Ranks, because torchmetrics applies a sigmoid to scores outside of [0, 1], which may tie them.
    values, ranks = both.unique(return_inverse=True)
    is_ood = torch.arange(len(both), device=both.device) >= len(scores)
    return float(_torchmetrics("ood_auroc").binary_auroc(ranks.double() / len(values), is_ood.long()))


def _mean(log_probs: Tensor, name: str = "log_probs") -> Tensor:
    """Checks log-probabilities; returns the log of their mean probabilities over the samples."""
    if log_probs.dim() != 3 or not log_probs.numel():
        raise ValueError(f"{name}: expected the shape (samples, data, classes), but got {tuple(log_probs.shape)}")
    log_probs = log_probs.double()
    if not (log_probs.logsumexp(-1).abs() < 1e-3).all():
        raise ValueError(f"{name}: expected log-probabilities that sum to 1, as logits.log_softmax(-1) does")
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def _calibration_error(log_probs: Tensor, labels: Tensor) -> float:
    # torchmetrics takes probabilities that rounding lifted above 1 for logits, and gives 1 a bin of its own.
    probs = log_probs.exp().clamp(max=1 - torch.finfo(torch.float32).eps)
    return float(_torchmetrics("uncertainty").multiclass_calibration_error(probs, labels, probs.shape[-1], n_bins=15))


def _torchmetrics(user: str) -> Any:
    try:
        from torchmetrics.functional import classification
    except ImportError as error:
        raise ImportError(f'{user}: expected torchmetrics; pip install "pyro-sparsevd[metrics]" installs it') from error
    return classification
