"""Forms with low rank: in the outputs, in the inputs, in both, or along one axis of the kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from onnx_kfe.graph import Geometry
from onnx_kfe.kfe import Array, InputSubspace, TwoFactor, refine_subspace
from onnx_kfe.planning._chain import Link, Stage
from onnx_kfe.planning._form import Form, all_axes, few, rank_grid
from onnx_kfe.planning._problem import GroupProblem, LayerProblem

__all__ = ["InputLowRank", "OutputLowRank", "Spatial", "TuckerChain"]

_MOST_INPUT_RANKS = 16  # each costs an eigendecomposition, and as many candidates as there are output ranks


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
        first = Link(geometry.in_channels, codes, geometry.groups, all_axes(geometry))
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
        return [Stage(first, all_axes(problem.geometry)), Stage(np.stack([left for left, _ in pairs]))]


class InputLowRank(Form):
    """``1x1`` into r channels, then ``k x k``, its weight re-solved under the full patch covariance."""

    name = "input_low_rank"

    def limits(self, geometry: Geometry, ranks: Sequence[int] = ()) -> tuple[int, ...]:
        return (geometry.in_channels // geometry.groups,) if geometry.taps > 1 else ()

    def grids(self, geometry: Geometry, round_to: int) -> list[list[int]]:
        """Few input ranks: each costs an eigendecomposition."""
        return [few(rank_grid(limit, round_to), _MOST_INPUT_RANKS) for limit in self.limits(geometry)]

    def links(self, geometry: Geometry, ranks: Sequence[int]) -> list[Link]:
        codes = geometry.groups * ranks[0]
        encoder = Link(geometry.in_channels, codes, geometry.groups)
        return [encoder, Link(codes, geometry.out_channels, geometry.groups, all_axes(geometry))]

    def losses(self, problem: LayerProblem, round_to: int) -> Iterator[tuple[tuple[int, ...], float]]:
        (ranks,) = self.grids(problem.geometry, round_to)
        for rank, *by_group in zip(ranks, *(group.tucker_losses(ranks) for group in problem.groups), strict=True):
            yield (rank,), float(sum(losses[-1] for losses in by_group))

    def stages(self, problem: LayerProblem, ranks: Sequence[int]) -> list[Stage]:
        refined = [_refined(group, ranks[0], len(group.weight))[0] for group in problem.groups]
        balanced = [_balance(subspace.encoder, subspace.core) for subspace in refined]
        encoders, cores = zip(*balanced, strict=True)
        return [Stage(np.stack(encoders)), Stage(np.stack(cores), all_axes(problem.geometry))]


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
        """Few input ranks: each costs an eigendecomposition."""
        inputs, outputs = (rank_grid(limit, round_to) for limit in self.limits(geometry))
        return [few(inputs, _MOST_INPUT_RANKS), outputs]

    def links(self, geometry: Geometry, ranks: Sequence[int]) -> list[Link]:
        inside, outside = (geometry.groups * rank for rank in ranks)
        encoder = Link(geometry.in_channels, inside, geometry.groups)
        core = Link(inside, outside, geometry.groups, all_axes(geometry))
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
        core_stage = Stage(np.stack(cores), all_axes(problem.geometry))
        return [Stage(np.stack(encoders)), core_stage, Stage(np.stack(decoders))]


class Spatial(Form):
    """``k x 1`` into r channels, then ``1 x k`` (Jaderberg et al. 2014), solved under the full patch covariance.

    It is an input subspace of rank r over channels and rows together (`GroupProblem.by_columns`).
    """

    name = "spatial"

    def limits(self, geometry: Geometry, ranks: Sequence[int] = ()) -> tuple[int, ...]:
        if len(geometry.kernel) != 2 or min(geometry.kernel) == 1:
            return ()
        high, wide = geometry.kernel
        return (min(geometry.in_channels // geometry.groups * high, geometry.out_channels // geometry.groups * wide),)

    def grids(self, geometry: Geometry, round_to: int) -> list[list[int]]:
        """Few ranks, each costs an eigendecomposition, and none beyond those that save parameters."""
        one = sum(link.parameters(geometry) for link in self.links(geometry, (1,)))
        saving = -(-geometry.weight_parameters // one)
        return [few(rank_grid(min(limit, saving), round_to), _MOST_INPUT_RANKS) for limit in self.limits(geometry)]

    def links(self, geometry: Geometry, ranks: Sequence[int]) -> list[Link]:
        codes = geometry.groups * ranks[0]
        first = Link(geometry.in_channels, codes, geometry.groups, (0,))
        return [first, Link(codes, geometry.out_channels, geometry.groups, (1,))]

    def losses(self, problem: LayerProblem, round_to: int) -> Iterator[tuple[tuple[int, ...], float]]:
        (ranks,) = self.grids(problem.geometry, round_to)
        found = (group.by_columns.tucker_losses(ranks) for group in problem.groups)
        for rank, *by_group in zip(ranks, *found, strict=True):
            yield (rank,), float(sum(losses[-1] for losses in by_group))

    def stages(self, problem: LayerProblem, ranks: Sequence[int]) -> list[Stage]:
        refined = [_refined(group.by_columns, ranks[0], len(group.weight))[0] for group in problem.groups]
        encoders, cores = zip(*(_balance(part.encoder, part.core) for part in refined), strict=True)
        columns = np.stack(encoders)
        high = problem.geometry.kernel[0]
        return [Stage(columns.reshape(*columns.shape[:2], -1, high), (0,)), Stage(np.stack(cores), (1,))]


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
