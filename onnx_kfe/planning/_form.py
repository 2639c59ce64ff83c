"""What a form is: a small structure that can stand in place of a layer, with ranks as its only parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from onnx_kfe.errors import UsageError
from onnx_kfe.graph import Geometry
from onnx_kfe.planning._chain import Cost, Link, Stage, chain_cost
from onnx_kfe.planning._problem import LayerProblem

__all__ = ["Form", "all_axes", "few", "rank_grid"]

_SMALLEST_UNIT = 4


def rank_grid(limit: int, round_to: int) -> list[int]:
    """Ranks below `limit` that run fast: multiples of `round_to`, of a fraction of it for small layers.

    Raises:
        UsageError: `round_to` is not positive.
    """
    if round_to < 1:
        raise UsageError(f"--round-to {round_to}: give 1 or more")
    unit = round_to
    while unit > _SMALLEST_UNIT and limit < 4 * unit:
        unit //= 2
    return list(range(unit, limit, unit))


class Form(ABC):
    """A structure for a layer, with ranks as its only parameters."""

    name: str
    searched = True
    """Whether integer programming chooses among its ranks."""
    moves_bias = True
    """Whether the bias makes up for what the mean input loses."""

    @abstractmethod
    def limits(self, geometry: Geometry, ranks: Sequence[int] = ()) -> tuple[int, ...]:
        """Largest value of each rank, given the `ranks` before it; empty where the form does not apply to the layer."""

    def misfit(self, geometry: Geometry, ranks: Sequence[int]) -> str | None:
        """What is wrong with ranks that are within the limits; None where they fit."""
        return None

    @abstractmethod
    def links(self, geometry: Geometry, ranks: Sequence[int]) -> list[Link]:
        """The shapes of the chain at the given ranks."""

    def cost(self, geometry: Geometry, ranks: Sequence[int]) -> Cost:
        """Cost at the given ranks."""
        return chain_cost(geometry, self.links(geometry, ranks))

    def grids(self, geometry: Geometry, round_to: int) -> list[list[int]]:
        """The values of each rank that are considered."""
        return [rank_grid(limit, round_to) for limit in self.limits(geometry)]

    @abstractmethod
    def losses(self, problem: LayerProblem, round_to: int) -> Iterator[tuple[tuple[int, ...], float]]:
        """Ranks on the grid with their predicted losses in nats per sample."""

    @abstractmethod
    def stages(self, problem: LayerProblem, ranks: Sequence[int]) -> list[Stage]:
        """The weights of the chain at the given ranks."""


def all_axes(geometry: Geometry) -> tuple[int, ...]:
    """The spatial axes of a layer."""
    return tuple(range(len(geometry.kernel)))


def few(ranks: list[int], most: int) -> list[int]:
    """Every so many of the ranks, where there are more than `most`."""
    return ranks[:: max(1, math.ceil(len(ranks) / most))]
