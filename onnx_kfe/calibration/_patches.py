"""Patches of convolutions as nodes of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_kfe.autodiff import Emitter
from onnx_kfe.calibration._grid import extent_of, float32, grid_positions, grid_start
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import Geometry, Layer

__all__ = [
    "channel_major",
    "emit_mean_patches",
    "emit_patches",
    "features_last",
    "geometry_of",
    "patched",
    "position_axes",
]

_INT64 = ir.DataType.INT64
_FLOAT = ir.DataType.FLOAT


def channel_major(geometry: Geometry) -> np.ndarray:
    """Where the graph, which stacks the taps of the last axis outermost and channels innermost, has each patch element.

    Args:
        geometry: Of the layer.

    Returns:
        ``[i]``, for patches in channel-major order; of a ConvTranspose ``[o]``, as its gradients come in patches.
    """
    taps, channels = geometry.taps, patched(geometry).patch_size // geometry.taps
    stacked = np.arange(taps).reshape(geometry.kernel[::-1]).T.reshape(-1)
    return (np.arange(channels)[:, None] + channels * stacked).reshape(-1)


def geometry_of(layer: Layer) -> Geometry:
    """The geometry of a layer whose shapes are known."""
    assert layer.geometry is not None
    return layer.geometry


def patched(geometry: Geometry) -> Geometry:
    """Of the convolution that takes patches: the layer itself, or the one that a ConvTranspose is the adjoint of."""
    return geometry.adjoint if geometry.transposed else geometry


def emit_patches(
    emit: Emitter, layer: Layer, x: ir.Value, y: ir.Value, strides: Sequence[int], phase: ir.Value
) -> ir.Value:
    """Patches of a convolution: rows are gathered once for all taps, the other axes sliced once for each of theirs.

    Args:
        emit: Where the nodes go.
        layer: The convolution, or the ConvTranspose that is its adjoint.
        x: What the patches are of: an input of the convolution, an output of the ConvTranspose.
        y: What has their positions: the output of the convolution, the input of the ConvTranspose.
        strides: Of the grid, along each axis.
        phase: Three int64 that move the grid.

    Returns:
        ``[taps, C, N, *grid]``.

    Raises:
        KfeError: The geometry cannot be expressed.
    """
    spatial = len(strides)
    axes = _axes(layer, x, strides)
    x = float32(emit, x)
    first = axes[0]
    x = emit.op("Unsqueeze", x, emit.ints(2)) if first.trivial else _gather_rows(emit, x, y, first, spatial, phase)
    x = emit.op("Transpose", x, perm=[2, 1, 0, *range(3, 3 + spatial)])  # [taps of the first axis, C, N, rows, ...]
    for axis in axes[1:]:
        x = x if axis.trivial else _slice_taps(emit, x, y, axis, spatial, phase)
    return x


def emit_mean_patches(emit: Emitter, layer: Layer, x: ir.Value, y: ir.Value) -> ir.Value:
    """The patches of each sample averaged over all positions: ``[n, i]``. Axis by axis, so that none is written out.

    Args:
        emit: Where the nodes go.
        layer: As of `emit_patches`.
        x: What the patches are of.
        y: What has their positions.

    Raises:
        KfeError: The geometry cannot be expressed.
    """
    spatial = len(geometry_of(layer).kernel)
    phase = emit.ints(0, 0, 0)
    means = emit.op(
        "Unsqueeze", emit.op("Transpose", float32(emit, x), perm=[1, 0, *range(2, 2 + spatial)]), emit.ints(0)
    )
    for axis in _axes(layer, x, [1] * spatial):
        means = _slice_taps(emit, means, y, axis, spatial, phase)
        means = emit.op("ReduceMean", means, emit.ints(3 + axis.index), keepdims=1)
    return emit.op("Reshape", emit.op("Transpose", means, perm=[2, 0, 1, *range(3, 3 + spatial)]), emit.ints(0, -1))


@dataclass(frozen=True)
class _Axis:
    """A spatial axis of a convolution, and the stride of the grid along it."""

    index: int
    kernel: int
    stride: int
    dilation: int
    begin: int
    end: int
    grid: int

    @property
    def trivial(self) -> bool:
        """Whether every output position reads just the input at the same place."""
        return self.kernel == self.stride == self.grid == 1 and not (self.begin or self.end)

    @property
    def offsets(self) -> list[int]:
        """Where each tap is, relative to the first."""
        return [tap * self.dilation for tap in range(self.kernel)]


def _axes(layer: Layer, x: ir.Value, grid: Sequence[int]) -> list[_Axis]:
    geometry = geometry_of(layer)
    spatial = len(geometry.kernel)
    dilations = layer.node.attributes.get_ints("dilations", [1] * spatial)
    pads = _pads(layer, x, dilations)
    return [
        _Axis(j, geometry.kernel[j], geometry.strides[j], dilations[j], pads[j], pads[spatial + j], grid[j])
        for j in range(spatial)
    ]


def _gather_rows(emit: Emitter, x: ir.Value, y: ir.Value, axis: _Axis, spatial: int, phase: ir.Value) -> ir.Value:
    """``[N, C, taps, rows, ...]``; rows in the padding are zeroed, which is cheaper than to pad all of x."""
    positions = emit.op("Unsqueeze", grid_positions(emit, y, 0, axis.grid, phase), emit.ints(0), dtype=_INT64)
    shifts = emit.constant(np.array(axis.offsets, np.int64)[:, None] - axis.begin)
    rows = emit.op("Mul", positions, emit.ints(axis.stride), dtype=_INT64)
    rows = emit.op("Add", rows, shifts, dtype=_INT64)
    if not (axis.begin or axis.end):
        return emit.op("Gather", x, rows, axis=2)
    last = emit.op("Sub", emit.size_of(x, 2), emit.ints(1), dtype=_INT64)
    inside = emit.op("Max", emit.op("Min", rows, last, dtype=_INT64), emit.ints(0), dtype=_INT64)
    real = emit.op("Cast", emit.op("Equal", rows, inside, dtype=ir.DataType.BOOL), dtype=_FLOAT, to=int(_FLOAT))
    if spatial > 1:
        real = emit.op("Unsqueeze", real, emit.ints(*range(2, 1 + spatial)))
    return emit.op("Mul", emit.op("Gather", x, inside, axis=2), real)


def _slice_taps(emit: Emitter, x: ir.Value, y: ir.Value, axis: _Axis, spatial: int, phase: ir.Value) -> ir.Value:
    """``[taps, C, N, rows, ...]`` with a further axis sliced for each of its taps, stacked on the first axis."""
    place = 3 + axis.index
    if axis.begin or axis.end:
        widths = np.zeros((2, 3 + spatial), np.int64)
        widths[:, place] = axis.begin, axis.end
        x = emit.op("Pad", x, emit.constant(widths.reshape(-1)))
    stride = emit.ints(axis.stride)
    first = emit.op("Mul", grid_start(emit, y, axis.index, axis.grid, phase), stride, dtype=_INT64)
    last = emit.op("Sub", emit.size_of(y, 2 + axis.index), emit.ints(1), dtype=_INT64)
    last = emit.op("Mul", last, stride, dtype=_INT64)
    slices = []
    for offset in axis.offsets:
        start = emit.op("Add", first, emit.ints(offset), dtype=_INT64)
        end = emit.op("Add", last, emit.ints(offset + 1), dtype=_INT64)
        step = emit.ints(axis.stride * axis.grid)
        slices.append(emit.op("Slice", x, start, end, emit.ints(place), step))
    return emit.op("Concat", *slices, axis=0) if len(slices) > 1 else slices[0]


def _pads(layer: Layer, x: ir.Value, dilations: Sequence[int]) -> list[int]:
    attributes = layer.node.attributes
    geometry = geometry_of(layer)
    mode = attributes.get_string("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return list(attributes.get_ints("pads", [0] * 2 * len(geometry.kernel)))
    if mode == "VALID":
        return [0] * 2 * len(geometry.kernel)
    begin, end = [], []
    added = attributes.get_ints("output_padding", [0] * len(geometry.kernel))
    for size, k, d, s, more in zip(extent_of(x), geometry.kernel, dilations, geometry.strides, added, strict=True):
        reach = d * (k - 1) + 1
        if geometry.transposed:
            total = max(reach + more - s, 0)
        elif size is None and s > 1:
            raise KfeError(f"auto_pad {mode} with a stride and a free input size")
        else:
            total = reach - 1 if s == 1 or size is None else max((-(-size // s) - 1) * s + reach - size, 0)
        begin.append(total // 2 if mode == "SAME_UPPER" else total - total // 2)
        end.append(total - begin[-1])
    return begin + end


def position_axes(layer: Layer, value: ir.Value) -> range:
    """The axes of a layer's input or output that count its positions, for each entry of the leading axis.

    Args:
        layer: The layer.
        value: Its input, its output or a cotangent.
    """
    rank = len(value.shape or (None, None))
    return range(2, rank) if geometry_of(layer).kernel else range(1, rank - 1)


def features_last(emit: Emitter, layer: Layer, value: ir.Value) -> ir.Value:
    """An input or output of a layer as of ``x @ W``: transposed where the layer is ``W @ x``.

    Args:
        emit: Where the nodes go.
        layer: The layer.
        value: Its input, its output or a cotangent.

    Raises:
        KfeError: The number of axes is unknown, or there is but one.
    """
    if not layer.left:
        return value
    rank = 0 if value.shape is None else len(value.shape)
    if rank < 2:
        raise KfeError(f"'{value.name}' is not known to be a matrix or a stack of them")
    return emit.transpose(value, [*range(rank - 2), rank - 1, rank - 2])
