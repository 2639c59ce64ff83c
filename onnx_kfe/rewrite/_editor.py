"""What passes over a graph have in common: new names and constants, and constants that nothing reads any more."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir

from onnx_kfe.kfe import Array

__all__ = ["Editor", "unclear_names"]


class Editor:
    """Edits one graph under names that are not taken.

    Args:
        graph: The graph, edited in place.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._taken = _names(graph)
        self._made: dict[str, ir.Value] = {}

    def unique(self, name: str) -> str:
        """The name, numbered where it is taken; it is taken from now on."""
        unique, count = name, 1
        while unique in self._taken:
            count += 1
            unique = f"{name}_{count}"
        self._taken.add(unique)
        return unique

    def constant(self, name: str, array: Array, dtype: ir.DataType) -> ir.Value:
        """A new initializer of the given element type; the one there is where it was asked for before."""
        stored, wanted, made = np.ascontiguousarray(array, dtype.numpy()), name, self._made.get(name)
        if made is not None and made.graph is self.graph and made.dtype == dtype and _holds(made, stored):
            return made
        name = self.unique(name)
        tensor = ir.tensor(stored, dtype=dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(value)
        self._made[wanted] = value
        return value

    def put(self, node: ir.Node, place: int, array: Array, suffix: str = "") -> None:
        """Have a node read other numbers in place of a constant: in it, or beside it where something else reads that.

        Args:
            node: The node.
            place: At which of its inputs the constant is.
            array: What it is to read.
            suffix: Behind the name of the constant, the name of the one beside it; nodes that are given the same share
                that.
        """
        value = node.inputs[place]
        assert value is not None
        assert value.const_value is not None
        dtype, name = value.const_value.dtype, f"{value.name}{suffix}"
        if len(value.uses()) > 1 or value.is_graph_output() or name in self._made:
            node.replace_input_with(place, self.constant(name, array, dtype))
            self.drop_unused(value)
            return
        value.const_value = ir.tensor(np.ascontiguousarray(array, dtype.numpy()), dtype=dtype, name=value.name)
        value.shape = ir.Shape(array.shape)

    def drop_unused(self, value: ir.Value) -> None:
        """Remove an initializer that no node reads and that is no graph output."""
        if value.graph is not None and not value.uses() and not value.is_graph_output():
            value.graph.initializers.pop(value.name or "")

    def absorb(self, output: ir.Value, bias: Array, suffix: str) -> bool:
        """Move a bias of a value into the constant that the only node behind it adds, where it adds one a feature.

        Args:
            output: The value that the bias ``[out]`` would be added to.
            bias: The bias, ``[out, 1]`` where features are the last axis but one.
            suffix: Behind the name of the constant, the name of the new one.

        Returns:
            Whether there was such a constant.
        """
        uses = list(output.uses())
        if len(uses) != 1 or uses[0].node.op_type != "Add" or output.is_graph_output():
            return False
        add, place = uses[0].node, 1 - uses[0].idx
        addend = add.inputs[place]
        if addend is None or not addend.is_initializer() or addend.const_value is None:
            return False
        if addend.const_value.shape != bias.shape:
            return False
        moved = addend.const_value.numpy().astype(np.float64) + bias
        add.replace_input_with(place, self.constant(f"{addend.name}/{suffix}", moved, addend.const_value.dtype))
        self.drop_unused(addend)
        return True


def _holds(value: ir.Value, array: np.ndarray) -> bool:
    return value.const_value is not None and np.array_equal(value.const_value.numpy(), array)


def unclear_names(graph: ir.Graph) -> list[str]:
    """Names of nodes, empty ones among them, that are not the name of a single node, as in a normalised model."""
    names = Counter(node.name or "" for node in graph)
    return [name for name, count in names.items() if count > 1 or not name]


def _names(graph: ir.Graph) -> set[str]:
    """Names of all nodes and values, those in bodies included."""
    nodes = list(graph.all_nodes())
    values = [value for node in nodes for value in node.outputs]
    graphs = [graph, *graph.subgraphs()]
    values += [value for each in graphs for value in (*each.inputs, *each.initializers.values())]
    return {name or "" for name in (*(node.name for node in nodes), *(value.name for value in values))}
