"""Operators that pick elements by position: their adjoints put the elements back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.autodiff._axiswise import map_axis, selection, static_sizes
from onnx_kfe.autodiff._emitter import constant_of, integers, sizes_of
from onnx_kfe.autodiff._registry import Backward, Cotangents, Declined, operand, vjp

_END = 2**31 - 1


@vjp("Slice")
def slice_(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """Zeros around and between the elements."""
    x = operand(node, 0)
    starts, ends, axes, steps = (constant_of(v) for v in (*node.inputs[1:], None, None)[:4])
    if len(node.inputs) > 3 and node.inputs[3] is not None and axes is None:
        raise Declined("no gradient rule for Slice along computed axes")
    if len(node.inputs) > 4 and node.inputs[4] is not None and steps is None:
        raise Declined("no gradient rule for Slice with computed steps")
    count = _count(node, starts, ends, axes)
    every = [1] * count if steps is None else steps.tolist()
    sizes = sizes_of(x)
    along = list(range(count)) if axes is None else [int(a) + (len(sizes or ()) if a < 0 else 0) for a in axes]
    if min(along) < 0:
        raise Declined("no gradient rule for Slice of an input of unknown rank")
    lengths = None if sizes is None else integers([sizes[axis] for axis in along])
    if starts is not None and ends is not None and lengths is not None:
        windows = zip(along, lengths, starts.tolist(), ends.tolist(), every, strict=True)
        picked = {axis: np.arange(size)[slice(*window)] for axis, size, *window in windows}
        return [_put_back(backward, cotangent, x, node.outputs[0], picked)]
    return [_put_back_unknown(backward, node, cotangent, along, every)]


def _count(node: ir.Node, *parameters: np.ndarray | None) -> int:
    """The number of sliced axes."""
    for parameter in parameters:
        if parameter is not None:
            return len(parameter)
    sizes = sizes_of(node.inputs[1]) if node.inputs[1] is not None else None
    if sizes is None or not isinstance(sizes[0], int):
        raise Declined("no gradient rule for Slice along computed axes")
    return sizes[0]


def _put_back(
    backward: Backward, cotangent: ir.Value, x: ir.Value, y: ir.Value, picked: dict[int, np.ndarray]
) -> ir.Value:
    """Zeros of the shape of `x`, with the cotangent at the picked positions of some axes."""
    rank = len(sizes_of(x) or ())
    shape = list(sizes_of(y) or [None] * rank)
    begins, ends = [0] * rank, [0] * rank
    if not all(map(len, picked.values())):
        return backward.zeros_like(x)
    for axis, positions in picked.items():
        (size,) = static_sizes(x, [axis], "Slice")
        if np.array_equal(positions, np.arange(positions[0], positions[0] + len(positions))):
            begins[axis], ends[axis] = int(positions[0]), size - 1 - int(positions[-1])
        else:
            cotangent, shape = map_axis(backward, cotangent, shape, axis, selection(positions, size))
    if any((*begins, *ends)):
        cotangent = backward.op("Pad", cotangent, backward.ints(*begins, *ends), like=x)
    return cotangent


def _put_back_unknown(
    backward: Backward, node: ir.Node, cotangent: ir.Value, axes: Sequence[int], steps: Sequence[int]
) -> ir.Value:
    """As `_put_back`, where only the running graph knows the sizes or the positions."""
    x = operand(node, 0)
    if min(steps) < 1:
        raise Declined("no gradient rule for Slice with a negative step of an input of unknown size")
    for axis, step in zip(axes, steps, strict=True):
        if step > 1:
            cotangent = _stuffed(backward, cotangent, axis, step)
    along = backward.ints(*axes)
    lengths = backward.op("Gather", backward.shape_of(x), along)
    starts = backward.op("Cast", operand(node, 1), dtype=ir.DataType.INT64, to=int(ir.DataType.INT64))
    wrapped = backward.op("Add", starts, lengths)
    negative = backward.op("Less", starts, backward.ints(0), dtype=ir.DataType.BOOL)
    starts = backward.op("Where", negative, wrapped, starts, dtype=ir.DataType.INT64)
    starts = backward.op("Min", backward.op("Max", starts, backward.ints(0)), lengths)
    width = backward.op("Gather", backward.op("Shape", cotangent, dtype=ir.DataType.INT64), along)
    rest = backward.op("Sub", backward.op("Sub", lengths, starts), width)
    return backward.op("Pad", cotangent, backward.op("Concat", starts, rest, axis=0), None, along, like=x)


def _stuffed(backward: Backward, value: ir.Value, axis: int, step: int) -> ir.Value:
    """`step - 1` zeros after each element along an axis."""
    apart = backward.op("Unsqueeze", value, backward.ints(axis + 1))
    filled = backward.op("Pad", apart, backward.ints(0, step - 1), None, backward.ints(axis + 1))
    shape = backward.op("Shape", value, dtype=ir.DataType.INT64)
    after = backward.op("Slice", shape, backward.ints(axis + 1), backward.ints(_END))
    target = backward.op("Concat", backward.ints(*[0] * axis, -1), after, axis=0)
    return backward.op("Reshape", filled, target)


@vjp("Gather")
def gather(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """The elements put back, those picked more than once added."""
    x, indices = operand(node, 0), operand(node, 1)
    sizes, index_sizes = sizes_of(x), sizes_of(indices)
    if sizes is None or index_sizes is None:
        raise Declined("no gradient rule for Gather of an input of unknown rank")
    axis = node.attributes.get_int("axis", 0) % len(sizes)
    size, positions = sizes[axis], constant_of(indices)
    if isinstance(size, int) and positions is not None and positions.ndim < 2:
        order = positions.reshape(-1) % size
        if positions.ndim == 0:
            cotangent = backward.op("Unsqueeze", cotangent, backward.ints(axis))
        if len(set(order.tolist())) == size == len(order):
            return [backward.op("Gather", cotangent, backward.ints(*np.argsort(order).tolist()), like=x, axis=axis)]
        if len(order) == 1:
            return [_put_back(backward, cotangent, x, x, {axis: order})]
    return [_scatter(backward, cotangent, x, indices, axis, len(sizes))]


def _scatter(backward: Backward, cotangent: ir.Value, x: ir.Value, indices: ir.Value, axis: int, rank: int) -> ir.Value:
    """Add the cotangent to zeros at some positions along an axis."""
    before = backward.op("Slice", backward.shape_of(x), backward.ints(0), backward.ints(axis))
    after = backward.op("Slice", backward.shape_of(x), backward.ints(axis + 1), backward.ints(_END))
    # All axes of the indices as one.
    merged = backward.op("Reshape", cotangent, backward.op("Concat", before, backward.ints(-1), after, axis=0))
    column = backward.op("Reshape", indices, backward.ints(-1, *[1] * (rank - 1 - axis)))
    positions = backward.op("Expand", column, backward.op("Shape", merged, dtype=ir.DataType.INT64))
    zeros = backward.zeros_like(x)
    return backward.op("ScatterElements", zeros, positions, merged, like=x, axis=axis, reduction="add")


@vjp("GatherElements")
def gather_elements(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """The elements put back, those picked more than once added."""
    x, indices = operand(node, 0), operand(node, 1)
    axis = node.attributes.get_int("axis", 0)
    zeros = backward.zeros_like(x)
    return [backward.op("ScatterElements", zeros, indices, cotangent, like=x, axis=axis, reduction="add")]


@vjp("GatherND")
def gather_nd(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """The elements put back, those picked more than once added."""
    x, indices = operand(node, 0), operand(node, 1)
    if node.attributes.get_int("batch_dims", 0):
        raise Declined("no gradient rule for GatherND with batch dimensions")
    return [backward.op("ScatterND", backward.zeros_like(x), indices, cotangent, like=x, reduction="add")]


@vjp("TopK")
def top_k(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """The values put back where they were."""
    x = operand(node, 0)
    axis = node.attributes.get_int("axis", -1)
    return [backward.op("ScatterElements", backward.zeros_like(x), node.outputs[1], cotangent, like=x, axis=axis)]
