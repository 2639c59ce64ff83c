"""Follow the channels of each layer to where they are summed over, as long as any basis of them would do.

Every channel has a label, and an array of labels stands for a value. Operators that move elements move the labels;
others pass where they act on all channels of a head alike. Coordinates of channel groups would not do: they tie heads,
and do not say which channels belong to one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from onnx_kfe.graph._layers import Layer
from onnx_kfe.graph._network import Network
from onnx_kfe.graph._shapes import concrete_shapes, nominal_input_shapes
from onnx_kfe.graph.groups._coordinates import Ids
from onnx_kfe.graph.groups._flow import Declined, constant_of, integers, operand

__all__ = ["Channels", "End", "Tracing"]


class Channels(NamedTuple):
    """Channels of a layer, ``[heads, d]``."""

    layer: str
    places: Ids


class End(NamedTuple):
    """Where channels are summed over, head by head.

    Attributes:
        first: Who computes them.
        second: Who computes what they are multiplied by, or reads them.
        read: Whether the second reads them.
    """

    first: Channels
    second: Channels
    read: bool


class Tracing:
    """The ends of all channels that a basis change reaches.

    Args:
        network: The network.

    Attributes:
        ends: Where channels are summed over.
        stops: By layer and channel why it cannot be part of a basis change.
    """

    def __init__(self, network: Network) -> None:
        self._shapes = concrete_shapes(network.model, nominal_input_shapes(network.model, network.input_shapes))
        self._layers = {layer.name: layer for layer in network.prunable if _is_followed(layer)}
        self._owners = [(name, place) for name, layer in self._layers.items() for place in range(_width(layer))]
        counts = [_width(layer) for layer in self._layers.values()]
        self._first = dict(zip(self._layers, np.cumsum([0, *counts]).tolist(), strict=False))
        self._heads = np.repeat(np.arange(len(counts)), counts)  # of each label; a layer is one until positions mix
        self._labels: dict[ir.Value, Ids] = {}
        self.ends: list[End] = []
        self.stops: dict[tuple[str, int], str] = {}
        for node in network.model.graph:
            self._visit(node)
        self._stop_repeated()

    def _visit(self, node: ir.Node) -> None:
        read = [value for value in node.inputs if value is not None and value in self._labels]
        if read and node.op_type != "Shape":
            try:
                for value, labels in zip(node.outputs, self._behind(node), strict=False):
                    self._assign(value, labels)
            except Declined as declined:
                for value in read:
                    self._stop(self._labels[value], f"{node.op_type} '{node.name}' {declined}")
        if layer := self._layers.get(node.name or ""):
            labels = self._first[layer.name] + np.arange(_width(layer))
            axis, shape = _channel_axis(node), self._shapes[layer.output]
            along = labels.reshape([-1 if n == axis % len(shape) else 1 for n in range(len(shape))])
            self._assign(node.outputs[0], np.broadcast_to(along, shape))
            if layer.twins:
                self._stop(labels, f"{len(layer.uses)} nodes share the weight that computes it")

    def _assign(self, value: ir.Value, labels: Ids) -> None:
        self._labels[value] = labels
        if value.is_graph_output():
            self._stop(labels, f"graph output '{value.name}'")

    def _stop(self, labels: Ids, reason: str) -> None:
        for label in np.unique(labels).tolist():
            self.stops.setdefault(self._owners[label], reason)

    def _stop_repeated(self) -> None:
        """What is summed over in several places would take one basis for all of them."""
        ends = Counter(
            (side.layer, place)
            for end in self.ends
            for side in ([end.first] if end.read else [end.first, end.second])
            for place in side.places.reshape(-1).tolist()
        )
        for owner, count in ends.items():
            if count > 1:
                self.stops.setdefault(owner, f"it is summed over in {count} places")

    def _behind(self, node: ir.Node) -> Sequence[Ids]:
        """The labels of the outputs of a node.

        Raises:
            Declined: It tells the channels of a head apart.
        """
        if node.op_type in ("MatMul", "Gemm", "Conv"):
            return self._product(node)
        if node.op_type == "Add" and self._is_bias(node):
            return [self._labels[value] for value in node.inputs if value in self._labels]
        if node.op_type in ("Mul", "Div"):
            return [self._scaled(node)]
        if node.op_type not in _MOVES or operand(node, 0) not in self._labels:
            raise Declined("tells its channels apart")
        shapes = [self._shape(value) for value in node.outputs]
        return _MOVES[node.op_type](node, self._labels[operand(node, 0)], shapes)

    def _shape(self, value: ir.Value) -> tuple[int, ...]:
        if (value.name or "") not in self._shapes:
            raise Declined("gives an unknown shape")
        return self._shapes[value.name or ""]

    def _is_bias(self, node: ir.Node) -> bool:
        """Whether it adds a number to each channel right behind a MatMul, where `ReweighPass` looks for its bias."""
        for place in (0, 1):
            value, addend = operand(node, place), constant_of(node.inputs[1 - place])
            producer = value.producer()
            layer = None if producer is None else self._layers.get(producer.name or "")
            if layer is not None and layer.op_type == "MatMul" and addend is not None:
                return addend.shape == (_width(layer),) and len(value.uses()) == 1
        return False

    def _scaled(self, node: ir.Node) -> Ids:
        """A number for all elements."""
        first, second = (operand(node, place) for place in (0, 1))
        value, factor = (second, first) if node.op_type == "Mul" and second in self._labels else (first, second)
        size = np.prod(self._shape(factor) if factor.const_value is None else factor.const_value.shape.numpy())
        if factor in self._labels or value not in self._labels or size != 1:
            raise Declined("tells its channels apart")
        return self._labels[value]

    def _product(self, node: ir.Node) -> Sequence[Ids]:
        first, second = (self._labels.get(operand(node, place)) for place in (0, 1))
        if constant_of(node.inputs[1]) is not None:
            self._read(node, first)
            return []
        if node.op_type != "MatMul" or min(len(self._shape(operand(node, place))) for place in (0, 1)) < 2:
            raise Declined("multiplies it with computed values")
        if first is not None and second is not None:
            self._contract(first, second)
            return []
        labels, axis = (second, -2) if first is None else (first, -1)
        assert labels is not None
        mixed = labels.take([0], axis)
        if not np.all(labels == mixed):
            raise Declined("mixes its channels")
        self._divide(mixed.reshape(-1, labels.shape[-3 - axis]))
        return [np.broadcast_to(mixed, self._shape(node.outputs[0]))]

    def _divide(self, rows: Ids) -> None:
        """Channels of which positions are mixed by different matrices are of different heads.

        Args:
            rows: Labels ``[matrices, channels]``.
        """
        rows = np.unique(rows, axis=0)
        if len(np.unique(rows)) != rows.size:
            raise Declined("mixes the same channels in several ways")
        matrices = np.repeat(np.arange(len(rows)), rows.shape[1])
        before = self._heads[rows.reshape(-1)]
        _, heads = np.unique(np.stack([before, matrices]), axis=1, return_inverse=True)
        self._heads[rows.reshape(-1)] = self._heads.max() + 1 + heads.reshape(-1)

    def _contract(self, first: Ids, second: Ids) -> None:
        """Queries ``[..., t, d]`` with keys ``[..., d, u]``."""
        if not (np.all(first == first[..., :1, :]) and np.all(second == second[..., :1])):
            raise Declined("sums over more than channels")
        pairs = np.stack(np.broadcast_arrays(first[..., 0, :], second[..., 0]), axis=-2)
        pairs = np.unique(pairs.reshape(-1, *pairs.shape[-2:]), axis=0)
        if len(np.unique(pairs)) != pairs.size:
            raise Declined("has several heads share it")
        if np.any(self._heads[pairs] != self._heads[pairs[..., :1]]):
            raise Declined("sums over the channels of several heads")
        self.ends.append(End(self._channels(pairs[:, 0]), self._channels(pairs[:, 1]), False))

    def _read(self, node: ir.Node, labels: Ids | None) -> None:
        """A layer sums over channels; those of one head are together in its weight's columns, wherever they are."""
        layer = self._layers.get(node.name or "")
        if labels is None or layer is None or layer.geometry is None or layer.geometry.taps != 1 or layer.twins:
            raise Declined("is no layer that can be changed, or its kernel is wide")
        columns = np.moveaxis(labels, _channel_axis(node), -1).reshape(-1, layer.geometry.in_channels)
        heads = self._heads[columns[0]]
        sizes = np.unique(heads, return_counts=True)[1]
        if np.any(columns != columns[0]) or len(np.unique(columns[0])) != columns.shape[1] or np.ptp(sizes):
            raise Declined("reads it in several places, or heads of several sizes")
        places = np.argsort(heads, kind="stable").reshape(len(sizes), -1)
        self.ends.append(End(self._channels(columns[0][places]), Channels(layer.name, places), True))

    def _channels(self, labels: Ids) -> Channels:
        layers, places = zip(*(self._owners[label] for label in labels.reshape(-1).tolist()), strict=True)
        if len(set(layers)) > 1:
            raise Declined("joins channels of several layers")
        return Channels(layers[0], np.array(places).reshape(labels.shape))


