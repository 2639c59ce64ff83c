"""Models that ONNX Runtime can run here, whatever element types it has kernels for."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.graph import in_single_precision, normalize, serialize
from onnx_kfe.runtime import create_session

__all__ = ["executable"]

_UNCOMMON = (ir.DataType.BFLOAT16, ir.DataType.DOUBLE)  # on CPUs few operators have kernels for them


def executable(model: ir.Model, providers: Sequence[str] = ()) -> ir.Model:
    """The model itself, or a copy in single precision where ONNX Runtime lacks kernels for bfloat16 or double.

    Args:
        model: The model.
        providers: Execution providers, CPU when empty.
    """
    values = (value for graph in model.graphs() for node in graph for value in (*node.inputs, *node.outputs))
    if not any(value is not None and value.dtype in _UNCOMMON for value in values):
        return model
    try:
        create_session(serialize(model), providers=providers)
    except UsageError:
        raise
    except KfeError:
        return in_single_precision(normalize(model))
    return model
