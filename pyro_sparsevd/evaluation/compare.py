"""Comparison of priors: predictions on held-out data, and compression, of a network trained under each."""

__all__ = ["compare_priors"]

import copy
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from .._modules import same_random_numbers
from ..infer.autoguide import AutoSparseNormal
from ..infer.elbo import SparseVD_ELBO
from ..nn.bayesianize import Prior, bayesianize
from ..nn.supervised import Supervised
from ..sparsity.threshold import SweepPoint, threshold_grid, threshold_sweep
from ..training.checkpoints import Checkpoint
from ..training.loop import fit_posterior
from ..training.split import Split
from .metrics import scores
from .predictions import sampled_predictions
from .report import PriorComparison, PriorResult


def compare_priors(
    network: Callable[[], nn.Module],
    priors: Mapping[str, Prior | None],
    likelihood: Callable[[Any], Distribution],
    train: Split,
    validation: Split,
    test: Split,
    *,
    epochs: int,
    batch_size: int,
    seeds: Sequence[int] = (0, 1, 2),
    lr: float = 3e-3,
    init_log_variance: float = -8.0,
    num_samples: int = 20,
    error_level: float | None = None,
    tolerance: float = 0.1,
    checkpoints: str | Path | None = None,
) -> PriorComparison:
    r"""Trains a network under each of several priors, all else equal, and scores it on held-out data.

    For each seed, the network starts from the same weights under all priors. The posterior is that of
    :class:`~.autoguide.AutoSparseNormal`, the bound has the exact divergence, and the schedules are those of
    :func:`~.loop.fit_posterior`. The prediction that is scored is the mean over posterior samples,

    .. math:: \log \tfrac1S \sum_s p(y_n \mid x_n, w_s), \quad w_s \sim q

    and the compression is the largest at which the validation error is at most a level that is the same for all
    priors, over thresholds on log α between which a tenth of the weights is dropped. As the level is compared so often,
    the validation error there is slightly optimistic; the test error beside it is not.

    Bounds of different priors are not reported: improper priors, such as the log-uniform one, define theirs up to a
    constant only.

    References:
        | Variational Bayesian dropout: pitfalls and fixes (Hron, Matthews, Ghahramani, 2018)
        | https://arxiv.org/abs/1807.01969

    Args:
        network: A function that returns a new network; called with the same random numbers for all priors of a seed.
        priors: By name, what :func:`~.bayesianize.bayesianize` takes as its prior.
        likelihood: As for :class:`~.supervised.Supervised`. A module with parameters, such as a noise scale, is copied
            for each run, and trained.
        train: The data to train on. The targets of any split may be real numbers.
        validation: The data to choose thresholds on.
        test: The data to report.
        epochs: How many times to go through the training data.
        batch_size: The number of examples in a step.
        seeds: The seeds.
        lr: The learning rate.
        init_log_variance: The initial log σ² of every latent, whatever its prior.
        num_samples: S, the number of posterior samples.
        error_level: The largest validation error that a sparse network may have; by default, for each seed,
            (1 + tolerance) times the smallest that any prior has with nothing dropped.
        tolerance: See ``error_level``.
        checkpoints: A folder, made if need be, for a checkpoint of each training, from which it resumes.

    Returns:
        The results. Torch's generators and Pyro's parameter store are left as they were.

    Raises:
        TypeError: If an argument is of another type than these.
        ValueError: If there is no prior or seed, a seed is twice, a split is empty, a number is out of range, or a
            prior does not fit the network; all before anything is trained.
        CheckpointError: If a file in ``checkpoints`` is of other priors, options or data, or of a network or a
            likelihood that gives the data another density before it is trained.
        ImportError: If the likelihood is categorical and torchmetrics is not installed.

    Example:
        >>> split = Split(torch.randn(40, 4), torch.randn(40))
        >>> network = lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
        >>> priors = {"log-uniform": sparsevd.LogUniform(), "normal": dist.Normal(0.0, 1.0)}
        >>> noisy = lambda mean: dist.Normal(mean, 1.0)
        >>> found = compare_priors(network, priors, noisy, split, split, split, epochs=2, batch_size=20, seeds=[0])
        >>> [(result.prior, result.seed) for result in found.results]
        [('log-uniform', 0), ('normal', 0)]
    """
    _check_network_and_priors(network, priors)
    _check_data_and_numbers(
        {"train": train, "validation": validation, "test": test},
        {"epochs": epochs, "batch_size": batch_size, "num_samples": num_samples},
        {"tolerance": tolerance, **({} if error_level is None else {"error_level": error_level})},
        seeds,
    )
    options = {"epochs": epochs, "batch_size": batch_size, "lr": float(lr)}
    folder = None if checkpoints is None else Path(checkpoints)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    make = partial(_model_and_guide, network, likelihood, train, init_log_variance)
    results: list[PriorResult] = []
    with same_random_numbers(), pyro.get_param_store().scope():
        error_name = _try_all(make, priors, seeds[0], validation)
        for seed in seeds:
            runs: list[_Run] = []
            for name, prior in priors.items():
                model, guide = make(prior, seed)
                kept = None
                if folder is not None:
                    settings = _settings(name, prior, model, guide, train, options)
                    kept = Checkpoint(folder / f"{len(runs)}-{seed}.pt", settings)
                seconds = _train(model, guide, train, options, kept)
                points = _sweep(model, guide, validation, threshold_grid(guide))
                runs.append(_Run(name, model, guide, seconds, points))
            errors = [run.points[math.inf].error for run in runs]
            best = min((error for error in errors if not math.isnan(error)), default=math.nan)
            level = (1 + tolerance) * best if error_level is None else error_level
            results += [_result(run, seed, level, test, num_samples) for run in runs]
    return PriorComparison(tuple(results), error_name)


