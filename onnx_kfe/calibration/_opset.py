"""The opset that the gradient rules are written for, and how a model gets there."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from onnx_kfe.errors import KfeError
from onnx_kfe.graph import in_single_precision, without_weights

__all__ = ["at_opset", "working_opset"]

_WORKING_OPSET = 21
_OLDEST_OPSET = 18


def working_opset(model: ir.Model) -> int:
    """The model's own opset where the gradient rules take it, else the one it is converted to."""
    opset = model.graph.opset_imports.get("", 1)
    return opset if opset >= _OLDEST_OPSET else _WORKING_OPSET


def at_opset(model: ir.Model, opset: int) -> ir.Model:
    """A private copy of a model at an opset, in single precision, which shares large constants with it.

    Raises:
        KfeError: The model cannot be converted.
    """
    copy = in_single_precision(model)
    own = model.graph.opset_imports.get("", 1)
    if own == opset:
        return copy
    try:
        converted = ir.from_proto(onnx.version_converter.convert_version(without_weights(copy), opset))
    except Exception as error:
        raise KfeError(f"the model's opset {own} cannot be converted to {opset}: {error}") from error
    given = {value.name for value in copy.graph.inputs}
    for value in [value for value in converted.graph.inputs if value.name not in given]:
        converted.graph.inputs.remove(value)
        value.const_value = copy.graph.initializers[value.name or ""].const_value
        converted.graph.register_initializer(value)
    return converted
