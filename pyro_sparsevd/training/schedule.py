"""How the weight of the KL and the learning rate change, by the part of the training that is done."""

__all__ = ["WARM_UP_START", "check_schedule", "kl_weight", "learning_rate_factor"]

import math

from ..infer.schedules import LinearWarmup

WARM_UP_START = 1 / 40  # until then, the means are fitted as if there were no prior


def kl_weight(part: float, warm_up: float) -> float:
    """Returns the weight of the KL: 0 for a fortieth of the training, then rising linearly to 1 at ``warm_up``."""
    return LinearWarmup(WARM_UP_START, warm_up)(part) if warm_up else 1.0


def learning_rate_factor(part: float) -> float:
    """Returns the factor of the learning rate: 1 for half of the training, then falling linearly to 0."""
    return min(1.0, max(0.0, 2 * (1 - part)))


def check_schedule(lr: float, warm_up: float) -> None:
    """Raises ValueError for a learning rate or a warm-up that is out of range."""
    if not 0 < lr < math.inf:
        raise ValueError(f"lr: expected a positive and finite number, but got {lr}")
    if warm_up and not WARM_UP_START < warm_up <= 1:
        raise ValueError(f"warm_up: expected 0 or a part of the training above 1/40 and up to 1, but got {warm_up}")
