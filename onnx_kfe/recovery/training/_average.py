"""Weights as tensors by name, and their exponential moving average."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

__all__ = ["Average", "tensors"]

_LONGEST = 0.9999


class Average:
    """A copy of a module whose parameters follow it as an exponential moving average, and its buffers at once.

    The average goes back over about a ninth of the steps so far, so that it is of use in runs of any length (the decay
    of TensorFlow's ExponentialMovingAverage): ``min(0.9999, (1 + step) / (10 + step))``.

    Args:
        module: The module that is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self._averaged = list(self.module.parameters())
        self._followed = list(module.parameters())
        self._buffers = list(zip(self.module.buffers(), module.buffers(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the module after a step of this number."""
        decay = min(_LONGEST, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averaged, self._followed, 1 - decay)
        for averaged, followed in self._buffers:
            averaged.copy_(followed)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of what a module saves, by name, in the memory of the CPU."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in module.state_dict().items()}
