"""Follow coordinates through a graph and group what touches the same places."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.graph._bodies import captured
from onnx_kfe.graph._layers import Layer
from onnx_kfe.graph._network import Network
from onnx_kfe.graph._shapes import concrete_shapes, nominal_input_shapes
from onnx_kfe.graph.groups._coordinates import STAYS, Ids
from onnx_kfe.graph.groups._flow import Axes, Declined, Flow
from onnx_kfe.graph.groups._groups import ChannelGroup, ChannelGroups, Member
from onnx_kfe.graph.groups._registry import RULES, Rule
from onnx_kfe.graph.groups._sites import Linear
from onnx_kfe.graph.groups._sizes import axes_of, follow_sizes

__all__ = ["find_groups"]

_BEGINNING = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Expand")  # where coordinates can begin
_ONNX = ("", "ai.onnx")
_NOT_ALL = "a single channel"


def find_groups(network: Network) -> ChannelGroups:
    """Find which channels of a network can only be removed together, and why some cannot be removed.

    Every layer begins new coordinates for its output channels; a rule for each operator says which coordinates its
    outputs have and which it ties. What an operator without a rule reads stays, as does what is an output of the graph.

    Args:
        network: The network; layers that the user left out stay as they are.

    Returns:
        Its groups, by which a `ChannelPass` removes channels.
    """
    model = network.model
    nominal = nominal_input_shapes(model, network.input_shapes)
    shapes = concrete_shapes(model, nominal)
    larger = _enlarged(model, nominal)
    others = shapes if larger == nominal else concrete_shapes(model, larger)
    flow = Flow(model.opset_imports.get("", 1), shapes, others, network.unselected)
    for node in model.graph:
        _visit(flow, node)
    for value in model.graph.outputs:
        for ids in flow.values.get(value, ()):
            flow.coordinates.freeze(ids, f"graph output '{value.name}'")
    return _grouped(flow, network.layers)


def _enlarged(model: ir.Model, nominal: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs with free axes twice as large: what has the same size then is taken to have it always."""
    larger = dict(nominal)
    for value in model.graph.inputs:
        name = value.name or ""
        if name in nominal and value.shape is not None:
            pairs = zip(value.shape, nominal[name], strict=True)
            larger[name] = tuple(size if isinstance(dim, int) else 2 * size for dim, size in pairs)
    return larger


def _visit(flow: Flow, node: ir.Node) -> None:
    """Pass coordinates through a node."""
    for value in captured(node):
        _freeze(flow, node, flow.values.get(value, ()), "has a body that reads it")
        _freeze(flow, node, axes_of(flow.sizes.get(value, ())), "has a body that reads the size of it")
    read = [value for value in node.inputs if value is not None and value in flow.values]
    try:
        follow_sizes(flow, node)
        if read or node.op_type in _BEGINNING:
            for value, axes in zip(node.outputs, _rule(node)(flow, node), strict=False):
                flow.assign(value, axes)
    except Declined as declined:
        linear = flow.linear.get(node.name or "")
        sides = [] if linear is None else [linear.rows, linear.columns]
        for axes in (*(flow.values[value] for value in read), sides):
            _freeze(flow, node, axes, str(declined))


def _rule(node: ir.Node) -> Rule:
    operator = node.op_type if node.domain in _ONNX else f"{node.domain}.{node.op_type}"
    if operator not in RULES:
        raise Declined("has no rule")
    return RULES[operator]


def _freeze(flow: Flow, node: ir.Node, axes: Axes, what: str) -> None:
    for ids in axes:
        flow.freeze(node, ids, what)


def _linear(flow: Flow, layers: Sequence[Layer]) -> dict[str, Linear]:
    """Coordinates of all linear layers; one that was not followed keeps all of its channels."""
    linear = {}
    for layer in layers:
        if layer.name in flow.linear:
            linear[layer.name] = flow.linear[layer.name]
        elif (geometry := layer.geometry) is not None:
            rows, columns = (np.full(channels, STAYS) for channels in (geometry.out_channels, geometry.in_channels))
            linear[layer.name] = Linear(rows, columns, geometry.groups, weighted=False)
    return linear


def _grouped(flow: Flow, layers: Sequence[Layer]) -> ChannelGroups:
    """The units in groups."""
    linear = _linear(flow, layers)
    sides = [(name, side, ids) for name, each in linear.items() if each.weighted for side, ids in each.sides]
    roots = flow.coordinates.roots(np.arange(len(flow.coordinates)))
    groups, units, names = [], {}, Counter[str]()
    for found, reason in _alike(flow, roots, [ids for *_, ids in sides]):
        index = np.full(len(roots) + 1, STAYS)  # the last for coordinates that stay
        index[found] = np.arange(len(found))
        members = [(name, side, index[np.append(roots, STAYS)[ids]]) for name, side, ids in sides]
        touched = tuple(Member(*each) for each in members if np.any(each[2] != STAYS))
        first = next((member for member in touched if member.side == "rows"), None)
        reason = reason or ("no layer computes it" if first is None else _NOT_ALL if len(found) == 1 else None)
        name = (first or touched[0]).layer
        names[name] += 1
        name = name if names[name] == 1 else f"{name}:{names[name]}"
        groups.append(ChannelGroup(name, len(found), touched, reason))
        units[name] = found
    return ChannelGroups(tuple(groups), tuple(flow.sites), linear, roots, units)


def _alike(flow: Flow, roots: Ids, sides: Sequence[Ids]) -> Iterator[tuple[Ids, str | None]]:
    """The units that touch the same places and have the same reason to stay, where they touch a side of a layer."""
    places: defaultdict[int, list[int]] = defaultdict(list)
    tracked = [ids for axes in flow.values.values() for ids in axes if ids is not None]
    for place, ids in enumerate((*sides, *tracked)):
        for root in np.unique(roots[ids[ids != STAYS]]).tolist():
            places[root].append(place)
    alike: defaultdict[tuple[tuple[int, ...], str | None], list[int]] = defaultdict(list)
    for root, touched in places.items():
        if touched[0] < len(sides):
            alike[tuple(touched), flow.coordinates.reason(root)].append(root)
    for (_, reason), units in alike.items():
        yield np.array(units), reason
