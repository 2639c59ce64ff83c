"""Operators that treat every element alike."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnx_kfe.graph.groups._coordinates import Ids
from onnx_kfe.graph.groups._flow import Axes, Flow, operand
from onnx_kfe.graph.groups._registry import rule

__all__ = ["broadcast"]


@rule(
    *("Relu", "LeakyRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "Softplus", "Softsign", "Shrink", "Mish", "Gelu"),
    *("Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Tanh", "Erf", "Exp", "Log", "Sqrt", "Reciprocal", "Identity"),
    *("Abs", "Neg", "Sign", "Floor", "Ceil", "Round", "Not", "IsNaN", "IsInf", "Cast", "Dropout"),
    *("Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh", "Acosh", "Atanh"),
)
def unary(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """Those of the input, for the mask of Dropout too."""
    return [flow.axes(operand(node, 0)) for _ in node.outputs]


@rule("CastLike")
def cast_like(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """Those of the first input; only the type of the second matters."""
    return [flow.axes(operand(node, 0))]


@rule(
    *("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Sum", "Mean", "Min", "Max", "PRelu", "Clip", "Where"),
    *("And", "Or", "Xor", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
    *("BitwiseAnd", "BitwiseOr", "BitwiseXor"),
)
def pointwise(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """What meets at an axis is tied, broadcast axes apart."""
    given = [(place, value) for place, value in enumerate(node.inputs) if value is not None]
    return [broadcast(flow, node, [(place, len(flow.shape(value))) for place, value in given])]


def broadcast(flow: Flow, node: ir.Node, ranks: Sequence[tuple[int, int]]) -> list[Ids | None]:
    """The coordinates of inputs broadcast against each other.

    Args:
        flow: The coordinates so far.
        node: The node.
        ranks: The inputs, and how many of their leading axes are broadcast. Axes are aligned at the last of these.
    """
    rank = max(count for _, count in ranks)
    axes = []
    for axis in range(rank):
        met = [(place, axis - rank + count) for place, count in ranks if axis >= rank - count]
        sizes = [flow.shape(operand(node, place))[own] for place, own in met]
        whole = [each for each, size in zip(met, sizes, strict=True) if size == max(sizes)]
        axes.append(flow.join(node, whole))
    return axes
