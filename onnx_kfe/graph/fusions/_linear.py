"""Products and convolutions, fused with what comes before or behind them."""

from __future__ import annotations

import onnx_ir as ir

from onnx_kfe.graph.fusions._registry import Expansion, Unsupported, fusion

__all__: list[str] = []

_PARAMETERS = {"Relu": (), "Sigmoid": (), "Tanh": (), "LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta")}
"""Activations of FusedConv, and the attributes that their parameters are."""


@fusion("FusedMatMul", "TransposeMatMul")
def fused_matmul(op: Expansion) -> ir.Value:
    """MatMul of transposed factors, times `alpha`."""
    for factor in "AB":
        if op.attributes.get_int(f"transBatch{factor}", 0):
            raise Unsupported(f"transBatch{factor}")
    left, right = (_transposed(op, index, f"trans{factor}") for index, factor in enumerate("AB"))
    return op.scaled(op.layer("", "MatMul", left, right), op.attributes.get_float("alpha", 1.0))


def _transposed(op: Expansion, index: int, attribute: str) -> ir.Value:
    """A factor with its last two axes exchanged if the attribute says so; a vector stays."""
    value = op.operand(index)
    if not op.attributes.get_int(attribute, 0) or (rank := op.rank(value)) < 2:
        return value
    return op.op("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])


@fusion("FusedGemm")
def fused_gemm(op: Expansion) -> ir.Value:
    """Gemm and an activation."""
    own = {name: value for name, value in op.attributes.items() if not name.startswith("activation")}
    parameters = {n.removeprefix("activation_"): v.as_float() for n, v in op.attributes.items() if "activation_" in n}
    return op.op(op.attributes.get_string("activation", ""), op.layer("", "Gemm", *op.node.inputs, **own), **parameters)


@fusion("FusedConv")
def fused_conv(op: Expansion) -> ir.Value:
    """Conv, a sum and an activation."""
    own = {name: value for name, value in op.attributes.items() if not name.startswith("activation")}
    output = op.layer("", "Conv", *op.node.inputs[:3], **own)
    output = op.added(output, op.input(3))
    activation = op.attributes.get_string("activation", "")
    parameters = op.attributes.get_floats("activation_params", ())
    if not activation:
        return output
    if activation == "Clip":
        low, high = parameters
        return op.call("Clip", [output], {"min": low, "max": high}, since=11)
    if activation not in _PARAMETERS:
        raise Unsupported(f"activation {activation}")
    return op.op(activation, output, **dict(zip(_PARAMETERS[activation], parameters, strict=True)))
