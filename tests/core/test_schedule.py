"""Schedules: their end points, their middle by hand, and that they never leave the range between."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core.errors import GossamerError
from gossamer.core.schedule import Constant, Cosine, Cubic, Linear

RAMPS = [Linear, Cubic, Cosine]
values = st.floats(-10, 10)


@pytest.mark.parametrize("ramp", RAMPS)
@given(start=values, end=values, steps=st.integers(1, 1000), begin=st.integers(-100, 1000), step=st.integers(-2000, 4000))
def test_a_ramp_is_clamped_monotone_and_between_its_ends(ramp, start, end, steps, begin, step) -> None:
    schedule = ramp(start, end, steps=steps, begin=begin)
    low, high = min(start, end) - 1e-9, max(start, end) + 1e-9
    assert low <= schedule(step) <= high
    assert schedule(begin) == schedule(begin - 1) == schedule(min(step, begin)) == start
    assert schedule(begin + steps) == schedule(begin + steps + 1) == pytest.approx(end)
    assert (schedule(step + 1) - schedule(step)) * (end - start) >= -1e-9


def test_by_hand() -> None:
    assert [Linear(0.2, 0.6, steps=4)(t) for t in range(5)] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    assert [Cubic(0.0, 0.8, steps=4)(t) for t in range(5)] == pytest.approx([0.8 * (1 - (1 - t / 4) ** 3) for t in range(5)])
    assert [Cubic(0.0, 1.0, steps=2, begin=10)(t) for t in (9, 10, 11, 12)] == pytest.approx([0, 0, 0.875, 1])
    half = math.sqrt(0.5)
    assert [Cosine(1.0, 0.0, steps=4)(t) for t in range(5)] == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2, 0])
    assert {Constant(0.3)(t) for t in (-1, 0, 5)} == {0.3}


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize("steps", [0, -3])
def test_a_ramp_takes_a_step_at_least(ramp, steps) -> None:
    with pytest.raises(GossamerError, match="at least one step"):
        ramp(0.0, 0.5, steps=steps)
