"""Bodies of control-flow operators (If, Loop, Scan), which are never changed, and how passes are kept out of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

__all__ = ["Sealed", "bodies", "captured", "seal", "unseal"]

_DOMAIN = "onnx_kfe.sealed"


def bodies(node: ir.Node) -> dict[str, ir.Graph]:
    """The graphs among the attributes of a node, by name of the attribute."""
    found = {}
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH:
            found[name] = attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.update({f"{name}.{place}": graph for place, graph in enumerate(attribute.as_graphs())})
    return found


def captured(node: ir.Node) -> list[ir.Value]:
    """The values that the bodies of a node read from around it, each once, in the order in which they are read."""
    found = (value for body in bodies(node).values() for value in _read_from_outside(body))
    return list(dict.fromkeys(found))


def _read_from_outside(body: ir.Graph) -> Iterator[ir.Value]:
    own = {*body.inputs, *body.initializers.values(), *(output for node in body for output in node.outputs)}
    for node in body:
        yield from (value for value in (*node.inputs, *captured(node)) if value is not None and value not in own)
    yield from (value for value in body.outputs if value not in own)


@dataclass(frozen=True)
class Sealed:
    """What `seal` took out of a graph.

    Attributes:
        attributes: Those of the node, its bodies among them.
        inputs: How many inputs it had.
        captured: Names of the values that its bodies read.
    """

    attributes: list[ir.Attr]
    inputs: int
    captured: list[str]


def seal(model: ir.Model, names: Collection[str | None]) -> dict[str, Sealed]:
    """Put a node of an unknown operator in place of each of the nodes, which reads what their bodies do.

    Args:
        model: The model, edited in place.
        names: Names of nodes of the main graph.

    Returns:
        What it takes to `unseal`, by name of the node.
    """
    sealed = {}
    for node in [node for node in model.graph if node.name in names]:
        outside = captured(node)
        sealed[node.name or ""] = Sealed(
            list(node.attributes.values()), len(node.inputs), [value.name or "" for value in outside]
        )
        _replace(node, _DOMAIN, [*node.inputs, *outside], [])
    if sealed:
        model.opset_imports[_DOMAIN] = 1
    return sealed


def unseal(model: ir.Model, sealed: Mapping[str, Sealed]) -> None:
    """Undo `seal` in the model or in what passes made of a copy of it.

    Bodies read values by name: where a value goes by another name now, an Identity gives it the old one as well.
    """
    renamed: dict[str, ir.Value] = {}
    for node in [node for node in model.graph if node.domain == _DOMAIN]:
        kept = sealed[node.name or ""]
        outside: dict[str | None, ir.Value] = {}
        for name, value in zip(kept.captured, node.inputs[kept.inputs :], strict=True):
            assert value is not None
            if value.name != name and name not in renamed:
                renamed[name] = _identity(node, value, name)
            outside[name] = renamed.get(name, value)
        restored = _replace(node, "", node.inputs[: kept.inputs], kept.attributes)
        for body in bodies(restored).values():
            _read_again(body, outside)
    model.opset_imports.pop(_DOMAIN, None)


def _replace(node: ir.Node, domain: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr]) -> ir.Node:
    """Put a node with the same name, operator and outputs in the place of another."""
    graph = node.graph
    assert graph is not None
    new = ir.Node(
        domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs), name=node.name,
        doc_string=node.doc_string, metadata_props=node.metadata_props,
    )  # fmt: skip
    ir.convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs)
    return new


def _identity(node: ir.Node, value: ir.Value, name: str) -> ir.Value:
    """A value by another name, in front of a node."""
    assert node.graph is not None
    identity = ir.Node("", "Identity", [value], name=f"Identity_{name}")
    output = identity.outputs[0]
    output.name, output.type, output.shape = name, value.type, value.shape
    node.graph.insert_before(node, identity)
    return output


def _read_again(body: ir.Graph, outside: Mapping[str | None, ir.Value]) -> None:
    """Connect what a body reads from outside to the values of that name in the graph around it."""
    known = set(outside.values())
    for value in dict.fromkeys(_read_from_outside(body)):
        if value in known or value.name not in outside:
            continue
        for node in body.all_nodes():
            for place, used in enumerate(node.inputs):
                if used is value:
                    node.replace_input_with(place, outside[value.name])
        for graph in (body, *body.subgraphs()):
            for place, used in enumerate(graph.outputs):
                if used is value:
                    graph.outputs[place] = outside[value.name]
