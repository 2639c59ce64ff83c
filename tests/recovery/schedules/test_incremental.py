"""Regularisation as the gradient of a sum of squares."""

from __future__ import annotations

import numpy as np
import torch

from onnx_kfe.recovery.schedules._ranked import Ranked
from tests.recovery.schedules.models import make, subject


def test_factors_shrink_the_units_own_weights_in_every_step() -> None:
    module, schedule = make("incremental", subject("kfe"))
    assert isinstance(schedule, Ranked)
    random = np.random.default_rng(0)
    schedule.levels = [random.random(units.size) for units in schedule.units]
    parameters = dict(module.named_parameters())
    expected = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    for units, levels in zip(schedule.units, schedule.levels, strict=True):
        for place in units.places:
            (key,) = (key for key, parameter in parameters.items() if parameter is place.parameter)
            if place.own:
                shape = [-1 if axis == place.axis else 1 for axis in range(place.parameter.ndim)]
                rates = torch.from_numpy(levels[place.units.numpy()]).float().reshape(shape)
                expected[key] -= 0.25 * rates * expected[key]
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    schedule.advance(0, 10_000)  # too early for an update of the factors

    for key, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), expected[key])
    cores = [key for key in parameters if key.endswith("kfe_c_obd_1")]
    assert cores
    assert any(not torch.equal(parameters[key], before[key]) for key in cores)


def test_units_that_are_to_go_shrink() -> None:
    from tests.recovery.schedules.models import drive

    module, schedule = make("incremental", subject("channel"))
    (before,) = [units.norms(2) for units in schedule.units if units.name == "conv1"]
    drive(module, schedule, 60)
    schedule._restore()
    (after,) = [units.norms(2) for units in schedule.units if units.name == "conv1"]
    gone = schedule.gone[[units.name for units in schedule.units].index("conv1")]
    assert gone.sum() == 6
    assert (after / before)[gone].mean() < 0.9 * (after / before)[~gone].mean()
