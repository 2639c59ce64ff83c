"""The planner: candidates of all layers, made once, and plans from them under any budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnx_kfe.calibration import Statistics
from onnx_kfe.errors import BudgetError, UsageError
from onnx_kfe.graph import Network
from onnx_kfe.planning._allocation import Candidate, allocate, candidates, least, worthwhile
from onnx_kfe.planning._any_planner import AnyPlanner
from onnx_kfe.planning._budget import Budget, Latency, describe
from onnx_kfe.planning._chain import Cost
from onnx_kfe.planning._latency import DEFAULT_ROUND_TO, LatencyModel
from onnx_kfe.planning._plan import Plan, network_cost
from onnx_kfe.planning._problem import LayerProblem
from onnx_kfe.planning._removal import removal_loss, removals

__all__ = ["Planner"]

_JUSTIFIED = 1e-3  # share of a weight's energy that may go when nothing but the weights is known


class Planner(AnyPlanner):
    """Plans of one model under several budgets; the candidates of its layers are made once.

    Args:
        network: The model.
        statistics: Collected on this very model; None for what the weights alone justify: forms that change a weight by
            next to nothing, whatever the inputs.
        round_to: Ranks are multiples of this (smaller ones for small layers).
        latency: Measured latencies, which budgets of latency need; their grid is the one that `round_to` gave there.

    Raises:
        KfeError: The statistics are of another model.
    """

    def __init__(
        self,
        network: Network,
        statistics: Statistics | None,
        *,
        round_to: int = DEFAULT_ROUND_TO,
        latency: LatencyModel | None = None,
    ) -> None:
        if statistics is not None:
            statistics.check_model(network.fingerprint, network.name)
        self._network, self._latency, self._proven = network, latency, statistics is not None
        self._skipped = network.left_alone
        self.options: dict[str, Sequence[Candidate]] = {}
        """Candidates by layer, the layer as it is first."""
        losses = {}
        for layer in network.prunable:
            grid = round_to if latency is None else latency.round_to(layer)
            if statistics is None:
                self.options[layer.name] = _justified(LayerProblem(layer, None), grid, latency)
            elif layer.name in statistics.layers:
                problem = LayerProblem(layer, statistics.layers[layer.name])
                self.options[layer.name] = candidates(problem, grid, latency)
                losses[layer.name] = removal_loss(problem)
            else:
                self._skipped[layer.name] = statistics.skipped.get(layer.name, "no statistics were collected")
        for name, removal in removals(network, losses, latency).items():
            self.options[name] = [*self.options[name], removal]

    def plan(self, *budgets: Budget) -> Plan:
        """Choose form and ranks of each layer: least predicted loss under the budgets.

        Raises:
            UsageError: There is no budget, or one of latency where none was measured.
            BudgetError: The budgets cannot be met.
        """
        if not budgets:
            raise UsageError("give a budget: --macs, --params or --latency")
        if self._latency is None and any(isinstance(budget, Latency) for budget in budgets):
            raise UsageError(f"{describe(budgets)}: no latency was measured")
        options = {name: worthwhile(choices, budgets) for name, choices in self.options.items()}
        try:
            choices = allocate(options, budgets, *self.costs())
        except BudgetError as error:
            if self._proven:
                raise
            raise BudgetError(f"without data, {error}; give --data so that more can be justified") from error
        return self._plan(choices, describe(budgets))

    def smallest(self) -> Plan:
        """Of each layer what has the fewest MACs."""
        choices = {name: min(found, key=lambda c: (c.cost.macs, c.loss)) for name, found in self.options.items()}
        return self._plan(choices, "")

    def fraction(self, plan: Plan, kind: type[Budget]) -> float:
        """Size of a plan's model as a fraction of the original's, counted or predicted."""
        original, dense = self.costs()
        changed = sum(
            kind(1).of(choice.cost) - kind(1).of(self.options[name][0].cost) for name, choice in plan.changed.items()
        )
        return (kind(1).of(dense) + changed) / max(kind(1).of(original), 1)

    def least(self, budget: Budget, *held: Budget) -> int:
        """The least of a budget's resource that any plan is predicted to take, of those within the budgets held."""
        options = {name: worthwhile(choices, [budget, *held]) for name, choices in self.options.items()}
        return least(options, budget, *self.costs(), held)

    def costs(self) -> tuple[Cost, Cost]:
        """Of the original, and of the normalised model."""
        cost, dense = network_cost(self._network.whole or self._network), network_cost(self._network)
        if self._latency is None:
            return cost, dense
        original, normalized = self._latency.original, self._latency.normalized
        return replace(cost, nanoseconds=original), replace(dense, nanoseconds=normalized)

    def _plan(self, choices: dict[str, Candidate], budget: str) -> Plan:
        original, _ = self.costs()
        return Plan(self._network.fingerprint, choices, original, budget, self._skipped)

    @property
    def bounds(self) -> str:
        """What bounds a latency."""
        assert self._latency is not None
        return f"{self._latency.bounds}{'' if self._proven else '; give --data so that more can be justified'}"


def _justified(problem: LayerProblem, round_to: int, latency: LatencyModel | None) -> list[Candidate]:
    allowed = _JUSTIFIED * 0.5 * float((problem.weight**2).sum())
    return [choice for choice in candidates(problem, round_to, latency) if choice.loss <= allowed]
