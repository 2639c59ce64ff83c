"""Operators that move axes, or put values side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.graph.groups._coordinates import STAYS
from onnx_kfe.graph.groups._flow import Axes, Declined, Flow, constant_of, integers, operand
from onnx_kfe.graph.groups._registry import rule

__all__: list[str] = []


@rule("Transpose")
def transpose(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """The axes in another order."""
    axes = flow.axes(operand(node, 0))
    order = node.attributes.get_ints("perm") or range(len(axes))[::-1]
    return [[axes[axis] for axis in order]]


@rule("Squeeze")
def squeeze(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """Fewer axes. Those to go have to be named: a trimmed axis may come to have one index as well."""
    axes = flow.axes(operand(node, 0))
    given = [axis % len(axes) for axis in _given_axes(node)]
    for axis in given:
        flow.freeze(node, axes[axis], "needs one index of it")
    return [[ids for axis, ids in enumerate(axes) if axis not in given]]


@rule("Unsqueeze")
def unsqueeze(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """More axes."""
    axes, given = list(flow.axes(operand(node, 0))), _given_axes(node)
    rank = len(axes) + len(given)
    for axis in sorted(axis % rank for axis in given):
        axes.insert(axis, None)
    return [axes]


@rule("Concat")
def concat(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """One after the other along an axis, tied along the others."""
    shapes = [flow.shape(operand(node, place)) for place in range(len(node.inputs))]
    rank = len(shapes[0])
    axis = node.attributes.get_int("axis", 0) % rank
    axes = [
        None if other == axis else flow.join(node, [(place, other) for place in range(len(node.inputs))])
        for other in range(rank)
    ]
    parts = [flow.axes(operand(node, place))[axis] for place in range(len(node.inputs))]
    if any(ids is not None for ids in parts):
        axes[axis] = np.concatenate(
            [np.full(shape[axis], STAYS) if ids is None else ids for ids, shape in zip(parts, shapes, strict=True)]
        )
    return [axes]


@rule("Expand")
def expand(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """Axes of one index are repeated; the shape of the others is counted anew."""
    x, target = operand(node, 0), constant_of(node.inputs[1])
    axes = flow.axes(x) if constant_of(x) is None else _begin(flow, node)
    (entries,) = flow.shape(operand(node, 1))
    sizes = flow.sizes.get(operand(node, 1), [None] * entries) if target is None else target.tolist()
    whole = {entry: ids for entry, ids in zip(range(entries)[::-1], axes[::-1], strict=False) if sizes[entry] != 1}
    if target is None:
        flow.follow(node, 1, whole)
    elif any(ids is not None and len(ids) != sizes[entry] for entry, ids in whole.items()):
        raise Declined("repeats it")
    else:
        flow.count(node, 1, whole)
    return [[*(None for _ in range(entries - len(axes))), *axes]]


def _begin(flow: Flow, node: ir.Node) -> Axes:
    """New coordinates for the axes of a constant, which is trimmed as what it meets asks for."""
    axes = [flow.coordinates.fresh(size) if size > 1 else None for size in flow.shape(operand(node, 0))]
    for axis, ids in enumerate(axes):
        flow.trim(node, 0, axis, ids)
    return axes


@rule("Tile")
def tile(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """The coordinates again and again."""
    axes, repeats = flow.axes(operand(node, 0)), constant_of(node.inputs[1])
    if repeats is None:
        raise Declined("repeats it by a computed number")
    return [[None if ids is None else np.tile(ids, times) for ids, times in zip(axes, repeats.tolist(), strict=True)]]


def _given_axes(node: ir.Node) -> list[int]:
    """The axes that are named, by an attribute or by an input."""
    axes = integers(node, 1, "axes")
    if axes is None:
        raise Declined("does not name its axes")
    return [int(axis) for axis in axes]
