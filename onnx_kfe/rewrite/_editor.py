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

    def unique(self, name: str) -> str:
        """The name, numbered where it is taken; it is taken from now on."""
        unique, count = name, 1
        while unique in self._taken:
            count += 1
            unique = f"{name}_{count}"
        self._taken.add(unique)
        return unique

    def constant(self, name: str, array: Array, dtype: ir.DataType) -> ir.Value:
        """A new initializer of the given element type."""
        name = self.unique(name)
        tensor = ir.tensor(np.ascontiguousarray(array, dtype.numpy()), dtype=dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value

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
