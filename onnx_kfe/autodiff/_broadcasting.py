"""The adjoint of broadcasting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.autodiff._emitter import Dim, same_dim, sizes_of
from onnx_kfe.autodiff._registry import Backward

__all__ = ["unbroadcast"]


def unbroadcast(
    backward: Backward, cotangent: ir.Value, operand: ir.Value, inputs: Sequence[ir.Value | None]
) -> ir.Value:
    """Sum a cotangent over the axes along which an operand was repeated to the shape of the cotangent.

    Args:
        backward: Where to emit.
        cotangent: In the shape that the broadcast gave.
        operand: One of the inputs; the result has its shape.
        inputs: All that were broadcast together.
    """
    others = [value for value in inputs if value is not None and value is not operand]
    axes = _broadcast_axes(operand, cotangent, others)
    if axes is None:
        return _sum_to_shape(backward, cotangent, operand)
    if not axes:
        return cotangent
    summed = backward.op("ReduceSum", cotangent, backward.ints(*axes), keepdims=1)
    return backward.reshape_like(summed, operand)


def _broadcast_axes(operand: ir.Value, cotangent: ir.Value, others: list[ir.Value]) -> list[int] | None:
    """The axes of the cotangent along which the operand may have been repeated; None if the shapes do not tell."""
    sizes = sizes_of(operand)
    other_sizes = [sizes_of(other) for other in others]
    if sizes is None or any(other is None for other in other_sizes):
        return None
    rank = max([len(sizes), *(len(other) for other in other_sizes if other is not None)])
    output_sizes = sizes_of(cotangent)
    output_sizes = output_sizes if output_sizes is not None and len(output_sizes) == rank else (None,) * rank
    axes = []
    for axis in range(rank):
        size, *rest = (_aligned(shape, rank)[axis] for shape in (sizes, *other_sizes) if shape is not None)
        if size == 1:
            if axis < rank - len(sizes) or any(other != 1 for other in rest):
                axes.append(axis)
        elif not (isinstance(size, int) or same_dim(size, output_sizes[axis]) or _covers(size, rest)):
            return None
    return axes


def _covers(size: Dim, others: Sequence[Dim]) -> bool:
    """Whether a size is certainly the one that the broadcast gives."""
    return all(other == 1 or same_dim(other, size) for other in others)


def _aligned(sizes: tuple[Dim, ...], rank: int) -> tuple[Dim, ...]:
    return (1,) * (rank - len(sizes)) + sizes


def _sum_to_shape(backward: Backward, cotangent: ir.Value, operand: ir.Value) -> ir.Value:
    """Sum over the axes where the shapes differ, which only the running graph knows."""
    full = backward.op("Shape", cotangent, dtype=ir.DataType.INT64)
    target = backward.shape_of(operand)
    missing = backward.op("Sub", backward.op("Size", full, dtype=ir.DataType.INT64), backward.op("Size", target))
    one = ir.Tensor(np.ones(1, np.int64))
    ones = backward.op("ConstantOfShape", backward.op("Reshape", missing, backward.ints(1)), value=one)
    padded = backward.op("Concat", ones, target, axis=0)
    differ = backward.op("Not", backward.op("Equal", full, padded, dtype=ir.DataType.BOOL))
    axes = backward.op("Reshape", backward.op("NonZero", differ, dtype=ir.DataType.INT64), backward.ints(-1))
    summed = backward.op("ReduceSum", cotangent, axes, keepdims=1, noop_with_empty_axes=1)
    return backward.op("Reshape", summed, target, like=operand)
