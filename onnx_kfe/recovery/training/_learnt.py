"""Which constants of a graph were learnt, so that training may change them, and which are part of its construction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

__all__ = ["Learnt", "constant_tensor", "find_learnt"]

_PARAMETERS: dict[str, tuple[int, ...]] = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "Einsum": (0, 1),
    "LSTM": (1, 2, 3),
    "GRU": (1, 2, 3),
    "RNN": (1, 2, 3),
    "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "PRelu": (1,),
}
"""Inputs of operators that are parameters of a layer."""

_LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN"}
_MASKED = 1e4  # what attention masks add is below minus this


@dataclass(frozen=True)
class Learnt:
    """The constants that training changes, by name: initializers and the outputs of Constant nodes.

    Attributes:
        parameters: What a gradient step changes.
        statistics: Running means and variances of batch normalisations.
    """

    parameters: dict[str, ir.Value]
    statistics: dict[str, ir.Value]

    @property
    def values(self) -> dict[str, ir.Value]:
        """All of them."""
        return self.parameters | self.statistics


def constant_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node, None for a value that is computed."""
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is not None and node.op_type == "Constant" and node.domain == "" and "value" in node.attributes:
        return node.attributes["value"].as_tensor()
    return None


def find_learnt(graph: ir.Graph) -> Learnt:
    """Find the constants that were learnt.

    A floating-point constant is a parameter if it, or what is computed from it and other constants, is

    - a weight, bias, scale or slope: an input in the table above,
    - a table that Gather takes rows of by indices that are computed,
    - added to an activation or multiplied with one, has more than one element, and is a vector (the bias or scale of
      channels) or stands in front of a linear layer (an embedding of positions). What is left out are scalars such as
      1/sqrt(d), anchors and strides behind the last layer, and masks of huge negative numbers.

    Everything else stays as it is: sizes, bounds of Clip, scales of Resize, means and deviations that inputs are
    normalised with by Sub and Div. A constant that is a running statistic anywhere is no parameter.

    Args:
        graph: The main graph, in topological order.
    """
    uses = _Uses(graph)
    constants = {str(value.name): value for value in _constants(graph) if _is_floating(value)}
    statistics = {name: value for name, value in constants.items() if _is_statistic(value)}
    parameters = {
        name: value for name, value in constants.items() if name not in statistics and uses.is_learnt(value, value)
    }
    return Learnt(parameters, statistics)


def _constants(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.initializers.values()
    for node in graph:
        yield from (value for value in node.outputs if constant_tensor(value) is not None)


def _is_floating(value: ir.Value) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and tensor.dtype.is_floating_point()


def _is_statistic(value: ir.Value) -> bool:
    return any(use.node.op_type == "BatchNormalization" and use.idx in (3, 4) for use in value.uses())


class _Uses:
    """How values are used: which depend on the inputs, and which stand in front of a linear layer."""

    def __init__(self, graph: ir.Graph) -> None:
        self._computed = {value for value in graph.inputs if not value.is_initializer()}
        self._before_linear: set[ir.Value] = set()
        for node in graph:
            if any(value in self._computed for value in node.inputs) or _has_body(node):
                self._computed.update(node.outputs)
        for node in reversed(graph):
            if node.op_type in _LINEAR or any(value in self._before_linear for value in node.outputs):
                self._before_linear.update(value for value in node.inputs if value in self._computed)

    def is_learnt(self, constant: ir.Value, value: ir.Value) -> bool:
        """Whether a constant is learnt, by the uses of it or of a value that is computed from it."""
        return any(self._is_parameter(constant, use.node, use.idx) for use in value.uses())

    def _is_parameter(self, constant: ir.Value, node: ir.Node, index: int) -> bool:
        if index in _PARAMETERS.get(node.op_type, ()):
            return True
        if node.op_type in {"Expand", "Tile"}:  # by a size that depends on the batch, but the constant's values
            return index == 0 and self.is_learnt(constant, node.outputs[0])
        if not any(value in self._computed for value in node.outputs):
            return not _is_scalar(constant) and any(self.is_learnt(constant, value) for value in node.outputs)
        if node.op_type == "Gather":
            return index == 0
        return node.op_type in {"Add", "Mul"} and self._is_term(constant, node.outputs[0])

    def _is_term(self, constant: ir.Value, result: ir.Value) -> bool:
        if _is_scalar(constant) or _is_mask(constant):
            return False
        return _is_vector(constant) or result in self._before_linear


def _has_body(node: ir.Node) -> bool:
    return any(isinstance(attribute.value, ir.Graph) for attribute in node.attributes.values())


def _array(constant: ir.Value) -> np.ndarray:
    tensor = constant_tensor(constant)
    assert tensor is not None
    return tensor.numpy()


def _is_scalar(constant: ir.Value) -> bool:
    return _array(constant).size <= 1


def _is_vector(constant: ir.Value) -> bool:
    return sum(size > 1 for size in _array(constant).shape) == 1


def _is_mask(constant: ir.Value) -> bool:
    return bool(_array(constant).min() <= -_MASKED)
