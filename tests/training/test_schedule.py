"""How learning rate and KL weight change over a training."""

import pytest

from pyro_sparsevd.training.schedule import check_schedule, kl_weight, learning_rate_factor


def test_the_learning_rate_is_constant_then_falls_linearly_to_0():
    factors = [learning_rate_factor(step / 8) for step in range(9)]
    assert factors == pytest.approx([1.0] * 5 + [0.75, 0.5, 0.25, 0.0])
    assert learning_rate_factor(1.1) == 0.0


def test_the_kl_weight_rises_after_a_fortieth_of_the_training():
    assert [kl_weight(part, 0.5) for part in (0.0, 1 / 40, 0.2625, 0.5, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert kl_weight(0.0, 0) == 1.0


@pytest.mark.parametrize(("lr", "warm_up", "name"), [(0.0, 0.5, "lr"), (float("nan"), 0.5, "lr"), (1, 0.02, "warm_up")])
def test_numbers_out_of_range_are_refused(lr, warm_up, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        check_schedule(lr, warm_up)
