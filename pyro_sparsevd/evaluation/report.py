"""The results of a comparison of priors, as numbers, as a table and as a picture."""

__all__ = ["PriorComparison", "PriorResult"]

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from .. import _tables as tables

# What the table shows of the scores, in this order, where the likelihood has them.
_SCORES = {"nll": "NLL, nats", "calibration_error": "calibration error", "crps": "CRPS", "coverage": "coverage of 90 %"}


@dataclass(frozen=True)
class PriorResult:
    """The results for one prior and one seed.

    Args:
        prior: What the prior was called.
        seed: The seed.
        error: The test error of the network of posterior means with nothing dropped: the fraction of targets that are
            not the mode of their prediction, or for real targets the mean squared error.
        scores: Of the mean prediction of posterior samples on the test data, see :func:`~.metrics.scores`.
        held_out_error: As ``error``, on the held-out data.
        error_level: The largest held-out error that a sparse network may have, the same for all priors of a seed.
        compression: The largest number of weights over the number kept at which the held-out error is no larger: 1
            where only all the weights reach that level; NaN where no number of them does.
        threshold: The log α above which weights are dropped for it; NaN likewise.
        sparse_error: As ``error``, of the network with these weights dropped; NaN likewise.
        seconds_per_step: The time of a training step, the median over the epochs.
    """

    prior: str
    seed: int
    error: float
    scores: dict[str, float]
    held_out_error: float
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
        >>> found = {"nll": 0.2, "calibration_error": 0.01}
        >>> result = PriorResult("normal", 0, 0.05, found, 0.05, 0.06, 4.0, 1.5, 0.06, 2e-3)
        >>> print(PriorComparison((result,), "error"))
        prior    error  NLL, nats  calibration error  compression  error at it  ms/step
        normal  0.0500     0.2000             0.0100          4.0       0.0600     2.00
    """

    results: tuple[PriorResult, ...]
    error_name: str

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers, for a file."""
        return {"error_name": self.error_name, "results": [asdict(result) for result in self.results]}

    def plot(self, *, title: str = "", figure: Any = None) -> Any:
        """Draws compression, the error at it, and the likelihood of each prior, see :func:`~.comparison.intervals`.

        Args:
            title: The title.
            figure: The figure or sub-figure to draw on; by default a new one.

        Returns:
            The figure.
        """
        from ..plots.comparison import intervals

        panels = {
            "compression at equal\nheld-out error": self._by_prior("compression"),
            f"{self.error_name} once pruned": self._by_prior("sparse_error"),
            "NLL with all weights,\nnats per example": self._by_prior("nll"),
        }
        return intervals(panels, linear=list(panels)[2:], title=title, figure=figure)

    def _by_prior(self, name: str) -> dict[str, list[float]]:
        """Returns for each prior a number or score of each seed."""
        found: dict[str, list[float]] = {}
        for result in self.results:
            value = result.scores[name] if name in result.scores else getattr(result, name)
            found.setdefault(result.prior, []).append(value)
        return found

    def __str__(self) -> str:
        return tables.as_text(self._cells())

    def _repr_html_(self) -> str:
        return tables.as_html(self._cells())

    def _cells(self) -> list[tuple[str, ...]]:
        scores = {name: label for name, label in _SCORES.items() if name in self.results[0].scores}
        columns = [
            (self.error_name, "error", 4, 1.0),
            *((label, name, 4, 1.0) for name, label in scores.items()),
            ("compression", "compression", 1, 1.0),
            ("error at it", "sparse_error", 4, 1.0),
            ("ms/step", "seconds_per_step", 2, 1e3),
        ]
        rows = [["prior", *(label for label, *_ in columns)]]
        rows += [[prior] for prior in self._by_prior("seed")]
        for _, name, digits, unit in columns:
            for row, values in zip(rows[1:], self._by_prior(name).values(), strict=True):
                row.append(_mean([unit * value for value in values], digits))
        return [tuple(row) for row in rows]


def _mean(values: list[float], digits: int) -> str:
    """Returns mean ± standard deviation of the values that are not NaN, and their number if that is not all."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    mean = statistics.mean(known)
    form = f".{digits}f" if mean == 0 or abs(mean) >= 10**-digits else ".1e"
    text = f"{mean:{form}}"
    if len(known) > 1 and max(known) < math.inf:
        text += f" ± {statistics.stdev(known):{form}}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"
