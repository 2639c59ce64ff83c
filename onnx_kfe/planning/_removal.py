"""Removal: residual branches left out altogether, as candidates that cover several layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnx_kfe.graph import Branch, Layer, Network, find_branches
from onnx_kfe.planning._allocation import REMOVED, Candidate
from onnx_kfe.planning._chain import Cost, dense_cost
from onnx_kfe.planning._latency import LatencyModel
from onnx_kfe.planning._problem import LayerProblem

__all__ = ["removal_loss", "removals"]


def removal_loss(problem: LayerProblem) -> float:
    """Predicted loss in nats per sample of a layer that gives its mean output, ``problem.bias`` of a weight of zero."""
    return problem.loss(np.zeros_like(problem.weight))


def removals(
    network: Network, losses: Mapping[str, float], latency: LatencyModel | None = None
) -> dict[str, Candidate]:
    """The removal of each residual branch, a candidate of its last layer.

    Of two branches that end in the same sum only one is on offer, or nothing might be left to add: the one that loses
    less for each of the MACs it saves.

    Args:
        network: The model.
        losses: `removal_loss` by name of the layers that have candidates of their own.
        latency: Measured latencies.

    Returns:
        A candidate by name of the last layer, which allocation takes among that layer's others.
    """
    layers = {layer.name: layer for layer in network.layers}
    branches = [branch for branch in find_branches(network) if branch.layer in losses]

    def loss_per_mac(branch: Branch) -> float:
        return losses[branch.layer] / sum(layers[name].macs for name in branch.layers)

    offered: dict[str, Branch] = {}
    for branch in sorted(branches, key=loss_per_mac):
        offered.setdefault(branch.sum, branch)
    found = {}
    for branch in offered.values():
        rest = [_own_cost(layers[name], network.model.graph, latency) for name in branch.layers if name not in losses]
        cost = (
            Cost(*(-sum(parts) for parts in zip(*map(dataclasses.astuple, rest), strict=True))) if rest else Cost(0, 0)
        )
        if latency is not None and branch.layer in latency.savings:  # all that vanishes, not only layers
            own = sum(latency.dense(layers[name]) for name in branch.layers if name in losses)
            cost = dataclasses.replace(cost, nanoseconds=own - latency.savings[branch.layer])
        others = tuple(name for name in branch.layers if name != branch.layer)
        found[branch.layer] = Candidate(REMOVED, (), cost, max(losses[branch.layer], 0.0), others)
    return found


def _own_cost(layer: Layer, graph: ir.Graph, latency: LatencyModel | None) -> Cost:
    """What a layer costs, its weight counted only where that is a constant which no other node reads."""
    if layer.geometry is None:
        return Cost(0, 0)
    cost, weight = dense_cost(layer.geometry), layer.weight_value
    assert weight is not None
    own = graph.initializers.get(weight.name or "") is weight and len(weight.uses()) == 1
    if latency is not None:
        cost = dataclasses.replace(cost, nanoseconds=latency.dense(layer))
    return cost if own else dataclasses.replace(cost, parameters=0)
