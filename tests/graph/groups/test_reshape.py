"""Reshapes against numpy: what is left of an array, reshaped, is what is left of the reshaped array."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import onnx_ir as ir
import pytest

from onnx_kfe.graph.groups import _find
from onnx_kfe.graph.groups._flow import Declined, Flow
from onnx_kfe.graph.groups._reshape import reshape
from tests.tiny import node, tiny

SHAPES = [
    (2, 12, 3, 2),
    (2, 12, 6),
    (2, 3, 4, 6),
    (2, 72),
    (24, 6),
    (2, 4, 3, 6),
    (1, 2, 12, 1, 6),
    (144,),
    (2, 6, 2, 6),
]


def flow_of(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> tuple[Flow, ir.Node]:
    """A Reshape of a value with coordinates at one axis."""
    target = np.array(after)
    model = tiny([node("Reshape", ["x", "t"], ["y"], "r")], {"x": before}, {"y": after}, {"t": target})
    graph = ir.from_proto(model).graph
    flow = Flow(17, {"x": before, "y": after}, {"x": before, "y": after}, {})
    axes = [flow.coordinates.fresh(size) if place == axis else None for place, size in enumerate(before)]
    flow.assign(graph.inputs[0], axes)
    return flow, graph[0]


def stays(flow: Flow, gone: int, ids: np.ndarray) -> np.ndarray:
    return flow.coordinates.roots(ids) != gone


@pytest.mark.parametrize(("before", "after"), itertools.permutations(SHAPES, 2))
def test_removal_and_reshape_commute(before, after):
    array = np.arange(math.prod(before)).reshape(before)
    for axis in range(len(before)):
        flow, the_node = flow_of(before, after, axis)
        ids = flow.axes(the_node.inputs[0])[axis]
        try:
            (axes,) = reshape(flow, the_node)
        except Declined:
            assert before[axis] == 1
            continue
        (carrier,) = (place for place, found in enumerate(axes) if found is not None)
        roots = flow.coordinates.roots(ids)
        for gone in np.unique(roots)[:-1]:
            kept = flow.coordinates.roots(axes[carrier]) != gone
            shape = [kept.sum() if place == carrier else size for place, size in enumerate(after)]
            left = np.compress(roots != gone, array, axis).reshape(shape)
            np.testing.assert_array_equal(left, np.compress(kept, array.reshape(after), carrier))
            (site,) = flow.sites
            found = site.edit(np.array(after), partial(stays, flow, gone))
            np.testing.assert_array_equal(found, shape)


@pytest.mark.parametrize(
    ("before", "after", "units"),
    [
        ((2, 12), (2, 3, 4), 4),  # heads
        ((2, 12, 5), (2, 2, 6, 5), 6),  # shuffled groups
        ((2, 80), (2, 5, 4, 4), 5),  # channels with positions
        ((2, 5, 4, 4), (2, 80), 5),
    ],
)
def test_the_axis_that_leaves_most_units_carries_them(before, after, units):
    flow, the_node = flow_of(before, after, 1)
    (axes,) = reshape(flow, the_node)
    assert max(len(np.unique(flow.coordinates.roots(ids))) for ids in axes if ids is not None) == units


def test_two_axes_with_coordinates_do_not_merge():
    flow, the_node = flow_of((2, 3, 4), (2, 12), 1)
    x = the_node.inputs[0]
    flow.assign(x, [None, flow.axes(x)[1], flow.coordinates.fresh(4)])
    _find._visit(flow, the_node)
    reasons = {flow.coordinates.reason(each) for each in range(7)}
    assert reasons == {"Reshape 'r' mixes it with another axis"}
