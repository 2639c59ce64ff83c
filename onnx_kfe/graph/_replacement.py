"""Nodes in place of one node, while a model is normalised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

__all__ = ["Replacement", "is_constant"]


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer that nobody can feed."""
    return value is not None and value.is_initializer() and not value.is_graph_input() and value.const_value is not None


class Replacement:
    """What stands in place of a node of a graph: nodes that follow each other, the linear one under the node's name.

    Args:
        node: The node, with one output.
        taken: Names of nodes and values of the graph, to which new ones are added.
    """

    def __init__(self, node: ir.Node, taken: set[str]) -> None:
        assert node.graph is not None
        self._node, self._graph, self._taken = node, node.graph, taken
        self._nodes: list[ir.Node] = []

    def constant(self, suffix: str, array: np.ndarray) -> ir.Value:
        """A new initializer in the array's type."""
        name = self._unique(f"{self._node.name}/{suffix}")
        tensor = ir.tensor(np.asarray(array, order="C"), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def linear(
        self, op_type: str, inputs: Sequence[ir.Value], attributes: Mapping[str, ir.Attr] | None = None
    ) -> ir.Value:
        """Append the linear node; its output."""
        return self._append(op_type, inputs, list((attributes or {}).values()), self._node.name or "")

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Sequence[int]) -> ir.Value:
        """Append a node; its output."""
        given = [ir.AttrInt64s(key, value) for key, value in attributes.items()]
        return self._append(op_type, inputs, given, self._unique(f"{self._node.name}/{op_type.lower()}"))

    def reshape(self, value: ir.Value, target: Sequence[int]) -> ir.Value:
        """Append a Reshape; its output."""
        return self.op("Reshape", value, self.constant("shape", np.array(target, np.int64)))

    def write(self) -> None:
        """Put the nodes in the place of the node; initializers that nothing reads any more go."""
        read = {value for value in self._node.inputs if value is not None and value.is_initializer()}
        ir.convenience.replace_nodes_and_values(
            self._graph, self._node, [self._node], self._nodes, self._node.outputs, self._nodes[-1].outputs
        )
        for value in read:
            if not value.uses() and not value.is_graph_output():
                self._graph.initializers.pop(value.name or "", None)

    def _append(self, op_type: str, inputs: Sequence[ir.Value], attributes: Sequence[ir.Attr], name: str) -> ir.Value:
        self._nodes.append(ir.Node("", op_type, inputs, attributes, name=name))
        (output,) = self._nodes[-1].outputs
        output.name, output.type = self._unique(f"{name}/{op_type.lower()}_output"), self._node.outputs[0].type
        return output

    def _unique(self, name: str) -> str:
        unique, count = name, 1
        while unique in self._taken:
            count += 1
            unique = f"{name}_{count}"
        self._taken.add(unique)
        return unique
