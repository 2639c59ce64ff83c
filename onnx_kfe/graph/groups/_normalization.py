"""Normalisations, reductions, and what else sees all indices of an axis at once."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnx_kfe.graph.groups._flow import Axes, Declined, Flow, constant_of, integers, operand
from onnx_kfe.graph.groups._registry import rule

__all__: list[str] = []

_OVER = "is over it"


@rule("BatchNormalization", "InstanceNormalization")
def by_channel(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """Constants for each channel; positions stay."""
    axes = flow.axes(operand(node, 0))
    if node.attributes.get_int("training_mode", 0):
        raise Declined("is in training mode")
    _freeze(flow, node, axes, range(2, len(axes)))
    for place in range(1, len(node.inputs)):
        flow.join(node, [(0, 1), (place, 0)])
    return [axes]


@rule("LayerNormalization", "RMSNormalization", "Softmax", "LogSoftmax", "Hardmax", "LpNormalization")
@rule("CumSum", "LRN", "GroupNormalization")
def over_axes(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """What they are over stays."""
    axes = flow.axes(operand(node, 0))
    _freeze(flow, node, axes, _axes_over(flow, node, len(axes)))
    return [axes]


@rule("MeanVarianceNormalization")
def over_positions(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """What it is over stays."""
    axes = flow.axes(operand(node, 0))
    _freeze(flow, node, axes, node.attributes.get_ints("axes", [0, 2, 3]) or ())
    return [axes]


@rule(
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"),
    *("ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"),
)
def reduction(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """What it is over stays, and is one index or none in the output."""
    axes = flow.axes(operand(node, 0))
    over = integers(node, 1, "axes")
    if over is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        raise Declined("is over computed axes")
    if over is None or not over.size:
        every = not node.attributes.get_int("noop_with_empty_axes", 0)
        return [_reduced(flow, node, axes, range(len(axes) if every else 0))]
    return [_reduced(flow, node, axes, over.tolist())]


@rule("ArgMax", "ArgMin")
def choice(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """What it is over stays."""
    return [_reduced(flow, node, flow.axes(operand(node, 0)), [node.attributes.get_int("axis", 0)])]


@rule("TopK")
def top(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """What it is over stays."""
    axes = list(flow.axes(operand(node, 0)))
    axis = node.attributes.get_int("axis", -1)
    _freeze(flow, node, axes, [axis])
    axes[axis] = None
    return [axes, axes]


def _axes_over(flow: Flow, node: ir.Node, rank: int) -> Sequence[int]:
    """The axes that an operator is over."""
    if node.op_type in ("LRN", "GroupNormalization"):
        return [1]
    if node.op_type == "CumSum":
        given = constant_of(node.inputs[1])
        return range(rank) if given is None else [int(given.item())]
    flattened = node.op_type in ("Softmax", "LogSoftmax", "Hardmax") and flow.opset < 13
    axis = node.attributes.get_int("axis", 1 if flattened else -1) % rank
    return range(axis, rank) if flattened or "Layer" in node.op_type or "RMS" in node.op_type else [axis]


def _reduced(flow: Flow, node: ir.Node, axes: Axes, over: Sequence[int]) -> Axes:
    over = [axis % len(axes) for axis in over]
    _freeze(flow, node, axes, over)
    if node.attributes.get_int("keepdims", 1):
        return [None if axis in over else ids for axis, ids in enumerate(axes)]
    return [ids for axis, ids in enumerate(axes) if axis not in over]


def _freeze(flow: Flow, node: ir.Node, axes: Axes, over: Sequence[int]) -> None:
    for axis in over:
        flow.freeze(node, axes[axis], _OVER)
