"""Gradients of single samples as nodes of the graph; their squares are diagonals of the Fisher information.

A sample is an entry of the leading axis. The sum over its positions is taken before the square: unlike Kronecker
factors these know what the positions have in common.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.autodiff import Emitter
from onnx_kfe.calibration._grid import float32
from onnx_kfe.calibration._patches import channel_major, emit_patches, position_axes
from onnx_kfe.graph import Geometry, Layer
from onnx_kfe.kfe import Array

__all__ = ["emit_gate_gradients", "emit_gradients", "emit_squares"]


def emit_gate_gradients(emit: Emitter, layer: Layer, y: ir.Value, g: ir.Value) -> ir.Value:
    """Derivative of the loss of each sample by a gate on each output channel, ``sum_t y_t g_t``: ``[samples, o]``.

    Args:
        emit: Where the nodes go.
        layer: The layer.
        y: Its output.
        g: The cotangent of that.
    """
    product = emit.op("Mul", float32(emit, y), float32(emit, g))
    axes = position_axes(layer, y)
    return emit.op("ReduceSum", product, emit.ints(*axes), keepdims=0) if axes else product


def emit_gradients(
    emit: Emitter,
    layer: Layer,
    x: ir.Value,
    y: ir.Value,
    g: ir.Value,
    input_basis: Array,
    output_basis: Array,
    mean: Array,
) -> ir.Value:
    """Gradients of single samples by the weight in an eigenbasis: ``[samples, groups, o, i]``, patches tap-major.

    The gradient is that by the weight while the bias makes up for the mean, ``sum_t g_t (x_t - mu)^T``, as the input
    factor is centred. Input and cotangent are rotated before patches are taken: every tap alike, and once.

    Args:
        emit: Where the nodes go.
        layer: The layer.
        x: Its input.
        y: Its output.
        g: The cotangent of that.
        input_basis: Q_a, ``[groups, c, c]``.
        output_basis: Q_g, ``[groups, o, o]``.
        mean: mu, ``[groups, i]``, channel-major.

    Raises:
        KfeError: The geometry cannot be expressed.
    """
    rotated = _rotated(emit, layer, float32(emit, x), input_basis)
    cotangents = _cotangents(emit, layer, _rotated(emit, layer, float32(emit, g), output_basis))
    centre = np.einsum("gct,gcd->gdt", mean.reshape(*input_basis.shape[:2], -1), input_basis).reshape(mean.shape)
    tap_major = centre[:, np.argsort(channel_major(_geometry(layer)))]
    patches = _patches(emit, layer, rotated, y)
    deviations = emit.op("Sub", patches, emit.array_like(tap_major[:, None], patches))
    return emit.op("MatMul", cotangents, deviations)


def emit_squares(emit: Emitter, gradients: Sequence[ir.Value]) -> ir.Value:
    """The squares of sums of gradients, summed over samples: ``[groups, o, i]``.

    Args:
        emit: Where the nodes go.
        gradients: By one weight at each node that it is shared by, ``[samples, groups, o, i]``.
    """
    total = emit.op("Sum", *gradients) if len(gradients) > 1 else gradients[0]
    return emit.op("ReduceSum", emit.op("Mul", total, total), emit.ints(0), keepdims=0)


def _patches(emit: Emitter, layer: Layer, x: ir.Value, y: ir.Value) -> ir.Value:
    """Patches of every sample at all positions: ``[n, groups, positions, i]``, tap-major."""
    geometry = _geometry(layer)
    groups, size = geometry.groups, geometry.patch_size
    if layer.op_type != "Conv":
        return emit.op("Reshape", x, emit.ints(0, 1, -1, size))
    spatial = len(geometry.kernel)
    patches = emit_patches(emit, layer, x, y, [1] * spatial, phase=emit.ints(0, 0, 0))
    patches = emit.op("Transpose", patches, perm=[2, *range(3, 3 + spatial), 0, 1])
    if groups == 1:
        return emit.op("Reshape", patches, emit.ints(0, 1, -1, size))
    split = emit.op("Reshape", patches, emit.ints(0, -1, geometry.taps, groups, size // geometry.taps))
    return emit.op("Reshape", emit.op("Transpose", split, perm=[0, 3, 1, 2, 4]), emit.ints(0, groups, -1, size))


def _cotangents(emit: Emitter, layer: Layer, g: ir.Value) -> ir.Value:
    """Cotangents of every sample at all positions: ``[n, groups, o, positions]``."""
    geometry = _geometry(layer)
    if layer.op_type == "Conv":
        return emit.op("Reshape", g, emit.ints(0, geometry.groups, geometry.out_channels // geometry.groups, -1))
    rows = emit.op("Reshape", g, emit.ints(0, 1, -1, geometry.out_channels))
    return emit.op("Transpose", rows, perm=[0, 1, 3, 2])


def _rotated(emit: Emitter, layer: Layer, x: ir.Value, basis: Array) -> ir.Value:
    """``Q^T x`` at every position, group by group."""
    if layer.op_type != "Conv":
        return emit.op("MatMul", x, emit.array_like(basis[0], x), like=x)
    groups, size, _ = basis.shape
    kernel = basis.transpose(0, 2, 1).reshape(groups * size, size, *[1] * len(_geometry(layer).kernel))
    return emit.op("Conv", x, emit.array_like(kernel, x), like=x, group=groups)


def _geometry(layer: Layer) -> Geometry:
    assert layer.geometry is not None
    return layer.geometry
