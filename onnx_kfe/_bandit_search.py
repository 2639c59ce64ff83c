"""A plan refined by measurements: a factored bandit whose evaluations are whole models on minibatches."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnx_kfe import evaluation
from onnx_kfe._headed import giving, head_specs
from onnx_kfe._latency_goal import Stadium
from onnx_kfe._measure import Machine
from onnx_kfe.calibration import Batch, Dataset, Statistics, batches, fixed_batch, input_specs
from onnx_kfe.errors import BudgetError, KfeError
from onnx_kfe.graph import Network, serialize
from onnx_kfe.planning import REMOVED, Budget, Candidate, Latency, Plan, Planner, arms_around, refine
from onnx_kfe.progress import Progress
from onnx_kfe.rewrite import Chain, solve_plan, write_chains
from onnx_kfe.runtime import Serialized, create_session

__all__ = ["DEFAULT_EVALUATIONS", "refine_plan"]

DEFAULT_EVALUATIONS = 200
_ARMS = 4  # besides the start's
_MINIBATCH = 64
_STEP = 0.05  # of the budget, over which the price of what it limits is taken
_RUNS = 5  # of which the fastest counts


def refine_plan(
    network: Network,
    planner: Planner,
    plan: Plan,
    budgets: Sequence[Budget],
    statistics: Statistics,
    samples: Dataset,
    machine: Machine,
    evaluations: int,
    progress: Progress,
) -> Plan:
    """Look near a plan for one whose models lose less on minibatches, within the same budgets.

    The cost of a model is its divergence from the original in nats a sample, one shot, plus what it spends of the first
    budget at the price that the K-FAC predictions put on it around the plan. A latency is measured, the rest counted.

    Args:
        network: The model.
        planner: What made the plan.
        plan: Where to start.
        budgets: Bounds that the result keeps, as predicted.
        statistics: What weights are solved under.
        samples: Minibatches are taken from them in turn.
        machine: What models run on.
        evaluations: At most so many models are measured.
        progress: Told what came of it.

    Returns:
        The refined plan, or the given one where none was measured to be better.
    """
    judge = _Judge(network, planner, plan, budgets, statistics, samples, machine)
    arms = {
        name: arms_around(planner.options[name], choice, _ARMS, type(budgets[0]))
        for name, choice in plan.choices.items()
        if choice.form != REMOVED
    }
    with progress.stage("searching", evaluations) as advance:

        def cost(choices: Mapping[str, Candidate], number: int) -> float:
            advance(1)
            return judge.cost(choices, number)

        found = refine(plan.choices, arms, cost, evaluations, feasible=judge.feasible)
    gain = (
        "no better plan was proposed" if math.isnan(found.gain) else f"gain {found.gain:.2g} +- {found.error:.2g} nats"
    )
    taken = "the plan stays" if found.is_start else f"{judge.changes(found.choices)} layers changed"
    progress.note(f"bandit, {found.evaluations} evaluations: {gain}, {taken}")
    return replace(plan, choices=found.choices)


class _Judge:
    """Measures the models of plans near one plan."""

    def __init__(
        self,
        network: Network,
        planner: Planner,
        plan: Plan,
        budgets: Sequence[Budget],
        statistics: Statistics,
        samples: Dataset,
        machine: Machine,
    ) -> None:
        self._network, self._planner, self._plan, self._budgets = network, planner, plan, budgets
        self._statistics, self._machine = statistics, machine
        specs = input_specs(network.model)
        self._batches: list[Batch] = [replace(b, labels=None) for b in batches(samples, _MINIBATCH, specs)]
        if not self._batches:
            raise KfeError(f"{samples.describe()}: too few samples for a minibatch of {fixed_batch(specs)}")
        self._heads = head_specs(statistics.heads, scaled=True)
        self._original = serialize(giving(network.original, self._heads))
        self._chains: dict[tuple[str, Candidate], Chain] = {}
        self._price = self._price_of(budgets[0])
        self._stadium = Stadium(network, machine) if isinstance(budgets[0], Latency) else None

    def cost(self, choices: Mapping[str, Candidate], number: int) -> float:
        """Loss on the minibatch of a round, and the price of what is spent."""
        plan = self._changed(choices)
        smaller = write_chains(self._network, plan, self._statistics, self._solved(plan))
        model = serialize(giving(smaller, self._heads))
        batch = self._batches[number % len(self._batches)]
        quality = evaluation.evaluate(
            model, [batch], reference=self._original, heads=self._heads,
            providers=self._machine.providers, threads=self._machine.threads,
        )  # fmt: skip
        loss = quality.divergence if quality.divergence is not None else math.nan
        return loss + self._price * self._spent(plan, model)

    def feasible(self, choices: Mapping[str, Candidate]) -> bool:
        """Whether choices keep the budgets, or spend no more than the start."""
        plan = self._changed(choices)
        original, _ = self._planner.costs()
        for budget in self._budgets:
            spent, start = (self._planner.fraction(each, type(budget)) for each in (plan, self._plan))
            if spent > max(budget.limit(budget.of(original)) / budget.of(original), start) + 1e-9:
                return False
        return True

    def changes(self, choices: Mapping[str, Candidate]) -> int:
        """In how many layers choices differ from the start."""
        return sum(choice != self._plan.choices[name] for name, choice in choices.items())

    def _changed(self, choices: Mapping[str, Candidate]) -> Plan:
        return replace(self._plan, choices=dict(choices))

    def _solved(self, plan: Plan) -> dict[str, Chain]:
        """The chains of a plan, each solved once."""
        wanted = {name: c for name, c in plan.changed.items() if c.form != REMOVED or name in plan.removed}
        missing = {name: c for name, c in wanted.items() if (name, c) not in self._chains}
        if missing:
            solved, _ = solve_plan(self._network, replace(plan, choices=missing), self._statistics)
            self._chains.update({(name, missing[name]): chain for name, chain in solved.items()})
        return {name: self._chains[name, choice] for name, choice in wanted.items()}

    def _price_of(self, budget: Budget) -> float:
        """Nats for the whole of what the original spends."""
        kind = Latency if isinstance(budget, Latency) else type(budget)  # which take fractions, milliseconds do not
        spent = self._planner.fraction(self._plan, kind)
        try:
            tighter = self._planner.plan(kind(min((1 - _STEP) * spent, 1.0)))
        except BudgetError:
            return 0.0
        return max(tighter.predicted_loss - self._plan.predicted_loss, 0.0) / (_STEP * spent)

    def _spent(self, plan: Plan, model: Serialized) -> float:
        if self._stadium is None:
            return self._planner.fraction(plan, type(self._budgets[0]))
        return _fastest(self._session(model), self._stadium.feeds) / _fastest(
            self._session(self._original), self._stadium.feeds
        )

    def _session(self, model: Serialized) -> Any:
        return create_session(model, providers=self._machine.providers, threads=self._machine.threads)


def _fastest(session: Any, feeds: Mapping[str, np.ndarray]) -> float:
    def run() -> float:
        start = time.perf_counter()
        session.run(None, dict(feeds))
        return time.perf_counter() - start

    return min(run() for _ in itertools.repeat(None, _RUNS))
