"""Operators of several operands that broadcast."""

from __future__ import annotations

import onnx_ir as ir

from onnx_kfe.autodiff._broadcasting import unbroadcast
from onnx_kfe.autodiff._emitter import constant_of
from onnx_kfe.autodiff._registry import Backward, Cotangents, Declined, operand, vjp


@vjp("Add", "Sum")
def add(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """1 for every operand."""
    return backward.for_needed(node, lambda index, value: unbroadcast(backward, cotangent, value, node.inputs))


@vjp("Mean")
def mean(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """`1 / n` for every operand."""
    return add(backward, node, backward.scale(cotangent, 1 / len(node.inputs)))


@vjp("Sub")
def sub(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """1 and -1."""

    def rule(index: int, value: ir.Value) -> ir.Value:
        summed = unbroadcast(backward, cotangent, value, node.inputs)
        return backward.op("Neg", summed, like=value) if index else summed

    return backward.for_needed(node, rule)


@vjp("Mul")
def mul(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """The other operand."""

    def rule(index: int, value: ir.Value) -> ir.Value:
        product = backward.op("Mul", cotangent, node.inputs[1 - index], like=node.outputs[0])
        return unbroadcast(backward, product, value, node.inputs)

    return backward.for_needed(node, rule)


@vjp("Div")
def div(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """`1 / b` and `-y / b`."""
    y = node.outputs[0]

    def rule(index: int, value: ir.Value) -> ir.Value:
        quotient = backward.op("Div", cotangent, node.inputs[1], like=y)
        if index:
            quotient = backward.op("Neg", backward.op("Mul", quotient, y, like=y), like=y)
        return unbroadcast(backward, quotient, value, node.inputs)

    return backward.for_needed(node, rule)


@vjp("Mod")
def mod(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """1 and less the quotient, rounded as the operator does: `(y - a) / b`."""
    a, b = operand(node, 0), operand(node, 1)
    y = node.outputs[0]

    def rule(index: int, value: ir.Value) -> ir.Value:
        passed = cotangent
        if index:
            quotient = backward.op("Round", backward.op("Div", backward.op("Sub", y, a, like=y), b, like=y), like=y)
            passed = backward.op("Mul", cotangent, quotient, like=y)
        return unbroadcast(backward, passed, value, node.inputs)

    return backward.for_needed(node, rule)


@vjp("Pow")
def power(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """`p x^(p-1)` and `y log x`."""
    x, exponent = operand(node, 0), operand(node, 1)
    y = node.outputs[0]
    constant = constant_of(exponent)

    def rule(index: int, value: ir.Value) -> ir.Value:
        if index:
            derivative = backward.op("Mul", y, backward.op("Log", x, like=x), like=y)
        elif constant is not None and constant.size == 1:
            derivative = _monomial(backward, x, float(constant.item()))
        elif exponent.dtype is not None and exponent.dtype != x.dtype:
            raise Declined("no gradient rule for Pow with a computed exponent of another type than the base")
        else:
            lowered = backward.op("Sub", exponent, backward.number(1.0, exponent), like=exponent)
            derivative = backward.op("Mul", exponent, backward.op("Pow", x, lowered, like=y), like=y)
        product = backward.op("Mul", cotangent, derivative, like=y)
        return unbroadcast(backward, product, value, node.inputs)

    return backward.for_needed(node, rule)


def _monomial(backward: Backward, x: ir.Value, exponent: float) -> ir.Value:
    if exponent == 2:
        return backward.scale(x, 2.0)
    raised = backward.op("Pow", x, backward.number(exponent - 1, x), like=x)
    return backward.scale(raised, exponent)


@vjp("Min", "Max")
def extremum(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """Passes to the first operand that attains the extremum."""
    y = node.outputs[0]
    zero = backward.number(0.0, y)
    cotangents: list[ir.Value | None] = []
    for value in node.inputs:
        assert value is not None
        attains = backward.op("Equal", value, y, dtype=ir.DataType.BOOL)
        passed = backward.op("Where", attains, cotangent, zero, like=y)
        cotangent = backward.op("Where", attains, zero, cotangent, like=y)
        needed = backward.needs(value)
        cotangents.append(unbroadcast(backward, passed, value, node.inputs) if needed else None)
    return cotangents


@vjp("Where")
def where(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """Passes to the operand that was chosen."""
    y = node.outputs[0]
    zero = backward.number(0.0, y)

    def rule(index: int, value: ir.Value) -> ir.Value:
        branches = (cotangent, zero) if index == 1 else (zero, cotangent)
        passed = backward.op("Where", node.inputs[0], *branches, like=y)
        return unbroadcast(backward, passed, value, node.inputs)

    return backward.for_needed(node, rule)


@vjp("PRelu")
def prelu(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """1 above zero; the slope below, whose own derivative is `min(x, 0)`."""
    x, slope = operand(node, 0), operand(node, 1)
    zero = backward.number(0.0, x)

    def rule(index: int, value: ir.Value) -> ir.Value:
        if index:
            product = backward.op("Mul", cotangent, backward.op("Min", x, zero, like=x), like=x)
            return unbroadcast(backward, product, value, node.inputs)
        negative = backward.op("Less", x, zero, dtype=ir.DataType.BOOL)
        factor = backward.op("Where", negative, slope, backward.number(1.0, x), like=x)
        return backward.op("Mul", cotangent, factor, like=x)

    return backward.for_needed(node, rule)
