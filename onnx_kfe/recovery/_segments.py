"""Segments: the nodes between values known already and values wanted next, of one graph or of two side by side."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import onnx_ir as ir

__all__ = ["Frontier", "ancestors", "join"]


def ancestors(values: Iterable[ir.Value], known: Collection[str | None] = ()) -> set[ir.Node]:
    """All nodes that the values depend on, as far back as values of known names."""
    found: set[ir.Node] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None or node in found or value.name in known:
            continue
        found.add(node)
        pending += [used for used in node.inputs if used is not None]
    return found


class Frontier:
    """How far a graph has been evaluated, each node once.

    Args:
        graph: The graph; nodes that are not evaluated yet may be replaced.
        wanted: All values that will be asked for.
        prefix: Of the names of its values beside those of another graph; graph inputs keep their names.
    """

    def __init__(self, graph: ir.Graph, wanted: Sequence[ir.Value], prefix: str = "") -> None:
        self.graph = graph
        self._prefix = prefix
        self._known = {value.name for value in graph.inputs if not value.is_initializer()}
        self._wanted = {value.name for value in wanted}

    def value(self, name: str) -> ir.Value:
        """The value of that name, as the graph is now."""
        value = self.find(name)
        assert value is not None
        return value

    def find(self, name: str) -> ir.Value | None:
        """The value of that name, where there is one that is no constant."""
        outputs = (output for node in self.graph for output in node.outputs)
        return next((value for value in (*self.graph.inputs, *outputs) if value.name == name), None)

    def joint_name(self, value: ir.Value) -> str:
        """Name of a value beside those of another graph."""
        return (value.name or "") if value.is_graph_input() else f"{self._prefix}{value.name}"

    def segment(self, targets: Iterable[ir.Value]) -> list[ir.Node]:
        """Nodes still to be evaluated for the targets, in order; constants are evaluated wherever they are used."""
        needed = ancestors(targets, self._known)
        return [node for node in self.graph if node in needed]

    def advance(self, nodes: Iterable[ir.Node]) -> None:
        """Mark nodes as evaluated."""
        self._known |= {output.name for node in nodes if any(node.inputs) for output in node.outputs}

    def needed(self) -> set[str]:
        """Joint names of the known values that nodes to be evaluated read."""
        values = [output for node in self.graph for output in node.outputs]
        ahead = ancestors([value for value in values if value.name in self._wanted], self._known)
        used = {value for node in ahead for value in node.inputs if value is not None and value.name in self._known}
        return {self.joint_name(value) for value in used}


def join(
    parts: Iterable[tuple[Frontier, Sequence[ir.Node], Sequence[ir.Value]]],
    opset_imports: Mapping[str, int],
    ir_version: int,
) -> tuple[ir.Model, dict[str, ir.Value]]:
    """One graph of the segments of several.

    Args:
        parts: Of each graph its frontier, the nodes, and values that are wanted of it.
        opset_imports: Operator sets.
        ir_version: Version of the format.

    Returns:
        The model, without outputs, and its values by joint name. Those that no node computes are its inputs.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports=dict(opset_imports), name="segment")
    values: dict[str, ir.Value] = {}
    for frontier, nodes, wanted in parts:
        computed = {output for node in nodes for output in node.outputs}
        used = [value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None]
        for value in (*used, *wanted):
            name = frontier.joint_name(value)
            if name in values:
                continue
            values[name] = new = ir.Value(name=name, type=value.type, shape=_open_batch(value.shape))
            if value.is_initializer():
                new.shape, new.const_value = value.shape, value.const_value
                graph.register_initializer(new)
            elif value not in computed:
                graph.inputs.append(new)
        for node in nodes:
            inputs = [None if value is None else values[frontier.joint_name(value)] for value in node.inputs]
            outputs = [values[frontier.joint_name(value)] for value in node.outputs]
            name = f"{len(graph)}/{node.name}"
            graph.append(
                ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), outputs=outputs, name=name)
            )
    return ir.Model(graph, ir_version=ir_version), values


def _open_batch(shape: ir.Shape | None) -> ir.Shape | None:
    return ir.Shape([None, *list(shape)[1:]]) if shape else shape
