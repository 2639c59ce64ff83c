"""Interpolation at positions that the graph computes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import onnx_ir as ir

from onnx_kfe.autodiff._emitter import sizes_of
from onnx_kfe.autodiff._registry import Backward, Cotangents, Declined, operand, vjp

_INT64 = ir.DataType.INT64


@dataclass(frozen=True)
class _Neighbour:
    """An element next to the sampled positions, along one axis; all `[samples, 1, positions]`.

    Attributes:
        index: Where it is, within the axis.
        share: What it contributes to the interpolation, 0 outside.
        slope: The derivative of that by the coordinate of the grid; None if there is none.
    """

    index: ir.Value
    share: ir.Value
    slope: ir.Value | None


@vjp("GridSample")
def grid_sample(backward: Backward, node: ir.Node, cotangent: ir.Value) -> Cotangents:
    """Elements get the shares that they had in the sampled values; coordinates the slopes between elements."""
    x, grid = operand(node, 0), operand(node, 1)
    sizes = sizes_of(x)
    if sizes is None:
        raise Declined("no gradient rule for GridSample of an input of unknown rank")
    axes = range(2, len(sizes))
    along = [_neighbours(backward, node, axis, len(sizes)) for axis in axes]
    flat = backward.op("Reshape", cotangent, backward.ints(0, 0, -1))
    corners = [(_flat_index(backward, x, corner, flat), corner) for corner in itertools.product(*along)]

    def rule(index: int, value: ir.Value) -> ir.Value:
        if index == 0:
            shares = [_product(backward, flat, *(near.share for near in corner)) for _, corner in corners]
            places = backward.op("Concat", *(place for place, _ in corners), axis=2)
            empty = backward.op("Reshape", backward.zeros_like(x), backward.ints(0, 0, -1))
            updates = backward.op("Concat", *shares, axis=2)
            filled = backward.op("ScatterElements", empty, places, updates, axis=2, reduction="add")
            return backward.reshape_like(filled, x)
        elements = backward.op("Reshape", x, backward.ints(0, 0, -1))
        weights = []
        for place, corner in corners:
            weighted = backward.op("Mul", flat, backward.op("GatherElements", elements, place, axis=2))
            weights.append((backward.op("ReduceSum", weighted, backward.ints(1), keepdims=1), corner))
        # The first coordinate is along the last axis.
        slopes = [_slope(backward, weights, axis - 2) for axis in reversed(axes)]
        stacked = backward.op("Concat", *slopes, axis=1)
        return backward.reshape_like(backward.op("Transpose", stacked, perm=[0, 2, 1]), grid)

    return backward.for_needed(node, rule)


def _neighbours(backward: Backward, node: ir.Node, axis: int, rank: int) -> list[_Neighbour]:
    """The elements along an axis that the sampled positions lie between."""
    mode, padding = (node.attributes.get_string(n, d) for n, d in (("mode", "linear"), ("padding_mode", "zeros")))
    if mode in ("cubic", "bicubic") or padding == "reflection":
        raise Declined(f"no gradient rule for GridSample of mode {mode} with padding {padding}")
    x = operand(node, 0)
    size = backward.op("Cast", backward.size_of(x, axis), dtype=backward.dtype(x), to=int(backward.dtype(x)))
    one = backward.number(1.0, x)
    last = backward.op("Sub", size, one)
    position, scale = _position(backward, node, rank - 1 - axis, size, last)
    if padding == "border":
        clamped = _clamped(backward, position, last)
        scale = backward.op("Mul", scale, _indicator(backward, "Equal", clamped, position))
        position = clamped
    if mode == "nearest":
        near = backward.op("Round", position)
        return [_Neighbour(_index(backward, near, last), _inside(backward, near, last), None)]
    low = backward.op("Floor", position)
    fraction = backward.op("Sub", position, low)
    found = []
    for place, weight, sign in (
        (low, backward.op("Sub", one, fraction), backward.op("Neg", scale)),
        (backward.op("Add", low, one), fraction, scale),
    ):
        inside = _inside(backward, place, last)
        share, slope = (backward.op("Mul", inside, factor) for factor in (weight, sign))
        found.append(_Neighbour(_index(backward, place, last), share, slope))
    return found


def _position(
    backward: Backward, node: ir.Node, coordinate: int, size: ir.Value, last: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Where along an axis the grid samples, in elements: `[samples, 1, positions]`; and the slope by the coordinate."""
    half, one = backward.number(0.5, size), backward.number(1.0, size)
    column = backward.op("Gather", operand(node, 1), backward.ints(coordinate), axis=-1)
    shifted = backward.op("Add", backward.op("Reshape", column, backward.ints(0, 1, -1)), one)
    if node.attributes.get_int("align_corners", 0):
        scale = backward.op("Mul", last, half)
        return backward.op("Mul", shifted, scale), scale
    scale = backward.op("Mul", size, half)
    return backward.op("Sub", backward.op("Mul", shifted, scale), half), scale


def _inside(backward: Backward, place: ir.Value, last: ir.Value) -> ir.Value:
    above = _indicator(backward, "GreaterOrEqual", place, backward.number(0.0, place))
    return backward.op("Mul", above, _indicator(backward, "LessOrEqual", place, last))


def _indicator(backward: Backward, comparison: str, left: ir.Value, right: ir.Value) -> ir.Value:
    holds = backward.op(comparison, left, right, dtype=ir.DataType.BOOL)
    return backward.op("Cast", holds, dtype=backward.dtype(left), to=int(backward.dtype(left)))


def _index(backward: Backward, place: ir.Value, last: ir.Value) -> ir.Value:
    """The nearest index that exists."""
    return backward.op("Cast", _clamped(backward, place, last), dtype=_INT64, to=int(_INT64))


def _clamped(backward: Backward, place: ir.Value, last: ir.Value) -> ir.Value:
    return backward.op("Max", backward.op("Min", place, last), backward.number(0.0, place))


def _flat_index(backward: Backward, x: ir.Value, corner: Sequence[_Neighbour], like: ir.Value) -> ir.Value:
    """The index of a corner within all spatial axes as one, for every channel."""
    index = corner[0].index
    for axis, near in enumerate(corner[1:], start=3):
        index = backward.op("Add", backward.op("Mul", index, backward.size_of(x, axis)), near.index)
    return backward.op("Expand", index, backward.op("Shape", like, dtype=_INT64))


def _slope(backward: Backward, weights: Iterable[tuple[ir.Value, Sequence[_Neighbour]]], spatial: int) -> ir.Value:
    """The derivative by the coordinate along a spatial axis: `[samples, 1, positions]`."""
    terms = []
    for weight, corner in weights:
        factors = [near.slope if axis == spatial else near.share for axis, near in enumerate(corner)]
        terms.append(_product(backward, weight, *(backward.number(0.0, weight) if f is None else f for f in factors)))
    return backward.op("Sum", *terms)


def _product(backward: Backward, *factors: ir.Value) -> ir.Value:
    return reduce(lambda left, right: backward.op("Mul", left, right), factors)
