"""Budgets: what the result may cost, as a fraction of the original or an absolute number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from onnx_kfe.errors import UsageError
from onnx_kfe.planning._chain import Cost

__all__ = ["Budget", "Latency", "Macs", "Milliseconds", "Params", "describe"]


@dataclass(frozen=True)
class Budget:
    """A bound on one resource of the whole model.

    Attributes:
        amount: A fraction of the original when at most 1, else an absolute number.
    """

    amount: float

    resource = ""
    option = ""
    title = ""
    margin = 0.0
    """Share of a layer's own cost that a form must save to be worth its place."""

    def __post_init__(self) -> None:
        if not 0 < self.amount < math.inf or (self.amount > 1 and self.amount != int(self.amount)):
            raise UsageError(
                f"{self.option} {self.amount}: give a fraction of the original (0 to 1) or a whole number above 1"
            )

    def __str__(self) -> str:
        """As the user would type it."""
        return f"{self.option} {self.amount:g}" if self.amount <= 1 else f"{self.option} {int(self.amount)}"

    def limit(self, original: int) -> int:
        """The bound as an absolute number."""
        return math.floor(round(self.amount * original, 6)) if self.amount <= 1 else int(self.amount)

    def meeting(self, amount: int, original: int) -> Self:
        """The tightest budget, in the unit that this one is given in, that `amount` of the resource meets."""
        return type(self)(amount if self.amount > 1 else math.ceil(1000 * amount / original) / 1000)

    def of(self, cost: Cost) -> int:
        """What a cost spends of this resource."""
        return int(getattr(cost, self.resource))


class Macs(Budget):
    """Multiply-accumulates of one sample over the whole model."""

    resource = "macs"
    option = "--macs"
    title = "MACs"


class Params(Budget):
    """Parameters of the whole model."""

    resource = "parameters"
    option = "--params"
    title = "parameters"


class Latency(Budget):
    """Latency of a run of the whole model, as a fraction of the original's."""

    resource = "nanoseconds"
    option = "--latency"
    title = "latency"
    margin = 0.03

    def __post_init__(self) -> None:
        if not 0 < self.amount <= 1:
            raise UsageError(f"{self.option} {self.amount:g}: give a fraction of the original, or use --latency-ms")

    def meeting(self, amount: int, original: int) -> Self:
        """The tightest budget that a latency meets; the whole original where that is faster."""
        return type(self)(min(math.ceil(1000 * amount / original) / 1000, 1.0))


class Milliseconds(Latency):
    """Latency of a run of the whole model in milliseconds."""

    option = "--latency-ms"

    def __post_init__(self) -> None:
        if not 0 < self.amount < math.inf:
            raise UsageError(f"{self.option} {self.amount:g}: give milliseconds above 0")

    def __str__(self) -> str:
        """As the user would type it."""
        return f"{self.option} {self.amount:g}"

    def limit(self, original: int) -> int:
        """The bound in nanoseconds."""
        return round(1e6 * self.amount)

    def meeting(self, amount: int, original: int) -> Self:
        """The tightest budget that a latency in nanoseconds meets."""
        return type(self)(math.ceil(amount / 1e3) / 1e3)


def describe(budgets: Sequence[Budget]) -> str:
    """The budgets as the user would type them."""
    return " ".join(map(str, budgets))
