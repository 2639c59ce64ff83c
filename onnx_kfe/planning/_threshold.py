"""One threshold of importance for the whole model: what is least important goes until the budgets are met."""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnx_kfe.errors import BudgetError, UsageError
from onnx_kfe.kfe import Array
from onnx_kfe.planning._any_planner import AnyPlanner
from onnx_kfe.planning._budget import Budget, describe
from onnx_kfe.planning._chain import Cost
from onnx_kfe.planning._direction_forms import best
from onnx_kfe.planning._form import rank_grid
from onnx_kfe.planning._plan import Plan

__all__ = ["Masks", "ThresholdPlanner", "check_any", "keep_above"]

Masks = dict[str, np.ndarray]
"""What is kept, ``[n]`` of booleans, by the name of what has n channels or directions."""

_MOST_DROPPED = 0.95  # of a side, as EigenDamage has it
_NAMED = 3  # reasons in a message


def keep_above(scores: Mapping[str, Array], threshold: float, round_to: int | None) -> Masks:
    """Keep what scores above a threshold, and of each side a twentieth at least, the best one at the least.

    Args:
        scores: Importances ``[n]`` by side.
        threshold: What is not above it goes.
        round_to: How many are kept is rounded up to the grid of `rank_grid`; None for no rounding.
    """
    masks = {}
    for name, side in scores.items():
        count = max(int((side > threshold).sum()), math.ceil((1 - _MOST_DROPPED) * len(side) - 1e-9), 1)
        masks[name] = best(side, count if round_to is None else _rounded_up(count, len(side), round_to))
    return masks


def _rounded_up(count: int, limit: int, round_to: int) -> int:
    return next((size for size in rank_grid(limit, round_to) if size >= count), limit)


def check_any(scores: Mapping[str, Array], skipped: Mapping[str, str]) -> None:
    """Refuse to plan where nothing can go.

    Raises:
        BudgetError: There are no scores; the message has the reasons by name of what could not be considered.
    """
    if not scores:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:_NAMED])
        raise BudgetError(f"nothing in the model can be pruned: {reasons or 'see onnx-kfe inspect'}")


class ThresholdPlanner(AnyPlanner):
    """Plans by one threshold. Latency is taken to go with MACs; whole models that are timed say how far it does.

    Args:
        scores: Importances by side, comparable over the whole model.
        original: Cost of the model that budgets are fractions of.
        dense: Cost of the model that is pruned, before it is.
        round_to: See `keep_above`.
        nanoseconds: Latency of a run of the original, where there is a budget of latency.
    """

    def __init__(
        self,
        scores: Mapping[str, Array],
        original: Cost,
        dense: Cost,
        round_to: int | None,
        nanoseconds: int,
    ) -> None:
        self._scores, self._original, self._dense, self._round_to = dict(scores), original, dense, round_to
        self._nanoseconds = nanoseconds
        self._thresholds = [-np.inf, *np.unique(np.concatenate([*scores.values(), np.zeros(0)]))]

    @property
    def bounds(self) -> str:
        """What bounds what can be reached, in words."""
        return "the best of each side stay, a twentieth at least"

    @abstractmethod
    def cost(self, masks: Masks) -> Cost:
        """Cost of the whole model with what is kept."""

    @abstractmethod
    def planned(self, plan: Plan) -> Cost:
        """Cost of the whole model of a plan."""

    @abstractmethod
    def written(self, masks: Masks, budget: str) -> Plan:
        """The plan that keeps it."""

    def plan(self, *budgets: Budget) -> Plan:
        """Drop no more than it takes to meet the budgets.

        Raises:
            UsageError: There is no budget.
            BudgetError: The budgets cannot be met.
        """
        if not budgets:
            raise UsageError("give a budget: --macs, --params or --latency")
        place = bisect_left(range(len(self._thresholds)), True, key=lambda n: self._meets(self._at(n), budgets))
        if place == len(self._thresholds):
            least = self._timed(self.cost(self._at(place - 1)))
            original = self._timed(self._original)
            possible = describe([b.meeting(b.of(least), b.of(original)) for b in budgets])
            raise BudgetError(
                f"{describe(budgets)} cannot be met ({self.bounds}): the smallest this model can become is {possible}"
            )
        masks = self._at(place)
        return self.written(self._filled(masks, budgets), describe(budgets))

    def fraction(self, plan: Plan, kind: type[Budget]) -> float:
        """Size of a plan's model as a fraction of the original's."""
        return kind(1).of(self._timed(self.planned(plan))) / max(kind(1).of(self._timed(self._original)), 1)

    def least(self, budget: Budget, *held: Budget) -> int:
        """The least of a budget's resource that there can be."""
        return budget.of(self._timed(self.cost(self._at(len(self._thresholds) - 1))))

    def costs(self) -> tuple[Cost, Cost]:
        """Of the original, and of the model before it is pruned."""
        return self._timed(self._original), self._timed(self._dense)

    def _at(self, place: int) -> Masks:
        return keep_above(self._scores, self._thresholds[place], self._round_to)

    def _filled(self, masks: Masks, budgets: Sequence[Budget]) -> Masks:
        """What a step of the grid drops beyond need is kept: the most important that fits, again and again."""
        if self._round_to in (None, 1):
            return masks  # one at a time went
        assert self._round_to is not None
        sides = set(masks)
        while sides:
            dropped = {name: self._scores[name][~masks[name]].max(initial=-np.inf) for name in sides}
            name = max(sorted(dropped), key=dropped.__getitem__)
            count, limit = int(masks[name].sum()), len(masks[name])
            more = {**masks, name: best(self._scores[name], _rounded_up(count + 1, limit, self._round_to))}
            if count < limit and self._meets(more, budgets):
                masks = more
            else:
                sides.discard(name)
        return masks

    def _meets(self, masks: Masks, budgets: Sequence[Budget]) -> bool:
        cost, original = self._timed(self.cost(masks)), self._timed(self._original)
        return all(budget.of(cost) <= budget.limit(budget.of(original)) for budget in budgets)

    def _timed(self, cost: Cost) -> Cost:
        """The cost with the latency that goes with its MACs."""
        return replace(cost, nanoseconds=round(self._nanoseconds * cost.macs / max(self._original.macs, 1)))
