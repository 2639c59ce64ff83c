"""Reshape and Flatten: axes that are merged and split.

The axes in front and behind fall into segments of equal size that hold the same elements. Where a segment splits an
axis, one of the new axes carries its coordinates, and those that come to the same index of it go together: with heads
or shuffled groups in front, all of these lose the same channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

import numpy as np
import onnx_ir as ir

from onnx_kfe.graph.groups._coordinates import STAYS, Ids
from onnx_kfe.graph.groups._flow import Axes, Declined, Flow, constant_of, operand
from onnx_kfe.graph.groups._registry import rule
from onnx_kfe.graph.groups._sites import Constant, Keep
from onnx_kfe.graph.groups._sizes import axes_of

__all__: list[str] = []


@rule("Flatten")
def flatten(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """A Reshape without a target."""
    return [_regrouped(flow, node, flow.fixed(node.outputs[0]))]


@rule("Reshape")
def reshape(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """The target is counted anew; one that is computed becomes a constant."""
    target, output = constant_of(node.inputs[1]), node.outputs[0]
    entries = flow.sizes.get(operand(node, 1), ()) if target is None else target.tolist()
    fixed = flow.fixed(output) | {axis for axis, size in enumerate(entries) if isinstance(size, int) and size > 0}
    axes = _regrouped(flow, node, fixed)
    if target is not None:
        flow.count(node, 1, {entry: ids for entry, ids in enumerate(axes) if target[entry] > 0})
    elif read := [ids for ids in (*axes, *axes_of(entries)) if ids is not None]:
        free, shape = _free(flow, node, axes, fixed), flow.shape(output)

        def constant(_: Constant | None, keep: Keep) -> Constant:
            counts = (size if ids is None else keep(ids).sum() for ids, size in zip(axes, shape, strict=True))
            return np.array([free.get(axis, count) for axis, count in enumerate(counts)], np.int64)

        flow.edit(node, 1, np.concatenate(read), constant)
    return [axes]


def _regrouped(flow: Flow, node: ir.Node, fixed: Set[int]) -> Axes:
    """The coordinates of the output.

    Args:
        flow: The coordinates so far.
        node: A Reshape or Flatten.
        fixed: The axes of the output whose sizes are the same for all inputs.
    """
    axes, before, after = flow.axes(operand(node, 0)), flow.shape(operand(node, 0)), flow.shape(node.outputs[0])
    found: list[Ids | None] = [None] * len(after)
    for old, new in _segments(before, after):
        tracked = [axis for axis in old if axes[axis] is not None]
        candidates = [axis for axis in new if after[axis] > 1 and (axis in fixed or len(old) == 1)]
        if not tracked:
            continue
        if len(tracked) > 1 or not candidates:
            raise Declined("mixes it with another axis")
        (axis,) = tracked
        ids = axes[axis]
        assert ids is not None
        spread = np.broadcast_to(ids.reshape(-1, *(1 for _ in old if _ > axis)), [before[each] for each in old])
        carrier, carried = _carry(flow, node, spread.reshape([after[each] for each in new]), new, candidates)
        found[carrier] = carried
    return found


def _carry(flow: Flow, node: ir.Node, spread: Ids, axes: Sequence[int], candidates: Sequence[int]) -> tuple[int, Ids]:
    """The new axis that leaves the most units, the last of equals, and its coordinates, tied as that asks for.

    Args:
        flow: The coordinates so far.
        node: The Reshape.
        spread: The coordinate of each element of the segment.
        axes: The new axes of the segment.
        candidates: Those of them that may carry coordinates.
    """
    roots = flow.coordinates.roots(np.unique(spread))
    units = roots[np.searchsorted(np.unique(spread), spread)]
    ties = {}
    for axis in candidates:
        rows = np.moveaxis(units, axes.index(axis), 0).reshape(spread.shape[axes.index(axis)], -1)
        ties[axis] = _distinct(rows)
    carrier = max(reversed(candidates), key=lambda axis: _count_units(ties[axis]))
    for row in ties[carrier]:
        flow.unite(node, np.full(len(row) - 1, row[0]), row[1:])
    return carrier, np.moveaxis(spread, axes.index(carrier), 0).reshape(len(ties[carrier]), -1)[:, 0].copy()


def _distinct(rows: Ids) -> list[Ids]:
    """The different coordinates that come to each index."""
    if np.all(rows == rows[:, :1]):
        return list(rows[:, :1])
    return [np.unique(row) for row in rows]


def _count_units(ties: Sequence[Ids]) -> int:
    """How many units that may go are left when the coordinates of each tie are united."""
    parents: dict[int, int] = {}

    def root(each: int) -> int:
        while parents.setdefault(each, each) != each:
            each = parents[each]
        return each

    for tie in ties:
        for each in tie.tolist() if STAYS not in tie else ():
            parents[root(each)] = root(int(tie[0]))
    return sum(each == parent for each, parent in parents.items())


def _segments(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[range, range]]:
    """Axes in front and axes behind that hold the same elements, as few as can be."""
    i = j = 0
    while i < len(before) or j < len(after):
        first, second = i, j
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while (left := np.prod(before[first:i])) != (right := np.prod(after[second:j])):
            if (i if left < right else j) == (len(before) if left < right else len(after)):
                raise Declined("changes the number of elements")
            i, j = (i + 1, j) if left < right else (i, j + 1)
        yield range(first, i), range(second, j)


def _free(flow: Flow, node: ir.Node, axes: Axes, fixed: Set[int]) -> dict[int, int]:
    """The entries of a new target that are not counted: 0 for an axis that stays in its place, -1 for one other."""
    before, after = flow.shape(operand(node, 0)), flow.shape(node.outputs[0])
    moving = [axis for axis, ids in enumerate(axes) if ids is None and axis not in fixed]
    kept = [old[0] for old, new in _segments(before, after) if list(old) == list(new) and len(old) == 1]
    others = [axis for axis in moving if axis not in kept]
    if len(others) > 1 or node.attributes.get_int("allowzero", False):
        raise Declined("is given a computed shape that no constant can replace")
    return {axis: 0 if axis in kept else -1 for axis in moving}
