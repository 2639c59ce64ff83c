"""Pruning in rounds: statistics collected anew on what is left, a part of the rest dropped, and so on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from onnx_kfe._latency_goal import Lap
from onnx_kfe._measure import Machine
from onnx_kfe._recipe import Recipe, make_plan, plan_by, stadium_for
from onnx_kfe.calibration import Statistics
from onnx_kfe.errors import UsageError
from onnx_kfe.graph import Geometry, Network, open_network
from onnx_kfe.kfe import Array
from onnx_kfe.planning import (
    Budget,
    Candidate,
    DirectionChain,
    DirectionPlanner,
    Directions,
    Latency,
    LayerProblem,
    Macs,
    Method,
    Milliseconds,
    Plan,
    Stage,
    compose,
    network_cost,
    three_factors,
)
from onnx_kfe.progress import Progress
from onnx_kfe.recovery.schedules import learnt_directions, with_weights
from onnx_kfe.rewrite import Chain, FactorizePass, add_losses, narrow, write_chains

__all__ = ["Rounds", "prune_in_rounds"]

Collect = Callable[[Network], Statistics]
Train = Callable[[ir.Model], ir.Model]


@dataclass(frozen=True)
class Rounds:
    """What came of all rounds.

    Attributes:
        network: The network, narrowed by what channels went.
        statistics: Of the last round, of what is left.
        plan: What became of the layers of the original.
        chains: The chains in the place of layers.
        losses: Predicted loss by layer over all rounds, in nats per sample.
        laps: The models that were timed in the last round.
    """

    network: Network
    statistics: Statistics
    plan: Plan
    chains: dict[str, Chain] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    laps: list[Lap] = field(default_factory=list)


@dataclass(frozen=True)
class _Terms:
    """What all rounds have in common; attributes as the arguments of `prune_in_rounds`."""

    method: Method
    round_to: int | None
    machine: Machine
    collect: Collect
    progress: Progress
    train: Train | None


def prune_in_rounds(
    network: Network,
    statistics: Statistics,
    budgets: Sequence[Budget],
    recipe: Recipe,
    round_to: int | None,
    machine: Machine,
    collect: Collect,
    progress: Progress,
    train: Train | None = None,
) -> Rounds:
    """Prune by a share in each round, the same one, until the budgets are met (iterative pruning, Wang et al. 2019).

    Args:
        network: The model.
        statistics: Of the model, for the first round.
        budgets: What is to be met in the end.
        recipe: The method, in one of the two bases, and how many rounds.
        round_to: Grid of what is kept.
        machine: What latency is of.
        collect: Collects statistics of what is left.
        progress: Shows what is going on.
        train: Trains what is left after each round but the last, which is the caller's.

    Raises:
        BudgetError: The budgets cannot be met.
        UsageError: A budget that cannot be divided over rounds.
    """
    steps = [[_step(budget, network, place / recipe.rounds) for budget in budgets] for place in range(1, recipe.rounds)]
    run = _channel_rounds if recipe.method.form is None else _direction_rounds
    terms = _Terms(recipe.method, round_to, machine, collect, progress, train)
    return run(network, statistics, [*steps, list(budgets)], terms)


def _step(budget: Budget, network: Network, share: float) -> Budget:
    """The budget after a share of the rounds, on a geometric way from the whole model."""
    if isinstance(budget, Milliseconds):
        raise UsageError("--latency-ms cannot be divided over --iterations: give --latency")
    fraction = budget.amount
    if fraction > 1:
        fraction = min(fraction / budget.of(network_cost(network)), 1.0)
    kind = Macs if isinstance(budget, Latency) else type(budget)  # only the last round is timed
    return kind(fraction**share)


def _channel_rounds(
    network: Network, statistics: Statistics, steps: Sequence[Sequence[Budget]], terms: _Terms
) -> Rounds:
    found = Rounds(network, statistics, Plan(network.fingerprint, {}, network_cost(network)))
    for place, budgets in enumerate(steps):
        seen = terms.collect(found.network) if place else statistics
        chosen = make_plan(
            found.network, seen, budgets, terms.machine, terms.progress, round_to=terms.round_to,
            recipe=Recipe(terms.method),
        )  # fmt: skip
        plan = chosen.plan
        left = narrow(found.network, plan, seen)
        before = found.plan.channels
        after = {name: tuple(before[name][n] for n in kept) if name in before else kept
                 for name, kept in plan.channels.items()}  # fmt: skip
        assert left.statistics is not None
        inner = left.network
        if terms.train is not None and place < len(steps) - 1:
            inner = with_weights(inner, terms.train(inner.model))
        found = Rounds(
            inner, left.statistics, replace(plan, channels={**before, **after}),
            losses=add_losses(found.losses, left.losses), laps=chosen.laps,
        )  # fmt: skip
    choices = {name: replace(choice, loss=found.losses.get(name, 0.0)) for name, choice in found.plan.choices.items()}
    return replace(found, plan=replace(found.plan, choices=choices))


def _direction_rounds(
    network: Network, statistics: Statistics, steps: Sequence[Sequence[Budget]], terms: _Terms
) -> Rounds:
    """Cores of the chains so far are layers in the next round, and the new rotations are folded into the old ones."""
    form = terms.method.form
    assert form is not None
    state = _Bottlenecks(network, form)
    plan = Plan(network.fingerprint, {}, network_cost(network))
    laps: list[Lap] = []
    losses: dict[str, float] = {}
    for place, budgets in enumerate(steps):
        cores: dict[str, LayerProblem] = {}
        if place:
            if terms.train is not None:
                network = state.learn(terms.train)
            inner = state.network(plan, statistics)
            seen = terms.collect(inner)
            cores = state.cores(inner, seen)
            dense = {name: seen.layers.get(name, before) for name, before in statistics.layers.items()}
            statistics = replace(statistics, layers=dense)
        settled = {name: choice for name, choice in plan.changed.items() if name not in cores}
        stadium = stadium_for(network, terms.machine, budgets)
        planner = DirectionPlanner(
            network, statistics, form, round_to=terms.round_to,
            nanoseconds=0 if stadium is None else stadium.nanoseconds(), cores=cores, settled=settled,
        )  # fmt: skip
        chosen = plan_by(planner, network, budgets, stadium, terms.progress)
        plan, laps = chosen.plan, chosen.laps
        losses = add_losses(losses, state.keep(planner, plan, settled))
    choices = {name: replace(choice, loss=losses.get(name, 0.0)) for name, choice in plan.choices.items()}
    return Rounds(network, statistics, replace(plan, choices=choices), state.chains(), losses, laps)


class _Bottlenecks:
    """The chains so far, as directions that later rounds may drop more of."""

    def __init__(self, network: Network, form: DirectionChain) -> None:
        self._network, self._form = network, form
        self._layers = {layer.name: layer for layer in network.layers}
        self._kept: dict[str, Directions] = {}
        self._bias: dict[str, Array] = {}

    def keep(self, planner: DirectionPlanner, plan: Plan, settled: dict[str, Candidate]) -> dict[str, float]:
        """Take over what a round chose; gives the predicted losses of the round."""
        losses = {}
        for name, choice in plan.changed.items():
            if name in settled:
                continue
            problem = planner.problems[name]
            new = self._form.directions(problem, choice.ranks)
            approximation = compose(three_factors(new, problem.geometry))
            bias = problem.bias(approximation if self._form.moves_bias else problem.weight)
            if name in self._kept:
                before = self._kept[name]
                self._kept[name], self._bias[name] = before.around(new), self._bias[name] + before.decoder @ bias
            else:
                self._kept[name], self._bias[name] = new, bias
            losses[name] = problem.loss(approximation)
        return losses

    def learn(self, train: Train) -> Network:
        """Train the chains and all else; gives the network with what layers beside the chains learnt."""
        chains = {name: self._chain(name, three_factors) for name in self._kept}
        model = train(FactorizePass(chains)(self._network.model.clone()).model)
        self._network = with_weights(self._network, model)
        self._layers = {layer.name: layer for layer in self._network.layers}
        for name in chains:
            self._kept[name], self._bias[name] = learnt_directions(self._network, name, self._form.name, model)
        return self._network

    def network(self, plan: Plan, statistics: Statistics) -> Network:
        """The network of the chains so far, opened anew at the same shapes."""
        chains = {name: self._chain(name, three_factors) for name in self._kept}
        model = write_chains(self._network, plan, statistics, chains)
        return open_network(model, input_shapes=self._network.input_shapes)

    def cores(self, inner: Network, statistics: Statistics) -> dict[str, LayerProblem]:
        """The cores as layers of their own, by name of the layer in whose place they are."""
        layers = {layer.name: layer for layer in inner.layers}
        found = {}
        for name in self._kept:
            core = f"{name}/{self._form.name}_1"
            if core in statistics.layers:
                found[name] = LayerProblem(layers[core], statistics.layers[core])
        return found

    def chains(self) -> dict[str, Chain]:
        """What layers became."""
        return {name: self._chain(name, self._form.written) for name in self._kept}

    def _chain(self, name: str, write: Callable[[Directions, Geometry], list[Stage]]) -> Chain:
        layer = self._layers[name]
        assert layer.geometry is not None
        return Chain(layer, self._form.name, write(self._kept[name], layer.geometry), self._bias[name])
