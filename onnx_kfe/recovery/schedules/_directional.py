"""Directional pruning by generalised regularised dual averaging (SDprun, gRDA; Chao et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnx_kfe.recovery.schedules._schedule import Numbers, Schedule, schedule

if TYPE_CHECKING:
    from onnx_kfe.recovery.schedules._units import Units

__all__ = ["Directional"]

_MU = 0.51  # 0.5 < mu <= 0.55


@schedule("directional")
class Directional(Schedule):
    """Steps add up in v, and the model shows ``w = max(0, 1 - tau/||v||) v``, unit by unit.

    The gradient is taken at w, so that v of a unit at zero goes on, and the unit returns if that is where the loss
    falls. tau = ``c g^(mu + 1/2) n^mu`` at step n with learning rate g; c is set for each group in every step, such
    that at the last step tau would lie half way between the norms ||v|| of the last unit that is to go and the first
    that is to stay. It thus rises as ``(n / steps)^mu`` of that norm, and the planned number is zero in the end. v is
    stepped by the optimizer of the run, momentum and all, and weights in two groups (cores of chains) are shrunk by the
    product of both factors.
    """

    remembered = ("gone", "lengths", "thresholds")

    def __init__(self, units: Sequence[Units], seed: int) -> None:
        super().__init__(units, seed)
        self.lengths: list[Numbers] = [np.ones(each.size) for each in units]
        self.thresholds: list[Numbers] = [np.zeros(1) for _ in units]

    def advance(self, step: int, steps: int) -> None:
        """Set the thresholds of all groups."""
        for place, units in enumerate(self.units):
            self.lengths[place] = units.norms(2)
            between = np.sort(self.lengths[place])[units.target - 1 : units.target + 1].mean()
            self.thresholds[place] = between * np.full(1, (step + 1) / steps) ** _MU

    def factors(self, place: int, step: int) -> Numbers:
        """By how much each unit is shrunk."""
        lengths = self.lengths[place]
        return np.maximum(0.0, 1.0 - self.thresholds[place] / np.maximum(lengths, np.finfo(np.float64).tiny))

    def show(self, units: Units, factors: Numbers) -> None:
        """Shrink the units' own weights alone: of one whose columns were zero as well no gradient would be left."""
        units.scale(factors)

    def order(self, place: int) -> Numbers:
        """The shortest go."""
        return self.lengths[place]

    def final(self, place: int) -> Numbers:
        """The shrunk weights are the result."""
        return self.factors(place, 0)