class _Run(NamedTuple):
    prior: str
    model: Supervised
    guide: AutoSparseNormal
    seconds_per_step: float
    points: dict[float, SweepPoint]


def _check_network_and_priors(network: Any, priors: Any) -> None:
    if isinstance(network, nn.Module) or not callable(network):
        raise TypeError(f"network: expected a function that returns a new network, but got {type(network).__name__}")
    if not isinstance(priors, Mapping):
        raise TypeError(f"priors: expected a mapping from names to priors, but got {type(priors).__name__}")
    if not priors:
        raise ValueError("priors: expected at least one, but got none")


def _check_data_and_numbers(
    splits: Mapping[str, Any], counts: Mapping[str, Any], errors: Mapping[str, float], seeds: Any
) -> None:
    for name, split in splits.items():
        if not isinstance(split, Split):
            raise TypeError(f"{name}: expected a datasets.Split, but got {type(split).__name__}")
        if not len(split):
            raise ValueError(f"{name}: expected at least one datum, but got an empty split")
    for name, count in counts.items():
        if not (isinstance(count, int) and count > 0):
            raise ValueError(f"{name}: expected a positive integer, but got {count!r}")
    for name, value in errors.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number, at least 0, but got {value}")
    if not isinstance(seeds, Sequence) or not all(isinstance(s, Integral) and not isinstance(s, bool) for s in seeds):
        raise TypeError(f"seeds: expected a sequence of integers, such as (0, 1, 2), but got {seeds!r}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected at least one, and each once, but got {seeds!r}")


def _model_and_guide(
    network: Callable[[], nn.Module],
    likelihood: Callable[[Any], Distribution],
    train: Split,
    init_log_variance: float,
    prior: Prior | None,
    seed: int,
) -> tuple[Supervised, AutoSparseNormal]:
    torch.manual_seed(seed)
    bnn = bayesianize(network(), prior)
    model = Supervised(bnn, copy.deepcopy(likelihood), num_data=len(train)).to(train.images.device)
    init_scale = math.exp(init_log_variance / 2)  # all priors start alike
    return model, AutoSparseNormal(model, init_log_variance=init_log_variance, init_scale=init_scale)


