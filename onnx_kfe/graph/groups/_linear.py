"""Linear layers, where channels begin and end, and products of computed values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.graph.groups._coordinates import STAYS, Ids
from onnx_kfe.graph.groups._elementwise import broadcast
from onnx_kfe.graph.groups._flow import Axes, Declined, Flow, constant_of, operand
from onnx_kfe.graph.groups._registry import rule
from onnx_kfe.graph.groups._sites import Linear

__all__: list[str] = []


@rule("Conv", "ConvTranspose")
def conv(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """The j-th channels of all groups go together; where each group reads one, channels pass through."""
    weight, groups = constant_of(node.inputs[1]), node.attributes.get_int("group", 1)
    if weight is None:
        raise Declined("has no constant weight")
    transposed = node.op_type == "ConvTranspose"
    inputs, outputs = len(weight) if transposed else weight.shape[1] * groups, len(weight)
    outputs = weight.shape[1] * groups if transposed else outputs
    x, *spatial = flow.axes(operand(node, 0))[1:]
    _positions(flow, node, spatial)
    columns = _known(x, inputs)
    depthwise = groups > 1 and groups == inputs
    if depthwise:
        rows = columns.repeat(outputs // groups)
    else:
        _tie(flow, node, columns.reshape(groups, -1))
        rows = np.tile(flow.coordinates.fresh(outputs // groups), groups)
    if depthwise:
        flow.trim(node, 1, 0, columns if transposed else rows)
        flow.edit(node, "group", columns, lambda _, keep: keep(columns).sum())
    else:
        per_group = (columns, rows[: outputs // groups]) if transposed else (rows, columns[: inputs // groups])
        for axis, ids in enumerate(per_group):
            flow.trim(node, 1, axis, ids)
    _bias(flow, node, rows)
    flow.add_linear(node, Linear(rows, columns, groups))
    return [[None, rows, *(None for _ in spatial)]]


@rule("Gemm")
def gemm(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """A product of matrices, whose second may be a constant."""
    transposed = [node.attributes.get_int(name, 0) for name in ("transA", "transB")]
    if constant_of(node.inputs[0]) is not None:
        raise Declined("multiplies a constant from the left")
    samples, inputs = (0, 1) if not transposed[0] else (1, 0)
    contracted, features = (0, 1) if not transposed[1] else (1, 0)
    x = flow.axes(operand(node, 0))
    columns = flow.join(node, [(0, inputs), (1, contracted)])
    rows = _features(flow, node, columns, features, contracted)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        _addend(flow, node, [x[samples], rows])
    return [[x[samples], rows]]


@rule("MatMul")
def matmul(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """The axes that are summed over meet, and so do those in front of the matrices."""
    ranks = [len(flow.shape(operand(node, place))) for place in (0, 1)]
    if constant_of(node.inputs[0]) is not None:
        raise Declined("multiplies a constant from the left")
    if min(ranks) < 2:
        raise Declined("multiplies a vector")
    columns = flow.join(node, [(0, ranks[0] - 1), (1, ranks[1] - 2)])
    rows = _features(flow, node, columns, ranks[1] - 1, ranks[1] - 2)
    leading = broadcast(flow, node, [(place, rank - 2) for place, rank in enumerate(ranks)])
    return [[*leading, flow.axes(operand(node, 0))[-2], rows]]


def _features(flow: Flow, node: ir.Node, columns: Ids | None, axis: int, contracted: int) -> Ids | None:
    """The coordinates of what a product gives: new ones of a constant matrix, otherwise those of its second operand."""
    shape = flow.shape(operand(node, 1))
    weighted = constant_of(node.inputs[1]) is not None
    if weighted:
        rows: Ids | None = flow.coordinates.fresh(shape[axis])
        flow.trim(node, 1, axis, rows)
    else:
        rows = flow.axes(operand(node, 1))[axis]
    linear = Linear(_known(rows, shape[axis]), _known(columns, shape[contracted]), weighted=weighted)
    flow.add_linear(node, linear)
    return rows


def _addend(flow: Flow, node: ir.Node, axes: Axes) -> None:
    """Trim or tie what a Gemm adds."""
    addend = operand(node, 2)
    shape = flow.shape(addend)
    for axis, size in enumerate(shape):
        ids = axes[axis - len(shape) + 2]
        if size == 1:
            continue
        if constant_of(addend) is not None:
            flow.trim(node, 2, axis, ids)
        else:
            flow.unite(node, ids, flow.axes(addend)[axis])


def _bias(flow: Flow, node: ir.Node, rows: Ids) -> None:
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return
    if constant_of(node.inputs[2]) is not None:
        flow.trim(node, 2, 0, rows)
    else:
        flow.unite(node, rows, flow.axes(operand(node, 2))[0])


def _positions(flow: Flow, node: ir.Node, spatial: Axes) -> None:
    for ids in spatial:
        flow.freeze(node, ids, "slides over it")


def _tie(flow: Flow, node: ir.Node, groups: Ids) -> None:
    for ids in groups[1:]:
        flow.unite(node, groups[0], ids)


def _known(ids: Ids | None, size: int) -> Ids:
    return np.full(size, STAYS) if ids is None else ids
