"""What the positions of a sample have in common, which Kronecker factors that take positions for independent miss."""

from __future__ import annotations

import onnx_ir as ir

from onnx_kfe.autodiff import Emitter
from onnx_kfe.graph import Layer

__all__ = ["emit_position_means"]

_FLOAT = ir.DataType.FLOAT


def emit_position_means(emit: Emitter, layer: Layer, value: ir.Value) -> ir.Value:
    """The input or a cotangent of a layer, averaged over the positions of each sample: ``[samples, channels]``.

    Args:
        emit: Where the nodes go.
        layer: The layer.
        value: Its input or a cotangent of its output.
    """
    rank = len(value.shape or (None, None))
    axes = range(2, rank) if layer.op_type == "Conv" else range(1, rank - 1)
    return _float32(emit, emit.op("ReduceMean", value, emit.ints(*axes), keepdims=0) if axes else value)


def _float32(emit: Emitter, x: ir.Value) -> ir.Value:
    return x if x.dtype in (None, _FLOAT) else emit.op("Cast", x, dtype=_FLOAT, to=int(_FLOAT))
