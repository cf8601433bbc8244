"""Accuracy, calibration and uncertainty of predictions."""

__all__ = ["entropies", "ood_auroc", "scores"]

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .predictions import Predictions


@torch.no_grad()
def scores(predictions: Predictions, ood: Predictions | None = None) -> dict[str, float]:
    r"""Scores the mean prediction p̄ over the samples against the targets.

    By name:

    - ``nll``: the negative log likelihood :math:`-\frac 1 N \sum_n \log \frac 1 S \sum_s p(y_n \mid x_n, w_s)`, in
      nats per datum;
    - of discrete targets, ``error``: the fraction that is not the mode of p̄;
    - where they have finitely many values, ``brier``, the Brier score :math:`\frac 1 E \sum_{ec} (\bar p_{ec} -
      [y_e = c])^2`, from 0 to 2; ``calibration_error``, the expected calibration error :math:`\sum_b \frac{E_b} E
      |\mathrm{accuracy}_b - \mathrm{confidence}_b|`, from 0 to 1, over 15 bins of equal width in the confidence
      :math:`\max_c \bar p_c`; ``entropy`` and ``mutual_information``, the means over the targets, see
      :func:`entropies`; and with ``ood``, ``ood_auroc``, how well the confidence separates those data, see
      :func:`ood_auroc`;
    - of real targets, ``rmse``, the root of the mean squared distance of the mean of p̄; ``crps``, the mean of the
      continuous ranked probability score :math:`\mathbb E|Y - y| - \frac 1 2 \mathbb E|Y - Y'|`, in units of the
      targets, where :math:`Y, Y' \sim \bar p`; and ``coverage``, the fraction in the central 90 % interval of p̄.

    The latter two are estimated from the draws, 500 or more of each target. A score that does not exist, as the mean of
    a Cauchy distribution, is NaN.

    References:
        | Verification of Forecasts Expressed in Terms of Probability (Brier, 1950)
        | https://doi.org/10.1175/1520-0493(1950)078%3C0001:VOFEIT%3E2.0.CO;2
        | Strictly Proper Scoring Rules, Prediction, and Estimation (Gneiting, Raftery, 2007)
        | https://doi.org/10.1198/016214506000001437
        | Obtaining Well Calibrated Probabilities Using Bayesian Binning (Naeini, Cooper, Hauskrecht, 2015)
        | https://doi.org/10.1609/aaai.v29i1.9602

    Args:
        predictions: The predictions.
        ood: Those for out-of-distribution data, whose targets count for nothing.

    Returns:
        The scores by name.

    Raises:
        ImportError: If targets have finitely many values and torchmetrics is not installed.
        ValueError: If ``ood`` is given where targets do not have finitely many values.

    Example:
        >>> likelihood, batches = lambda x: dist.Categorical(logits=x), [(torch.rand(50, 4), torch.zeros(50))]
        >>> list(scores(sparsevd.evaluation.network_predictions(nn.Linear(4, 3), likelihood, batches)))
        ['nll', 'error', 'brier', 'calibration_error', 'entropy', 'mutual_information']
    """
    likelihoods = predictions.log_likelihoods
    found = {"nll": math.log(len(likelihoods)) - float(likelihoods.logsumexp(0).mean())}
    error = float(predictions.errors.mean())
    if ood is not None and (predictions.log_probs is None or ood.log_probs is None):
        raise ValueError("ood: expected predictions of classes, but these are of targets with more values than that")
    if predictions.log_probs is not None:
        return found | {"error": error} | _scores_of_classes(predictions.log_probs, predictions.targets, ood)
    if predictions.draws is None:
        return found | {"error": error}
    is_known = math.isfinite(error)  # else there is no expected distance either
    crps = float(_crps(predictions.draws, predictions.targets).mean()) if is_known else math.nan
    below = (predictions.draws <= predictions.targets).double().mean(0)
    return found | {
        "rmse": math.sqrt(error) if is_known else math.nan,
        "crps": crps,
        "coverage": float(((below > 0.05) & (below < 0.95)).double().mean()),
    }


def entropies(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns predictive entropy, and mutual information of target and weights, in nats, each of shape ``(E,)``.

    The latter is the part of the former that is due to uncertainty about the weights.

    .. math:: \mathrm H[\bar p_e] = -\sum_c \bar p_{ec} \log \bar p_{ec}, \quad
        \mathrm I_e = \mathrm H[\bar p_e] - \frac 1 S \sum_s \mathrm H[p_{se}], \quad 0 \log 0 = 0

    References:
        | Bayesian Active Learning for Classification and Preference Learning (Houlsby et al., 2011)
        | https://arxiv.org/abs/1112.5745

    Args:
        log_probs: The log-probabilities, of shape ``(S, E, C)``, as in :class:`~.predictions.Predictions`.

    Raises:
        ValueError: If probabilities are not of that shape or do not sum to 1.

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


def _scores_of_classes(log_probs: Tensor, labels: Tensor, ood: Predictions | None) -> dict[str, float]:
    mean = _mean(log_probs)
    entropy, information = entropies(log_probs)
    found = {
        "brier": float((mean.exp() - F.one_hot(labels, mean.shape[-1])).square().sum(-1).mean()),
        "calibration_error": _calibration_error(mean, labels),
        "entropy": float(entropy.mean()),
        "mutual_information": float(information.mean()),
    }
    if ood is not None and ood.log_probs is not None:
        found["ood_auroc"] = ood_auroc(-mean.amax(-1), -_mean(ood.log_probs).amax(-1))
    return found


def _crps(draws: Tensor, targets: Tensor) -> Tensor:
    """Returns the unbiased estimate of the score from D draws; sorting sums |Y - Y'| over all pairs."""
    count = len(draws)
    ordered = draws.double().sort(0).values
    weights = torch.arange(1 - count, count, 2, device=draws.device).double() / (count * (count - 1))
    return (ordered - targets).abs().mean(0) - torch.tensordot(weights, ordered, 1)


def _mean(log_probs: Tensor) -> Tensor:
    """Checks log-probabilities; returns the log of their mean probabilities over the samples."""
    if log_probs.dim() != 3 or not log_probs.numel():
        raise ValueError(f"log_probs: expected the shape (samples, data, classes), but got {tuple(log_probs.shape)}")
    log_probs = log_probs.double()
    if not (log_probs.logsumexp(-1).abs() < 1e-3).all():
        raise ValueError("log_probs: expected log-probabilities that sum to 1, as logits.log_softmax(-1) does")
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def _calibration_error(log_probs: Tensor, labels: Tensor) -> float:
    # torchmetrics takes probabilities that rounding lifted above 1 for logits, and gives 1 a bin of its own.
    probs = log_probs.exp().clamp(max=1 - torch.finfo(torch.float32).eps)
    return float(_torchmetrics("scores").multiclass_calibration_error(probs, labels, probs.shape[-1], n_bins=15))


def _torchmetrics(user: str) -> Any:
    try:
        from torchmetrics.functional import classification
    except ImportError as error:
        raise ImportError(f'{user}: expected torchmetrics; pip install "pyro-sparsevd[metrics]" installs it') from error
    return classification
