"""Comparison of priors: predictions on held-out data, and compression, of a network trained under each."""

__all__ = ["compare_priors"]

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import pyro
import torch
from torch import nn
from torch.distributions import Distribution

from .._modules import device_of, same_random_numbers
from ..infer.autoguide import AutoSparseNormal
from ..nn.batches import pairs
from ..nn.bayesianize import Prior, bayesianize
from ..nn.priors import named_prior
from ..nn.supervised import Supervised
from ..sparsity.threshold import SweepPoint, threshold_grid, threshold_sweep
from ..training.fit import fit
from .metrics import scores
from .predictions import sampled_predictions
from .report import PriorComparison, PriorResult


def compare_priors(
    make_network: Callable[[], nn.Module],
    likelihood: Callable[[Any], Distribution],
    loader: Iterable[Any] | Callable[[], Iterable[Any]],
    held_out: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    test: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
    priors: Mapping[str, Prior | str | None] | Sequence[str] = ("log-uniform", "ard", "normal"),
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int,
    lr: float = 3e-3,
    init_log_variance: float = -8.0,
    num_samples: int = 20,
    error_level: float | None = None,
    tolerance: float = 0.1,
) -> PriorComparison:
    r"""Trains a network under each of several priors, all else equal, and scores it on held-out data.

    For each seed, the network starts from the same weights under all priors. The posterior is that of
    :class:`~.autoguide.AutoSparseNormal`, trained by :func:`~.fit.fit`. What is scored is the mean prediction of
    posterior samples, see :func:`~.metrics.scores`. The compression is the largest at which the held-out error is at
    most a level that is the same for all priors, over thresholds on log α between which a tenth of the weights is
    dropped. As the level is compared so often, the held-out error there is slightly optimistic; the error on ``test``
    data of its own is not.

    Bounds of different priors are not reported: improper priors, such as the log-uniform one, define theirs up to a
    constant only.

    References:
        | Variational Bayesian dropout: pitfalls and fixes (Hron, Matthews, Ghahramani, 2018)
        | https://arxiv.org/abs/1807.01969

    Args:
        make_network: A function that returns a new network; called with the same random numbers for all priors of a
            seed.
        likelihood: As for :class:`~.supervised.Supervised`. A module with parameters, such as a noise scale, is copied
            for each run, and trained.
        loader: The training data: pairs ``(x, y)`` of inputs and targets from a ``DataLoader``, a list, or a function
            that returns the batches of an epoch. It is gone through once to count them.
        held_out: Batches of the data to choose thresholds on.
        test: Batches of the data to report; by default those held out.
        priors: Names as of :func:`~.priors.named_prior`, or by names of your own, what
            :func:`~.bayesianize.bayesianize` takes as its prior, or such a name.
        seeds: The seeds.
        epochs: How many times to go through the training data.
        lr: The learning rate.
        init_log_variance: The initial log σ² of every latent, whatever its prior.
        num_samples: The number of posterior samples.
        error_level: The largest held-out error that a sparse network may have; by default, for each seed,
            (1 + tolerance) times the smallest that any prior has with nothing dropped.
        tolerance: See ``error_level``.

    Returns:
        The results. Torch's generators and Pyro's parameter store are left as they were.

    Raises:
        TypeError: If an argument is of another type than these.
        ValueError: If there is no prior or seed, one is twice, a prior is unknown or does not fit the network, there is
            no batch or one is no pair, data can be gone through only once, or a number is out of range; all before
            anything is trained.
        ImportError: If targets have finitely many values and torchmetrics is not installed.

    Example:
        >>> batches = [(torch.randn(20, 4), torch.randn(20)), (torch.randn(20, 4), torch.randn(20))]
        >>> make_network = lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
        >>> noise = sparsevd.GaussianLikelihood()
        >>> found = compare_priors(make_network, noise, batches, batches, priors=["ard", "normal"], seeds=[0], epochs=2)
        >>> [(result.prior, result.seed) for result in found.results]
        [('ard', 0), ('normal', 0)]
    """
    if isinstance(make_network, nn.Module) or not callable(make_network):
        found = type(make_network).__name__
        raise TypeError(f"make_network: expected a function that returns a new network, but got {found}")
    test = held_out if test is None else test
    by_name = _by_name(priors)
    _check_numbers(epochs, num_samples, tolerance, error_level, seeds)
    _check_data(loader=loader, held_out=held_out, test=test)
    results: list[PriorResult] = []
    with same_random_numbers(), pyro.get_param_store().scope(), _same_order(loader) as restart:
        make = partial(_model_and_guide, make_network, likelihood, init_log_variance)
        error_name = _try_all(make, by_name, seeds[0], {"loader": loader, "held_out": held_out, "test": test})
        sizes = [len(y) for _, y in pairs("loader", loader)]
        for seed in seeds:
            runs: list[_Run] = []
            for name, prior in by_name.items():
                model, guide = make(sum(sizes), prior, seed)
                restart()
                seconds = _train(model, guide, loader, epochs, lr, f"{name}, seed {seed}")
                points = _sweep(model, guide, held_out, threshold_grid(guide))
                runs.append(_Run(name, model, guide, seconds / len(sizes), points))
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


