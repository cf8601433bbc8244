"""The warm-up as a function: its values, its laws, what it refuses."""

import dataclasses
import math
import pickle

import pytest

from pyro_sparsevd import LinearWarmup

SCHEDULES = [
    pytest.param(LinearWarmup(0, 1), id="one step"),
    pytest.param(LinearWarmup(5, 20), id="late start"),
    pytest.param(LinearWarmup(0.5, 2.25), id="fractions"),
    pytest.param(LinearWarmup(1e6, 1e6 + 1), id="far"),
]


@pytest.mark.parametrize(
    ("step", "weight"),
    [(-3, 0.0), (0, 0.0), (5, 0.0), (6.5, 0.1), (8, 0.2), (12.5, 0.5), (17, 0.8), (20, 1.0), (21, 1.0), (1e9, 1.0)],
)
def test_weight_rises_linearly_between_start_and_end(step, weight):
    assert LinearWarmup(5, 20)(step) == pytest.approx(weight, abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weight_is_exactly_0_up_to_start_and_exactly_1_from_end(schedule):
    width = schedule.end - schedule.start
    assert schedule(schedule.start) == schedule(schedule.start - 10 * width) == schedule(-math.inf) == 0.0
    assert schedule(schedule.end) == schedule(schedule.end + 10 * width) == schedule(math.inf) == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weight_never_falls_and_is_symmetric_about_its_middle(schedule):
    width = schedule.end - schedule.start
    weights = [schedule(schedule.start + width * i / 64) for i in range(-8, 73)]
    assert weights == sorted(weights)
    assert weights == pytest.approx([1 - w for w in reversed(weights)], abs=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weight_is_a_float_and_a_function_of_the_step_alone(schedule):
    steps = [schedule.end, schedule.start, schedule.end]
    assert [schedule(step) for step in steps] == [1.0, 0.0, 1.0]
    assert all(type(schedule(step)) is float for step in steps)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_is_an_immutable_value(schedule):
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert hash(schedule) == hash(dataclasses.replace(schedule))
    assert schedule != dataclasses.replace(schedule, end=schedule.end + 1)
    with pytest.raises(dataclasses.FrozenInstanceError, match="start"):
        schedule.start = 0


@pytest.mark.parametrize(
    ("start", "end"),
    [(1, 1), (2, 1), (-1, 3), (0, math.inf), (math.inf, math.inf), (math.nan, 1), (0, math.nan), (0, 0), (-2, -1)],
)
def test_bad_bounds_are_refused_with_their_values(start, end):
    with pytest.raises(ValueError, match=rf"LinearWarmup: expected 0 <= start < end < inf, but got {start}, {end}"):
        LinearWarmup(start, end)
