"""What all planners can do, whatever they choose among."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from onnx_kfe.kfe import Array
from onnx_kfe.planning._budget import Budget
from onnx_kfe.planning._chain import Cost
from onnx_kfe.planning._plan import Plan

__all__ = ["AnyPlanner"]

_FRONTIER_POINTS = 17


class AnyPlanner(ABC):
    """Makes plans of one model under several budgets."""

    @property
    @abstractmethod
    def bounds(self) -> str:
        """What bounds what can be reached, in words."""

    @abstractmethod
    def plan(self, *budgets: Budget) -> Plan:
        """The plan that loses least under the budgets.

        Raises:
            UsageError: There is no budget, or one of latency where none was measured.
            BudgetError: The budgets cannot be met.
        """

    @abstractmethod
    def fraction(self, plan: Plan, kind: type[Budget]) -> float:
        """Size of a plan's model as a fraction of the original's, counted or predicted."""

    @abstractmethod
    def least(self, budget: Budget, *held: Budget) -> int:
        """The least of a budget's resource that any plan is predicted to take, of those within the budgets held."""

    @abstractmethod
    def costs(self) -> tuple[Cost, Cost]:
        """Of the original, and of the model that is planned for, before it is pruned."""

    def frontier(self, kind: type[Budget]) -> tuple[Array, Array]:
        """The least predicted loss at every size of the model.

        Args:
            kind: The budget that sizes are fractions of.

        Returns:
            Fractions of the original, rising to 1 from the least that there is, and the losses, falling to 0.
        """
        original, _ = self.costs()
        smallest = (self.least(kind(1)) + 1) / max(kind(1).of(original), 1)  # one more, for a budget is rounded down
        fractions = np.linspace(min(smallest, 1.0), 1.0, _FRONTIER_POINTS)
        losses = [self.plan(kind(float(fraction))).predicted_loss for fraction in fractions[:-1]]
        return fractions, np.maximum.accumulate([0.0, *reversed(losses)])[::-1]
