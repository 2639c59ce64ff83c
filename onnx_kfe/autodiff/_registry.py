"""Where rules register, and what a rule is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_kfe.autodiff._emitter import Emitter

__all__ = [
    "RULES",
    "ZERO_GRADIENT",
    "Backward",
    "Cotangents",
    "Declined",
    "Rule",
    "operand",
    "operator_name",
    "vjp",
    "zero_gradient",
]

Cotangents = Sequence[ir.Value | None]
"""For each input of a node the value of its cotangent, None where it was not asked for."""


class Declined(Exception):
    """A rule cannot differentiate this node; the message names what stands in the way."""


class Backward(Emitter):
    """What a rule emits its nodes with.

    Args:
        graph: The graph that grows.
        active: The values a wanted value can change; it grows with the forward nodes that are computed again.
    """

    def __init__(self, graph: ir.Graph, active: set[ir.Value]) -> None:
        super().__init__(graph)
        self.active = active

    def needs(self, value: ir.Value | None) -> bool:
        """Whether the cotangent of an input is asked for."""
        return value in self.active

    def for_needed(self, node: ir.Node, rule: Callable[[int, ir.Value], ir.Value | None]) -> Cotangents:
        """`rule(index, input)` for the inputs whose cotangents are asked for."""
        return [
            rule(index, value) if value is not None and self.needs(value) else None
            for index, value in enumerate(node.inputs)
        ]


@dataclass(frozen=True)
class Rule:
    """The vector-Jacobian product of an operator.

    Attributes:
        apply: `(backward, node, cotangent) -> cotangents of the inputs`. The cotangent is that of the first output, or,
            if `every_output`, the sequence of those of all outputs, None where an output does not matter.
        every_output: Whether outputs after the first are differentiated too.
    """

    apply: Callable[..., Cotangents]
    every_output: bool = False


RULES: dict[str, Rule] = {}
ZERO_GRADIENT: dict[str, frozenset[int] | None] = {}
"""For operators that do not pass small changes on: the inputs that is true of, or None for all."""


def vjp(*op_types: str, every_output: bool = False) -> Callable[[Callable[..., Cotangents]], Callable[..., Cotangents]]:
    """Register a function as the rule of operators of the ONNX domain; see `Rule`."""

    def register(function: Callable[..., Cotangents]) -> Callable[..., Cotangents]:
        for op_type in op_types:
            RULES[op_type] = Rule(function, every_output)
        return function

    return register


def operator_name(node: ir.Node) -> str:
    """What an operator is registered as: with its domain where that is not the one of ONNX."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def operand(node: ir.Node, index: int) -> ir.Value:
    """An input that the operator cannot do without."""
    value = node.inputs[index]
    assert value is not None
    return value


def zero_gradient(*op_types: str, inputs: Sequence[int] | None = None) -> None:
    """Register operators whose outputs no small change of an input, or of some of the inputs, changes."""
    ZERO_GRADIENT.update(dict.fromkeys(op_types, None if inputs is None else frozenset(inputs)))
