"""The opset that the gradient rules are written for, and how a model gets there."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from onnx_kfe.errors import KfeError
from onnx_kfe.graph import serialize

__all__ = ["at_opset", "working_opset"]

_WORKING_OPSET = 21
_OLDEST_OPSET = 18


def working_opset(model: ir.Model) -> int:
    """The model's own opset where the gradient rules take it, else the one it is converted to."""
    opset = model.graph.opset_imports.get("", 1)
    return opset if opset >= _OLDEST_OPSET else _WORKING_OPSET


def at_opset(model: ir.Model, opset: int) -> ir.Model:
    """A private copy of a model at an opset.

    Raises:
        KfeError: The model cannot be converted.
    """
    own = model.graph.opset_imports.get("", 1)
    if own == opset:
        return model.clone()
    proto = onnx.ModelProto.FromString(serialize(model))
    try:
        return ir.from_proto(onnx.version_converter.convert_version(proto, opset))
    except Exception as error:
        raise KfeError(f"the model's opset {own} cannot be converted to {opset}: {error}") from error
