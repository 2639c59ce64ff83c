"""Reverse-mode differentiation of a graph, in the graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_kfe.autodiff._functions import emit_body
from onnx_kfe.autodiff._registry import RULES, ZERO_GRADIENT, Backward, Cotangents, Declined, operator_name
from onnx_kfe.autodiff._sizes import unify_sizes

__all__ = ["Gradients", "append_gradients"]


@dataclass(frozen=True)
class Gradients:
    """What the backward graph computes.

    Attributes:
        cotangents: For each wanted value that has one, the value that holds the derivative of the loss by it, in the
            shape and type of the wanted value.
        blocked: For the other wanted values, why there is none.
    """

    cotangents: dict[ir.Value, ir.Value]
    blocked: dict[ir.Value, str]


def append_gradients(graph: ir.Graph, seeds: Mapping[ir.Value, ir.Value], wanted: Sequence[ir.Value]) -> Gradients:
    """Append to a graph the nodes that compute the derivatives of a loss by some of its values.

    Nodes are appended only between the wanted values and the heads. The forward nodes stay as they are, except that
    `MaxPool` and `LayerNormalization` gain the optional outputs their derivatives use, and symbolic sizes that are
    certainly equal get the same name. What an operator without a rule is defined by in ONNX is computed again, if any.

    Args:
        graph: A sorted graph of opset 18 or later, with shapes inferred. It grows at the end.
        seeds: For each head, the value in the graph that holds the derivative of the loss by that head alone.
        wanted: The values to differentiate by; a head may be among them.

    Returns:
        The cotangent of each wanted value, or the reason why it has none. An operator without a rule is such a reason
        for the values above it, never an error.
    """
    unify_sizes(graph)
    nodes = list(graph)
    active = set(wanted)
    _activate(nodes, active)
    reaching = _reaching(nodes, seeds)
    backward = Backward(graph, active)
    sweep = _Sweep(backward, seeds)
    for node in reversed(nodes):
        if any(value in reaching for value in node.outputs) and any(map(backward.needs, _differentiable_inputs(node))):
            sweep.visit(node)
    cotangents: dict[ir.Value, ir.Value] = {}
    blocked: dict[ir.Value, str] = {}
    for value in wanted:
        if value in sweep.blocked:
            blocked[value] = sweep.blocked[value]
        elif (cotangent := sweep.cotangent(value)) is not None:
            cotangents[value] = cotangent
        else:
            inside = value.graph is not None and value.graph is not graph
            blocked[value] = "inside the body of a Loop, If or Scan" if inside else "no path to a head"
    backward.discard_unused(set(cotangents.values()))
    return Gradients(cotangents, blocked)


class _Sweep:
    """The state of the reverse sweep: the contributions to each cotangent so far, and the values that can have none."""

    def __init__(self, backward: Backward, seeds: Mapping[ir.Value, ir.Value]) -> None:
        self.blocked: dict[ir.Value, str] = {}
        self._backward = backward
        self._contributions: dict[ir.Value, list[ir.Value]] = {value: [seed] for value, seed in seeds.items()}

    def cotangent(self, value: ir.Value) -> ir.Value | None:
        """The sum of the contributions to a value; None if there are none."""
        terms = self._contributions.get(value, [])
        if len(terms) > 1:
            # Only wanted values and outputs of visited nodes are asked for, and those after their last contribution.
            terms[:] = [self._backward.op("Add" if len(terms) == 2 else "Sum", *terms, like=value)]
        return terms[0] if terms else None

    def visit(self, node: ir.Node) -> None:
        """Pass the cotangents of the outputs of a node on to its inputs."""
        reason = next((self.blocked[value] for value in node.outputs if value in self.blocked), None)
        cotangents = [] if reason else [self.cotangent(value) for value in node.outputs]
        if reason is None and all(cotangent is None for cotangent in cotangents):
            return
        inputs: Cotangents = []
        if reason is None:
            if operator_name(node) not in RULES and (body := emit_body(self._backward, node)) is not None:
                return self._visit_body(*body)
            try:
                inputs = _apply(self._backward, node, cotangents)
            except Declined as declined:
                reason = f"{declined} (node '{node.name}')"
        if reason is not None:
            for value in filter(self._backward.needs, _differentiable_inputs(node)):
                self.blocked.setdefault(value, reason)
            return
        for index, (operand, cotangent) in enumerate(zip(node.inputs, inputs, strict=True)):
            if operand is None or not self._backward.needs(operand):
                continue
            if cotangent is not None:
                self._contributions.setdefault(operand, []).append(cotangent)
            elif _passes_on(node, index):
                lacking = f"no gradient rule for input {index} of {node.op_type} (node '{node.name}')"
                self.blocked.setdefault(operand, lacking)

    def _visit_body(self, nodes: Sequence[ir.Node], outputs: Mapping[ir.Value, ir.Value]) -> None:
        """Pass the cotangents on through the nodes that an operator stands for."""
        _activate(nodes, self._backward.active)
        for output, computed_again in outputs.items():
            if (cotangent := self.cotangent(output)) is not None:
                self._contributions[computed_again] = [cotangent]
        for node in reversed(nodes):
            self.visit(node)


def _apply(backward: Backward, node: ir.Node, cotangents: Cotangents) -> Cotangents:
    operator = operator_name(node)
    rule = RULES.get(operator)
    if rule is None:
        raise Declined(f"no gradient rule for {operator}")
    if rule.every_output:
        inputs = rule.apply(backward, node, cotangents)
    elif any(cotangent is not None for cotangent in cotangents[1:]):
        raise Declined(f"no gradient rule for the optional outputs of {operator}")
    else:
        inputs = rule.apply(backward, node, cotangents[0])
    return [*inputs, *[None] * (len(node.inputs) - len(inputs))]


def _activate(nodes: Sequence[ir.Node], active: set[ir.Value]) -> None:
    """Add the values that change when an active value does."""
    for node in nodes:
        if any(value in active for value in _differentiable_inputs(node)):
            active.update(filter(_is_floating, node.outputs))


def _reaching(nodes: Sequence[ir.Node], heads: Mapping[ir.Value, ir.Value]) -> set[ir.Value]:
    """The values that change a head when they change."""
    reaching = set(heads)
    for node in reversed(nodes):
        if any(value in reaching for value in node.outputs):
            reaching.update(_differentiable_inputs(node))
    return reaching


def _differentiable_inputs(node: ir.Node) -> Iterator[ir.Value]:
    """The values whose small changes a node passes on, those used inside its bodies included."""
    if any(map(_is_floating, node.outputs)):
        yield from (value for index, value in enumerate(node.inputs) if value is not None and _passes_on(node, index))
        yield from filter(_is_floating, _captured(node))


def _passes_on(node: ir.Node, index: int) -> bool:
    """Whether a small change of an input may change the outputs."""
    value = node.inputs[index]
    if value is None or not _is_floating(value):
        return False
    if (operator := operator_name(node)) not in ZERO_GRADIENT:
        return True
    inputs = ZERO_GRADIENT[operator]
    return inputs is not None and index not in inputs


def _captured(node: ir.Node) -> Iterator[ir.Value]:
    for attribute in node.attributes.values():
        bodies = (
            [attribute.as_graph()]
            if attribute.type == ir.AttributeType.GRAPH
            else attribute.as_graphs()
            if attribute.type == ir.AttributeType.GRAPHS
            else []
        )
        for body in bodies:
            for inner in body:
                yield from (value for value in inner.inputs if value is not None and value.graph is not body)
                yield from _captured(inner)
            yield from (value for value in body.outputs if value.graph is not body)


def _is_floating(value: ir.Value) -> bool:
    """Whether a value can have a derivative; a value of unknown type may."""
    if isinstance(value.type, ir.SequenceType | ir.OptionalType):
        return True
    return value.dtype is None or value.dtype.is_floating_point()
