"""Weights that several nodes share: which of them are pruned as one layer, and why others are left alone."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from onnx_kfe.graph._layers import Layer

__all__ = ["tied"]


def tied(layers: Sequence[Layer]) -> list[Layer]:
    """Layers with the nodes that read a weight in the same way made one: the first owns the others as its twins.

    The others stay in the list, with the reason that they are pruned with the first. Where anything reads the weight in
    another way, or a node cannot be pruned for a reason of its own, none of them can be.

    Args:
        layers: Every linear node of a graph, in order, each judged by itself.
    """
    readers: defaultdict[ir.Value, list[Layer]] = defaultdict(list)
    for layer in layers:
        weight = layer.weight_value
        if weight is not None and weight.const_value is not None:
            readers[weight].append(layer)
    changed: dict[ir.Node, Layer] = {}
    for weight, nodes in readers.items():
        if len(weight.uses()) == 1:
            continue
        obstacle, (owner, *others) = _obstacle(weight, nodes), nodes
        if obstacle is None:
            twins = [dataclasses.replace(other, reason=f"pruned with '{owner.name}'") for other in others]
            nodes = [dataclasses.replace(owner, twins=tuple(twins)), *twins]
        else:
            reason = f"weight '{weight.name}' is shared by {len(weight.uses())} nodes{obstacle}"
            nodes = [dataclasses.replace(node, reason=node.reason or reason) for node in nodes]
        changed |= {layer.node: layer for layer in nodes}
    return [changed.get(layer.node, layer) for layer in layers]


def _obstacle(weight: ir.Value, nodes: Sequence[Layer]) -> str | None:
    """Why the nodes that have a weight cannot be pruned as one, as the end of a sentence; None where they can."""
    own = {layer.node for layer in nodes}
    for node, _ in weight.uses():
        if node not in own:
            return f", {node.op_type} '{node.name}' among them"
    if len(weight.uses()) > len(nodes) or len(set(map(_reading, nodes))) > 1:
        return " that read it in different ways"
    stuck = next((layer for layer in nodes if layer.reason is not None), None)
    return None if stuck is None else f", of which '{stuck.name}' cannot be pruned: {stuck.reason}"


def _reading(layer: Layer) -> tuple[object, ...]:
    """What makes the same numbers the same weight."""
    attributes = layer.node.attributes
    return (
        layer.op_type, layer.left, attributes.get_int("group", 1), attributes.get_int("transB", 0),
        attributes.get_float("alpha", 1.0),
    )  # fmt: skip
