"""Forms with structured stages: depthwise, and block-diagonal between two reorderings of channels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from onnx_kfe.graph import Geometry
from onnx_kfe.kfe import block_diagonal, separable, separable_losses
from onnx_kfe.planning._chain import Link, Stage
from onnx_kfe.planning._form import Form, all_axes, few, rank_grid
from onnx_kfe.planning._problem import LayerProblem

__all__ = ["BlockDiagonal", "DepthwiseSeparable"]

_MOST_RANKS = 5  # each is a decomposition of its own
_MOST_GROUPS = 8
_LARGEST = 2**16  # input times output channels beyond which pivoting takes too long


class DepthwiseSeparable(Form):
    """``1x1`` into r channels, depthwise ``k x k``, ``1x1`` out (see `kfe.separable`). For ungrouped convolutions."""

    name = "separable"

    def limits(self, geometry: Geometry, ranks: Sequence[int] = ()) -> tuple[int, ...]:
        return (geometry.patch_size,) if geometry.taps > 1 and geometry.groups == 1 else ()

    def grids(self, geometry: Geometry, round_to: int) -> list[list[int]]:
        """Few ranks, up to the larger number of channels: beyond it little is saved."""
        widest = max(geometry.in_channels, geometry.out_channels) + 1
        return [few(rank_grid(min(limit, widest), round_to), _MOST_RANKS) for limit in self.limits(geometry)]

    def links(self, geometry: Geometry, ranks: Sequence[int]) -> list[Link]:
        (rank,) = ranks
        depthwise = Link(rank, rank, rank, all_axes(geometry))
        return [Link(geometry.in_channels, rank), depthwise, Link(rank, geometry.out_channels)]

    def losses(self, problem: LayerProblem, round_to: int) -> Iterator[tuple[tuple[int, ...], float]]:
        (ranks,), (group,) = self.grids(problem.geometry, round_to), problem.groups
        for rank, loss in zip(
            ranks, separable_losses(group.weight, group.input_factor, group.output, ranks), strict=True
        ):
            yield (rank,), loss

    def stages(self, problem: LayerProblem, ranks: Sequence[int]) -> list[Stage]:
        (group,) = problem.groups
        chain = separable(group.weight, group.input_factor, group.output, ranks[0])
        depthwise = chain.depthwise[:, None, None]
        return [Stage(chain.encoder[None]), Stage(depthwise, all_axes(problem.geometry)), Stage(chain.left[None])]


class BlockDiagonal(Form):
    """A convolution in groups, between reorderings of its channels that bring what is heavy into the groups.

    Its rank is the number of groups (see `kfe.block_diagonal`). For ungrouped convolutions.
    """

    name = "block_diagonal"

    def limits(self, geometry: Geometry, ranks: Sequence[int] = ()) -> tuple[int, ...]:
        if not geometry.kernel or geometry.groups > 1 or geometry.transposed:
            return ()
        most = math.gcd(geometry.in_channels, geometry.out_channels)
        return (most,) if most > 1 else ()

    def misfit(self, geometry: Geometry, ranks: Sequence[int]) -> str | None:
        """Groups divide both numbers of channels."""
        (most,) = self.limits(geometry)
        return f"{ranks[0]} groups do not divide its channels" if most % ranks[0] else None

    def grids(self, geometry: Geometry, round_to: int) -> list[list[int]]:
        """Powers of 2, for layers that are not too large."""
        if geometry.in_channels * geometry.out_channels > _LARGEST:
            return [[]]
        powers = (2**power for power in range(1, _MOST_GROUPS.bit_length()))
        return [[groups for groups in powers if limit % groups == 0] for limit in self.limits(geometry)]

    def links(self, geometry: Geometry, ranks: Sequence[int]) -> list[Link]:
        inputs, outputs = geometry.in_channels, geometry.out_channels
        blocks = Link(inputs, outputs, ranks[0], all_axes(geometry))
        return [Link(inputs, inputs, reorders=True), blocks, Link(outputs, outputs, reorders=True)]

    def losses(self, problem: LayerProblem, round_to: int) -> Iterator[tuple[tuple[int, ...], float]]:
        (grid,), (group,) = self.grids(problem.geometry, round_to), problem.groups
        for groups in grid:
            yield (groups,), block_diagonal(group.weight, group.input_factor, group.output, groups).loss

    def stages(self, problem: LayerProblem, ranks: Sequence[int]) -> list[Stage]:
        (group,) = problem.groups
        found = block_diagonal(group.weight, group.input_factor, group.output, ranks[0])
        blocks = Stage(found.weight, all_axes(problem.geometry))
        return [Stage(found.columns.astype(float)), blocks, Stage(np.argsort(found.rows).astype(float))]
