"""Incremental regularisation (IncReg; Wang et al. 2018, Structured Pruning for Efficient ConvNets via it; 2019)."""

from __future__ import annotations

import numpy as np

from onnx_kfe.recovery.schedules._ranked import Ranked
from onnx_kfe.recovery.schedules._schedule import Numbers, schedule

__all__ = ["Incremental"]


@schedule("incremental")
class Incremental(Ranked):
    """Each unit has an L2 regularisation factor of its own, which shrinks it before it goes.

    The factor is added to the weight decay. Its ceiling of 1 is strong: at a learning rate of 0.03 and a momentum of
    0.9 a weight under it halves in two steps or three.
    """

    def factors(self, place: int, step: int) -> Numbers:
        """Units that have not gone are shown as they are."""
        return np.where(self.gone[place], 0.0, 1.0)

    def after_backward(self, step: int, steps: int) -> None:
        """Add the gradients of the regularisation; see `Hook`."""
        super().after_backward(step, steps)
        for units, levels, gone in zip(self.units, self.levels, self.gone, strict=True):
            units.decay(np.where(gone, 0.0, levels))
