"""Operators that move elements without changing them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_kfe.autodiff._axiswise import map_axis, selection
from onnx_kfe.autodiff._broadcasting import unbroadcast
from onnx_kfe.autodiff._emitter import constant_of, integers, sizes_of
from onnx_kfe.autodiff._registry import Backward, Cotangents, Declined, operand, vjp


@vjp("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """The shape it had."""
    x = operand(node, 0)
    return [backward.reshape_like(cotangent, x)]


@vjp("Identity")
def identity(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """1."""
    return [cotangent]


@vjp("Dropout")
def dropout(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """The identity, as in inference."""
    training = node.inputs[2] if len(node.inputs) > 2 else None
    state = constant_of(training)
    if training is not None and (state is None or bool(state)):
        raise Declined("no gradient rule for Dropout in training mode")
    return [cotangent]


@vjp("Cast", "CastLike")
def cast(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """Back to the type it had."""
    x = operand(node, 0)
    return [backward.op("Cast", cotangent, like=x, to=int(backward.dtype(x)))]


@vjp("Transpose")
def transpose(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """The inverse permutation."""
    x = operand(node, 0)
    permutation = node.attributes.get_ints("perm")
    if permutation is None:
        return [backward.op("Transpose", cotangent, like=x)]
    return [backward.op("Transpose", cotangent, like=x, perm=[int(axis) for axis in np.argsort(permutation)])]


@vjp("Concat")
def concat(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """The parts."""
    axis = node.attributes.get_int("axis", 0)
    if len(node.inputs) == 1:
        return [cotangent]
    parts = [backward.size_of(value, axis) for value in node.inputs if value is not None]
    constants = [constant_of(part) for part in parts]
    known = [int(size.item()) for size in constants if size is not None]
    sizes = backward.ints(*known) if len(known) == len(parts) else backward.op("Concat", *parts, axis=0)
    pieces = backward.ops("Split", cotangent, sizes, outputs=len(parts), axis=axis)
    for piece, value in zip(pieces, node.inputs, strict=True):
        if value is not None and value.shape is not None:
            piece.shape = value.shape.copy()
    return backward.for_needed(node, lambda index, value: pieces[index])


@vjp("Split", every_output=True)
def split(backward: Backward, node: ir.Node, cotangents: Cotangents) -> Cotangents:
    """The parts put together, zero where one does not matter."""
    x = operand(node, 0)
    parts = [
        backward.zeros_like(output) if cotangent is None else cotangent
        for output, cotangent in zip(node.outputs, cotangents, strict=True)
    ]
    return [backward.op("Concat", *parts, like=x, axis=node.attributes.get_int("axis", 0))]


@vjp("Expand")
def expand(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """Summed back."""
    x = operand(node, 0)
    return [unbroadcast(backward, cotangent, x, [x, node.outputs[0]])]


@vjp("Tile")
def tile(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """The sum over the copies."""
    x, repeats = operand(node, 0), operand(node, 1)
    sizes = sizes_of(x)
    if sizes is None:
        raise Declined("no gradient rule for Tile of an input of unknown rank")
    times, known = constant_of(repeats), integers(sizes)
    if times is not None and known is not None:
        target = backward.ints(*np.stack([times, known], 1).ravel().tolist())
    else:
        columns = [backward.op("Unsqueeze", part, backward.ints(1)) for part in (repeats, backward.shape_of(x))]
        target = backward.op("Reshape", backward.op("Concat", *columns, axis=1), backward.ints(-1))
    split_up = backward.op("Reshape", cotangent, target, shape=[None] * (2 * len(sizes)))
    return [backward.op("ReduceSum", split_up, backward.ints(*range(0, 2 * len(sizes), 2)), like=x, keepdims=0)]


@vjp("Pad")
def pad(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """Cropped; where the padding repeats elements, their copies are added to them."""
    x, pads = operand(node, 0), operand(node, 1)
    axes = node.inputs[3] if len(node.inputs) > 3 else None
    amounts = constant_of(pads)
    mode = node.attributes.get_string("mode", "constant")
    if mode == "constant":
        opposite = backward.op("Neg", pads) if amounts is None else backward.constant(-amounts)
        return [backward.op("Pad", cotangent, opposite, None, axes, like=x)]
    sizes = sizes_of(x)
    stated = constant_of(axes)
    if amounts is None or sizes is None or (axes is not None and stated is None):
        raise Declined(f"no gradient rule for Pad of mode {mode} with computed pads")
    padded_axes = [int(axis) % len(sizes) for axis in (range(len(sizes)) if stated is None else stated)]
    shape = list(sizes_of(node.outputs[0]) or [None] * len(sizes))
    for axis, begin, end in zip(padded_axes, *amounts.reshape(2, -1).tolist(), strict=True):
        size = sizes[axis]
        if begin or end:
            if not isinstance(size, int) or min(begin, end) < 0:
                raise Declined(f"no gradient rule for Pad of mode {mode} of an input of unknown size")
            source = np.pad(np.arange(size), (begin, end), mode=mode)  # type: ignore[call-overload]
            cotangent, shape = map_axis(backward, cotangent, shape, axis, selection(source, size))
    return [cotangent]


@vjp("Trilu")
def triangle(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """The same triangle."""
    upper = node.attributes.get_int("upper", 1)
    return [backward.op("Trilu", cotangent, *node.inputs[1:], like=node.inputs[0], upper=upper)]


@vjp("ReverseSequence")
def reverse_sequence(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """Reversed again."""
    x, lengths = node.inputs[0], node.inputs[1]
    time, batch = node.attributes.get_int("time_axis", 0), node.attributes.get_int("batch_axis", 1)
    return [backward.op("ReverseSequence", cotangent, lengths, like=x, time_axis=time, batch_axis=batch)]


@vjp("DepthToSpace")
def depth_to_space(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """SpaceToDepth, with the channels in the order the mode says."""
    x = operand(node, 0)
    block = node.attributes.get_int("blocksize", 1)
    depth_first = backward.op("SpaceToDepth", cotangent, like=x, blocksize=block)
    if node.attributes.get_string("mode", "DCR") == "DCR":
        return [depth_first]
    # Its channels are (block, block, channel); the mode CRD has the channel first.
    channels = (sizes_of(x) or (None, None))[1]
    if not isinstance(channels, int):
        raise Declined("no gradient rule for DepthToSpace of an unknown number of channels")
    order = np.arange(channels).reshape(block * block, -1).T.ravel()
    return [backward.op("Gather", depth_first, backward.ints(*order.tolist()), like=x, axis=1)]


@vjp("SpaceToDepth")
def space_to_depth(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """DepthToSpace."""
    block = node.attributes.get_int("blocksize", 1)
    return [backward.op("DepthToSpace", cotangent, like=node.inputs[0], blocksize=block, mode="DCR")]
