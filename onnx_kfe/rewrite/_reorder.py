"""Orders of channels: which constants around a Gather are to be reordered for it to be left out.

An order names the channel that comes to each place: ``y[:, i] = x[:, order[i]]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["Edit", "find_edits"]

_CHANNELS = 1  # the axis of them
_ALIKE = (
    *("Relu", "LeakyRelu", "Elu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Identity"),
    *("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"),
)
_WITH_CONSTANT = ("Add", "Sub", "Mul", "Div", "PRelu")
_Order = npt.NDArray[np.intp]
_Constant = npt.NDArray[Any]  # of the type that the model stores


@dataclass(frozen=True)
class Edit:
    """A constant in another order.

    Attributes:
        node: The node that reads it.
        place: At which of its inputs.
        array: What it is to read there, of the shape of what it reads now.
    """

    node: ir.Node
    place: int
    array: _Constant


def find_edits(gather: ir.Node, graph: ir.Graph) -> list[Edit] | str:
    """What makes up for a Gather: the edits after which what it gives is what it reads, or why there are none.

    Args:
        gather: The Gather, a node of the graph.
        graph: The graph, left as it is.
    """
    order, value, output = _permutation(gather), gather.inputs[0], gather.outputs[0]
    assert value is not None
    if order is None or _channels(value) != len(order):
        return "it is not known to put all channels into a constant order"
    if _is_identity(order):
        between = output.is_graph_output() and (value.is_graph_output() or value.producer() is None)
        return f"it is all that is between '{value.name}' and the graph output '{output.name}'" if between else []
    front, back = _Walk(graph), _Walk(graph)
    if (in_front := front.up(value, order) or front.parted()) is None:
        return front.edits
    if (behind := back.down(output, order) or back.parted()) is None:
        return back.edits
    return f"in front, {in_front}; behind, {behind}"


class _Walk:
    """Collects the edits by which the nodes on one side of a Gather take over its order."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.edits: list[Edit] = []

    def up(self, value: ir.Value, order: _Order) -> str | None:
        """Have a value computed with its channels in an order; why that cannot be, None where it can."""
        node = value.producer()
        if node is None:
            return f"'{value.name}' is computed by no node"
        if value.is_graph_output():
            return f"'{value.name}' is a graph output"
        if len(value.uses()) > 1:
            return f"'{value.name}' is read {len(value.uses())} times"
        if _channels(value) != len(order):
            return f"'{value.name}' is not known to have {len(order)} channels"
        if (indices := _permutation(node)) is not None:
            self.edits.append(Edit(node, 1, indices[order]))
            return None
        if _is(node, "Conv"):
            return self._conv_in_front(node, order)
        place = int(_is(node, *_WITH_CONSTANT) and _constant(node.inputs[0]) is not None)
        source = node.inputs[place] if node.inputs else None
        if source is None:
            return f"it meets {node.op_type} '{node.name}'"
        return self._pass(node, place, order) or self.up(source, order)

    def down(self, value: ir.Value, order: _Order) -> str | None:
        """Have the readers of a value, which now get it in an order, do with the channels as they were before."""
        if value.is_graph_output():
            return f"'{value.name}' is a graph output"
        obstacles = (self._reader(node, place, order) for node, place in value.uses())
        return next((obstacle for obstacle in obstacles if obstacle is not None), None)

    def parted(self) -> str | None:
        """Which convolution would no longer share its weight; None where all keep to theirs."""
        weights = [(edit.node, edit.node.inputs[1], edit.array) for edit in self.edits if _is_weight(edit)]
        for node, weight, array in weights:
            alike = sum(other is weight and np.array_equal(new, array) for _, other, new in weights)
            if weight is not None and alike < len(weight.uses()):
                return f"Conv '{node.name}' shares its weight"
        return None

    def _reader(self, node: ir.Node, place: int, order: _Order) -> str | None:
        if node.graph is not self.graph:
            return f"{node.op_type} '{node.name}' of a body reads it"
        if (indices := _permutation(node)) is not None:
            self.edits.append(Edit(node, 1, order[indices]))
            return None
        if _is(node, "Conv"):
            return self._conv_behind(node, order)
        return self._pass(node, place, np.argsort(order)) or self.down(node.outputs[0], order)

    def _pass(self, node: ir.Node, place: int, order: _Order) -> str | None:
        """Move through a node that reads the channels at a place, and a constant for each of them at the other."""
        value = node.inputs[place]
        if not _is(node, *_ALIKE, *_WITH_CONSTANT) or len(node.outputs) > 1:
            return f"it meets {node.op_type} '{node.name}'"
        if node.op_type in _ALIKE:
            return None
        constant = _constant(node.inputs[1 - place])
        if constant is None:
            return f"{node.op_type} '{node.name}' reads two computed values"
        if value is None or value.shape is None or value.shape.rank() < constant.ndim:
            return f"{node.op_type} '{node.name}' may add axes"
        axis = _CHANNELS + constant.ndim - value.shape.rank()  # shapes are aligned at their ends
        if axis >= 0 and constant.shape[axis] > 1:
            self.edits.append(Edit(node, 1 - place, np.take(constant, order, axis)))
        return None

    def _conv_in_front(self, node: ir.Node, order: _Order) -> str | None:
        """Have a convolution compute its channels in an order; its groups may ask for another order of its input."""
        weight, groups, source = _constant(node.inputs[1]), node.attributes.get_int("group", 1), node.inputs[0]
        if weight is None or source is None:
            return f"Conv '{node.name}' has no constant weight"
        came_from = _group_order(order, groups)
        if came_from is None:
            return f"the groups of Conv '{node.name}' would mix"
        inputs = _expanded(came_from, weight.shape[1])
        return self._reorder(node, order, weight[order]) or (None if _is_identity(inputs) else self.up(source, inputs))

    def _conv_behind(self, node: ir.Node, order: _Order) -> str | None:
        """Have a convolution read channels that no longer come in an order; its groups may give another at its output.

        Channel j comes where ``argsort(order)[j]`` was, so that column of the weight, in its group, is to come to j.
        """
        weight, groups = _constant(node.inputs[1]), node.attributes.get_int("group", 1)
        if weight is None:
            return f"Conv '{node.name}' has no constant weight"
        came_from = _group_order(order, groups)
        if came_from is None:
            return f"the groups of Conv '{node.name}' would mix"
        group_rows = len(weight) // groups
        rows = _expanded(np.argsort(came_from), group_rows)
        columns = np.argsort(order).reshape(groups, -1) % weight.shape[1]
        moved = weight[rows[:, None], np.repeat(columns, group_rows, axis=0)]
        outputs = _expanded(came_from, group_rows)
        unmoved = _is_identity(outputs)
        return self._reorder(node, rows, moved) or (None if unmoved else self.down(node.outputs[0], outputs))

    def _reorder(self, node: ir.Node, rows: _Order, weight: _Constant) -> str | None:
        """Give a convolution a weight with other rows, and its bias likewise."""
        self.edits.append(Edit(node, 1, weight))
        if len(node.inputs) < 3 or node.inputs[2] is None or _is_identity(rows):
            return None
        bias = _constant(node.inputs[2])
        if bias is None:
            return f"Conv '{node.name}' has no constant bias"
        self.edits.append(Edit(node, 2, bias[rows]))
        return None


