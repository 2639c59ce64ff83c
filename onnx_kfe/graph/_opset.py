"""Models at another operator set."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from onnx_kfe.graph._shapes import without_weights

__all__ = ["convert_opset"]


def convert_opset(model: ir.Model, opset: int) -> ir.Model:
    """A model at another operator set, which shares its large constants.

    Args:
        model: The model; it is not changed.
        opset: Version of the operators of ONNX.

    Raises:
        Exception: Whatever the version converter of ONNX raises where it lacks an adapter.
    """
    converted = ir.from_proto(onnx.version_converter.convert_version(without_weights(model), opset))
    given = {value.name for value in model.graph.inputs}
    for value in [value for value in converted.graph.inputs if value.name not in given]:
        converted.graph.inputs.remove(value)
        value.const_value = model.graph.initializers[value.name or ""].const_value
        converted.graph.register_initializer(value)
    return converted
