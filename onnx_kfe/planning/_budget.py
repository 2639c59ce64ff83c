"""Budgets: what the result may cost, as a fraction of the original or an absolute number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx_kfe.errors import UsageError
from onnx_kfe.planning._forms import Cost

__all__ = ["Budget", "Macs", "Params"]


@dataclass(frozen=True)
class Budget:
    """A bound on one resource of the whole model.

    Attributes:
        amount: A fraction of the original when at most 1, else an absolute number.
    """

    amount: float

    resource = ""
    option = ""

    def __post_init__(self) -> None:
        if not self.amount > 0:
            raise UsageError(
                f"{self.option} {self.amount}: give a fraction of the original (0 to 1) or a number above 1"
            )

    def limit(self, original: int) -> int:
        """The bound as an absolute number."""
        return int(self.amount * original) if self.amount <= 1 else int(self.amount)

    def of(self, cost: Cost) -> int:
        """What a cost spends of this resource."""
        return int(getattr(cost, self.resource))


class Macs(Budget):
    """Multiply-accumulates of one sample over the whole model."""

    resource = "macs"
    option = "--macs"


class Params(Budget):
    """Parameters of the whole model."""

    resource = "parameters"
    option = "--params"


def describe(budgets: Sequence[Budget]) -> str:
    """The budgets as the user would type them."""
    return " ".join(f"{budget.option} {budget.amount:g}" for budget in budgets)
