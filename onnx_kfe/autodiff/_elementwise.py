"""Functions of one value, element by element.

Where a derivative can be had from the output it is: the input then has no second consumer, and the runtime still fuses
the activation into the convolution before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnx_kfe.autodiff._emitter import constant_of
from onnx_kfe.autodiff._registry import Backward, Cotangents, vjp

Derivative = Callable[[Backward, ir.Node, ir.Value, ir.Value], ir.Value]
"""`(backward, node, x, y) -> dy/dx`."""

# Steep enough for one ulp to saturate, small enough not to overflow with the thresholds of activations.
_STEEP = 2.0**100


def unary(*op_types: str) -> Callable[[Derivative], Derivative]:
    """Register the derivative of a function of one value."""

    def register(derivative: Derivative) -> Derivative:
        @vjp(*op_types)
        def rule(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
            x, y = node.inputs[0], node.outputs[0]
            assert x is not None
            return [backward.op("Mul", cotangent, derivative(backward, node, x, y), like=x)]

        return derivative

    return register


def above(backward: Backward, value: ir.Value, threshold: float) -> ir.Value:
    """1 where a value is above a threshold, else 0."""
    return _step(backward, value, threshold, "Greater", 1.0)


def below(backward: Backward, value: ir.Value, threshold: float) -> ir.Value:
    """1 where a value is below a threshold, else 0."""
    return _step(backward, value, threshold, "Less", -1.0)


def _step(backward: Backward, value: ir.Value, threshold: float, comparison: str, sign: float) -> ir.Value:
    # A steep HardSigmoid is a step: scaling by a power of two is exact, so the sign of the difference is, too. It takes
    # two thirds of the time of a comparison and a cast; Sign and Where are slower still.
    exact = threshold == 0 or 2.0**-60 < abs(threshold) < 2.0**20
    if exact and backward.dtype(value) == ir.DataType.FLOAT:
        beta = -sign * _STEEP * float(np.float32(threshold)) if threshold else 0.0
        return backward.op("HardSigmoid", value, like=value, alpha=sign * _STEEP, beta=beta)
    condition = backward.op(comparison, value, backward.number(threshold, value), dtype=ir.DataType.BOOL)
    return backward.op("Cast", condition, like=value, to=int(backward.dtype(value)))


@unary("Relu")
def relu(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`y > 0`."""
    return above(backward, y, 0.0)


