"""The group proximal step against its formula, with a threshold that meets the target."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onnx_kfe.recovery.schedules._directional import _MU, Directional
from tests.recovery.schedules.models import drive, make, subject


def directional() -> tuple[torch.nn.Module, Directional]:
    module, schedule = make("directional", subject("channel"))
    assert isinstance(schedule, Directional)
    return module, schedule


def test_shown_weights_are_the_proximal_step_of_the_hidden_ones() -> None:
    module, schedule = directional()
    weight = dict(module.named_parameters())["w1"]
    v = weight.detach().double().numpy().reshape(16, -1)
    lengths = np.linalg.norm(v, axis=1)
    target = 6
    schedule.after_step(4, 10)
    tau = np.sort(lengths)[target - 1 : target + 1].mean() * (5 / 10) ** _MU
    expected = np.maximum(0, 1 - tau / lengths)[:, None] * v
    np.testing.assert_allclose(weight.detach().numpy().reshape(16, -1), expected, rtol=1e-5, atol=1e-7)
    schedule.after_backward(5, 10)
    np.testing.assert_allclose(weight.detach().numpy().reshape(16, -1), v, rtol=1e-6)


def test_the_threshold_rises_as_a_power_of_the_step_and_meets_the_target() -> None:
    _, schedule = directional()
    taus = []
    for step in range(10):
        schedule.advance(step, 10)
        taus.append(float(schedule.thresholds[1][0]))
    np.testing.assert_allclose(np.diff(np.log(taus)), _MU * np.diff(np.log(np.arange(1, 11))), rtol=1e-9)
    assert [int((schedule.factors(place, 9) == 0).sum()) for place in range(3)] == [3, 6, 5]
    assert 0.5 < _MU <= 0.55


def test_exactly_the_planned_units_are_zero_at_the_last_step() -> None:
    module, schedule = directional()
    drive(module, schedule, 30)
    zeros = [int((units.norms(2) == 0).sum()) for units in schedule.units]
    assert zeros == [units.target for units in schedule.units]


def test_a_unit_at_zero_goes_on_and_may_return() -> None:
    module, schedule = directional()
    drive(module, schedule, 30, stop=29)
    out = [schedule.factors(place, 28) == 0 for place in range(3)]
    assert sum(map(np.sum, out)) > 0
    hidden = schedule.state()["hidden.0"]
    assert torch.count_nonzero(hidden.flatten(1).abs().sum(1)) == len(hidden)
    assert pytest.approx(0) != float(hidden.abs().sum())
