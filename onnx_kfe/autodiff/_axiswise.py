"""Linear maps along one axis, as constant matrices: much faster in the runtime than scattering."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.autodiff._emitter import Dim, integers, sizes_of
from onnx_kfe.autodiff._registry import Backward, Declined

__all__ = ["map_axis", "selection", "static_sizes"]


def static_sizes(value: ir.Value, axes: Sequence[int], operator: str) -> list[int]:
    """The sizes of a value along some axes.

    Raises:
        Declined: One is not known before the graph runs.
    """
    sizes = sizes_of(value)
    known = None if sizes is None else integers([sizes[axis] for axis in axes])
    if known is None:
        raise Declined(f"no gradient rule for {operator} of an input of unknown size")
    return known


def selection(indices: np.ndarray, size: int) -> np.ndarray:
    """The matrix that puts element `j` at `indices[j]` of a vector of a size, adding where several meet."""
    matrix = np.zeros((size, len(indices)))
    matrix[indices, np.arange(len(indices))] = 1
    return matrix


def map_axis(
    backward: Backward, value: ir.Value, sizes: Sequence[Dim], axis: int, matrix: np.ndarray
) -> tuple[ir.Value, list[Dim]]:
    """Multiply a value by a matrix along an axis.

    Args:
        backward: Where to emit.
        value: What to multiply.
        sizes: Its shape.
        axis: A non-negative axis.
        matrix: New size by old size.

    Returns:
        The product and its shape.
    """
    after: list[Dim] = [*sizes[:axis], matrix.shape[0], *sizes[axis + 1 :]]
    if axis == len(sizes) - 1:
        return backward.op("MatMul", value, backward.array_like(matrix.T, value), shape=after), after
    left = backward.array_like(matrix, value)
    trailing = sizes[axis + 1 :]
    if len(trailing) == 1:
        return backward.op("MatMul", left, value, shape=after), after
    rest = integers(trailing)
    if rest is None:
        raise Declined("no gradient rule for a map along an axis before axes of unknown size")
    flat = backward.op("Reshape", value, backward.ints(*[0] * axis, matrix.shape[1], -1))
    product = backward.op("MatMul", left, flat)
    return backward.op("Reshape", product, backward.ints(*[0] * axis, matrix.shape[0], *rest), shape=after), after
