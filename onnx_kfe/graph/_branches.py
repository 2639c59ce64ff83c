"""Residual branches: what a model can do without once the last layer of a branch gives a constant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnx_kfe.graph._bodies import bodies
from onnx_kfe.graph._layers import weight_place
from onnx_kfe.graph._network import Network
from onnx_kfe.graph._shapes import concrete_shapes, nominal_input_shapes

__all__ = ["Branch", "Junction", "find_branches", "find_junction", "only_feeding"]


@dataclass(frozen=True)
class Branch:
    """A residual branch, whose last layer can be replaced by its mean output.

    Attributes:
        layer: Name of the last layer.
        layers: Names of all layers that vanish with it, prunable or not, in graph order, the last layer included.
        sum: Name of the Add that the branch ends in. Of two branches that end in the same one, one must stay.
    """

    layer: str
    layers: tuple[str, ...]
    sum: str


@dataclass(frozen=True)
class Junction:
    """Where the output of a layer meets another computed value.

    Attributes:
        addition: The Add of the two.
        branch: The operand that comes from the layer: its output, or the sum of that and the bias.
        other: The other operand.
        bias: Constant ``[out]`` that a MatMul is given as a bias on the way; None without one.
    """

    addition: ir.Node
    branch: ir.Value
    other: ir.Value
    bias: ir.Value | None


def find_branches(network: Network) -> list[Branch]:
    """The branches that can be removed: one for each prunable layer whose output goes straight into a residual sum.

    An Add of two computed values of the same shape has to be all that reads the output of the layer (the bias of a
    MatMul added), and neither the output nor the sum is an output of the graph. Any two branches are apart, or one lies
    within the other. A branch with a layer that the user left out is none, nor is one with a node that is pruned with
    others: these still need the weight.
    """
    shapes = concrete_shapes(network.model, nominal_input_shapes(network.model, network.input_shapes))
    kept = {*network.unselected, *network.twins, *network.twins.values()}
    branches = []
    for layer in network.prunable:
        junction = find_junction(layer.node)
        if junction is None:
            continue
        dying = only_feeding(junction.branch)
        layers = tuple(other.name for other in network.layers if other.node in dying)
        alike = _same_shape([layer.node.outputs[0], junction.other, junction.addition.outputs[0]], shapes)
        if alike and kept.isdisjoint(layers):
            branches.append(Branch(layer.name, layers, junction.addition.name or ""))
    return branches


def find_junction(node: ir.Node) -> Junction | None:
    """Where the output of a linear node goes straight into a residual sum, its shapes not looked at.

    Returns:
        The junction; None where the output goes elsewhere too, or it or the sum is an output of the graph.
    """
    branch, bias = node.outputs[0], None
    operands = _only_addition(branch)
    if operands is not None and _is_bias(node, operands[1]):
        branch, bias = operands[0].outputs[0], operands[1]
        operands = _only_addition(branch)
    if operands is None:
        return None
    addition, other = operands
    if other.const_value is not None or addition.outputs[0].is_graph_output():
        return None
    return Junction(addition, branch, other, bias)


def only_feeding(value: ir.Value) -> set[ir.Node]:
    """The node that computes a value and all nodes whose outputs end in it and nowhere else, their bodies included."""
    last = value.producer()
    assert last is not None
    assert last.graph is not None
    found = set(_with_bodies(last))
    for node in reversed(last.graph):  # what reads a value comes behind it
        readers = {reader for output in node.outputs for reader in output.consumers()}
        if readers and readers <= found and not any(output.is_graph_output() for output in node.outputs):
            found.update(_with_bodies(node))
    return found


def _only_addition(value: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """The Add that a value is used in, where that is its only use, and what it is added to."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node, place = uses[0]
    if node.op_type != "Add" or node.domain or node.graph is not value.graph:
        return None
    other = node.inputs[1 - place]
    return None if other is None else (node, other)


def _is_bias(node: ir.Node, addend: ir.Value) -> bool:
    """Whether a value is a constant for each feature of a MatMul."""
    place = weight_place(node)
    weight = node.inputs[place]
    if node.op_type != "MatMul" or weight is None or not weight.shape or addend.const_value is None:
        return False
    return list(addend.const_value.shape) == ([weight.shape[-1]] if place else [weight.shape[0], 1])


def _with_bodies(node: ir.Node) -> Iterator[ir.Node]:
    """A node and those inside its bodies, which a control-flow operator has."""
    yield node
    for body in bodies(node).values():
        yield from body.all_nodes()


def _same_shape(values: list[ir.Value], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the shapes are known and the same, also for other batches than the one that costs are counted at."""
    found = {shapes.get(value.name or "") for value in values}
    declared = [value.shape[0] for value in values if value.shape]
    fixed = {size if isinstance(size, int) else None for size in declared}
    return len(found) == 1 and None not in found and len(fixed) <= 1
