"""The order in which a refit solves layers: each when all that its nodes read is as it will be."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_kfe.graph import Layer, weight_place
from onnx_kfe.recovery._segments import ancestors

__all__ = ["solving_order"]


def solving_order(layers: Sequence[Layer]) -> tuple[list[Layer], list[Layer]]:
    """An order in which every layer comes behind those that it reads from, at whichever of its nodes.

    Where a layer reads what another node with its weight gave, as a block of layers does that is run repeatedly, there
    is no such order.

    Args:
        layers: The layers, in graph order, which is the result where no weight is shared.

    Returns:
        The layers in order, and those that have to be settled before.
    """
    owners = {use.name: layer.name for layer in layers for use in layer.uses}
    awaited = {layer.name: _read(layer, owners) for layer in layers}
    order: list[Layer] = []
    settled: list[Layer] = []
    left = list(layers)
    while left:
        done = {layer.name for layer in (*order, *settled)}
        ready = next((layer for layer in left if awaited[layer.name] <= done), None)
        # without shared weights the first is always ready
        chosen = next(layer for layer in left if layer.twins) if ready is None else ready
        (order if ready is not None else settled).append(chosen)
        left.remove(chosen)
    return order, settled


def _read(layer: Layer, owners: dict[str, str]) -> set[str]:
    """Names of the layers that the inputs of a layer depend on."""
    values = [use.node.inputs[1 - weight_place(use.node)] for use in layer.uses]
    behind = ancestors(value for value in values if value is not None)
    return {owners[node.name] for node in behind if node.name in owners}
