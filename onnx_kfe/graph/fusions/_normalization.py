"""Normalisation over the last axes, fused with the sums and the look-ups in front of it."""

from __future__ import annotations

import onnx_ir as ir

from onnx_kfe.graph.fusions._registry import Expansion, Outputs, fusion

__all__: list[str] = []

_EPSILON = 1e-12  # of the operators of com.microsoft; those in the domain of ONNX have 1e-5


@fusion("LayerNormalization", domain="")
def layer_normalization(op: Expansion) -> ir.Value:
    """LayerNormalization in opsets before 17."""
    epsilon = op.attributes.get_float("epsilon", 1e-5)
    return _normalized(op, op.operand(0), op.operand(1), op.input(2), epsilon, op.attributes.get_int("axis", -1))


@fusion("SimplifiedLayerNormalization", domain="")
def simplified_layer_normalization(op: Expansion) -> ir.Value:
    """Division by the root of the mean square."""
    epsilon = op.attributes.get_float("epsilon", 1e-5)
    return _rms_normalized(op, op.operand(0), op.operand(1), epsilon, op.attributes.get_int("axis", -1))


@fusion("SkipLayerNormalization")
def skip_layer_normalization(op: Expansion) -> Outputs:
    """A sum and LayerNormalization."""
    total = op.added(op.op("Add", op.operand(0), op.operand(1)), op.input(4))
    epsilon = op.attributes.get_float("epsilon", _EPSILON)
    return _normalized(op, total, op.operand(2), op.input(3), epsilon), None, None, total


@fusion("SkipSimplifiedLayerNormalization")
def skip_simplified_layer_normalization(op: Expansion) -> Outputs:
    """A sum and division by the root of the mean square."""
    total = op.added(op.op("Add", op.operand(0), op.operand(1)), op.input(3))
    return _rms_normalized(op, total, op.operand(2), op.attributes.get_float("epsilon", _EPSILON)), None, None, total


@fusion("EmbedLayerNormalization")
def embed_layer_normalization(op: Expansion) -> Outputs:
    """The sum of embeddings of tokens, positions and segments, and LayerNormalization."""
    ids, positions, segments, mask = op.operand(0), op.input(8), op.input(1), op.input(7)
    if positions is None:
        positions = op.indices(op.length(ids, 1))
    total = op.op("Add", op.op("Gather", op.operand(2), ids), op.op("Gather", op.operand(3), positions))
    if segments is not None:
        total = op.op("Add", total, op.op("Gather", op.operand(4), segments))
    lengths = None if mask is None else op.call("ReduceSum", [mask], {"axes": [1]}, since=13, keepdims=0)
    normalized = _normalized(op, total, op.operand(5), op.operand(6), op.attributes.get_float("epsilon", _EPSILON))
    return normalized, lengths, total


def _normalized(
    op: Expansion, x: ir.Value, scale: ir.Value, bias: ir.Value | None, epsilon: float, axis: int = -1
) -> ir.Value:
    """LayerNormalization, in what it stands for where the opset is older."""
    if op.opset >= 17:
        return op.op("LayerNormalization", x, scale, bias, epsilon=epsilon, axis=axis)
    wide, axes = _cast(op, x, ir.DataType.FLOAT), _axes(op, x, axis)
    centred = op.op("Sub", wide, op.call("ReduceMean", [wide], {"axes": axes}, since=18))
    return op.added(_divided(op, centred, scale, epsilon, axes), bias)


def _rms_normalized(op: Expansion, x: ir.Value, scale: ir.Value, epsilon: float, axis: int = -1) -> ir.Value:
    """Division by the root of the mean square, and multiplication by the scale."""
    return _divided(op, _cast(op, x, ir.DataType.FLOAT), scale, epsilon, _axes(op, x, axis))


def _divided(op: Expansion, wide: ir.Value, scale: ir.Value, epsilon: float, axes: list[int]) -> ir.Value:
    square = op.call("ReduceMean", [op.op("Mul", wide, wide)], {"axes": axes}, since=18)
    root = op.op("Sqrt", op.op("Add", square, op.number(epsilon, wide=True)))
    return op.op("Mul", _cast(op, op.op("Div", wide, root), op.dtype), scale)


def _cast(op: Expansion, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Half precision to single, where squares do not overflow, and back."""
    return x if op.dtype.bitwidth >= 32 else op.op("Cast", x, to=dtype)


def _axes(op: Expansion, x: ir.Value, axis: int) -> list[int]:
    """The axes from `axis` on, counted from the end."""
    return list(range(axis if axis < 0 else axis - op.rank(x), 0))
