"""Plans that remove the least important channels of the graph, group by group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from onnx_kfe.calibration import Statistics
from onnx_kfe.errors import UsageError
from onnx_kfe.graph import ChannelGroup, Geometry, LayerCut, Network, find_groups
from onnx_kfe.kfe import IMPORTANCES, Array, Scores, compensate
from onnx_kfe.planning._allocation import DENSE, Candidate
from onnx_kfe.planning._budget import Budget
from onnx_kfe.planning._chain import Cost, dense_cost, layer_cost
from onnx_kfe.planning._plan import Plan, network_cost
from onnx_kfe.planning._problem import LayerProblem
from onnx_kfe.planning._threshold import Masks, ThresholdPlanner, check_any

__all__ = ["ChannelPlanner", "CutLayer", "cut_layer"]


@dataclass(frozen=True)
class CutLayer:
    """What is left of a layer when channels go.

    Attributes:
        weight: ``[groups, kept o, kept c, *kernel]``.
        bias: ``[kept out]``, with the mean of what the inputs that go gave.
        loss: Predicted loss in nats per sample of the inputs that go.
    """

    weight: Array
    bias: Array
    loss: float


def cut_layer(problem: LayerProblem, cut: LayerCut, compensates: bool) -> CutLayer:
    """A layer without the channels that go.

    Args:
        problem: The layer.
        cut: What it keeps.
        compensates: Whether the weights that stay make up for those that go, see `kfe.compensate`.
    """
    groups = len(problem.weight)
    rows, columns = cut.rows.reshape(groups, -1), cut.columns.reshape(groups, -1)
    approximation = np.zeros_like(problem.weight)
    weights = []
    for place, group in enumerate(problem.groups):
        kept = np.ix_(rows[place], columns[place])
        if compensates:
            # Outputs that go are made up for where they are read: both sides at once do it twice, and measure worse.
            factors = group.input_factor, group.output_factor
            weights.append(compensate(group.weight, *factors, rows[place], columns[place], output_side=False))
        else:
            weights.append(group.weight[kept])
        approximation[place][kept] = weights[-1]
    bias = problem.bias(approximation)[cut.rows]
    approximation[~rows] = problem.weight[~rows]  # what goes with an output is a loss of the layers that read it
    return CutLayer(np.stack(weights), bias, problem.loss(approximation))


class ChannelPlanner(ThresholdPlanner):
    """Channels of all groups under one threshold: the importance of a unit is that of all rows that go with it.

    Where no layer that computes a group has statistics, it is that of the columns that read it, but for the saliency,
    which says nothing of these. ConvTranspose has no say.

    Args:
        network: The model.
        statistics: Collected on this very model; None where the importance looks at the weights alone.
        importance: Key of `IMPORTANCES`.
        spares: What the importance is divided by, for each unit what goes with it: the budget of that resource then
            costs least. None for the importance alone, as published methods have it.
        round_to: Grid of the numbers of channels that are kept; any number when None.
        nanoseconds: Latency of a run of the original, where there is a budget of latency.
        rotates: Whether heads of the network were rotated, which plans are to say.

    Raises:
        BudgetError: No group can be pruned.
        KfeError: The statistics are of another model, or lack what the importance needs in every layer.
        UsageError: There are none, and the importance needs them.
    """

    bounds = "of each group the best channels stay, a twentieth at least"

    def __init__(
        self,
        network: Network,
        statistics: Statistics | None,
        importance: str,
        *,
        spares: type[Budget] | None = None,
        round_to: int | None = None,
        nanoseconds: int = 0,
        rotates: bool = False,
    ) -> None:
        if statistics is not None:
            statistics.check_model(network.fingerprint, network.name)
        elif IMPORTANCES[importance].needs != "weights":
            raise UsageError(f"--method {importance} needs statistics: give --data or --stats")
        self._network, self._statistics, self._importance = network, statistics, IMPORTANCES[importance]
        self._rotates = rotates
        self._sides = ("rows",) if self._importance.needs == "saliency" else ("rows", "columns")
        self._channels = find_groups(network)
        self._layers = {layer.name: layer for layer in network.layers}
        weights = {layer.weight_value: layer.name for layer in network.layers}
        # of the layers that share a weight one, and none where it is computed
        self._owners = {name for weight, name in weights.items() if weight is not None and weight.is_initializer()}
        self._skipped: dict[str, str] = {}
        layer_scores = dict(self._layer_scores())
        scores: dict[str, Array] = {}
        for group in self._channels.groups:
            found = _unit_scores(group, layer_scores, self._sides)
            if group.reason is not None or found is None:
                self._skipped[f"channels of {group.name}"] = group.reason or self._unseen(group)
            else:
                scores[group.name] = found / self._spared(group, spares)
        check_any(scores, self._skipped)
        original = network_cost(network.whole or network)
        super().__init__(scores, original, network_cost(network), round_to, nanoseconds)

    def cost(self, masks: Masks) -> Cost:
        cuts = self._channels.cut(masks)
        macs, parameters = self._dense.macs, self._dense.parameters
        for layer in self._network.layers:
            if layer.geometry is not None:
                before, after = dense_cost(layer.geometry), _cost_after(cuts[layer.name], layer.geometry)
                macs += after.macs - before.macs
                if layer.name in self._owners:
                    parameters += after.parameters - before.parameters
        return Cost(macs, parameters)

    def planned(self, plan: Plan) -> Cost:
        return self.cost(plan.masks(self._channels))

    def written(self, masks: Masks, budget: str) -> Plan:
        cuts = self._channels.cut(masks)
        compensates = self._importance.compensates
        choices = {}
        for layer in self._network.prunable:
            cut, loss = cuts[layer.name], 0.0
            if self._statistics is not None and layer.name in self._statistics.layers and not layer.transposed:
                problem = LayerProblem(layer, self._statistics.layers[layer.name])
                loss = cut_layer(problem, cut, compensates).loss
            cost = layer_cost(layer, partial(_cost_after, cut))
            choices[layer.name] = Candidate(DENSE, (), cost, loss)
        kept = {name: tuple(map(int, np.flatnonzero(mask))) for name, mask in masks.items() if not mask.all()}
        return Plan(
            self._network.fingerprint, choices, self._original, budget, self._skipped, kept, compensates,
            self._rotates,
        )  # fmt: skip

    def _layer_scores(self) -> Iterator[tuple[str, Scores]]:
        """Of the rows and columns of each layer, all groups of a convolution in a row."""
        seen = {} if self._statistics is None else self._statistics.layers
        for layer in self._network.prunable:
            if not layer.transposed and (self._statistics is None or layer.name in seen):
                problem = LayerProblem(layer, seen.get(layer.name))
                by_group = [self._importance(part) for part in problem.coordinates("channel")]
                yield layer.name, Scores(*(np.concatenate(parts) for parts in zip(*by_group, strict=True)))

    def _spared(self, group: ChannelGroup, kind: type[Budget] | None) -> Array:
        """What goes with each unit alone, in the resource of a budget; 1 without one."""
        if kind is None:
            return np.ones(group.size)
        total = np.zeros(group.size)
        for member in group.members:
            geometry = self._layers[member.layer].geometry
            if geometry is None:
                continue
            cost, own = dense_cost(geometry), member.units >= 0
            if member.layer not in self._owners:  # whose weight is another's, too
                cost = Cost(cost.macs, 0)
            total += kind(1).of(cost) / len(own) * np.bincount(member.units[own], minlength=group.size)
        return np.maximum(total, 1.0)

    def _unseen(self, group: ChannelGroup) -> str:
        """Why there is no importance of a group."""
        names = [member.layer for member in group.members]
        skipped = {} if self._statistics is None else self._statistics.skipped
        reason = next((skipped[name] for name in names if name in skipped), None)
        layers = [self._layers[name] for name in names if name in self._layers]
        reason = reason or next((layer.reason for layer in layers), None)
        if reason is None and layers and all(layer.transposed for layer in layers):
            reason = "ConvTranspose has no say in channels"
        return f"no statistics of its layers: {reason or 'none were collected'}"


def _cost_after(cut: LayerCut, whole: Geometry) -> Cost:
    return dense_cost(cut.geometry(whole))


def _unit_scores(group: ChannelGroup, layer_scores: dict[str, Scores], sides: Sequence[str]) -> Array | None:
    """Importance of each unit: summed over the rows that compute it, else over the columns that read it."""
    for side in sides:
        members = [member for member in group.members if member.side == side and member.layer in layer_scores]
        total = np.zeros(group.size)
        for member in members:
            own = member.units >= 0
            found = getattr(layer_scores[member.layer], side)[own]
            total += np.bincount(member.units[own], weights=found, minlength=group.size)
        if members:
            return total
    return None