def _is_weight(edit: Edit) -> bool:
    return edit.place == 1 and _is(edit.node, "Conv")


def _permutation(node: ir.Node) -> _Order | None:
    """The constant order into which a Gather puts as many channels as it names; None for any other node."""
    if not _is(node, "Gather") or node.attributes.get_int("axis", 0) != _CHANNELS:
        return None
    indices = _constant(node.inputs[1])
    if indices is None or indices.ndim != 1 or not np.array_equal(np.sort(indices), np.arange(indices.size)):
        return None
    return indices.astype(np.intp)


def _group_order(order: _Order, groups: int) -> _Order | None:
    """The group that comes to each place, for an order that keeps groups of channels together; None for another."""
    came_from = order.reshape(groups, -1) // (len(order) // groups)
    return came_from[:, 0] if np.all(came_from == came_from[:, :1]) else None


def _expanded(group_order: _Order, size: int) -> _Order:
    """The order of channels that an order of groups of a size amounts to."""
    return (group_order[:, None] * size + np.arange(size)).reshape(-1)


def _is_identity(order: _Order) -> bool:
    return np.array_equal(order, np.arange(len(order)))


def _channels(value: ir.Value) -> int | None:
    """How many channels a value has, None where that is not known."""
    shape = value.shape
    size = shape[_CHANNELS] if shape is not None and shape.rank() > _CHANNELS else None
    return size if isinstance(size, int) else None


def _constant(value: ir.Value | None) -> _Constant | None:
    """An initializer that nobody can feed, as it is stored; None for anything else."""
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    return value.const_value.numpy()


def _is(node: ir.Node, *op_types: str) -> bool:
    return node.domain == "" and node.op_type in op_types
