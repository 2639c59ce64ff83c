"""Plans that drop the least important directions of each layer's Kronecker-factored eigenbasis, as EigenDamage does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from onnx_kfe.calibration import Statistics
from onnx_kfe.graph import Network
from onnx_kfe.kfe import Array
from onnx_kfe.planning._allocation import DENSE, Candidate
from onnx_kfe.planning._chain import Cost, compose, layer_cost
from onnx_kfe.planning._direction_forms import DirectionChain
from onnx_kfe.planning._plan import Plan, network_cost
from onnx_kfe.planning._problem import LayerProblem
from onnx_kfe.planning._threshold import Masks, ThresholdPlanner, check_any

__all__ = ["DirectionPlanner"]

_ROWS, _COLUMNS = " rows", " columns"


class DirectionPlanner(ThresholdPlanner):
    """Rows and columns of all layers but the last, in the KFE, under one threshold (Wang et al. 2019, section 4).

    A layer is replaced where the form accepts it.

    Args:
        network: The model.
        statistics: Collected on this very model.
        form: What layers become.
        round_to: Grid of the numbers of directions that are kept; any number when None.
        nanoseconds: Latency of a run of the original, where there is a budget of latency.
        cores: Of the layers that were replaced in a round before, the core as a layer of its own.
        settled: What has become of layers that no later round changes.

    Raises:
        BudgetError: No layer can be pruned.
        KfeError: The statistics are of another model.
    """

    bounds = "of each layer the best directions stay, a twentieth at least"

    def __init__(
        self,
        network: Network,
        statistics: Statistics,
        form: DirectionChain,
        *,
        round_to: int | None = None,
        nanoseconds: int = 0,
        cores: Mapping[str, LayerProblem] | None = None,
        settled: Mapping[str, Candidate] | None = None,
    ) -> None:
        statistics.check_model(network.fingerprint, network.name)
        self._network, self._form = network, form
        self._skipped = network.left_alone
        self._cores, self._settled = dict(cores or {}), dict(settled or {})
        self._layers = {layer.name: layer for layer in network.prunable}
        self.problems: dict[str, LayerProblem] = {}
        """What is to be approximated, by layer name."""
        for layer in network.prunable:
            if layer.name in self._cores:
                self.problems[layer.name] = self._cores[layer.name]
            elif layer.name in self._settled:
                continue
            elif layer.name not in statistics.layers:
                self._skipped[layer.name] = statistics.skipped.get(layer.name, "no statistics were collected")
            elif any(use.name == network.layers[-1].name for use in layer.uses):
                self._skipped[layer.name] = "the last layer, which EigenDamage leaves as it is"
            elif layer.geometry is not None and not form.limits(layer.geometry):
                self._skipped[layer.name] = f"form '{form.name}' is for ungrouped layers"
            else:
                self.problems[layer.name] = LayerProblem(layer, statistics.layers[layer.name])
        scores: dict[str, Array] = {}
        for name, problem in self.problems.items():
            scores[name + _ROWS], scores[name + _COLUMNS] = form.scores(problem)
        if not self._settled:  # of what was, some may be small enough already
            check_any(scores, self._skipped)
        original = network_cost(network.whole or network)
        super().__init__(scores, original, network_cost(network), round_to, nanoseconds)

    def cost(self, masks: Masks) -> Cost:
        return self._total({name: self._choice(name, masks) for name in self.problems} | self._settled)

    def planned(self, plan: Plan) -> Cost:
        return self._total(plan.choices)

    def written(self, masks: Masks, budget: str) -> Plan:
        choices = dict(self._settled)
        for name, problem in self.problems.items():
            choices[name] = choice = self._choice(name, masks)
            if choice.form != DENSE:
                approximation = compose(self._form.stages(problem, choice.ranks))
                choices[name] = replace(choice, loss=problem.loss(approximation))
        return Plan(self._network.fingerprint, choices, self._original, budget, self._skipped)

    def _choice(self, name: str, masks: Masks) -> Candidate:
        """The chain of what is kept, or the layer as it is."""
        layer = self._layers[name]
        assert layer.geometry is not None
        ranks = int(masks[name + _COLUMNS].sum()), int(masks[name + _ROWS].sum())
        if name not in self._cores and not self._form.accepted(layer.geometry, ranks):
            return Candidate(DENSE, (), layer_cost(layer), 0.0)
        return Candidate(self._form.name, ranks, layer_cost(layer, partial(self._form.cost, ranks=ranks)), 0.0)

    def _total(self, choices: Mapping[str, Candidate]) -> Cost:
        macs, parameters = self._dense.macs, self._dense.parameters
        for name, choice in choices.items():
            dense = layer_cost(self._layers[name])
            macs += choice.cost.macs - dense.macs
            parameters += choice.cost.parameters - dense.parameters
        return Cost(macs, parameters)
