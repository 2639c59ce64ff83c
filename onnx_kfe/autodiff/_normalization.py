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
    epsilon = _epsilon(node)
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
        return [_through(backward, x, scaled, axes, _epsilon(node))]
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
    return [_through(backward, x, scaled, range(2, len(sizes)), _epsilon(node))]


@vjp("MeanVarianceNormalization")
def mean_variance_normalization(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """Over some axes, with nothing to scale by after."""
    axes = node.attributes.get_ints("axes", (0, 2, 3))
    # The operator adds 1e-9 to the deviation.
    return [_through(backward, operand(node, 0), cotangent, axes, 1e-18)]


@vjp("GroupNormalization")
def group_normalization(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """Over the channels of a group and the spatial axes, with a scale for each channel (opset 21)."""
    x, scale = operand(node, 0), operand(node, 1)
    sizes, groups = sizes_of(x), node.attributes.get_int("num_groups", 1)
    if sizes is None or sizes_of(scale) != (sizes[1],):
        raise Declined("no gradient rule for GroupNormalization with a scale for each group")
    if not backward.needs(x):
        return []
    column = backward.op("Reshape", scale, backward.ints(-1, *[1] * (len(sizes) - 2)))
    scaled = backward.op("Mul", cotangent, column, like=x)
    apart = backward.ints(0, groups, -1)
    by_group = backward.op("Reshape", x, apart, shape=(sizes[0], groups, None))
    scaled_by_group = backward.op("Reshape", scaled, apart, shape=(sizes[0], groups, None))
    return [backward.reshape_like(_through(backward, by_group, scaled_by_group, [2], _epsilon(node)), x)]


@vjp("RMSNormalization")
def rms_normalization(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """`inverse (g - n mean (g n))`: the scale alone is divided out."""
    x, scale = operand(node, 0), operand(node, 1)
    sizes = sizes_of(x)
    if sizes is None:
        raise Declined("no gradient rule for RMSNormalization of an input of unknown rank")
    if not backward.needs(x):
        return []
    axes = list(range(node.attributes.get_int("axis", -1) % len(sizes), len(sizes)))
    scaled = backward.op("Mul", cotangent, scale, like=x)
    inverse = _inverse_deviation(backward, x, axes, _epsilon(node))
    normalized = backward.op("Mul", x, inverse, like=x)
    return [backward.op("Mul", _without(backward, scaled, normalized, axes), inverse, like=x)]


@vjp("LpNormalization")
def lp_normalization(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """`(g - dn sum (g y)) / n` with `n` the norm and `dn` its derivative."""
    x, y = operand(node, 0), node.outputs[0]
    axis = backward.ints(node.attributes.get_int("axis", -1))
    euclidean = node.attributes.get_int("p", 2) == 2
    norm = backward.op("ReduceL2" if euclidean else "ReduceL1", x, axis, keepdims=1)
    slope = y if euclidean else backward.op("Sign", x, like=x)
    overlap = backward.op("ReduceSum", backward.op("Mul", cotangent, y, like=x), axis, keepdims=1)
    rest = backward.op("Sub", cotangent, backward.op("Mul", slope, overlap, like=x), like=x)
    return [backward.op("Div", rest, norm, like=x)]


@vjp("LRN")
def local_response_normalization(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """`g s^-b - 2 a b x sum(g x s^(-b-1))` with `y = x s^-b`, `s = k + a sum x^2` over windows of channels."""
    x, y = operand(node, 0), node.outputs[0]
    alpha, beta = node.attributes.get_float("alpha", 1e-4), node.attributes.get_float("beta", 0.75)
    square = backward.op("Mul", x, x, like=x)
    spread = backward.scale(_channel_windows(backward, node, square), alpha)
    base = backward.op("Add", spread, backward.number(node.attributes.get_float("bias", 1.0), x), like=x)
    passed = backward.op("Mul", cotangent, backward.op("Pow", base, backward.number(-beta, x), like=x), like=x)
    weighted = backward.op("Div", backward.op("Mul", cotangent, y, like=x), base, like=x)
    shared = backward.op("Mul", x, _channel_windows(backward, node, weighted), like=x)
    return [backward.op("Sub", passed, backward.scale(shared, 2 * alpha * beta), like=x)]


def _channel_windows(backward: Backward, node: ir.Node, value: ir.Value) -> ir.Value:
    """The mean over the window of channels around each, zero beyond the ends."""
    size = node.attributes.get_int("size", 1)
    target = backward.op("Concat", backward.ints(0, 1), backward.size_of(value, 1), backward.ints(-1), axis=0)
    flat = backward.op("Reshape", value, target)
    padding = [size // 2, 0, size // 2, 0]  # the runtime has windows of odd size alone
    mean = backward.op("AveragePool", flat, kernel_shape=[size, 1], pads=padding, count_include_pad=1)
    return backward.reshape_like(mean, value)


def _through(backward: Backward, x: ir.Value, scaled: ir.Value, axes: Sequence[int], epsilon: float) -> ir.Value:
    """Through `(x - mean) / sqrt(variance + epsilon)`, the statistics computed again."""
    centred = backward.op("Sub", x, _mean(backward, x, axes), like=x)
    inverse = _inverse_deviation(backward, centred, axes, epsilon)
    return _project(backward, scaled, backward.op("Mul", centred, inverse, like=x), inverse, axes)


def _inverse_deviation(backward: Backward, value: ir.Value, axes: Sequence[int], epsilon: float) -> ir.Value:
    """`1 / sqrt(mean value^2 + epsilon)`."""
    square = _mean(backward, backward.op("Mul", value, value, like=value), axes)
    deviation = backward.op("Sqrt", backward.op("Add", square, backward.number(epsilon, value)))
    return backward.op("Reciprocal", deviation)


def _project(
    backward: Backward, scaled: ir.Value, normalized: ir.Value, inverse: ir.Value, axes: Sequence[int]
) -> ir.Value:
    """`inverse (g - mean g - n mean (g n))`: the part of `g` that a shift and a scale of the input cannot undo."""
    centred = backward.op("Sub", scaled, _mean(backward, scaled, axes), like=scaled)
    return backward.op("Mul", _without(backward, centred, normalized, axes), inverse, like=scaled)


def _without(backward: Backward, value: ir.Value, normalized: ir.Value, axes: Sequence[int]) -> ir.Value:
    """A value less its part along a normalised one."""
    overlap = _mean(backward, backward.op("Mul", value, normalized, like=value), axes)
    return backward.op("Sub", value, backward.op("Mul", normalized, overlap, like=value), like=value)


def _epsilon(node: ir.Node) -> float:
    return node.attributes.get_float("epsilon", 1e-5)


def _mean(backward: Backward, value: ir.Value, axes: Sequence[int]) -> ir.Value:
    return backward.op("ReduceMean", value, backward.ints(*axes), keepdims=1)
