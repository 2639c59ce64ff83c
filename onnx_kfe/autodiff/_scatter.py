"""Operators that write elements at given positions."""

from __future__ import annotations

import onnx_ir as ir

from onnx_kfe.autodiff._registry import Backward, Cotangents, Declined, operand, vjp


@vjp("ScatterElements", "ScatterND")
def scatter(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """The updates get what lies where they were written, the data the rest; with a reduction both may."""
    updates = operand(node, 2)
    reduction = node.attributes.get_string("reduction", "none")
    if reduction == "mul":
        raise Declined(f"no gradient rule for {node.op_type} with products")

    def rule(index: int, value: ir.Value) -> ir.Value:
        passed = cotangent if index == 0 else _picked(backward, node, cotangent)
        if reduction in ("min", "max"):
            result = node.outputs[0] if index == 0 else _picked(backward, node, node.outputs[0])
            attains = backward.op("Equal", value, result, dtype=ir.DataType.BOOL)
            return backward.op("Where", attains, passed, backward.number(0.0, passed), like=value)
        if index == 0 and reduction == "none":
            return _written(backward, node, cotangent, backward.zeros_like(updates))
        return passed

    return backward.for_needed(node, rule)


def _picked(backward: Backward, node: ir.Node, value: ir.Value) -> ir.Value:
    """What a value of the shape of the data has at the positions."""
    indices, updates = node.inputs[1:3]
    if node.op_type == "ScatterND":
        return backward.op("GatherND", value, indices, like=updates)
    return backward.op("GatherElements", value, indices, like=updates, axis=node.attributes.get_int("axis", 0))


def _written(backward: Backward, node: ir.Node, value: ir.Value, updates: ir.Value) -> ir.Value:
    """A value of the shape of the data with updates at the positions."""
    if node.op_type == "ScatterND":
        return backward.op("ScatterND", value, node.inputs[1], updates, like=value)
    axis = node.attributes.get_int("axis", 0)
    return backward.op("ScatterElements", value, node.inputs[1], updates, like=value, axis=axis)