def _is_followed(layer: Layer) -> bool:
    return layer.geometry is not None and layer.geometry.groups == 1 and not layer.left


def _width(layer: Layer) -> int:
    assert layer.geometry is not None
    return layer.geometry.out_channels


def _channel_axis(node: ir.Node) -> int:
    return 1 if node.op_type == "Conv" else -1


_Move = Callable[[ir.Node, Ids, Sequence[tuple[int, ...]]], Sequence[Ids]]


def _reshape(node: ir.Node, labels: Ids, shapes: Sequence[tuple[int, ...]]) -> Sequence[Ids]:
    return [labels.reshape(shapes[0])]


def _transpose(node: ir.Node, labels: Ids, shapes: Sequence[tuple[int, ...]]) -> Sequence[Ids]:
    return [labels.transpose(node.attributes.get_ints("perm") or range(labels.ndim)[::-1])]


def _split(node: ir.Node, labels: Ids, shapes: Sequence[tuple[int, ...]]) -> Sequence[Ids]:
    axis = node.attributes.get_int("axis", 0)
    return np.split(labels, np.cumsum([shape[axis] for shape in shapes])[:-1], axis)


def _slice(node: ir.Node, labels: Ids, shapes: Sequence[tuple[int, ...]]) -> Sequence[Ids]:
    if any(value is not None and value.const_value is None for value in node.inputs[1:]):
        raise Declined("is given computed bounds")
    starts, ends, axes, steps = (
        integers(node, place, name) for place, name in enumerate(("starts", "ends", "axes", "steps"), 1)
    )
    assert starts is not None
    assert ends is not None
    index = [slice(None)] * labels.ndim
    for n, axis in enumerate(range(len(starts)) if axes is None else axes.tolist()):
        index[axis] = slice(int(starts[n]), int(ends[n]), 1 if steps is None else int(steps[n]))
    return [labels[tuple(index)]]


def _gather(node: ir.Node, labels: Ids, shapes: Sequence[tuple[int, ...]]) -> Sequence[Ids]:
    indices = constant_of(node.inputs[1])
    if indices is None:
        raise Declined("picks it by computed indices")
    return [labels.take(indices, node.attributes.get_int("axis", 0))]


_MOVES: Mapping[str, _Move] = {
    **dict.fromkeys(("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Transpose": _transpose,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
}
