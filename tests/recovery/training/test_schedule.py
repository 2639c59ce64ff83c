"""Learning rate schedules: where they are highest, how they end, and how many steps they rise."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_kfe.recovery.training import SCHEDULES


@pytest.mark.parametrize(("name", "warm_up"), [("one-cycle", 0.3), ("cosine", 0.05)])
@pytest.mark.parametrize("steps", [20, 1000])
def test_up_once_and_down_to_nothing(name: str, warm_up: float, steps: int) -> None:
    factors = np.array([SCHEDULES[name](step, steps) for step in range(steps)])
    peak = int(factors.argmax())
    assert peak == pytest.approx(warm_up * steps, abs=1)
    assert factors[peak] == 1
    assert (np.diff(factors[: peak + 1]) > 0).all()
    assert (np.diff(factors[peak:]) < 0).all()
    assert factors.min() > 0
    assert factors[-1] < 0.02
    middle = (peak + steps) // 2
    assert factors[middle] == pytest.approx(0.5, abs=2 / (steps - peak))


@pytest.mark.parametrize("name", SCHEDULES)
def test_few_steps_are_steps_too(name: str) -> None:
    for steps in (1, 2, 3):
        assert all(0 < SCHEDULES[name](step, steps) <= 1 for step in range(steps))


def test_constant_stays_up() -> None:
    factors = np.array([SCHEDULES["constant"](step, 1000) for step in range(1000)])
    assert (np.diff(factors[:50]) > 0).all()
    assert (factors[50:] == 1).all()