def _try_all(make: Callable, priors: Mapping[str, Prior | None], seed: int, split: Split) -> str:
    """Raises an error for a prior that does not fit the network; returns what to call the errors."""
    for name, prior in priors.items():
        try:
            model, guide = make(prior, seed)
            if not guide.real_sites:
                raise ValueError("expected weights that are real numbers, of which some can be dropped, but got none")
            found = sampled_predictions(model, guide, [(split.images[:1], split.labels[:1])], num_samples=1)
        except (TypeError, ValueError) as error:
            raise type(error)(f"prior {name!r}: {error}") from error
    return "error" if found.draws is None else "mean squared error"


def _settings(
    name: str, prior: Prior | None, model: Supervised, guide: AutoSparseNormal, train: Split, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the settings of a checkpoint, which identify prior, options, data and untrained network."""
    prior_text = re.sub(r" at 0x[0-9a-f]+", "", repr(prior))  # addresses of functions differ between runs
    with same_random_numbers():
        nll, _ = _scores(model, guide, Split(train.images[:100], train.labels[:100]), 1)
    return {
        "prior": f"{name}: {prior_text}",
        **options,
        "init_log_variance": float(guide.init_log_variance),
        "num_data": len(train),
        "untrained_nll": f"{nll:.4g}",
    }


def _train(
    model: Supervised, guide: AutoSparseNormal, split: Split, options: Mapping[str, Any], checkpoint: Checkpoint | None
) -> float:
    """Fits the posterior; returns the median over the epochs of the seconds per step."""
    before = time.perf_counter()

    def after_epoch(epoch: int) -> dict[str, float]:
        nonlocal before
        now, start = time.perf_counter(), before
        before = now
        return {"seconds": now - start}

    elbo = SparseVD_ELBO(kl="exact")
    history = fit_posterior(elbo, model, guide, split, **options, after_epoch=after_epoch, checkpoint=checkpoint)
    steps = math.ceil(len(split) / options["batch_size"])
    return statistics.median(epoch["seconds"] for epoch in history) / steps


def _sweep(model: Supervised, guide: AutoSparseNormal, split: Split, tried: list[float]) -> dict[float, SweepPoint]:
    """Returns error and compression of the network at each threshold, applied to weights of any prior."""
    points = threshold_sweep(model, guide, _batches(split, model), [{"*": threshold} for threshold in tried])
    return dict(zip(tried, points, strict=True))


def _result(run: _Run, seed: int, level: float, test: Split, num_samples: int) -> PriorResult:
    """Scores a run on the test data."""
    reached = {threshold: point.compression for threshold, point in run.points.items() if point.error <= level}
    threshold = max(reached, key=reached.__getitem__, default=math.nan)
    tried = _sweep(run.model, run.guide, test, [math.inf, *([threshold] if reached else [])])
    torch.manual_seed(seed)  # so that a prior's numbers do not depend on which others there are
    nll, calibration_error = _scores(run.model, run.guide, test, num_samples)
    return PriorResult(
        prior=run.prior,
        seed=seed,
        error=tried[math.inf].error,
        nll=nll,
        calibration_error=calibration_error,
        validation_error=run.points[math.inf].error,
        error_level=level,
        compression=reached.get(threshold, math.nan),
        threshold=threshold,
        sparse_error=tried[threshold].error if reached else math.nan,
        seconds_per_step=run.seconds_per_step,
    )


def _scores(model: Supervised, guide: AutoSparseNormal, split: Split, num_samples: int) -> tuple[float, float]:
    """Returns the negative log likelihood of an example, and the calibration error, of the mean prediction."""
    found = scores(sampled_predictions(model, guide, _batches(split, model), num_samples))
    return found["nll"], found.get("calibration_error", math.nan)


def _batches(split: Split, model: Supervised) -> list[tuple[Tensor, Tensor]]:
    return split.chunks(min(1_000, model.num_data))  # the model refuses more than all data
