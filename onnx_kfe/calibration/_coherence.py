"""What the positions of a sample have in common, which Kronecker factors that take positions for independent miss."""

from __future__ import annotations

import onnx_ir as ir

from onnx_kfe.autodiff import Emitter
from onnx_kfe.calibration._grid import float32
from onnx_kfe.calibration._patches import emit_mean_patches, position_axes
from onnx_kfe.graph import Layer

__all__ = ["emit_cotangent_means", "emit_position_means"]


def emit_position_means(emit: Emitter, layer: Layer, value: ir.Value, weight: ir.Value | None = None) -> ir.Value:
    """The input or a cotangent of a layer, averaged over the positions of each sample: ``[samples, channels]``.

    Args:
        emit: Where the nodes go.
        layer: The layer.
        value: Its input or a cotangent of its output.
        weight: Of each position, ``[samples, positions, 1]``; equal ones when None.
    """
    axes = position_axes(layer, value)
    if not axes:
        return float32(emit, value)
    if weight is None:
        return float32(emit, emit.op("ReduceMean", value, emit.ints(*axes), keepdims=0))
    total = emit.op("ReduceSum", emit.op("Mul", float32(emit, value), weight), emit.ints(*axes), keepdims=0)
    count = emit.op("ReduceSum", weight, emit.ints(*axes), keepdims=0)
    return emit.op("Div", total, emit.op("Max", count, emit.number(1.0, count)))


def emit_cotangent_means(
    emit: Emitter, layer: Layer, x: ir.Value, g: ir.Value, weight: ir.Value | None = None
) -> ir.Value:
    """The cotangent of a layer, of a ConvTranspose its patches, averaged over the positions of each sample: ``[n, o]``.

    Args:
        emit: Where the nodes go.
        layer: The layer.
        x: Its input.
        g: The cotangent of its output.
        weight: Of each position, ``[samples, positions, 1]``; equal ones when None.

    Raises:
        KfeError: The geometry cannot be expressed.
    """
    if layer.transposed:
        return emit_mean_patches(emit, layer, g, x)
    return emit_position_means(emit, layer, g, weight)
