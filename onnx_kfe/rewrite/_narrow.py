"""Narrow a network: remove the channels that a plan gives up, and have what is left make up for them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from onnx_kfe.calibration import Statistics
from onnx_kfe.errors import UsageError
from onnx_kfe.graph import Network, find_groups
from onnx_kfe.planning import LayerProblem, Plan, cut_layer
from onnx_kfe.rewrite._channels import ChannelPass
from onnx_kfe.rewrite._reweigh import ReweighPass, Weights
from onnx_kfe.rewrite._rotate import rotate

__all__ = ["Narrowed", "narrow"]


class Narrowed(NamedTuple):
    """A network with fewer channels.

    Attributes:
        network: The network, whose `whole` is the one that it was narrowed from.
        statistics: The parts of the statistics that are about what is left.
        losses: Predicted loss by layer of the inputs that went, in nats per sample; none without statistics.
    """

    network: Network
    statistics: Statistics | None
    losses: dict[str, float]


def narrow(network: Network, plan: Plan, statistics: Statistics | None) -> Narrowed:
    """A network without the channels that a plan gives up.

    Layers that lose inputs, ConvTranspose apart, get the mean of what these gave as a bias, and where the plan says so
    weights that make up for the rest as well as can be predicted. Where the plan says so, heads are rotated first.

    Args:
        network: The network.
        plan: Which channels are kept.
        statistics: Of the network; without them what is left is as it was.

    Raises:
        UsageError: The plan's channels are not those of the network, or those of rotated heads without statistics.
    """
    if not plan.channels:
        return Narrowed(network, statistics, {})
    if plan.rotates:
        if statistics is None:
            raise UsageError("the plan's channels are those of rotated heads: give --data or --stats")
        network, statistics = rotate(network, statistics)
    groups = find_groups(network)
    masks = plan.masks(groups)
    cuts = groups.cut(masks)
    weights, losses, shifts = {}, {}, {}
    if statistics is not None:
        for layer in network.prunable:
            cut = cuts[layer.name]
            if layer.name not in statistics.layers or layer.transposed or (cut.rows.all() and cut.columns.all()):
                continue
            for use in layer.uses:
                left = cut_layer(LayerProblem(use, statistics.layers[layer.name]), cut, plan.compensates)
                weights[use.name], losses[layer.name] = Weights(left.weight, left.bias), left.loss
                if use.op_type == "MatMul":
                    shifts[use.name] = left.bias
        statistics = replace(
            statistics,
            layers={name: seen.cut(cuts[name].rows, cuts[name].columns) for name, seen in statistics.layers.items()},
        )
    model = ChannelPass(network, masks)(network.model.clone()).model
    model = ReweighPass(weights)(model).model
    return Narrowed(network.narrowed(model, cuts, shifts), statistics, losses)
