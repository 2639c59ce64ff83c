"""Circular and hyperbolic functions."""

from __future__ import annotations

import onnx_ir as ir

from onnx_kfe.autodiff._elementwise import unary
from onnx_kfe.autodiff._registry import Backward


def _shifted_square(backward: Backward, value: ir.Value, sign: float, constant: float) -> ir.Value:
    """`constant + sign value^2`."""
    square = backward.scale(backward.op("Mul", value, value, like=value), sign)
    return backward.op("Add", square, backward.number(constant, value), like=value)


def _inverse_root(backward: Backward, value: ir.Value) -> ir.Value:
    return backward.op("Reciprocal", backward.op("Sqrt", value, like=value), like=value)


@unary("Sin")
def sin(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`cos x`."""
    return backward.op("Cos", x, like=x)


@unary("Cos")
def cos(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`-sin x`."""
    return backward.op("Neg", backward.op("Sin", x, like=x), like=x)


@unary("Tan")
def tan(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`1 + y^2`."""
    return _shifted_square(backward, y, 1.0, 1.0)


@unary("Asin")
def asin(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`(1 - x^2)^(-1/2)`."""
    return _inverse_root(backward, _shifted_square(backward, x, -1.0, 1.0))


@unary("Acos")
def acos(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`-(1 - x^2)^(-1/2)`."""
    return backward.op("Neg", asin(backward, node, x, y), like=x)


@unary("Atan")
def atan(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`1 / (1 + x^2)`."""
    return backward.op("Reciprocal", _shifted_square(backward, x, 1.0, 1.0), like=x)


@unary("Sinh")
def sinh(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`cosh x`."""
    return backward.op("Cosh", x, like=x)


@unary("Cosh")
def cosh(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`sinh x`."""
    return backward.op("Sinh", x, like=x)


@unary("Asinh")
def asinh(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`(1 + x^2)^(-1/2)`."""
    return _inverse_root(backward, _shifted_square(backward, x, 1.0, 1.0))


@unary("Acosh")
def acosh(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`(x^2 - 1)^(-1/2)`."""
    return _inverse_root(backward, _shifted_square(backward, x, 1.0, -1.0))


@unary("Atanh")
def atanh(backward: Backward, node: ir.Node, x: ir.Value, y: ir.Value) -> ir.Value:
    """`1 / (1 - x^2)`."""
    return backward.op("Reciprocal", _shifted_square(backward, x, -1.0, 1.0), like=x)
