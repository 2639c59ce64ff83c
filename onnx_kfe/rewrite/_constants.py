"""Constants that a graph gains and loses, and names that nothing in it has yet."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_kfe.kfe import Array

__all__ = ["Constants"]


class Constants:
    """The initializers of a graph that is being rewritten.

    Args:
        graph: The graph; what is added to it meanwhile takes its name from here.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._taken = _names(graph)

    def add(self, name: str, array: Array, dtype: ir.DataType) -> ir.Value:
        """A new initializer, of that name or one like it."""
        name = self.unique(name)
        tensor = ir.tensor(np.ascontiguousarray(array, dtype.numpy()), dtype=dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def drop_unused(self, value: ir.Value) -> None:
        """Take an initializer out of the graph where nothing reads it any more."""
        if value.graph is not None and not value.uses() and not value.is_graph_output():
            value.graph.initializers.pop(value.name or "")

    def unique(self, name: str) -> str:
        """The name, with a number where it is taken; it is taken from now on."""
        unique, count = name, 1
        while unique in self._taken:
            count += 1
            unique = f"{name}_{count}"
        self._taken.add(unique)
        return unique


def _names(graph: ir.Graph) -> set[str]:
    """Names of all nodes and values, those in bodies included."""
    nodes = list(graph.all_nodes())
    values = [value for node in nodes for value in node.outputs]
    graphs = [graph, *graph.subgraphs()]
    values += [value for each in graphs for value in (*each.inputs, *each.initializers.values())]
    return {name or "" for name in (*(node.name for node in nodes), *(value.name for value in values))}
