"""Incremental regularisation (IncReg; Wang et al. 2018, Structured Pruning for Efficient ConvNets via it; 2019)."""

from __future__ import annotations

import numpy as np

from onnx_kfe.recovery.schedules._ranked import Ranked
from onnx_kfe.recovery.schedules._schedule import Numbers, schedule

__all__ = ["Incremental"]


_SHRINKAGE = 0.25  # of a weight in a step, at the ceiling


@schedule("incremental")
class Incremental(Ranked):
    """Each unit has an L2 regularisation factor of its own, which shrinks it before it goes.

    The regularisation is decoupled from the gradient (Loshchilov and Hutter, ICLR 2019), so that it means the same with
    every optimizer: in each step the weights of a unit are multiplied by ``1 - factor / 4``, with a ceiling of 1.
    """

    def advance(self, step: int, steps: int) -> None:
        """Shrink the units, and set their factors."""
        for units, levels in zip(self.units, self.levels, strict=True):
            units.scale(1 - _SHRINKAGE * levels)
        super().advance(step, steps)

    def factors(self, place: int, step: int) -> Numbers:
        """Units that have not gone are shown as they are."""
        return np.where(self.gone[place], 0.0, 1.0)
