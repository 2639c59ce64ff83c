"""Sizes of axes that a graph computes with: where they are read, the axis has to stay or its reader to follow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.graph.groups._coordinates import Ids
from onnx_kfe.graph.groups._flow import Axes, Flow, Size, constant_of, integers, operand
from onnx_kfe.graph.groups._registry import rule

__all__ = ["axes_of", "follow_sizes"]

_KEEPING = ("Squeeze", "Unsqueeze", "Cast", "Identity")
_COPING = {"Reshape": 1, "Expand": 1, "Resize": 3}  # whose rules see to the sizes that they read there


@rule("Shape")
def shape(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """Sizes, which `follow_sizes` sees to, and no channels."""
    return []


def follow_sizes(flow: Flow, node: ir.Node) -> None:
    """Tell what integers of a node are sizes of tracked axes; such an axis stays where that is not followed."""
    sizes = _passed(flow, node)
    if sizes is not None and any(size is not None for size in sizes):
        flow.sizes[node.outputs[0]] = sizes
    if sizes is not None:
        return
    for place, value in enumerate(node.inputs):
        if value is not None and _COPING.get(node.op_type) != place:
            for ids in axes_of(flow.sizes.get(value, ())):
                flow.freeze(node, ids, "reads the size of it")


def axes_of(sizes: Sequence[Size]) -> list[Ids]:
    """The coordinates of the axes that sizes are of."""
    return [size for size in sizes if isinstance(size, np.ndarray)]


def _passed(flow: Flow, node: ir.Node) -> Sequence[Size] | None:
    """The sizes that come out of a node; None for a node that does more than move some."""
    if node.op_type == "Shape":
        axes = flow.values.get(operand(node, 0), ())
        return axes[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(axes))]
    if node.op_type == "Concat":
        parts = [_entries(flow, value) for value in node.inputs]
        return None if any(part is None for part in parts) else [size for part in parts for size in part or ()]
    sizes = flow.sizes.get(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
    if sizes is None:
        return None
    if node.op_type in _KEEPING:
        return sizes
    if node.op_type == "Gather":
        indices = constant_of(node.inputs[1])
        return None if indices is None else [sizes[index] for index in indices.reshape(-1).tolist()]
    if node.op_type == "Slice":
        first, last, step = (_bound(node, place, name) for place, name in ((1, "starts"), (2, "ends"), (4, "steps")))
        return None if first is None or last is None else sizes[first:last:step]
    return None


def _entries(flow: Flow, value: ir.Value | None) -> Sequence[Size] | None:
    """The sizes in a value, unknown ones among them; None for a value that is no list of integers."""
    if value is None or value.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    constant = constant_of(value)
    if constant is not None:
        return constant.tolist() if constant.ndim == 1 else None
    shape = flow.shape(value)
    return flow.sizes.get(value, [None] * shape[0]) if len(shape) == 1 else None


def _bound(node: ir.Node, place: int, name: str) -> int | None:
    given = integers(node, place, name)
    return None if given is None else int(given[0])
