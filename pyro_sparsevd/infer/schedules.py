"""KL weights as pure functions of the step: ``elbo.kl_weight = schedule(step)``.

Raising the weight of the KL from 0 to 1 over the first epochs lets the means fit before the prior prunes. Nothing
here counts steps; a step may be a mini-batch or an epoch, and fractions are welcome.
"""

__all__ = ["LinearWarmup"]

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearWarmup:
    r"""A KL weight of 0 up to ``start``, rising linearly to 1 at ``end``.

    .. math:: c(t) = \min(1, \max(0, (t - \mathrm{start}) / (\mathrm{end} - \mathrm{start})))

    References:
        | Ladder Variational Autoencoders (Sønderby, Raiko, Maaløe, Sønderby, Winther, 2016)
        | https://arxiv.org/abs/1602.02282

    Args:
        start: The last step with weight 0.
        end: The first step with weight 1, greater than ``start``.

    Raises:
        ValueError: If not ``0 <= start < end < inf``.

    Example:
        >>> schedule = LinearWarmup(5, 20)
        >>> [schedule(step) for step in (0, 5, 8, 20, 100)]
        [0.0, 0.0, 0.2, 1.0, 1.0]
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end < math.inf:
            raise ValueError(f"LinearWarmup: expected 0 <= start < end < inf, but got {self.start}, {self.end}")

    def __call__(self, step: float) -> float:
        """Returns the weight at a step."""
        return min(1.0, max(0.0, (step - self.start) / (self.end - self.start)))
