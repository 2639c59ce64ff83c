"""Pairs of linear nodes: which node follows which, and why the two cannot become one if they cannot.

Of two nodes that can, at least one is pointwise: a product, or a 1x1 convolution of stride 1 without padding. What
replaces them has the geometry of the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_kfe.graph import Layer, initializer_array
from onnx_kfe.kfe import Array

__all__ = ["Pair", "find_pair", "is_linear", "weight_shape"]


@dataclass(frozen=True)
class Pair:
    """A linear node and what computes its input.

    Attributes:
        first: The node in front, linear or not.
        second: The linear node.
        add: Addition of a constant vector between two MatMuls; None where nothing is between.
        addend: The constant that it adds.
    """

    first: ir.Node
    second: ir.Node
    add: ir.Node | None = None
    addend: ir.Value | None = None

    @property
    def spatial(self) -> ir.Node | None:
        """The node whose geometry the two have together; None where neither is pointwise."""
        return self.first if _is_pointwise(self.second) else self.second if _is_pointwise(self.first) else None

    @property
    def nodes(self) -> list[ir.Node]:
        """The nodes in order."""
        return [self.first, *([self.add] if self.add is not None else []), self.second]

    def weights(self) -> tuple[Array, Array]:
        """The weights ``[out, in, *kernel]`` of first and second, float64."""
        return _layer(self.first).weight()[0], _layer(self.second).weight()[0]

    def biases(self) -> tuple[Array | None, Array | None]:
        """What is added behind the first weight and behind the second: ``[out]`` or ``[1]``, float64, None for none."""
        between = initializer_array(self.addend) if self.addend is not None else _layer(self.first).bias()
        return between, _layer(self.second).bias()

    def obstacle(self) -> str | None:
        """Why the two cannot become one, whatever that would cost; None where they can."""
        first, second = self.first, self.second
        if not is_linear(first):
            return f"its input comes from {first.op_type} '{first.name}'"
        if reason := _unfit(first) or _unfit(second):
            return reason
        if first.op_type != second.op_type:
            return f"it is {second.op_type}, '{first.name}' is {first.op_type}"
        for value in (node.outputs[0] for node in self.nodes[:-1]):
            if value.is_graph_output():
                return f"'{value.name}' is a graph output"
            if len(value.uses()) > 1:
                return f"'{value.name}' is read {len(value.uses())} times"
        if self.spatial is None:
            return f"neither it nor '{first.name}' is 1x1 with stride 1 and no padding"
        bias, _ = self.biases()
        if self.spatial is second and _is_padded(second) and bias is not None and np.any(bias):
            return f"its zero padding lacks the bias of '{first.name}'"
        return None


def find_pair(second: ir.Node) -> Pair | None:
    """A linear node and the node in front of it; None where it reads an input of the graph or a constant."""
    first = _producer(second.inputs[0])
    if first is None or second.op_type != "MatMul" or not _is(first, "Add"):
        return Pair(first, second) if first is not None else None
    add = first
    for value, addend in (add.inputs, add.inputs[::-1]):
        product = _producer(value)
        if product is not None and _is(product, "MatMul"):
            features = (_constant_shape(product.inputs[1]) or ())[-1:]
            if features and _constant_shape(addend) == features:
                return Pair(product, second, add, addend)
    return Pair(add, second)


def is_linear(node: ir.Node) -> bool:
    """Whether a node is a convolution or a product of the default domain, whatever its operands."""
    return _is(node, "Conv", "ConvTranspose", "Gemm", "MatMul")


def weight_shape(node: ir.Node) -> tuple[int, ...]:
    """Shape of a constant weight as ``[out, in, *kernel]``, however the node stores it."""
    shape = _constant_shape(node.inputs[1]) or ()
    return shape if node.op_type == "Conv" or node.attributes.get_int("transB", 0) == 1 else shape[::-1]


def _unfit(node: ir.Node) -> str | None:
    """Why a linear node cannot be merged with any other."""
    weight = node.inputs[1]
    shape = _constant_shape(weight)
    if node.op_type == "ConvTranspose":
        return f"'{node.name}' is ConvTranspose"
    if weight is None or weight.dtype is None or shape is None:
        return f"'{node.name}' has no constant weight"
    if not weight.dtype.is_floating_point():
        return f"'{node.name}' has a weight of {weight.dtype}"
    if node.op_type == "MatMul" and len(shape) != 2:
        return f"'{node.name}' has a weight of rank {len(shape)}"
    if node.attributes.get_int("group", 1) != 1:
        return f"'{node.name}' is grouped"
    if node.attributes.get_int("transA", 0):
        return f"'{node.name}' transposes its input"
    addend = _constant_shape(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else ()
    if addend is None or math.prod(addend) != math.prod(addend[-1:]):
        return f"'{node.name}' adds no constant vector"
    return None


def _is_pointwise(node: ir.Node) -> bool:
    extents = (*weight_shape(node)[2:], *node.attributes.get_ints("strides", ()))
    return all(extent == 1 for extent in extents) and not _is_padded(node)


def _is_padded(node: ir.Node) -> bool:
    if node.attributes.get_string("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
        return any(size > 1 for size in weight_shape(node)[2:])
    return any(node.attributes.get_ints("pads", ()))


def _is(node: ir.Node, *op_types: str) -> bool:
    return node.domain == "" and node.op_type in op_types


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _constant_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Shape of an initializer that nobody can feed; None for anything else."""
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    return tuple(value.const_value.shape.numpy())


def _layer(node: ir.Node) -> Layer:
    return Layer(node.name or "", node.op_type, "", "", geometry=None, reason=None, node=node)
