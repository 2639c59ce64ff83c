"""Operators that change the positions of images and leave their channels apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.graph.groups._flow import Axes, Declined, Flow, constant_of, operand
from onnx_kfe.graph.groups._registry import rule

__all__: list[str] = []


@rule("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def pool(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """Channels pass; the indices that MaxPool may give count over all channels."""
    if len(node.outputs) > 1 and node.outputs[1].uses():
        raise Declined("counts its indices over it")
    return [_channels(flow, node)]


@rule("Resize", "Upsample")
def resize(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """Channels pass; sizes that are given are counted anew."""
    axes, shape = flow.axes(operand(node, 0)), flow.shape(operand(node, 0))
    if any(ids is not None and flow.shape(node.outputs[0])[axis] != shape[axis] for axis, ids in enumerate(axes)):
        raise Declined("resizes it")
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        given = node.attributes.get_ints("axes")
        resized = range(len(axes)) if given is None else [axis % len(axes) for axis in given]
        sizes = {entry: axes[axis] for entry, axis in enumerate(resized)}
        if constant_of(node.inputs[3]) is not None:
            flow.count(node, 3, sizes)
        else:
            flow.follow(node, 3, sizes)
    return [axes]


@rule("DepthToSpace")
def depth_to_space(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """The channels that become positions of one channel go together."""
    axes = _channels(flow, node)
    blocks = node.attributes.get_int("blocksize", 1) ** 2
    if axes[1] is None:
        return [axes]
    depth_first = node.attributes.get_string("mode", "DCR") == "DCR"
    parts = axes[1].reshape(blocks, -1) if depth_first else axes[1].reshape(-1, blocks).T
    for part in parts[1:]:
        flow.unite(node, parts[0], part)
    return [[axes[0], parts[0], *axes[2:]]]


@rule("SpaceToDepth")
def space_to_depth(flow: Flow, node: ir.Node) -> Sequence[Axes]:
    """A channel becomes one for each of its positions in a block."""
    axes = _channels(flow, node)
    blocks = node.attributes.get_int("blocksize", 1) ** 2
    return [[axes[0], None if axes[1] is None else np.tile(axes[1], blocks), *axes[2:]]]


def _channels(flow: Flow, node: ir.Node) -> Axes:
    """The coordinates of samples and channels, those of positions staying."""
    axes = flow.axes(operand(node, 0))
    for ids in axes[2:]:
        flow.freeze(node, ids, "moves over it")
    return [*axes[:2], *(None for _ in axes[2:])]