@contextmanager
def _same_order(loader: Any) -> Iterator[Callable[[], None]]:
    """Gives a function that sets the generator of a DataLoader, if it has one, to its state, in which it is left."""
    generator = getattr(loader, "generator", None)
    state = None if generator is None else generator.get_state()

    def restart() -> None:
        if generator is not None:
            generator.set_state(state)

    try:
        yield restart
    finally:
        restart()


def _by_name(priors: Any) -> dict[str, Prior | None]:
    is_named = isinstance(priors, Mapping) or (
        isinstance(priors, Sequence) and not isinstance(priors, str) and all(isinstance(prior, str) for prior in priors)
    )
    if not is_named:
        raise TypeError(
            f"priors: expected names such as ('log-uniform', 'normal'), or a mapping from names to priors, but got "
            f"{priors!r}"
        )
    if not priors or len(set(priors)) < len(priors):
        raise ValueError(f"priors: expected at least one, and each once, but got {priors!r}")
    given = priors if isinstance(priors, Mapping) else {name: name for name in priors}
    return {name: named_prior(prior) if isinstance(prior, str) else prior for name, prior in given.items()}


def _check_numbers(epochs: Any, num_samples: Any, tolerance: float, error_level: float | None, seeds: Any) -> None:
    for name, count in (("epochs", epochs), ("num_samples", num_samples)):
        if isinstance(count, bool) or not (isinstance(count, int) and count > 0):
            raise ValueError(f"{name}: expected a positive integer, but got {count!r}")
    for name, value in (("tolerance", tolerance), ("error_level", 0.0 if error_level is None else error_level)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number, at least 0, but got {value}")
    if not isinstance(seeds, Sequence) or not all(isinstance(s, Integral) and not isinstance(s, bool) for s in seeds):
        raise TypeError(f"seeds: expected a sequence of integers, such as (0, 1, 2), but got {seeds!r}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected at least one, and each once, but got {seeds!r}")


def _check_data(**data: Any) -> None:
    for name, batches in data.items():
        if isinstance(batches, Iterator):
            raise ValueError(
                f"{name}: expected batches that can be gone through for each prior, but got a "
                f"{type(batches).__name__}; give a DataLoader, a list, or a function that returns an iterator"
            )


def _model_and_guide(
    make_network: Callable[[], nn.Module],
    likelihood: Callable[[Any], Distribution],
    init_log_variance: float,
    num_data: int,
    prior: Prior | None,
    seed: int,
) -> tuple[Supervised, AutoSparseNormal]:
    torch.manual_seed(seed)
    network = make_network()
    model = Supervised(bayesianize(network, prior), copy.deepcopy(likelihood), num_data).to(device_of(network))
    init_scale = math.exp(init_log_variance / 2)  # all priors start alike
    return model, AutoSparseNormal(model, init_log_variance=init_log_variance, init_scale=init_scale)


def _try_all(make: Callable, priors: Mapping[str, Prior | None], seed: int, data: Mapping[str, Any]) -> str:
    """Raises an error for a prior that does not fit the network, or data that do not; returns what the error is."""
    first = {name: [next(pairs(name, batches))] for name, batches in data.items()}
    for name, prior in priors.items():
        try:
            model, guide = make(1, prior, seed)
            if not guide.real_sites:
                raise ValueError("expected weights that are real numbers, of which some can be dropped, but got none")
        except (TypeError, ValueError) as error:
            raise type(error)(f"prior {name!r}: {error}") from error
        for of_data, batch in first.items():
            try:
                found = sampled_predictions(model, guide, batch, num_samples=1)
            except (TypeError, ValueError) as error:
                raise type(error)(f"prior {name!r}, {of_data}: {error}") from error
    return "error" if found.draws is None else "mean squared error"


def _train(model: Supervised, guide: AutoSparseNormal, loader: Any, epochs: int, lr: float, description: str) -> float:
    """Fits the posterior; returns the median over the epochs of their seconds."""
    ends = [time.perf_counter()]
    after_epoch = lambda epoch, numbers: ends.append(time.perf_counter())  # noqa: E731
    fit(model, guide, loader, epochs=epochs, lr=lr, callbacks=[after_epoch], description=description)
    return statistics.median(end - start for start, end in itertools.pairwise(ends))


def _sweep(model: Supervised, guide: AutoSparseNormal, data: Any, tried: list[float]) -> dict[float, SweepPoint]:
    """Returns error and compression of the network at each threshold, applied to weights of any prior."""
    points = threshold_sweep(model, guide, data, [{"*": threshold} for threshold in tried])
    return dict(zip(tried, points, strict=True))


def _result(run: _Run, seed: int, level: float, test: Any, num_samples: int) -> PriorResult:
    """Scores a run on the test data."""
    reached = {threshold: point.compression for threshold, point in run.points.items() if point.error <= level}
    threshold = max(reached, key=reached.__getitem__, default=math.nan)
    tried = _sweep(run.model, run.guide, test, [math.inf, *([threshold] if reached else [])])
    torch.manual_seed(seed)  # so that a prior's numbers do not depend on which others there are
    return PriorResult(
        prior=run.prior,
        seed=seed,
        error=tried[math.inf].error,
        scores=scores(sampled_predictions(run.model, run.guide, test, num_samples)),
        held_out_error=run.points[math.inf].error,
        error_level=level,
        compression=reached.get(threshold, math.nan),
        threshold=threshold,
        sparse_error=tried[threshold].error if reached else math.nan,
        seconds_per_step=run.seconds_per_step,
    )
