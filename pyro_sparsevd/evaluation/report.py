"""The results of a comparison of priors, as numbers and as a table."""

__all__ = ["PriorComparison", "PriorResult"]

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from .. import _tables as tables


@dataclass(frozen=True)
class PriorResult:
    """The results for one prior and one seed.

    Args:
        prior: What the prior was called.
        seed: The seed.
        error: The test error of the network of posterior means with nothing dropped: the fraction of targets that are
            not the mode of their prediction, or for continuous targets the mean squared error.
        nll: The negative log likelihood of a test example under the mean prediction of posterior samples, in nats.
        calibration_error: The expected calibration error of that prediction, see :class:`~.metrics.Uncertainty`; NaN
            where the likelihood is not categorical.
        validation_error: As ``error``, on the validation data.
        error_level: The largest validation error that a sparse network may have, the same for all priors of a seed.
        compression: The largest number of weights over the number kept at which the validation error is no larger: 1
            where only all the weights reach that level; NaN where no number of them does.
        threshold: The log α above which weights are dropped for it; NaN likewise.
        sparse_error: As ``error``, of the network with these weights dropped; NaN likewise.
        seconds_per_step: The time of a training step, the median over the epochs, checkpoints included.
    """

    prior: str
    seed: int
    error: float
    nll: float
    calibration_error: float
    validation_error: float
    error_level: float
    compression: float
    threshold: float
    sparse_error: float
    seconds_per_step: float


@dataclass(frozen=True)
class PriorComparison:
    """The results of :func:`~.compare.compare_priors`; prints as a table of means ± standard deviations over the seeds.

    Compression, and the error at it, are averaged over those seeds that reached the error level; their number follows
    where it was not all of them.

    Args:
        results: The numbers of each prior and seed.
        error_name: What the errors are: ``"error"``, a fraction, or ``"mean squared error"``.

    Example:
        >>> result = PriorResult("normal", 0, 0.05, 0.2, 0.01, 0.05, 0.06, 4.0, 1.5, 0.06, 2e-3)
        >>> print(PriorComparison((result,), "error"))
        prior    error  NLL, nats  calibration error  compression  error at it  ms/step
        normal  0.0500     0.2000             0.0100          4.0       0.0600     2.00
    """

    results: tuple[PriorResult, ...]
    error_name: str

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers, for a file."""
        return {"error_name": self.error_name, "results": [asdict(result) for result in self.results]}

    def __str__(self) -> str:
        return tables.as_text(self._cells())

    def _repr_html_(self) -> str:
        return tables.as_html(self._cells())

    def _cells(self) -> list[tuple[str, ...]]:
        header = ("prior", self.error_name, "NLL, nats", "calibration error", "compression", "error at it", "ms/step")
        rows: list[tuple[str, ...]] = [header]
        for prior in dict.fromkeys(result.prior for result in self.results):
            runs = [result for result in self.results if result.prior == prior]
            row = (
                _mean([r.error for r in runs], 4),
                _mean([r.nll for r in runs], 4),
                _mean([r.calibration_error for r in runs], 4),
                _mean([r.compression for r in runs], 1),
                _mean([r.sparse_error for r in runs], 4),
                _mean([1e3 * r.seconds_per_step for r in runs], 2),
            )
            rows.append((prior, *row))
        return rows


def _mean(values: list[float], digits: int) -> str:
    """Returns mean ± standard deviation of the values that are not NaN, and their number if that is not all."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    text = f"{statistics.mean(known):.{digits}f}"
    if len(known) > 1 and max(known) < math.inf:
        text += f" ± {statistics.stdev(known):.{digits}f}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"
