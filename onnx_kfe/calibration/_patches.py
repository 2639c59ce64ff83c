"""Second moments of patches and cotangents as nodes of the graph.

The covariance of a ``k x k`` patch costs up to ``k^2`` times the convolution that it describes when every position is
used. Positions are therefore taken on a strided grid whose phase changes from batch to batch, so that a covariance costs
about as much as the layer itself; sums are scaled up to all positions when they are accumulated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import onnx_ir as ir

from onnx_kfe.autodiff import Emitter
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import Layer

__all__ = ["emit_cotangents", "emit_inputs", "grid_strides"]

_COST = 1.0  # MACs of a covariance as a multiple of the layer's own
_FEWEST = 4  # positions of a sample taken at least


def grid_strides(extent: Sequence[int | None], share: float) -> tuple[int, ...]:
    """Strides of a grid that takes about `share` of the positions, coarsest along the longest axis.

    Args:
        extent: Positions along each axis; None where unknown, taken for long.
        share: Share wanted, in (0, 1].
    """
    sizes = [size if size is not None else 2**10 for size in extent]
    strides = [1] * len(sizes)
    while sizes and math.prod(strides) < 1 / share:
        axis = max(range(len(sizes)), key=lambda j: sizes[j] / strides[j])
        if math.prod(-(-n // s) for n, s in zip(sizes, strides, strict=True)) < 2 * _FEWEST:
            break
        strides[axis] += 1
    return tuple(strides)


def emit_inputs(
    emit: Emitter, layer: Layer, x: ir.Value, y: ir.Value, phase: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Sum of ``x x^T`` ``[groups, i, i]``, sum of x ``[groups, i]`` and element count, of the patches on the grid.

    Args:
        emit: Where the nodes go.
        layer: The layer.
        x: Its input.
        y: Its output, whose extent the grid covers.
        phase: Two int64 that move the grid.

    Raises:
        KfeError: The geometry cannot be expressed; the message is the reason to skip the layer.
    """
    geometry = layer.geometry
    assert geometry is not None
    share = min(1.0, _COST * geometry.out_channels / geometry.groups / geometry.patch_size)
    if layer.op_type != "Conv":
        rows = _rows(emit, x, geometry.in_channels, share, phase)
        return _row_moments(emit, rows)
    patches = _patches(emit, layer, x, y, share, phase)
    columns = _columns(emit, patches, geometry.groups, geometry.taps, geometry.in_channels // geometry.groups)
    return _column_moments(emit, columns)


def emit_cotangents(emit: Emitter, layer: Layer, g: ir.Value, phase: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Sum of ``g g^T`` ``[groups, o, o]`` and element count on the grid, and the element count of all of g."""
    geometry = layer.geometry
    assert geometry is not None
    total = emit.op("Size", g, dtype=ir.DataType.INT64, shape=())
    share = min(1.0, _COST * geometry.patch_size / (geometry.out_channels / geometry.groups))
    if layer.op_type != "Conv":
        moment, _, size = _row_moments(emit, _rows(emit, g, geometry.out_channels, share, phase))
        return moment, size, total
    extent = _extent(g)
    strides = grid_strides(extent, share)
    if math.prod(strides) > 1:
        starts = _phases(emit, g, extent, strides, phase)
        ends = emit.ints(*[2**31 - 1] * len(strides))
        g = _slice(emit, g, starts, ends, strides)
    columns = _columns(emit, g, geometry.groups, 1, geometry.out_channels // geometry.groups)
    moment, _, size = _column_moments(emit, columns)
    return moment, size, total


def _patches(emit: Emitter, layer: Layer, x: ir.Value, y: ir.Value, share: float, phase: ir.Value) -> ir.Value:
    """``[N, taps * C, *grid]``, tap-major: one strided slice of the padded input for each tap."""
    geometry = layer.geometry
    assert geometry is not None
    spatial = len(geometry.kernel)
    dilations = layer.node.attributes.get_ints("dilations", [1] * spatial)
    pads = _pads(layer, x, dilations)
    if any(pads):
        begin, end = pads[:spatial], pads[spatial:]
        x = emit.op("Pad", _float32(emit, x), emit.ints(0, 0, *begin, 0, 0, *end))
    else:
        x = _float32(emit, x)
    extent = _extent(y)
    strides = grid_strides(extent, share)
    if geometry.taps == 1 and math.prod(strides) == 1 and math.prod(geometry.strides) == 1:
        return x
    layer_strides = emit.ints(*geometry.strides)
    first = emit.op("Mul", _phases(emit, y, extent, strides, phase), layer_strides, dtype=ir.DataType.INT64)
    last = emit.op("Mul", _last_position(emit, y, extent), layer_strides, dtype=ir.DataType.INT64)
    steps = [a * b for a, b in zip(strides, geometry.strides, strict=True)]
    slices = []
    for tap in itertools.product(*map(range, geometry.kernel)):
        offset = [k * d for k, d in zip(tap, dilations, strict=True)]
        starts = emit.op("Add", first, emit.ints(*offset), dtype=ir.DataType.INT64)
        ends = emit.op("Add", last, emit.ints(*(o + 1 for o in offset)), dtype=ir.DataType.INT64)
        slices.append(_slice(emit, x, starts, ends, steps))
    return emit.op("Concat", *slices, axis=1) if len(slices) > 1 else slices[0]


def _pads(layer: Layer, x: ir.Value, dilations: Sequence[int]) -> list[int]:
    attributes = layer.node.attributes
    geometry = layer.geometry
    assert geometry is not None
    mode = attributes.get_string("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return list(attributes.get_ints("pads", [0] * 2 * len(geometry.kernel)))
    if mode == "VALID":
        return [0] * 2 * len(geometry.kernel)
    begin, end = [], []
    for size, k, d, s in zip(_extent(x), geometry.kernel, dilations, geometry.strides, strict=True):
        if size is None and s > 1:
            raise KfeError(f"auto_pad {mode} with a stride and a free input size")
        reach = d * (k - 1) + 1
        total = reach - 1 if s == 1 or size is None else max((-(-size // s) - 1) * s + reach - size, 0)
        small = total // 2
        begin.append(small if mode == "SAME_UPPER" else total - small)
        end.append(total - begin[-1])
    return begin + end


def _extent(value: ir.Value) -> list[int | None]:
    if value.shape is None:
        raise KfeError(f"the shape of '{value.name}' is unknown")
    return [size if isinstance(size, int) else None for size in value.shape[2:]]


def _phases(
    emit: Emitter, y: ir.Value, extent: Sequence[int | None], strides: Sequence[int], phase: ir.Value
) -> ir.Value:
    """Where the grid starts on each axis: a function of the phase, within the stride and the extent."""
    if math.prod(strides) == 1:
        return emit.ints(*[0] * len(strides))
    limits = emit.ints(*strides)
    if any(size is None for size in extent):
        sizes = emit.op("Shape", y, dtype=ir.DataType.INT64, start=2)
        limits = emit.op("Min", limits, sizes, dtype=ir.DataType.INT64)
    offsets = phase if len(strides) == 2 else emit.op("Slice", phase, emit.ints(0), emit.ints(1))
    return emit.op("Mod", offsets, limits, dtype=ir.DataType.INT64)


def _last_position(emit: Emitter, y: ir.Value, extent: Sequence[int | None]) -> ir.Value:
    if all(size is not None for size in extent):
        return emit.ints(*(size - 1 for size in extent if size is not None))
    sizes = emit.op("Shape", y, dtype=ir.DataType.INT64, start=2)
    return emit.op("Sub", sizes, emit.ints(*[1] * len(extent)), dtype=ir.DataType.INT64)


def _slice(emit: Emitter, x: ir.Value, starts: ir.Value, ends: ir.Value, steps: Sequence[int]) -> ir.Value:
    axes = emit.ints(*range(2, 2 + len(steps)))
    return emit.op("Slice", x, starts, ends, axes, emit.ints(*steps))


def _columns(emit: Emitter, x: ir.Value, groups: int, taps: int, channels: int) -> ir.Value:
    """``[N, taps * C, *grid]`` to one column a position: ``[groups, taps * c, N * T]``, ``[taps * c, N * T]`` for one."""
    x = _float32(emit, x)
    if groups == 1:
        flat = emit.op("Reshape", x, emit.ints(0, taps * channels, -1))
        return emit.op("Reshape", emit.op("Transpose", flat, perm=[1, 0, 2]), emit.ints(taps * channels, -1))
    split = emit.op("Reshape", x, emit.ints(0, taps, groups, channels, -1))
    grouped = emit.op("Transpose", split, perm=[2, 1, 3, 0, 4])
    return emit.op("Reshape", grouped, emit.ints(groups, taps * channels, -1))


def _column_moments(emit: Emitter, columns: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    grouped = columns.shape is not None and len(columns.shape) == 3
    producer = columns.producer()
    target = producer.inputs[1].const_value if producer is not None and producer.inputs[1] is not None else None
    grouped = target is not None and target.size == 3
    if grouped:
        moment = emit.op("MatMul", columns, emit.op("Transpose", columns, perm=[0, 2, 1]))
    else:
        moment = emit.op("Gemm", columns, columns, transB=1)
    total = emit.op("ReduceSum", columns, emit.ints(-1), keepdims=0)
    return moment, total, emit.op("Size", columns, dtype=ir.DataType.INT64, shape=())


def _rows(emit: Emitter, x: ir.Value, features: int, share: float, phase: ir.Value) -> ir.Value:
    """``[..., features]`` to one row a position, thinned along the last position axis where there is one."""
    x = _float32(emit, x)
    rank = len(x.shape) if x.shape is not None else 2
    if rank >= 3 and share < 1:
        length = x.shape[-2] if x.shape is not None else None
        (stride,) = grid_strides([length if isinstance(length, int) else None], share)
        if stride > 1:
            first = emit.op("Slice", phase, emit.ints(0), emit.ints(1))
            limit = emit.ints(stride)
            if not isinstance(length, int):
                size = emit.op("Shape", x, dtype=ir.DataType.INT64, start=-2, end=-1)
                limit = emit.op("Min", limit, size, dtype=ir.DataType.INT64)
            start = emit.op("Mod", first, limit, dtype=ir.DataType.INT64)
            x = emit.op("Slice", x, start, emit.ints(2**31 - 1), emit.ints(-2), emit.ints(stride))
    return emit.op("Reshape", x, emit.ints(-1, features))


def _row_moments(emit: Emitter, rows: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    moment = emit.op("Gemm", rows, rows, transA=1)
    total = emit.op("ReduceSum", rows, emit.ints(0), keepdims=0)
    return moment, total, emit.op("Size", rows, dtype=ir.DataType.INT64, shape=())


def _float32(emit: Emitter, x: ir.Value) -> ir.Value:
    if x.dtype in (None, ir.DataType.FLOAT):
        return x
    return emit.op("Cast", x, dtype=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
