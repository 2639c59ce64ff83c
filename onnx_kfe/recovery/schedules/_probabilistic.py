"""Structured probabilistic pruning (SPP; Wang, Zhang, Wang and Hu, BMVC 2018)."""

from __future__ import annotations

import numpy as np

from onnx_kfe.recovery.schedules._ranked import Ranked
from onnx_kfe.recovery.schedules._schedule import Numbers, schedule

__all__ = ["Probabilistic"]


@schedule("probabilistic")
class Probabilistic(Ranked):
    """Each unit has a probability of being left out, drawn anew in every step; it may fall again.

    A unit that is left out keeps its hidden weights, and returns with them. Survivors are left as they are, as
    published: as probabilities go to 1, the ``1/(1-p)`` of dropout would blow up what is about to go.
    """

    def factors(self, place: int, step: int) -> Numbers:
        """Masks, a function of seed, step and group alone given the probabilities; one unit is always left."""
        drawn = np.random.default_rng((self.seed, step, place)).random(self.units[place].size)
        shown = ~self.gone[place] & (drawn >= self.levels[place])
        if not shown.any():
            shown[np.argmin(np.where(self.gone[place], np.inf, self.levels[place]))] = True
        return shown.astype(np.float64)
