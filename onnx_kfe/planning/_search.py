"""The smallest budget that keeps a measured quality, found with few measurements."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from onnx_kfe.kfe import Array

__all__ = ["Attempt", "meets", "search"]

TOLERANCE = 0.02  # share of the MACs within which the answer is known
_LEAST_SAVING = 0.002  # share of the MACs below which a smaller model is none
MOST_ATTEMPTS = 8
_STEP = 0.9 * TOLERANCE  # from an end that may be the answer: close enough to settle it
_MARGIN = 0.1  # share of the bracket by which other attempts keep away from its ends
_ROUNDING = 1e-9
_SMALLEST_RATIO = 1 / 16  # a drop below this share of the floor, or none at all, tells no more than that
_SMALLEST_LOSS = 1e-12


@dataclass(frozen=True)
class Attempt:
    """One measured model.

    Attributes:
        fraction: MACs of the model as a fraction of the original's.
        predicted_loss: In nats a sample.
        drop: How much worse than the original it was measured to be.
    """

    fraction: float
    predicted_loss: float
    drop: float


AnyAttempt = TypeVar("AnyAttempt", bound=Attempt)


def meets(attempt: Attempt, floor: float) -> bool:
    """Whether the drop is no larger than the floor, up to rounding."""
    return attempt.drop <= floor * (1 + _ROUNDING)


def search(
    attempt: Callable[[float], AnyAttempt], frontier: tuple[Array, Array], floor: float
) -> tuple[list[AnyAttempt], AnyAttempt | None]:
    """Find the smallest fraction of the MACs whose measured drop is no larger than the floor.

    The predicted loss says where on the way from the original to the smallest model the drops are; the drops measured
    so far say how large. So the next attempt goes where the drop, interpolated between the two ends of the bracket on
    logarithmic scales, equals the floor. Where that leads nowhere, because two answers in a row fell on the same side
    or it is at an end again, it is a bisection instead: neither steps nor noise in the drop hold the search up.

    Args:
        attempt: Makes and measures the best model within a fraction of the MACs. It may come out smaller; the model
            of an earlier attempt need not be measured again.
        frontier: Fractions that the model can have, rising to 1, and the predicted loss at each, falling to 0.
        floor: The largest drop allowed, above 0.

    Returns:
        The different attempts in order, and the smallest that meets the floor and saves anything, None without one.
    """
    bracket: _Bracket[AnyAttempt] = _Bracket(frontier, floor)
    attempts: list[AnyAttempt] = []
    for _ in range(2 * MOST_ATTEMPTS):  # some of which may lead to the same model
        if len(attempts) == MOST_ATTEMPTS or bracket.narrow:
            break
        budget = bracket.next_budget()
        tried = attempt(budget)
        bracket.add(budget, tried)
        if tried not in attempts:
            attempts.append(tried)
    return attempts, bracket.met


class _Bracket(Generic[AnyAttempt]):
    """What is known of the answer: it lies from `low` to `high`, each a fraction of the MACs."""

    def __init__(self, frontier: tuple[Array, Array], floor: float) -> None:
        self._fractions, self._losses = frontier
        self._floor = floor
        self.least = float(self._fractions[0])
        self.low, self.high = self.least, 1.0
        self.failed: AnyAttempt | None = None
        self.met: AnyAttempt | None = None
        self._stepped = False  # whether an attempt was made one step from an end, to settle the search at once
        self._row = 0  # answers in a row on one side: above 0 those that met the floor, below 0 those that did not

    @property
    def narrow(self) -> bool:
        """Whether more attempts would tell little: while none has met the floor, even a little smaller is much."""
        saves = self.met is not None or self.high < 1
        return self._row != 0 and self.high - self.low <= (TOLERANCE if saves else _LEAST_SAVING)

    def add(self, budget: float, attempt: AnyAttempt) -> None:
        """Learn from an attempt at a budget; a model that comes out smaller is the best up to that budget."""
        if not meets(attempt, self._floor):
            self.low, self.failed = budget, attempt
        elif attempt.fraction < 1:
            self.high, self.met = min(attempt.fraction, budget), attempt
        else:
            self.high = budget  # there is nothing to save from here on
        met = meets(attempt, self._floor)
        self._row = max(self._row, 0) + 1 if met else min(self._row, 0) - 1
        if met and budget <= self.least:
            self.low = self.high

    def next_budget(self) -> float:
        """Where to measure next."""
        target = float(np.interp(self._wanted_loss(), self._losses[::-1], self._fractions[::-1]))
        if self.failed is None and target <= self.low + _STEP:
            return self.least
        stalled = self.failed is not None and abs(self._row) > 1
        at_an_end = self.met is not None and not self.low + _STEP <= target <= self.high - _STEP
        bisect = stalled or (at_an_end and self._stepped)
        self._stepped = self._stepped or (at_an_end and not bisect)
        if bisect:
            return (self.low + self.high) / 2
        margin = _STEP if at_an_end else max(_STEP, _MARGIN * (self.high - self.low))
        return min(max(target, self.low + margin), self.high - margin)

    def _wanted_loss(self) -> float:
        """The predicted loss at which the drop should equal the floor; the floor itself while nothing is measured."""
        points = [self._logarithms(attempt) for attempt in (self.met, self.failed) if attempt is not None]
        if len(points) == 2 and points[0][1] < points[1][1]:
            (loss, drop), (failed_loss, failed_drop) = points
            slope = (failed_loss - loss) / (failed_drop - drop)
        else:
            (loss, drop), slope = points[-1] if points else (0.0, 0.0), 1.0
        return math.exp(loss + slope * (math.log(self._floor) - drop))

    def _logarithms(self, attempt: AnyAttempt) -> tuple[float, float]:
        drop = max(attempt.drop, _SMALLEST_RATIO * self._floor)
        return math.log(max(attempt.predicted_loss, _SMALLEST_LOSS)), math.log(drop)