@vjp("Clip")
def clip(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """Passes where the output is strictly between the limits."""
    for limit, function, comparison in zip(node.inputs[1:], (above, below), ("Greater", "Less"), strict=False):
        if limit is None:
            continue
        y, threshold = node.outputs[0], constant_of(limit)
        if threshold is None:
            condition = backward.op(comparison, y, limit, dtype=ir.DataType.BOOL)
            mask = backward.op("Cast", condition, like=y, to=int(backward.dtype(y)))
        elif abs(float(threshold)) >= float(np.finfo(np.float32).max):
            continue
        else:
            mask = function(backward, y, float(threshold))
        cotangent = backward.op("Mul", cotangent, mask, like=y)
    return [cotangent]


@unary("LeakyRelu")
def leaky_relu(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """1 above zero, alpha below."""
    alpha = node.attributes.get_float("alpha", 0.01)
    mask = above(backward, y if alpha >= 0 else x, 0.0)
    slope = backward.scale(mask, 1 - alpha)
    return backward.op("Add", slope, backward.number(alpha, x), like=x)


@unary("ThresholdedRelu")
def thresholded_relu(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`x > alpha`."""
    return above(backward, x, node.attributes.get_float("alpha", 1.0))


@unary("Shrink")
def shrink(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`|x| > lambd`."""
    return above(backward, backward.op("Abs", x, like=x), node.attributes.get_float("lambd", 0.5))


@unary("Sigmoid")
def sigmoid(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`y - y^2`."""
    return backward.op("Sub", y, backward.op("Mul", y, y, like=y), like=y)


@unary("Tanh")
def tanh(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`1 - y^2`."""
    return _one_minus(backward, backward.op("Mul", y, y, like=y))


def _one_minus(backward: Backward, value: ir.Value) -> ir.Value:
    return backward.op("Sub", backward.number(1.0, value), value, like=value)


def _between(backward: Backward, value: ir.Value, low: float, high: float) -> ir.Value:
    return backward.op("Mul", above(backward, value, low), below(backward, value, high), like=value)


@unary("HardSigmoid")
def hard_sigmoid(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """Alpha where the output is strictly between 0 and 1."""
    return backward.scale(_between(backward, y, 0.0, 1.0), node.attributes.get_float("alpha", 0.2))


@unary("HardSwish")
def hard_swish(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`h + x / 6` between -3 and 3, `h` elsewhere, with `h` the hard sigmoid of slope 1/6."""
    gate = backward.op("HardSigmoid", x, like=x, alpha=1 / 6, beta=0.5)
    ramp = backward.op("Mul", backward.scale(x, 1 / 6), _between(backward, x, -3.0, 3.0), like=x)
    return backward.op("Add", gate, ramp, like=x)


@unary("Elu")
def elu(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """1 above zero, `y + alpha` below."""
    return _exponential_below(backward, x, y, 1.0, 1.0, node.attributes.get_float("alpha", 1.0))


@unary("Selu")
def selu(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """Gamma above zero, `y + alpha gamma` below."""
    gamma = node.attributes.get_float("gamma", 1.0507009873554805)
    alpha = node.attributes.get_float("alpha", 1.6732632423543772)
    return _exponential_below(backward, x, y, gamma, 1.0, alpha * gamma)


@unary("Celu")
def celu(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """1 above zero, `y / alpha + 1` below."""
    return _exponential_below(backward, x, y, 1.0, 1 / node.attributes.get_float("alpha", 1.0), 1.0)


def _exponential_below(
    backward: Backward, x: ir.Value, y: ir.Value, slope: float, factor: float, offset: float
) -> ir.Value:
    """`slope` where `x > 0`, else `factor y + offset`."""
    positive = backward.op("Greater", x, backward.number(0.0, x), dtype=ir.DataType.BOOL)
    below_zero = backward.op("Add", backward.scale(y, factor), backward.number(offset, y), like=y)
    return backward.op("Where", positive, backward.number(slope, y), below_zero, like=y)


@unary("Softplus")
def softplus(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """The sigmoid."""
    return backward.op("Sigmoid", x, like=x)


@unary("Softsign")
def softsign(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`(1 - |y|)^2`."""
    root = _one_minus(backward, backward.op("Abs", y, like=y))
    return backward.op("Mul", root, root, like=y)


@unary("Erf")
def erf(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`2 / sqrt(pi) exp(-x^2)`."""
    return _bell(backward, backward.op("Mul", x, x, like=x), 2 / math.sqrt(math.pi))


def _bell(backward: Backward, square: ir.Value, height: float) -> ir.Value:
    """`height exp(-square)`."""
    exponent = backward.op("Sub", backward.number(math.log(height), square), square, like=square)
    return backward.op("Exp", exponent, like=square)


@unary("Exp")
def exp(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`y`."""
    return y


@vjp("Log")
def log(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """`1 / x`."""
    return [backward.op("Div", cotangent, node.inputs[0], like=cotangent)]


@vjp("Sqrt")
def sqrt(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """`1 / (2 y)`."""
    return [backward.op("Div", backward.scale(cotangent, 0.5), node.outputs[0], like=cotangent)]


@unary("Reciprocal")
def reciprocal(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`-y^2`."""
    return backward.op("Neg", backward.op("Mul", y, y, like=y), like=y)


@vjp("Neg")
def neg(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """-1."""
    return [backward.op("Neg", cotangent, like=cotangent)]


@unary("Abs")
def absolute(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """The sign."""
    return backward.op("Sign", x, like=x)


@unary("Gelu")
def gelu(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`x Phi(x)`, or its approximation `x (1 + tanh u) / 2` with `u` a cubic."""
    square = backward.op("Mul", x, x, like=x)
    one = backward.number(1.0, x)
    if node.attributes.get_string("approximate", "none") == "none":
        error = backward.op("Erf", backward.scale(x, math.sqrt(0.5)), like=x)
        gate = backward.scale(backward.op("Add", error, one, like=x), 0.5)
        density = _bell(backward, backward.scale(square, 0.5), 1 / math.sqrt(2 * math.pi))
        return backward.op("Add", gate, backward.op("Mul", x, density, like=x), like=x)
    root, cubic = math.sqrt(2 / math.pi), 0.044715
    polynomial = backward.op("Add", backward.scale(square, cubic), one, like=x)
    bend = backward.op("Tanh", backward.scale(backward.op("Mul", x, polynomial, like=x), root), like=x)
    gate = backward.scale(backward.op("Add", bend, one, like=x), 0.5)
    inner = backward.op("Add", backward.scale(square, 1.5 * cubic * root), backward.number(0.5 * root, x), like=x)
    slope = backward.op("Mul", _one_minus(backward, backward.op("Mul", bend, bend, like=x)), inner, like=x)
    return backward.op("Add", gate, backward.op("Mul", x, slope, like=x), like=x)


@unary("Mish")
def mish(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`t + x s (1 - t^2)` with `t = tanh(softplus(x))` and `s` the sigmoid."""
    bend = backward.op("Tanh", backward.op("Softplus", x, like=x), like=x)
    slope = _one_minus(backward, backward.op("Mul", bend, bend, like=x))
    slope = backward.op("Mul", slope, backward.op("Sigmoid", x, like=x), like=x)
    return backward.op("Add", bend, backward.op("Mul", x, slope, like=x), like=x)


@unary("Swish")
def swish(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`s + alpha y (1 - s)` with `s = sigmoid(alpha x)`."""
    alpha = node.attributes.get_float("alpha", 1.0)
    gate = backward.op("Sigmoid", backward.scale(x, alpha), like=x)
    tail = backward.op("Mul", backward.scale(y, alpha), _one_minus(backward, gate), like=x)
    return backward.op("Add", gate, tail, like=x)
