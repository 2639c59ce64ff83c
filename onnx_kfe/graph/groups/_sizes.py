"""Sizes of axes that a graph computes with: where they are read, the axis has to stay or its reader to follow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.graph.groups._coordinates import Ids
from onnx_kfe.graph.groups._flow import Flow, constant_of, operand

__all__ = ["follow_sizes"]

_KEEPING = ("Squeeze", "Unsqueeze", "Cast", "Identity")
_COPING = {"Reshape": 1, "Expand": 1, "Resize": 3}  # whose rules see to the sizes that they read there


def follow_sizes(flow: Flow, node: ir.Node) -> None:
    """Tell what integers of a node are sizes of tracked axes; such an axis stays where that is not followed."""
    if node.op_type == "Shape":
        _assign(flow, node, _shape(flow, node))
        return
    read = [value for value in node.inputs if value is not None and value in flow.sizes]
    if not read or (node.op_type in _COPING and read == [operand(node, _COPING[node.op_type])]):
        return
    entries = _passed(flow, node)
    if entries is not None:
        _assign(flow, node, entries)
        return
    for value in read:
        for ids in flow.sizes[value]:
            flow.freeze(node, ids, "reads the size of it")


def _shape(flow: Flow, node: ir.Node) -> Sequence[Ids | None]:
    value = operand(node, 0)
    if value not in flow.values:
        return ()
    axes = flow.axes(value)
    return axes[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(axes))]


def _passed(flow: Flow, node: ir.Node) -> Sequence[Ids | None] | None:
    """The sizes that come out of a node that reads some; None for a node that does more than move them."""
    if node.op_type == "Concat":
        return [ids for place in range(len(node.inputs)) for ids in _entries(flow, operand(node, place))]
    entries = _entries(flow, operand(node, 0))
    if node.op_type in _KEEPING:
        return entries
    if node.op_type == "Gather":
        indices = constant_of(node.inputs[1])
        return None if indices is None else [entries[index] for index in indices.reshape(-1).tolist()]
    if node.op_type == "Slice":
        bounds = [_bound(node, place, name) for place, name in ((1, "starts"), (2, "ends"), (4, "steps"))]
        return None if bounds[0] is None or bounds[1] is None else entries[slice(*bounds)]
    return None


def _entries(flow: Flow, value: ir.Value) -> Sequence[Ids | None]:
    return flow.sizes.get(value) or [None] * int(np.prod(flow.shape(value)))


def _bound(node: ir.Node, place: int, name: str) -> int | None:
    given = node.attributes.get_ints(name)
    if given is None:
        constant = constant_of(node.inputs[place]) if len(node.inputs) > place else None
        given = None if constant is None else constant.tolist()
    return None if given is None else int(given[0])


def _assign(flow: Flow, node: ir.Node, entries: Sequence[Ids | None]) -> None:
    if any(ids is not None for ids in entries):
        flow.sizes[node.outputs[0]] = entries
