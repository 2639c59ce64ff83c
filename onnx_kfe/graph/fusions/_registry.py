"""Where decompositions register, and what a decomposition is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

__all__ = ["FUSIONS", "Decomposition", "Expansion", "Outputs", "Unsupported", "fusion", "operator_name"]

Attribute = int | float | str | Sequence[int] | ir.TensorProtocol | ir.Attr


class Unsupported(Exception):
    """A node has a form that is not decomposed; the message names what it comes with."""


class Expansion:
    """Emits what a node stands for, in operators that the model's opset has.

    Args:
        node: The fused node.
        opset: Of the model.

    Raises:
        Unsupported: By all methods, where the node or the opset lacks what they need.
    """

    def __init__(self, node: ir.Node, opset: int) -> None:
        self.node, self.opset = node, opset
        self.attributes = node.attributes
        self.nodes: list[ir.Node] = []

    @property
    def dtype(self) -> ir.DataType:
        """The floating-point type that the node computes in."""
        known = (value.dtype for value in self.node.inputs if value is not None)
        found = next((dtype for dtype in known if dtype is not None and dtype.is_floating_point()), None)
        if found is None:
            raise Unsupported("inputs of unknown type")
        return found

    def input(self, index: int) -> ir.Value | None:
        """An input, None where it is left out."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def operand(self, index: int, name: str = "input") -> ir.Value:
        """An input that this form of the operator cannot do without; `name` is what to call it."""
        if (value := self.input(index)) is None:
            raise Unsupported(f"no {name}")
        return value

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Attribute | None) -> ir.Value:
        """Emit a node of the ONNX domain with one output; attributes that are None are left out."""
        if not onnx.defs.has(op_type, self.opset):
            raise Unsupported(f"opset {self.opset}, which has no {op_type}")
        name = f"{self.node.name}/{op_type}_{len(self.nodes)}"
        stated = {key: value for key, value in attributes.items() if value is not None}
        node = ir.node(op_type, inputs, stated, name=name)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def layer(self, suffix: str, op_type: str, *inputs: ir.Value | None, **attributes: Attribute | None) -> ir.Value:
        """Emit a node that is known by the name of the fused one and a suffix; see `op`."""
        output = self.op(op_type, *inputs, **attributes)
        self.nodes[-1].name = f"{self.node.name}{suffix}"
        return output

    def call(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        parameters: Mapping[str, Sequence[int] | float],
        *,
        since: int,
        **attributes: Attribute,
    ) -> ir.Value:
        """Emit a node whose parameters are attributes before opset `since`, and inputs, in that order, from it on."""
        if self.opset < since:
            return self.op(op_type, *inputs, **parameters, **attributes)
        given = [self.number(p) if isinstance(p, float) else self.ints(*p) for p in parameters.values()]
        return self.op(op_type, *inputs, *given, **attributes)

    def discard(self) -> None:
        """Take back what was emitted, or it would count as uses of what the node reads."""
        for node in self.nodes:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)

    def constant(self, array: np.ndarray) -> ir.Value:
        """A constant."""
        return self.op("Constant", value=ir.tensor(array))

    def number(self, number: float, *, wide: bool = False) -> ir.Value:
        """A scalar of the node's type, in single precision at least if `wide`."""
        dtype = ir.DataType.FLOAT if wide and self.dtype.bitwidth < 32 else self.dtype
        return self.constant(np.asarray(number, dtype.numpy()))

    def ints(self, *values: int) -> ir.Value:
        """An int64 vector."""
        return self.constant(np.array(values, np.int64))

    def scaled(self, value: ir.Value, factor: float) -> ir.Value:
        """`factor * value`."""
        return value if factor == 1 else self.op("Mul", value, self.number(factor))

    def added(self, value: ir.Value, addend: ir.Value | None) -> ir.Value:
        """`value + addend`."""
        return value if addend is None else self.op("Add", value, addend)

    def unsqueezed(self, value: ir.Value, *axes: int) -> ir.Value:
        """A value with new axes, counted in the result."""
        return self.call("Unsqueeze", [value], {"axes": axes}, since=13)

    def sliced(self, value: ir.Value, start: int, stop: int, axis: int) -> ir.Value:
        """The part of a value from `start` to `stop` along an axis."""
        return self.call("Slice", [value], {"starts": [start], "ends": [stop], "axes": [axis]}, since=10)

    def length(self, value: ir.Value, axis: int) -> ir.Value:
        """One size of a value, as an int64 scalar."""
        return self.op("Gather", self.op("Shape", value), self.constant(np.array(axis)))

    def indices(self, count: ir.Value) -> ir.Value:
        """The numbers below an int64 scalar, as a vector."""
        return self.op("Range", self.constant(np.array(0)), count, self.constant(np.array(1)))

    @staticmethod
    def rank(value: ir.Value) -> int:
        """How many axes a value has."""
        if value.shape is None:
            raise Unsupported(f"'{value.name}' of unknown rank")
        return len(value.shape)

    @staticmethod
    def size(value: ir.Value, axis: int) -> int:
        """One size of a value, as a number."""
        size = None if value.shape is None else value.shape[axis]
        if not isinstance(size, int):
            raise Unsupported(f"'{value.name}' of unknown size")
        return size

    @staticmethod
    def same_size(left: ir.Value, left_axis: int, right: ir.Value, right_axis: int) -> bool:
        """Whether two sizes are certainly equal; those without a name are not."""
        if left.shape is None or right.shape is None:
            return False
        size = left.shape[left_axis]
        named = isinstance(size, int) or size.value not in (None, "", "?")  # exporters write "?" for any size
        return named and size == right.shape[right_axis]


Outputs = Sequence[ir.Value | None]
Decomposition = Callable[[Expansion], ir.Value | Outputs]
"""`expansion -> output`, or outputs; those that a decomposition does not give may not be used."""

FUSIONS: dict[str, Decomposition] = {}


def fusion(*operators: str, domain: str = "com.microsoft") -> Callable[[Decomposition], Decomposition]:
    """Register a function as the decomposition of operators; see `Decomposition`."""

    def register(function: Decomposition) -> Decomposition:
        FUSIONS.update({f"{domain}.{operator}" if domain else operator: function for operator in operators})
        return function

    return register


def operator_name(node: ir.Node) -> str:
    """What an operator is registered as: with its domain where that is not the one of ONNX."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
