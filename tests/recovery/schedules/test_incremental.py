"""Regularisation as the gradient of a sum of squares."""

from __future__ import annotations

import numpy as np
import torch

from onnx_kfe.recovery.schedules._ranked import Ranked
from tests.recovery.schedules.models import make, subject


def test_factors_add_the_gradient_of_an_l2_penalty() -> None:
    module, schedule = make("incremental", subject("kfe"))
    assert isinstance(schedule, Ranked)
    random = np.random.default_rng(0)
    schedule.levels = [random.random(units.size) for units in schedule.units]
    parameters = dict(module.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    schedule.after_backward(0, 10)

    for parameter in parameters.values():
        expected = torch.ones_like(parameter)
        for units, levels in zip(schedule.units, schedule.levels, strict=True):
            for place in units.places:
                if place.parameter is parameter and place.own:
                    shape = [-1 if axis == place.axis else 1 for axis in range(parameter.ndim)]
                    rates = torch.from_numpy(levels[place.units.numpy()]).float().reshape(shape)
                    leaf = parameter.detach().clone().requires_grad_()
                    (0.5 * (rates * leaf.square()).sum()).backward()
                    assert leaf.grad is not None
                    expected += leaf.grad
        torch.testing.assert_close(parameter.grad, expected)
    cores = [key for key in parameters if key.endswith("kfe_c_obd_1")]
    assert cores
    assert any(not torch.equal(parameters[key].grad, torch.ones_like(parameters[key])) for key in cores)


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
