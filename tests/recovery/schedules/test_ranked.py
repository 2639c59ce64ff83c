"""The step curve against its formula and its properties, and factors that follow it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnx_kfe.recovery.schedules import step_curve
from onnx_kfe.recovery.schedules._ranked import Ranked
from tests.recovery.schedules.models import drive, make, subject

U, A = 0.25, 0.3


def curve(rank: float, count: int) -> float:
    a = math.log(2 / U) / count
    middle = -math.log(U) / a
    if rank < middle:
        return A * math.exp(-a * rank)
    return 2 * U * A - A * math.exp(-a * (2 * middle - rank))


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_curve_is_the_published_one(count: int) -> None:
    ranks = np.linspace(0, 3 * count, 50)
    expected = [curve(rank, count) for rank in ranks]
    np.testing.assert_allclose(step_curve(ranks, count, A), expected, rtol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_curve_falls_from_its_amplitude_through_zero_at_the_count(count: int) -> None:
    middle = -math.log(U) / (math.log(2 / U) / count)
    start, there, zero, mirrored = step_curve(np.array([0, middle, count, 2 * middle]), count, A)
    assert start == pytest.approx(A)
    assert there == pytest.approx(U * A)
    assert zero == pytest.approx(0, abs=1e-12)
    assert mirrored == pytest.approx((2 * U - 1) * A)  # below 0
    below, above = step_curve(np.array([middle - 1e-9, middle + 1e-9]), count, A)
    assert below == pytest.approx(above, abs=1e-8)
    apart = np.linspace(0, middle, 20, endpoint=False)
    around = step_curve(middle - apart, count, A) + step_curve(middle + apart, count, A)
    np.testing.assert_allclose(around, 2 * U * A, rtol=1e-9)  # symmetric about the point at N1
    assert np.all(np.diff(step_curve(np.linspace(0, 4 * count, 99), count, A)) < 0)


def test_what_is_to_go_reaches_the_ceiling_before_the_end_and_nothing_else_does() -> None:
    module, schedule = make("incremental", subject("channel"))
    assert isinstance(schedule, Ranked)
    drive(module, schedule, 100)
    assert [schedule.to_go(place) for place in range(3)] == [0, 0, 0]
    for gone, levels in zip(schedule.gone, schedule.levels, strict=True):
        np.testing.assert_array_equal(levels[gone], 1.0)
        assert np.all(levels[~gone] < 1.0)


def test_ranks_are_averaged_over_the_run() -> None:
    _, schedule = make("incremental", subject("channel"))
    assert isinstance(schedule, Ranked)
    size = schedule.units[0].size
    low_once = np.arange(size, dtype=float)
    for _ in range(3):
        schedule._update(0, low_once, 0.01)
    levels = schedule.levels[0].copy()
    schedule._update(0, low_once[::-1].copy(), 0.01)  # the last becomes the lowest, but not on average
    assert schedule.levels[0][0] > levels[0]
    assert schedule.levels[0][-1] == 0
