"""Activations in one node."""

from __future__ import annotations

import math

import onnx_ir as ir

from onnx_kfe.graph.fusions._registry import Expansion, fusion

__all__: list[str] = []


@fusion("Gelu", "BiasGelu")
def gelu(op: Expansion) -> ir.Value:
    """`x/2 (1 + erf(x / sqrt(2)))`, of a sum where there is a bias."""
    x = op.added(op.operand(0), op.input(1))
    error = op.op("Erf", op.op("Div", x, op.number(math.sqrt(2))))
    return op.scaled(op.op("Mul", x, op.op("Add", error, op.number(1))), 0.5)


@fusion("FastGelu")
def fast_gelu(op: Expansion) -> ir.Value:
    """`x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`, of a sum where there is a bias."""
    x = op.added(op.operand(0), op.input(1))
    cube = op.op("Mul", op.op("Mul", x, x), x)
    inner = op.scaled(op.op("Add", x, op.scaled(cube, 0.044715)), math.sqrt(2 / math.pi))
    return op.op("Mul", op.scaled(x, 0.5), op.op("Add", op.op("Tanh", inner), op.number(1)))


@fusion("QuickGelu")
def quick_gelu(op: Expansion) -> ir.Value:
    """`x sigmoid(alpha x)`."""
    x = op.operand(0)
    return op.op("Mul", x, op.op("Sigmoid", op.scaled(x, op.attributes.get_float("alpha", 1.702))))
