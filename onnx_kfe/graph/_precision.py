"""Copies of models in single precision: statistics are taken in that, whatever the model itself computes in."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

__all__ = ["in_single_precision"]

_FLOAT = ir.DataType.FLOAT
_OTHERS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_NAMING_TYPES = ("to", "dtype", "output_datatype", "stash_type", "softmax_precision")


def in_single_precision(model: ir.Model) -> ir.Model:
    """A copy of a model whose half-precision and double-precision values are all in single precision.

    Args:
        model: A model without functions; it is not changed, and constants in single precision are shared with it.
    """
    copy = model.clone()
    for graph in copy.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _single(value.const_value)
        _convert([*graph.inputs, *graph.initializers.values()])
        for node in graph:
            _convert(node.outputs)
            for attribute in list(node.attributes.values()):
                _convert_attribute(node, attribute)
    return copy


def _convert(values: Iterable[ir.Value]) -> None:
    for value in values:
        value.type = _single_type(value.type)


def _single_type(kind: ir.TypeProtocol | None) -> ir.TypeProtocol | None:
    if isinstance(kind, ir.SequenceType | ir.OptionalType):
        inner = _single_type(kind.elem_type)
        assert inner is not None
        return type(kind)(inner, denotation=kind.denotation)
    if isinstance(kind, ir.TensorType) and kind.dtype in _OTHERS:
        return ir.TensorType(_FLOAT, denotation=kind.denotation)
    return kind


def _convert_attribute(node: ir.Node, attribute: ir.Attr) -> None:
    if attribute.is_ref():
        return
    name = attribute.name
    if attribute.type == ir.AttributeType.TENSOR:
        node.attributes[name] = ir.AttrTensor(name, _single(attribute.as_tensor()))
    elif name in _NAMING_TYPES and attribute.type == ir.AttributeType.INT and attribute.as_int() in _OTHERS:
        node.attributes[name] = ir.AttrInt64(name, int(_FLOAT))


def _single(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A constant in single precision; what is beyond its range becomes the largest number, not infinity."""
    if tensor.dtype not in _OTHERS:
        return tensor
    array = tensor.numpy()
    if tensor.dtype == ir.DataType.DOUBLE:
        largest = np.finfo(np.float32).max
        array = np.where(np.isfinite(array), np.clip(array, -largest, largest), array)
    return ir.tensor(array.astype(np.float32), dtype=_FLOAT, name=tensor.name)
