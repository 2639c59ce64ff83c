"""Forms: the small structures that can stand in place of a layer. One class, one registration."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from onnx_kfe.errors import UsageError
from onnx_kfe.graph import Geometry
from onnx_kfe.kfe import Array, InputSubspace, TwoFactor, refine_subspace
from onnx_kfe.planning._chain import Cost, Link, Stage, chain_cost
from onnx_kfe.planning._problem import GroupProblem, LayerProblem

__all__ = ["FORMS", "Form", "rank_grid"]

_SMALLEST_UNIT = 4
_MOST_INPUT_RANKS = 16  # each costs an eigendecomposition, and as many candidates as there are output ranks


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

    @abstractmethod
    def limits(self, geometry: Geometry, ranks: Sequence[int] = ()) -> tuple[int, ...]:
        """Largest value of each rank, given the `ranks` before it; empty where the form does not apply to the layer."""

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


class OutputLowRank(Form):
    """``k x k`` into r channels, then ``1x1``: the exact optimum of its kind (see `kfe.two_factor`), group by group."""

    def __init__(self, name: str, pointwise: bool) -> None:
        self.name = name
        self._pointwise = pointwise

    def limits(self, geometry: Geometry, ranks: Sequence[int] = ()) -> tuple[int, ...]:
        applies = (geometry.taps == 1) == self._pointwise
        return (min(geometry.patch_size, geometry.out_channels // geometry.groups),) if applies else ()

    def links(self, geometry: Geometry, ranks: Sequence[int]) -> list[Link]:
        codes = geometry.groups * ranks[0]
        first = Link(geometry.in_channels, codes, geometry.groups, _all_axes(geometry))
        return [first, Link(codes, geometry.out_channels, geometry.groups)]

    def losses(self, problem: LayerProblem, round_to: int) -> Iterator[tuple[tuple[int, ...], float]]:
        total = sum(group.factors.losses for group in problem.groups)
        (ranks,) = self.grids(problem.geometry, round_to)
        for rank in ranks:
            yield (rank,), float(np.asarray(total)[rank])

    def stages(self, problem: LayerProblem, ranks: Sequence[int]) -> list[Stage]:
        pairs = [group.factors.truncated(ranks[0]) for group in problem.groups]
        kernel = problem.weight.shape[2:]
        first = np.stack([right.reshape(ranks[0], *kernel) for _, right in pairs])
        return [Stage(first, _all_axes(problem.geometry)), Stage(np.stack([left for left, _ in pairs]))]


class InputLowRank(Form):
    """``1x1`` into r channels, then ``k x k``, its weight re-solved under the full patch covariance."""

    name = "input_low_rank"

    def limits(self, geometry: Geometry, ranks: Sequence[int] = ()) -> tuple[int, ...]:
        return (geometry.in_channels // geometry.groups,) if geometry.taps > 1 else ()

    def grids(self, geometry: Geometry, round_to: int) -> list[list[int]]:
        """Few input ranks, see `_few`."""
        return [_few(rank_grid(limit, round_to)) for limit in self.limits(geometry)]

    def links(self, geometry: Geometry, ranks: Sequence[int]) -> list[Link]:
        codes = geometry.groups * ranks[0]
        encoder = Link(geometry.in_channels, codes, geometry.groups)
        return [encoder, Link(codes, geometry.out_channels, geometry.groups, _all_axes(geometry))]

    def losses(self, problem: LayerProblem, round_to: int) -> Iterator[tuple[tuple[int, ...], float]]:
        (ranks,) = self.grids(problem.geometry, round_to)
        for rank, *by_group in zip(ranks, *(group.tucker_losses(ranks) for group in problem.groups), strict=True):
            yield (rank,), float(sum(losses[-1] for losses in by_group))

    def stages(self, problem: LayerProblem, ranks: Sequence[int]) -> list[Stage]:
        refined = [_refined(group, ranks[0], len(group.weight))[0] for group in problem.groups]
        balanced = [_balance(subspace.encoder, subspace.core) for subspace in refined]
        encoders, cores = zip(*balanced, strict=True)
        return [Stage(np.stack(encoders)), Stage(np.stack(cores), _all_axes(problem.geometry))]


class TuckerChain(Form):
    """``1x1`` into r channels, ``k x k`` into s, ``1x1`` out: the chain that EigenDamage writes."""

    name = "tucker"

    def limits(self, geometry: Geometry, ranks: Sequence[int] = ()) -> tuple[int, ...]:
        if geometry.taps == 1:
            return ()
        inside = geometry.in_channels // geometry.groups
        seen = (ranks[0] if ranks else inside) * geometry.taps  # inputs of the core
        return (inside, min(seen, geometry.out_channels // geometry.groups))

    def grids(self, geometry: Geometry, round_to: int) -> list[list[int]]:
        """Few input ranks, see `_few`."""
        inputs, outputs = (rank_grid(limit, round_to) for limit in self.limits(geometry))
        return [_few(inputs), outputs]

    def links(self, geometry: Geometry, ranks: Sequence[int]) -> list[Link]:
        inside, outside = (geometry.groups * rank for rank in ranks)
        encoder = Link(geometry.in_channels, inside, geometry.groups)
        core = Link(inside, outside, geometry.groups, _all_axes(geometry))
        return [encoder, core, Link(outside, geometry.out_channels, geometry.groups)]

    def losses(self, problem: LayerProblem, round_to: int) -> Iterator[tuple[tuple[int, ...], float]]:
        ranks, outputs = self.grids(problem.geometry, round_to)
        for rank, *by_group in zip(ranks, *(group.tucker_losses(ranks) for group in problem.groups), strict=True):
            for output in outputs:
                if output < len(by_group[0]):  # no more than the core has inputs
                    yield (rank, output), float(sum(losses[output] for losses in by_group))

    def stages(self, problem: LayerProblem, ranks: Sequence[int]) -> list[Stage]:
        encoders, cores, decoders = [], [], []
        for group in problem.groups:
            subspace, factors = _refined(group, ranks[0], ranks[1])
            left, right = factors.truncated(ranks[1])
            encoder, core = _balance(subspace.encoder, right.reshape(ranks[1], *subspace.core.shape[1:]))
            encoders.append(encoder)
            cores.append(core)
            decoders.append(left)
        core_stage = Stage(np.stack(cores), _all_axes(problem.geometry))
        return [Stage(np.stack(encoders)), core_stage, Stage(np.stack(decoders))]


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        OutputLowRank("two_factor", pointwise=True),
        OutputLowRank("output_low_rank", pointwise=False),
        InputLowRank(),
        TuckerChain(),
    )
}


def _all_axes(geometry: Geometry) -> tuple[int, ...]:
    return tuple(range(len(geometry.kernel)))


def _few(grid: list[int]) -> list[int]:
    """Every so many of the input ranks, where there are very many."""
    return grid[:: max(1, math.ceil(len(grid) / _MOST_INPUT_RANKS))]


def _refined(group: GroupProblem, rank: int, output_rank: int) -> tuple[InputSubspace, TwoFactor]:
    return refine_subspace(group.weight, group.input_factor, group.output, rank, output_rank)


def _balance(encoder: Array, core: Array) -> tuple[Array, Array]:
    """Rescale the channels between two stages to equal norms on both sides."""
    axes = (0, *range(2, core.ndim))
    tiny = np.finfo(np.float64).tiny
    scales = np.sqrt(
        np.maximum(np.linalg.norm(encoder, axis=1), tiny) / np.maximum(np.sqrt(np.square(core).sum(axis=axes)), tiny)
    )
    shape = (1, -1, *[1] * (core.ndim - 2))
    return encoder / scales[:, None], core * scales.reshape(shape)
