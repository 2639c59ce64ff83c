"""Resize: along each axis a matrix, which is transposed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnx_kfe.autodiff._axiswise import map_axis, static_sizes
from onnx_kfe.autodiff._emitter import constant_of, sizes_of
from onnx_kfe.autodiff._registry import Backward, Cotangents, Declined, operand, vjp

_ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda position: np.ceil(position - 0.5),
    "round_prefer_ceil": lambda position: np.floor(position + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


@vjp("Resize")
def resize(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """By the input."""
    x, y = operand(node, 0), node.outputs[0]
    if node.attributes.get_int("antialias", 0) or "keep_aspect_ratio_policy" in node.attributes:
        raise Declined("no gradient rule for Resize with antialias or keep_aspect_ratio_policy")
    sizes = sizes_of(x)
    if sizes is None:
        raise Declined("no gradient rule for Resize of an input of unknown rank")
    rank = len(sizes)
    axes = [axis % rank for axis in node.attributes.get_ints("axes", range(rank))]
    scales = constant_of(node.inputs[2] if len(node.inputs) > 2 else None)
    if scales is not None and scales.size == 0:
        scales = None
    if scales is not None:
        stated = dict(zip(axes, scales.astype(np.float64).tolist(), strict=True))
        if (factors := _repeats(node, stated, rank)) is not None:
            # Each element was repeated: its copies are summed, whatever the size.
            mean = backward.op("AveragePool", cotangent, like=x, kernel_shape=factors, strides=factors)
            return [backward.scale(mean, float(np.prod(factors)))]
        axes = [axis for axis in axes if stated[axis] != 1]
    else:
        out = sizes_of(y)
        axes = [axis for axis in axes if out is None or out[axis] is None or out[axis] != sizes[axis]]
    before, after = static_sizes(x, axes, "Resize"), static_sizes(y, axes, "Resize")
    shape = list(sizes_of(y) or ())
    for axis, old, new in zip(axes, before, after, strict=True):
        scale = stated[axis] if scales is not None else new / old
        matrix = interpolation(node, old, new, scale)
        cotangent, shape = map_axis(backward, cotangent, shape, axis, matrix.T)
    return [cotangent]


def _repeats(node: ir.Node, scales: dict[int, float], rank: int) -> list[int] | None:
    """How often each element is repeated along the spatial axes, if that is all there is to it."""
    factors = [int(scales.get(axis, 1.0)) for axis in range(rank)]
    plain = all(factor == scales.get(axis, 1.0) and factor >= 1 for axis, factor in enumerate(factors))
    if rank < 3 or not plain or factors[0] != 1 or factors[1] != 1:
        return None
    for factor in factors[2:]:
        if not np.array_equal(interpolation(node, 4, 4 * factor, factor), np.repeat(np.eye(4), factor, axis=0)):
            return None
    return factors[2:]


def interpolation(node: ir.Node, old: int, new: int, scale: float) -> np.ndarray:
    """The matrix by which a Resize maps one axis.

    Args:
        node: The Resize.
        old: Size before.
        new: Size after.
        scale: Size after by size before, as the node states it.

    Raises:
        Declined: The node asks for a coordinate transformation or mode that has no matrix here.
    """
    position = _source_positions(node, old, new, scale)
    mode = node.attributes.get_string("mode", "nearest")
    matrix = np.zeros((new, old))
    rows = np.arange(new)
    if mode == "nearest":
        rounding = _ROUNDINGS[node.attributes.get_string("nearest_mode", "round_prefer_floor")]
        matrix[rows, np.clip(rounding(position), 0, old - 1).astype(int)] = 1
        return matrix
    base = np.floor(position)
    fraction = position - base
    if mode == "linear":
        weights = {0: 1 - fraction, 1: fraction}
    else:
        weights = _cubic(fraction, node.attributes.get_float("cubic_coeff_a", -0.75))
    exclude = mode == "cubic" and bool(node.attributes.get_int("exclude_outside", 0))
    for offset, weight in weights.items():
        column = base + offset
        inside = (column >= 0) & (column < old)
        np.add.at(
            matrix,
            (rows, np.clip(column, 0, old - 1).astype(int)),
            np.where(inside, weight, 0) if exclude else weight,
        )
    return matrix / matrix.sum(1, keepdims=True) if exclude else matrix


def _cubic(t: np.ndarray, a: float) -> dict[int, np.ndarray]:
    def near(d: np.ndarray) -> np.ndarray:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: np.ndarray) -> np.ndarray:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return {-1: far(t + 1), 0: near(t), 1: near(1 - t), 2: far(2 - t)}


def _source_positions(node: ir.Node, old: int, new: int, scale: float) -> np.ndarray:
    """For each element after, the position before that it is interpolated at."""
    transformation = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    target = np.arange(new, dtype=np.float64)
    if transformation == "align_corners":
        return target * (old - 1) / (new - 1) if new > 1 else np.zeros(new)
    if transformation == "asymmetric":
        return target / scale
    if transformation == "half_pixel" or (transformation == "pytorch_half_pixel" and new > 1):
        return (target + 0.5) / scale - 0.5
    if transformation == "pytorch_half_pixel":
        return np.zeros(new)
    if transformation == "half_pixel_symmetric":
        offset = old / 2 * (1 - new / (scale * old))
        return offset + (target + 0.5) / scale - 0.5
    raise Declined(f"no gradient rule for Resize with coordinates {transformation}")
