"""Second moments of patches and cotangents as nodes of the graph.

The covariance of a ``k x k`` patch costs up to ``k^2`` times the convolution that it describes when every position is
used. Positions are therefore thinned to a grid, so that both covariances cost a fraction of the layer itself. Sums are
scaled up to all positions when they are accumulated.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnx_kfe.autodiff import Emitter
from onnx_kfe.calibration._grid import extent_of, grid_strides, on_grid, rows_on_grid
from onnx_kfe.calibration._patches import emit_patches, geometry_of, patched
from onnx_kfe.graph import Layer

__all__ = ["emit_cotangents", "emit_inputs", "emit_samples"]

_INPUT_COST = 0.25  # MACs of the input covariance as a multiple of the layer's own
_OUTPUT_COST = 0.1  # and of the output covariance
_INT64 = ir.DataType.INT64

Moments = tuple[ir.Value, ir.Value, ir.Value]


def emit_inputs(emit: Emitter, layer: Layer, x: ir.Value, y: ir.Value, phase: ir.Value) -> Moments:
    """Sum of ``x x^T``, sum of x and element count of the patches on the grid, tap-major with the last axis slowest.

    Of a ConvTranspose, which reads single positions, these are the patches.

    Args:
        emit: Where the nodes go.
        layer: The layer.
        x: Its input.
        y: Its output, whose extent the grid covers.
        phase: Three int64 that move the grid.

    Returns:
        ``[groups, i, i]`` or ``[i, i]``, ``[groups, i]`` or ``[i]``, and a scalar.

    Raises:
        KfeError: The geometry cannot be expressed; the message is the reason to skip the layer.
    """
    geometry = geometry_of(layer)
    share = min(1.0, _INPUT_COST * geometry.cotangent_size / geometry.patch_size)
    if not geometry.kernel:
        return _row_moments(emit, rows_on_grid(emit, x, geometry.in_channels, _of_rows(x, share), phase))
    if geometry.transposed:
        return _grid_moments(emit, x, geometry.groups, geometry.patch_size, share, phase)
    return _patch_moments(emit, layer, x, y, share, phase)


def emit_cotangents(emit: Emitter, layer: Layer, x: ir.Value, g: ir.Value, phase: ir.Value) -> Moments:
    """Sum of ``g g^T`` on the grid, its element count, and the element count of what has all positions.

    Of a ConvTranspose, where a position of the input writes a patch of the output, these are patches of g, and the
    element count is that of x; else it is that of g.

    Args:
        emit: Where the nodes go.
        layer: The layer.
        x: Its input.
        g: Cotangent of its output.
        phase: Three int64 that move the grid.

    Raises:
        KfeError: The geometry cannot be expressed; the message is the reason to skip the layer.
    """
    geometry = geometry_of(layer)
    total = emit.op("Size", x if geometry.transposed else g, dtype=_INT64, shape=())
    share = min(1.0, _OUTPUT_COST * geometry.patch_size / geometry.cotangent_size)
    if not geometry.kernel:
        moment, _, size = _row_moments(emit, rows_on_grid(emit, g, geometry.out_channels, _of_rows(g, share), phase))
    elif geometry.transposed:
        moment, _, size = _patch_moments(emit, layer, g, x, share, phase)
    else:
        moment, _, size = _grid_moments(emit, g, geometry.groups, geometry.cotangent_size, share, phase)
    return moment, size, total


def emit_samples(
    emit: Emitter, layer: Layer, x: ir.Value, outputs: Sequence[ir.Value], phase: ir.Value, share: float
) -> list[ir.Value]:
    """Patches, in the order of `emit_inputs`, and values of the shape of the layer's output, on one grid.

    For all layers but ConvTranspose.

    Args:
        emit: Where the nodes go.
        layer: The layer.
        x: An input of it.
        outputs: Values of the shape of its output.
        phase: Three int64 that move the grid.
        share: Share of the positions wanted.

    Returns:
        ``[groups, i, n]`` and ``[groups, o, n]`` for each output.
    """
    geometry = geometry_of(layer)
    groups, patch, out = geometry.groups, geometry.patch_size, geometry.out_channels // geometry.groups
    sizes = [patch, *[out] * len(outputs)]
    if not geometry.kernel:
        rows = [rows_on_grid(emit, v, size, share, phase) for v, size in zip((x, *outputs), sizes, strict=True)]
        columns = [emit.op("Transpose", v, perm=[1, 0]) for v in rows]
    else:
        strides = grid_strides(extent_of(outputs[0]), share)
        columns = [
            _columns(emit, emit_patches(emit, layer, x, outputs[0], strides, phase), groups, geometry.taps, patch)
        ]
        columns += [_columns(emit, on_grid(emit, v, strides, phase), groups, 1, out) for v in outputs]
    return [emit.op("Reshape", v, emit.ints(groups, size, -1)) for v, size in zip(columns, sizes, strict=True)]


def _of_rows(x: ir.Value, share: float) -> float:
    """The share, or all where the length of a sequence is free: of a short one hardly a position would be taken."""
    free = x.shape is not None and len(x.shape) >= 3 and not isinstance(x.shape[-2], int)
    return 1.0 if free else share


def _patch_moments(emit: Emitter, layer: Layer, x: ir.Value, y: ir.Value, share: float, phase: ir.Value) -> Moments:
    """Of patches, see `emit_patches`."""
    geometry = patched(geometry_of(layer))
    patches = emit_patches(emit, layer, x, y, grid_strides(extent_of(y), share), phase)
    columns = _columns(emit, patches, geometry.groups, geometry.taps, geometry.patch_size)
    return _second_moments(emit, columns, geometry.groups)


def _grid_moments(emit: Emitter, y: ir.Value, groups: int, size: int, share: float, phase: ir.Value) -> Moments:
    """Of single positions."""
    columns = on_grid(emit, y, grid_strides(extent_of(y), share), phase)
    return _second_moments(emit, _columns(emit, columns, groups, 1, size), groups)


def _row_moments(emit: Emitter, rows: ir.Value) -> Moments:
    moment = emit.op("Gemm", rows, rows, transA=1)
    total = emit.op("ReduceSum", rows, emit.ints(0), keepdims=0)
    return moment, total, emit.op("Size", rows, dtype=_INT64, shape=())


def _second_moments(emit: Emitter, columns: ir.Value, groups: int) -> Moments:
    if groups == 1:
        moment = emit.op("Gemm", columns, columns, transB=1)
    else:
        moment = emit.op("MatMul", columns, emit.op("Transpose", columns, perm=[0, 2, 1]))
    total = emit.op("ReduceSum", columns, emit.ints(-1), keepdims=0)
    return moment, total, emit.op("Size", columns, dtype=_INT64, shape=())


def _columns(emit: Emitter, x: ir.Value, groups: int, taps: int, size: int) -> ir.Value:
    """``[taps, C, N, *grid]`` with one column a position: ``[size, columns]``, or ``[groups, size, columns]``."""
    if groups == 1:
        return emit.op("Reshape", x, emit.ints(size, -1), shape=(size, None))
    split = emit.op("Reshape", x, emit.ints(taps, groups, size // taps, -1))
    columns = emit.op("Transpose", split, perm=[1, 0, 2, 3])
    return emit.op("Reshape", columns, emit.ints(groups, size, -1), shape=(groups, size, None))
