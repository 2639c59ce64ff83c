"""Normalisation layers, by their input."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.autodiff._emitter import constant_of, sizes_of
from onnx_kfe.autodiff._registry import Backward, Cotangents, Declined, operand, vjp


@vjp("BatchNormalization")
def batch_normalization(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """In inference: `scale / sqrt(variance + epsilon)`."""
    x, scale, variance = operand(node, 0), operand(node, 1), operand(node, 4)
    sizes = sizes_of(x)
    if node.attributes.get_int("training_mode", 0) or sizes is None:
        raise Declined("no gradient rule for BatchNormalization in training mode or of an input of unknown rank")
    if not backward.needs(x):
        return []
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    column = (-1, *[1] * (len(sizes) - 2))
    known_scale, known_variance = constant_of(scale), constant_of(variance)
    if known_scale is not None and known_variance is not None:
        ratio = known_scale.astype(np.float64) / np.sqrt(known_variance.astype(np.float64) + epsilon)
        factor = backward.array_like(ratio.reshape(column), x)
    else:
        deviation = backward.op("Sqrt", backward.op("Add", variance, backward.number(epsilon, variance)))
        factor = backward.op("Reshape", backward.op("Div", scale, deviation), backward.ints(*column))
    return [backward.op("Mul", cotangent, factor, like=x)]


@vjp("LayerNormalization")
def layer_normalization(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """Over the axes from `axis` on; the statistics are outputs of the forward node."""
    x, scale = operand(node, 0), operand(node, 1)
    sizes = sizes_of(x)
    if sizes is None:
        raise Declined("no gradient rule for LayerNormalization of an input of unknown rank")
    if not backward.needs(x):
        return []
    axes = list(range(node.attributes.get_int("axis", -1) % len(sizes), len(sizes)))
    scaled = backward.op("Mul", cotangent, scale, like=x)
    if backward.dtype(x) != ir.DataType.FLOAT:
        return [_through(backward, x, scaled, axes, node.attributes.get_float("epsilon", 1e-5))]
    mean, inverse = _statistics(backward, node)
    normalized = backward.op("Mul", backward.op("Sub", x, mean, like=x), inverse, like=x)
    return [_project(backward, scaled, normalized, inverse, axes)]


def _statistics(backward: Backward, node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The mean and the inverse standard deviation, as outputs of the node."""
    if len(node.outputs) < 3:
        node.resize_outputs(3)
    for output in node.outputs[1:]:
        if not output.name:
            output.name = backward.unique("statistics")
            output.type = ir.TensorType(ir.DataType.FLOAT)
    return node.outputs[1], node.outputs[2]


@vjp("InstanceNormalization")
def instance_normalization(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """Over the spatial axes."""
    x, scale = operand(node, 0), operand(node, 1)
    sizes = sizes_of(x)
    if sizes is None:
        raise Declined("no gradient rule for InstanceNormalization of an input of unknown rank")
    if not backward.needs(x):
        return []
    column = backward.op("Reshape", scale, backward.ints(-1, *[1] * (len(sizes) - 2)))
    scaled = backward.op("Mul", cotangent, column, like=x)
    return [_through(backward, x, scaled, range(2, len(sizes)), node.attributes.get_float("epsilon", 1e-5))]


def _through(backward: Backward, x: ir.Value, scaled: ir.Value, axes: Sequence[int], epsilon: float) -> ir.Value:
    """Through `(x - mean) / sqrt(variance + epsilon)`, the statistics computed again."""
    centred = backward.op("Sub", x, _mean(backward, x, axes), like=x)
    variance = _mean(backward, backward.op("Mul", centred, centred, like=x), axes)
    deviation = backward.op("Sqrt", backward.op("Add", variance, backward.number(epsilon, x)))
    inverse = backward.op("Reciprocal", deviation)
    return _project(backward, scaled, backward.op("Mul", centred, inverse, like=x), inverse, axes)


def _project(
    backward: Backward, scaled: ir.Value, normalized: ir.Value, inverse: ir.Value, axes: Sequence[int]
) -> ir.Value:
    """`inverse (g - mean g - n mean (g n))`: the part of `g` that a shift and a scale of the input cannot undo."""
    centred = backward.op("Sub", scaled, _mean(backward, scaled, axes), like=scaled)
    overlap = _mean(backward, backward.op("Mul", scaled, normalized, like=scaled), axes)
    aligned = backward.op("Mul", normalized, overlap, like=scaled)
    return backward.op("Mul", backward.op("Sub", centred, aligned, like=scaled), inverse, like=scaled)


def _mean(backward: Backward, value: ir.Value, axes: Sequence[int]) -> ir.Value:
    return backward.op("ReduceMean", value, backward.ints(*axes), keepdims=1)
