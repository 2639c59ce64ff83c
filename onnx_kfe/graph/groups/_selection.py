"""Operators that take a part of an axis, or add to it: the amounts are counted anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.graph.groups._coordinates import Ids
from onnx_kfe.graph.groups._flow import Axes, Declined, Flow, constant_of, integers, operand
from onnx_kfe.graph.groups._registry import rule
from onnx_kfe.graph.groups._sites import Constant, Keep

__all__: list[str] = []


@rule("Split")
def split(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """Parts of an axis. Equal parts are given their sizes, as they may become unequal."""
    axes = list(flow.axes(operand(node, 0)))
    axis = node.attributes.get_int("axis", 0) % len(axes)
    ids = axes[axis]
    if ids is None:
        return [axes for _ in node.outputs]
    sizes = [flow.shape(output)[axis] for output in node.outputs]
    parts = np.split(ids, np.cumsum(sizes)[:-1])
    place: int | str = 1 if flow.opset >= 13 else "split"
    if len(node.inputs) > 1 and node.inputs[1] is not None and constant_of(node.inputs[1]) is None:
        raise Declined("is given computed sizes")
    flow.edit(node, place, ids, lambda _, keep: np.array([keep(part).sum() for part in parts]))
    if "num_outputs" in node.attributes:
        flow.edit(node, "num_outputs", ids, lambda _, keep: None)
    return [[*axes[:axis], part, *axes[axis + 1 :]] for part in parts]


@rule("Slice")
def slice_(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """A part of each axis that is named; its bounds are counted anew."""
    axes = list(flow.axes(operand(node, 0)))
    named = integers(node, 3, "axes")
    if named is None and (len(node.inputs) > 3 and node.inputs[3] is not None):
        raise Declined("is along computed axes")
    starts, ends = integers(node, 1, "starts"), integers(node, 2, "ends")
    count = len(next((each for each in (named, starts, ends) if each is not None), axes))
    along = range(count) if named is None else [int(axis) % len(axes) for axis in named]
    tracked = {entry: axis for entry, axis in enumerate(along) if axes[axis] is not None}
    if not tracked:
        return [axes]
    steps = integers(node, 4, "steps")
    if starts is None or ends is None or (steps is None and len(node.inputs) > 4 and node.inputs[4] is not None):
        raise Declined("is given computed bounds")
    whole = [axes[axis] for axis in tracked.values()]
    before: dict[int, Ids | None] = {}
    until: dict[int, Ids | None] = {}
    for entry, axis in tracked.items():
        ids = axes[axis]
        assert ids is not None
        if steps is not None and steps[entry] != 1:
            raise Declined("takes every n-th of it")
        first, last, _ = slice(int(starts[entry]), int(ends[entry])).indices(len(ids))
        before[entry], until[entry] = ids[:first], ids[:last]
        axes[axis] = ids[first:last]
    flow.count(node, _place(node, 1, "starts"), before, whole)
    flow.count(node, _place(node, 2, "ends"), until, whole)
    return [axes]


@rule("Gather")
def gather(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """The coordinates of the indices, which are counted anew; what a single index picks stays."""
    axes = flow.axes(operand(node, 0))
    axis = node.attributes.get_int("axis", 0) % len(axes)
    ids, picked = axes[axis], constant_of(node.inputs[1])
    indices = flow.axes(operand(node, 1))
    if ids is None:
        return [[*axes[:axis], *indices, *axes[axis + 1 :]]]
    if picked is None:
        raise Declined("picks it by computed indices")
    if picked.ndim > 1:
        raise Declined("makes several axes of it")
    flow.edit(node, 1, ids, lambda array, keep: _renumbered(array, ids, keep))
    taken = ids[picked]
    if picked.ndim == 0:
        flow.freeze(node, taken.reshape(1), "picks it")
    return [[*axes[:axis], *([taken] if picked.ndim else []), *axes[axis + 1 :]]]


@rule("Pad")
def pad(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """Constants around; those along a tracked axis go with what they meet. A negative amount takes indices away."""
    axes = list(flow.axes(operand(node, 0)))
    amounts = integers(node, 1, "pads")
    if amounts is None:
        raise Declined("is given computed amounts")
    named = integers(node, 3, "axes")
    if named is None and len(node.inputs) > 3 and node.inputs[3] is not None:
        raise Declined("is along computed axes")
    along = range(len(axes)) if named is None else [int(axis) % len(axes) for axis in named]
    ends: dict[int, Ids | None] = {}
    for entry, axis in enumerate(along):
        ids, before, after = axes[axis], int(amounts[entry]), int(amounts[entry + len(along)])
        if ids is None or (before == 0 and after == 0):
            continue
        if node.attributes.get_string("mode", "constant") != "constant" or min(before, after) < 0:
            raise Declined("pads it with others than constants")
        padding = flow.coordinates.fresh(before), flow.coordinates.fresh(after)
        ends[entry], ends[entry + len(along)] = padding
        axes[axis] = np.concatenate([padding[0], ids, padding[1]])
    flow.count(node, _place(node, 1, "pads"), ends)
    return [axes]


def _renumbered(indices: Constant | None, ids: Ids, keep: Keep) -> Constant:
    """The indices that are left of those kept, counted without the others."""
    assert indices is not None
    kept = keep(ids)
    places = np.cumsum(kept) - 1
    absolute = indices % len(ids)
    return places[absolute[kept[absolute]] if indices.ndim else absolute]


def _place(node: ir.Node, place: int, name: str) -> int | str:
    return name if name in node.attributes else place
