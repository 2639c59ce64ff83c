"""A factor for each unit that is raised or lowered by its rank, until those that are to go reach the ceiling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnx_kfe.recovery.schedules._schedule import Numbers, Schedule

if TYPE_CHECKING:
    from onnx_kfe.recovery.schedules._units import Units

__all__ = ["Ranked", "step_curve"]

_U = 0.25
_CEILING = 1.0
_UPDATES = 200  # in a run, or one a step where there are fewer steps


def step_curve(ranks: Numbers, count: int, amplitude: float) -> Numbers:
    """By how much the factor of a unit changes, by its rank (Wang et al. 2018, 2019).

    ``A e^(-a r)`` below N1, else ``2uA - A e^(-a (2 N1 - r))``, with ``a = ln(2/u)/n``, ``N1 = -ln(u)/a`` and u = 0.25:
    from A at rank 0 through uA at N1 to 0 at rank n, so that the n lowest rise and the others fall.

    Args:
        ranks: Ranks r ``[m]``, 0 for the least important unit.
        count: How many units n are to go, at least 1.
        amplitude: A.
    """
    a = math.log(2 / _U) / count
    middle = -math.log(_U) / a
    mirrored = np.where(ranks < middle, ranks, 2 * middle - ranks)
    curve = amplitude * np.exp(-a * mirrored)
    return np.where(ranks < middle, curve, 2 * _U * amplitude - curve)


class Ranked(Schedule):
    """Schedules whose units have a factor, of ceiling 1, at which a unit is gone for good.

    A unit's rank is that of its L1 norm among the units of its group that are left, averaged over all updates so far;
    what counts is its place by that average. The amplitude is such that units of constant ranks have gone when nine
    tenths of the steps are done: n of them take about ``1 + 1.2 ln n`` times as many updates as one.
    """

    remembered = ("gone", "levels", "rank_sums")

    def __init__(self, units: Sequence[Units], seed: int) -> None:
        super().__init__(units, seed)
        self.levels: list[Numbers] = [np.zeros(each.size) for each in units]
        self.rank_sums: list[Numbers] = [np.zeros(each.size) for each in units]

    def advance(self, step: int, steps: int) -> None:
        """Update the factors every so many steps."""
        every = max(steps // _UPDATES, 1)
        if (step + 1) % every:
            return
        for place, units in enumerate(self.units):
            amplitude = _CEILING * (1 + 1.2 * math.log(units.target)) / (0.9 * (steps // every))
            self._update(place, units.norms(1), amplitude)

    def order(self, place: int) -> Numbers:
        """Those of the highest factors go first, then those of the lowest ranks."""
        ranks = self.rank_sums[place]
        return -self.levels[place] + 1e-9 * ranks / max(ranks.max(), 1.0)

    def _update(self, place: int, norms: Numbers, amplitude: float) -> None:
        count = self.to_go(place)
        left = ~self.gone[place]
        if not count:
            self.levels[place][left] = 0.0
            return
        self.rank_sums[place][left] += _ranks(norms[left])
        change = step_curve(_ranks(self.rank_sums[place][left]), count, amplitude)
        self.levels[place][left] = np.clip(self.levels[place][left] + change, 0.0, _CEILING)
        self.gone[place] |= self.levels[place] >= _CEILING


def _ranks(values: Numbers) -> Numbers:
    """Ranks from 0 of numbers, of equal ones in order."""
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks
