"""Pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.autodiff._axiswise import map_axis
from onnx_kfe.autodiff._convolution import Geometry, halves, transposed
from onnx_kfe.autodiff._emitter import Dim, integers, sizes_of
from onnx_kfe.autodiff._reduction import divide_by_count, share_among_equal
from onnx_kfe.autodiff._registry import Backward, Cotangents, Declined, operand, vjp


@vjp("MaxPool")
def max_pool(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """Passes to the position the forward pooling took, which it tells by its `Indices` output."""
    x = operand(node, 0)
    if node.attributes.get_int("storage_order", 0):
        raise Declined("no gradient rule for MaxPool with column-major indices")
    shape = backward.shape_of(x)
    indices = _indices(backward, node)
    kernel = node.attributes.get_ints("kernel_shape", ())
    strides = node.attributes.get_ints("strides", [1] * len(kernel))
    disjoint = all(taps <= stride for taps, stride in zip(kernel, strides, strict=True))
    plain = not node.attributes.get_int("ceil_mode", 0) and max(node.attributes.get_ints("dilations", [1])) == 1
    if disjoint and plain and backward.dtype(x) == ir.DataType.FLOAT:
        # Windows that share nothing: writing is enough, and faster than adding.
        unpooled = backward.op("MaxUnpool", cotangent, indices, shape, like=x, kernel_shape=kernel, strides=strides)
        return [unpooled]
    flat = backward.op("Reshape", cotangent, backward.ints(-1))
    positions = backward.op("Reshape", indices, backward.ints(-1))
    zeros = backward.op("Reshape", backward.zeros_like(x), backward.ints(-1))
    scattered = backward.op("ScatterElements", zeros, positions, flat, axis=0, reduction="add")
    return [backward.op("Reshape", scattered, shape, like=x)]


def _indices(backward: Backward, node: ir.Node) -> ir.Value:
    if len(node.outputs) < 2:
        node.resize_outputs(2)
    indices = node.outputs[1]
    if not indices.name:
        indices.name = backward.unique("indices")
        indices.type = ir.TensorType(ir.DataType.INT64)
        shape = node.outputs[0].shape
        indices.shape = None if shape is None else shape.copy()
    return indices


@vjp("AveragePool")
def average_pool(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """By a matrix along each axis where sizes are known, else by a transposed convolution channel by channel."""
    x, y = operand(node, 0), node.outputs[0]
    sizes, out_sizes = sizes_of(x), sizes_of(y)
    if sizes is None or out_sizes is None:
        raise Declined("no gradient rule for AveragePool of an input of unknown rank")
    geometry = _pool_geometry(node, sizes[2:], out_sizes[2:])
    taps = node.attributes.get_ints("kernel_shape", ())
    before, after = integers(sizes[2:]), integers(out_sizes[2:])
    if before is None or after is None:
        return [_average_unknown_size(backward, node, cotangent, geometry, taps)]
    shape = list(out_sizes)
    for axis, (size, out_size) in enumerate(zip(before, after, strict=True)):
        averaging = _averaging(node, geometry, taps, axis, size, out_size)
        cotangent, shape = map_axis(backward, cotangent, shape, axis + 2, averaging.T)
    return [cotangent]


def _averaging(
    node: ir.Node, geometry: Geometry, taps: Sequence[int], axis: int, size: int, out_size: int
) -> np.ndarray:
    """The matrix that averages along one axis: the weights of a window are products over the axes."""
    begin, end, dilation = geometry.begins[axis], geometry.ends[axis], geometry.dilations[axis]
    first = np.arange(out_size)[:, None] * geometry.strides[axis] - begin
    positions = first + dilation * np.arange(taps[axis])
    inside = (positions >= 0) & (positions < size)
    # Padding counts only if stated; what ceil_mode adds beyond the padding never does.
    counted = (positions < size + end) if node.attributes.get_int("count_include_pad", 0) else inside
    matrix = np.zeros((out_size, size))
    rows, columns = np.nonzero(inside)
    np.add.at(matrix, (rows, positions[rows, columns]), 1 / counted.sum(1)[rows])
    return matrix


def _average_unknown_size(
    backward: Backward, node: ir.Node, cotangent: ir.Value, geometry: Geometry, taps: Sequence[int]
) -> ir.Value:
    x = operand(node, 0)
    sizes = sizes_of(x)
    channels = sizes[1] if sizes is not None else None
    padded = any(geometry.pads) and node.attributes.get_int("count_include_pad", 0) == 0
    if padded or node.attributes.get_int("ceil_mode", 0) == 1 or not isinstance(channels, int):
        raise Declined("no gradient rule for AveragePool with padding or ceil_mode of an input of unknown size")
    window = backward.array_like(np.full((channels, 1, *taps), 1 / math.prod(taps)), x)
    return transposed(backward, geometry, window, x, cotangent)


def _pool_geometry(node: ir.Node, sizes: Sequence[Dim], out_sizes: Sequence[Dim]) -> Geometry:
    taps = node.attributes.get_ints("kernel_shape", ())
    strides = node.attributes.get_ints("strides", [1] * len(taps))
    dilations = node.attributes.get_ints("dilations", [1] * len(taps))
    extents = [d * (k - 1) + 1 for d, k in zip(dilations, taps, strict=True)]
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    pads = list(node.attributes.get_ints("pads", [0] * (2 * len(taps)))) if auto == "NOTSET" else [0] * (2 * len(taps))
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        before, after = integers(sizes), integers(out_sizes)
        if before is None or after is None:
            raise Declined(f"no gradient rule for {node.op_type} with auto_pad {auto} of an input of unknown size")
        terms = zip(before, after, strides, extents, strict=True)
        totals = [max((out - 1) * stride + extent - size, 0) for size, out, stride, extent in terms]
        begins, ends = halves(totals, larger_first=auto == "SAME_LOWER")
        pads = [*begins, *ends]
    return Geometry(strides, dilations, extents, pads[: len(taps)], pads[len(taps) :], group=_channels(node))


def _channels(node: ir.Node) -> int:
    sizes = sizes_of(node.outputs[0])
    return sizes[1] if sizes is not None and isinstance(sizes[1], int) else 1


@vjp("GlobalAveragePool")
def global_average_pool(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """Spreads evenly."""
    x = operand(node, 0)
    return [backward.expand_like(divide_by_count(backward, cotangent, x, node.outputs[0]), x)]


@vjp("GlobalMaxPool")
def global_max_pool(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """Passes to the positions that attain the maximum, in equal parts."""
    x, y = operand(node, 0), node.outputs[0]
    sizes = sizes_of(x)
    if sizes is None:
        raise Declined("no gradient rule for GlobalMaxPool of an input of unknown rank")
    return [share_among_equal(backward, x, y, cotangent, backward.ints(*range(2, len(sizes))))]
