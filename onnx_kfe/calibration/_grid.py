"""The grids of positions that statistics are taken at, and values on them.

Positions are thinned alike along all axes, for neighbours have much in common, and the grid moves from batch to batch:
few of them shall have positions from everywhere, for what is near a border is unlike the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.autodiff import Emitter
from onnx_kfe.errors import KfeError

__all__ = [
    "PHASES",
    "extent_of",
    "float32",
    "grid_phase",
    "grid_positions",
    "grid_start",
    "grid_strides",
    "on_grid",
    "rows_on_grid",
]

PHASES = 2**20
"""Number of the phases of a grid, each of which is a share of the stride that it starts behind."""

_FEWEST = 4  # positions of a sample taken at least
_UNKNOWN = 2**10  # positions along an axis of unknown extent, when deciding how many of them to take
_ROOT = 1.2207440846057596  # of x^4 = x + 1
_INT64 = ir.DataType.INT64
_FLOAT = ir.DataType.FLOAT


def grid_strides(extent: Sequence[int | None], share: float) -> tuple[int, ...]:
    """Strides of a grid that takes about `share` of the positions, alike along all axes as far as they go.

    Args:
        extent: Positions along each axis; None where unknown.
        share: Share wanted, in (0, 1].
    """
    sizes = [_UNKNOWN if size is None else size for size in extent]
    share = max(share, min(1.0, _FEWEST / math.prod(sizes)))
    strides = [1] * len(sizes)
    shortest_first = sorted(range(len(sizes)), key=lambda axis: sizes[axis])
    for done, axis in enumerate(shortest_first):
        size, left = sizes[axis], len(sizes) - done
        strides[axis] = stride = min(size, max(1, round(share ** (-1 / left))))
        share = min(1.0, share * size / -(-size // stride))
    return tuple(strides)


def grid_phase(seed: int, place: int) -> np.ndarray:
    """Three int64 that move the grid of one batch among others: terms of the low-discrepancy R_3 sequence.

    Any number of batches in a row takes positions from all over the stride, each about equally often (Roberts 2018,
    "The unreasonable effectiveness of quasirandom sequences").

    Args:
        seed: Of the first term.
        place: Number of the batch.
    """
    first = np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64))).random(3)
    return np.floor((first + place * _ROOT ** -np.arange(1.0, 4.0)) % 1 * PHASES).astype(np.int64)


def extent_of(value: ir.Value) -> list[int | None]:
    """The sizes of the axes behind the first two, None where they are free."""
    if value.shape is None:
        raise KfeError(f"the shape of '{value.name}' is unknown")
    return [size if isinstance(size, int) else None for size in value.shape[2:]]


def grid_start(emit: Emitter, y: ir.Value, axis: int, stride: int, phase: ir.Value) -> ir.Value:
    """First position of the grid along an axis, an int64 vector of one: the phase's share of the stride, or extent."""
    if stride == 1:
        return emit.ints(0)
    limit = emit.op("Min", emit.ints(stride), emit.size_of(y, 2 + axis), dtype=_INT64)
    limit = emit.op("Max", limit, emit.ints(1), dtype=_INT64)  # of a batch that is padding throughout
    entry = min(max(axis, 0), 2)
    chosen = emit.op("Slice", phase, emit.ints(entry), emit.ints(entry + 1), dtype=_INT64)
    return emit.op("Div", emit.op("Mul", chosen, limit, dtype=_INT64), emit.ints(PHASES), dtype=_INT64)


def grid_positions(emit: Emitter, y: ir.Value, axis: int, stride: int, phase: ir.Value) -> ir.Value:
    """Output positions on the grid along an axis, an int64 vector."""
    start = emit.op("Squeeze", grid_start(emit, y, axis, stride, phase), dtype=_INT64)
    extent = emit.op("Squeeze", emit.size_of(y, 2 + axis), dtype=_INT64)
    return emit.op("Range", start, extent, emit.constant(np.array(stride, np.int64)), dtype=_INT64)


def on_grid(emit: Emitter, y: ir.Value, strides: Sequence[int], phase: ir.Value) -> ir.Value:
    """``[C, N, *grid]`` of an output or its cotangent."""
    y = float32(emit, y)
    for axis, stride in enumerate(strides):
        y = _thin(emit, y, axis, stride, phase)
    return emit.op("Transpose", y, perm=[1, 0, *range(2, 2 + len(strides))])


def _thin(emit: Emitter, x: ir.Value, axis: int, stride: int, phase: ir.Value) -> ir.Value:
    """Every stride-th position along an axis."""
    if stride == 1:
        return x
    start = grid_start(emit, x, axis, stride, phase)
    return emit.op("Slice", x, start, emit.ints(2**31 - 1), emit.ints(2 + axis), emit.ints(stride))


def rows_on_grid(emit: Emitter, x: ir.Value, features: int, share: float, phase: ir.Value) -> ir.Value:
    """``[..., features]`` to one row a position, thinned along the last position axis where there is one.

    The positions taken move on by one from entry to entry of the axes before, for where a sequence is read out at one
    position alone, as at its beginning, no other has a gradient.
    """
    rows = emit.op("Reshape", float32(emit, x), emit.ints(-1, features), shape=(None, features))
    if x.shape is None or len(x.shape) < 3 or share >= 1:
        return rows
    extent = x.shape[-2]
    (stride,) = grid_strides([extent if isinstance(extent, int) else None], share)
    if stride == 1:
        return rows
    length = emit.op("Max", emit.size_of(x, -2), emit.ints(1), dtype=_INT64)
    scalars = (emit.size_of(rows, 0), length, grid_start(emit, x, len(x.shape) - 4, stride, phase))
    count, length, start = (emit.op("Squeeze", value, dtype=_INT64) for value in scalars)
    even = emit.op("Range", start, count, emit.constant(np.array(stride, np.int64)), dtype=_INT64)
    entry = emit.op("Div", even, length, dtype=_INT64)
    place = emit.op("Mod", emit.op("Add", even, entry, dtype=_INT64), length, dtype=_INT64)
    taken = emit.op("Add", emit.op("Mul", entry, length, dtype=_INT64), place, dtype=_INT64)
    return emit.op("Gather", rows, taken, axis=0, shape=(None, features))


def float32(emit: Emitter, x: ir.Value) -> ir.Value:
    """A value in single precision."""
    return x if x.dtype in (None, _FLOAT) else emit.op("Cast", x, like=x, dtype=_FLOAT, to=int(_FLOAT))
