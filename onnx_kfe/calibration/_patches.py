"""Second moments of patches and cotangents as nodes of the graph.

The covariance of a ``k x k`` patch costs up to ``k^2`` times the convolution that it describes when every position is
used. Positions are therefore thinned, whole rows at a time because rows are contiguous in memory, and the rows taken
change from batch to batch, so that both covariances cost a fraction of the layer itself. Sums are scaled up to all
positions when they are accumulated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_kfe.autodiff import Emitter
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import Geometry, Layer

__all__ = [
    "channel_major",
    "emit_cotangents",
    "emit_inputs",
    "emit_mean_patches",
    "emit_patches",
    "emit_samples",
    "features_last",
    "float32",
    "grid_strides",
    "position_axes",
]

_INPUT_COST = 0.25  # MACs of the input covariance as a multiple of the layer's own
_OUTPUT_COST = 0.1  # and of the output covariance
_FEWEST = 4  # positions of a sample taken at least
_UNKNOWN = 2**10  # positions along an axis of unknown extent, when deciding how many of them to take
_INT64 = ir.DataType.INT64
_FLOAT = ir.DataType.FLOAT

Moments = tuple[ir.Value, ir.Value, ir.Value]


def grid_strides(extent: Sequence[int | None], share: float) -> tuple[int, ...]:
    """Strides of a grid that takes about `share` of the positions: along the first axis as far as it goes, then on.

    Args:
        extent: Positions along each axis; None where unknown.
        share: Share wanted, in (0, 1].
    """
    sizes = [_UNKNOWN if size is None else size for size in extent]
    share = max(share, min(1.0, _FEWEST / math.prod(sizes)))
    strides = []
    for size in sizes:
        stride = min(size, max(1, round(1 / share)))
        strides.append(stride)
        share = min(1.0, share * size / -(-size // stride))
    return tuple(strides)


def channel_major(geometry: Geometry) -> np.ndarray:
    """Where the graph, which stacks the taps of the last axis outermost and channels innermost, has each patch element.

    Args:
        geometry: Of the layer.

    Returns:
        ``[i]``, for patches in channel-major order; of a ConvTranspose ``[o]``, as its gradients come in patches.
    """
    taps, channels = geometry.taps, _patched(geometry).patch_size // geometry.taps
    stacked = np.arange(taps).reshape(geometry.kernel[::-1]).T.reshape(-1)
    return (np.arange(channels)[:, None] + channels * stacked).reshape(-1)


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
    geometry = _geometry(layer)
    share = min(1.0, _INPUT_COST * geometry.cotangent_size / geometry.patch_size)
    if not geometry.kernel:
        return _row_moments(emit, _rows(emit, x, geometry.in_channels, _of_rows(x, share), phase))
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
    geometry = _geometry(layer)
    total = emit.op("Size", x if geometry.transposed else g, dtype=_INT64, shape=())
    share = min(1.0, _OUTPUT_COST * geometry.patch_size / geometry.cotangent_size)
    if not geometry.kernel:
        moment, _, size = _row_moments(emit, _rows(emit, g, geometry.out_channels, _of_rows(g, share), phase))
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
    geometry = _geometry(layer)
    groups, patch, out = geometry.groups, geometry.patch_size, geometry.out_channels // geometry.groups
    sizes = [patch, *[out] * len(outputs)]
    if not geometry.kernel:
        rows = [_rows(emit, v, size, share, phase) for v, size in zip((x, *outputs), sizes, strict=True)]
        columns = [emit.op("Transpose", v, perm=[1, 0]) for v in rows]
    else:
        strides = grid_strides(_extent(outputs[0]), share)
        columns = [
            _columns(emit, emit_patches(emit, layer, x, outputs[0], strides, phase), groups, geometry.taps, patch)
        ]
        columns += [_columns(emit, _output_grid(emit, v, strides, phase), groups, 1, out) for v in outputs]
    return [emit.op("Reshape", v, emit.ints(groups, size, -1)) for v, size in zip(columns, sizes, strict=True)]


def _geometry(layer: Layer) -> Geometry:
    assert layer.geometry is not None
    return layer.geometry


def _patched(geometry: Geometry) -> Geometry:
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
    spatial = len(_geometry(layer).kernel)
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
    geometry = _geometry(layer)
    spatial = len(geometry.kernel)
    dilations = layer.node.attributes.get_ints("dilations", [1] * spatial)
    pads = _pads(layer, x, dilations)
    return [
        _Axis(j, geometry.kernel[j], geometry.strides[j], dilations[j], pads[j], pads[spatial + j], grid[j])
        for j in range(spatial)
    ]


def _gather_rows(emit: Emitter, x: ir.Value, y: ir.Value, axis: _Axis, spatial: int, phase: ir.Value) -> ir.Value:
    """``[N, C, taps, rows, ...]``; rows in the padding are zeroed, which is cheaper than to pad all of x."""
    positions = emit.op("Unsqueeze", _positions(emit, y, 0, axis.grid, phase), emit.ints(0), dtype=_INT64)
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
    first = emit.op("Mul", _start(emit, y, axis.index, axis.grid, phase), stride, dtype=_INT64)
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
    geometry = _geometry(layer)
    mode = attributes.get_string("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return list(attributes.get_ints("pads", [0] * 2 * len(geometry.kernel)))
    if mode == "VALID":
        return [0] * 2 * len(geometry.kernel)
    begin, end = [], []
    added = attributes.get_ints("output_padding", [0] * len(geometry.kernel))
    for size, k, d, s, more in zip(_extent(x), geometry.kernel, dilations, geometry.strides, added, strict=True):
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


def _extent(value: ir.Value) -> list[int | None]:
    if value.shape is None:
        raise KfeError(f"the shape of '{value.name}' is unknown")
    return [size if isinstance(size, int) else None for size in value.shape[2:]]


def _start(emit: Emitter, y: ir.Value, axis: int, stride: int, phase: ir.Value) -> ir.Value:
    """First position of the grid along an axis, an int64 vector of one: the phase within the stride and the extent."""
    if stride == 1:
        return emit.ints(0)
    limit = emit.op("Min", emit.ints(stride), emit.size_of(y, 2 + axis), dtype=_INT64)
    limit = emit.op("Max", limit, emit.ints(1), dtype=_INT64)  # of a batch that is padding throughout
    entry = min(max(axis, 0), 2)
    chosen = emit.op("Slice", phase, emit.ints(entry), emit.ints(entry + 1), dtype=_INT64)
    return emit.op("Mod", chosen, limit, dtype=_INT64)


def _positions(emit: Emitter, y: ir.Value, axis: int, stride: int, phase: ir.Value) -> ir.Value:
    """Output positions on the grid along an axis, an int64 vector."""
    start = emit.op("Squeeze", _start(emit, y, axis, stride, phase), dtype=_INT64)
    extent = emit.op("Squeeze", emit.size_of(y, 2 + axis), dtype=_INT64)
    return emit.op("Range", start, extent, emit.constant(np.array(stride, np.int64)), dtype=_INT64)


def _thin(emit: Emitter, x: ir.Value, axis: int, stride: int, phase: ir.Value) -> ir.Value:
    """Every stride-th position along an axis."""
    if stride == 1:
        return x
    start = _start(emit, x, axis, stride, phase)
    return emit.op("Slice", x, start, emit.ints(2**31 - 1), emit.ints(2 + axis), emit.ints(stride))


def _output_grid(emit: Emitter, y: ir.Value, strides: Sequence[int], phase: ir.Value) -> ir.Value:
    """``[C, N, *grid]`` of an output or its cotangent."""
    y = float32(emit, y)
    for axis, stride in enumerate(strides):
        y = _thin(emit, y, axis, stride, phase)
    return emit.op("Transpose", y, perm=[1, 0, *range(2, 2 + len(strides))])


def _columns(emit: Emitter, x: ir.Value, groups: int, taps: int, size: int) -> ir.Value:
    """``[taps, C, N, *grid]`` with one column a position: ``[size, columns]``, or ``[groups, size, columns]``."""
    if groups == 1:
        return emit.op("Reshape", x, emit.ints(size, -1), shape=(size, None))
    split = emit.op("Reshape", x, emit.ints(taps, groups, size // taps, -1))
    columns = emit.op("Transpose", split, perm=[1, 0, 2, 3])
    return emit.op("Reshape", columns, emit.ints(groups, size, -1), shape=(groups, size, None))


def _patch_moments(emit: Emitter, layer: Layer, x: ir.Value, y: ir.Value, share: float, phase: ir.Value) -> Moments:
    """Of patches, see `emit_patches`."""
    geometry = _patched(_geometry(layer))
    patches = emit_patches(emit, layer, x, y, grid_strides(_extent(y), share), phase)
    columns = _columns(emit, patches, geometry.groups, geometry.taps, geometry.patch_size)
    return _second_moments(emit, columns, geometry.groups)


def _grid_moments(emit: Emitter, y: ir.Value, groups: int, size: int, share: float, phase: ir.Value) -> Moments:
    """Of single positions."""
    columns = _output_grid(emit, y, grid_strides(_extent(y), share), phase)
    return _second_moments(emit, _columns(emit, columns, groups, 1, size), groups)


def _second_moments(emit: Emitter, columns: ir.Value, groups: int) -> Moments:
    if groups == 1:
        moment = emit.op("Gemm", columns, columns, transB=1)
    else:
        moment = emit.op("MatMul", columns, emit.op("Transpose", columns, perm=[0, 2, 1]))
    total = emit.op("ReduceSum", columns, emit.ints(-1), keepdims=0)
    return moment, total, emit.op("Size", columns, dtype=_INT64, shape=())


def _of_rows(x: ir.Value, share: float) -> float:
    """The share, or all where the length of a sequence is free: of a short one hardly a position would be taken."""
    free = x.shape is not None and len(x.shape) >= 3 and not isinstance(x.shape[-2], int)
    return 1.0 if free else share


def _rows(emit: Emitter, x: ir.Value, features: int, share: float, phase: ir.Value) -> ir.Value:
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
    scalars = (emit.size_of(rows, 0), length, _start(emit, x, len(x.shape) - 4, stride, phase))
    count, length, start = (emit.op("Squeeze", value, dtype=_INT64) for value in scalars)
    even = emit.op("Range", start, count, emit.constant(np.array(stride, np.int64)), dtype=_INT64)
    entry = emit.op("Div", even, length, dtype=_INT64)
    place = emit.op("Mod", emit.op("Add", even, entry, dtype=_INT64), length, dtype=_INT64)
    taken = emit.op("Add", emit.op("Mul", entry, length, dtype=_INT64), place, dtype=_INT64)
    return emit.op("Gather", rows, taken, axis=0, shape=(None, features))


def _row_moments(emit: Emitter, rows: ir.Value) -> Moments:
    moment = emit.op("Gemm", rows, rows, transA=1)
    total = emit.op("ReduceSum", rows, emit.ints(0), keepdims=0)
    return moment, total, emit.op("Size", rows, dtype=_INT64, shape=())


def position_axes(layer: Layer, value: ir.Value) -> range:
    """The axes of a layer's input or output that count its positions, for each entry of the leading axis.

    Args:
        layer: The layer.
        value: Its input, its output or a cotangent.
    """
    rank = len(value.shape or (None, None))
    return range(2, rank) if _geometry(layer).kernel else range(1, rank - 1)


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


def float32(emit: Emitter, x: ir.Value) -> ir.Value:
    """A value in single precision."""
    return x if x.dtype in (None, _FLOAT) else emit.op("Cast", x, like=x, dtype=_FLOAT, to=int(_FLOAT))
