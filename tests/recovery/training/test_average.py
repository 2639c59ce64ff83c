"""The moving average against its formula."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from onnx_kfe.recovery.training._average import Average, tensors


def test_parameters_are_averaged_and_buffers_followed() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = Average(module)
    expected = module[0].weight.detach().numpy().astype(np.float64)
    random = np.random.default_rng(0)
    for step in range(30):
        weight, mean = random.standard_normal((3, 2)), random.standard_normal(3)
        with torch.no_grad():
            module[0].weight.copy_(torch.tensor(weight))
            module[1].running_mean.copy_(torch.tensor(mean))
        average.update(step)
        decay = min(0.9999, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    found = tensors(average.module)
    np.testing.assert_allclose(found["0.weight"].numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["1.running_mean"].numpy(), mean, rtol=1e-6)
    assert not average.module.training
