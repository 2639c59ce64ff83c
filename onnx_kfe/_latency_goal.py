"""Budgets of latency: plans from measured latencies, corrected by whole models until these are as fast as is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import onnx_ir as ir

from onnx_kfe import evaluation
from onnx_kfe._measure import Machine
from onnx_kfe.calibration import batches, fixed_batch, input_specs, synthetic_dataset
from onnx_kfe.errors import BudgetError, KfeError
from onnx_kfe.graph import Branch, Network, find_branches, nominal_input_shapes, serialize
from onnx_kfe.planning import (
    AnyPlanner,
    Budget,
    Latency,
    LatencyModel,
    Milliseconds,
    Plan,
    describe,
    measure_latency_model,
)
from onnx_kfe.progress import Progress
from onnx_kfe.rewrite import RemovePass, sketch_plan

__all__ = ["Lap", "Stadium", "meet"]

_TOLERANCE = 0.05
"""A goal is met where the measured latency is no more than this above it."""

_AIM = 0.01
"""Share of the goal that a plan may be above it without another try."""

_SLACK = 0.04
"""Share of the goal that a plan may be below it without another try, which would lose less."""

_MOST_LAPS = 6
_SAME_AIM = 1e-3
_LEAST_STEP = 0.1  # share of a bracket by which the next try keeps away from its ends
_SECONDS = 2.0  # for each model of a race
_SECONDS_IN_A_CROWD = 0.7
_MOST_BRANCHES = 16
_MOST_RACES = 4
_SLOWER = 1.08
_ORIGINAL = "the original"  # a name that no layer has
_NOISY = 0.1  # spread of the ratio, above which a latency cannot be told to the tolerance


@dataclass(frozen=True)
class Lap:
    """One plan whose model was timed.

    Attributes:
        predicted: Latency over the original's, as predicted.
        measured: As measured, the median over rounds.
        low: First quartile over rounds.
        high: Third quartile.
        predicted_loss: In nats a sample.
    """

    predicted: float
    measured: float
    low: float
    high: float
    predicted_loss: float

    def as_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return asdict(self)


class Stadium:
    """Where whole models are timed against the original, on random inputs of the shapes that costs are counted at.

    Args:
        network: The model.
        machine: What they run on.
    """

    def __init__(self, network: Network, machine: Machine) -> None:
        specs = input_specs(network.model)
        self.batch = fixed_batch(specs) or machine.batch
        shapes = nominal_input_shapes(network.model, network.input_shapes)
        samples = synthetic_dataset(specs, self.batch, 0, shapes)
        first = next(batches(samples, self.batch, specs), None)
        if first is None:
            raise KfeError(f"{network.name}: its latency cannot be measured on random inputs")
        self._network, self._machine = network, machine
        self.feeds = first.feeds
        self._original = serialize(network.original)
        self._fastest = np.inf  # of the original, in seconds

    def time(self, model: ir.Model) -> np.ndarray:
        """Latency of a model over that of the original, by round."""
        rounds = self._race({"": model}, _SECONDS)
        return rounds[:, 1] / rounds[:, 0]

    def nanoseconds(self) -> int:
        """Latency of a run of the original."""
        self._race({}, _SECONDS)
        return round(1e9 * self._fastest)

    def measure(self, round_to: int | None, progress: Progress) -> LatencyModel:
        """Measure the model, the same without each of its residual branches, its layers and their forms."""
        network = self._network
        branches = find_branches(network)[:_MOST_BRANCHES]
        models = {"": network.model, **{branch.layer: _without(network, branch) for branch in branches}}
        with progress.stage("measuring the model"):
            rounds = self._race(models, _SECONDS if len(models) == 1 else _SECONDS_IN_A_CROWD)
        original = float(np.median(rounds[:, 0]))
        normalized, *others = original * np.median(rounds[:, 1:] / rounds[:, :1], 0)
        savings = {branch.layer: float(normalized - without) for branch, without in zip(branches, others, strict=True)}
        with progress.stage("measuring layers", 100) as advance:
            shown = 0

            def show(done: int, total: int) -> None:
                nonlocal shown
                advance(100 * done // total - shown)
                shown = 100 * done // total

            model = measure_latency_model(
                network, original, float(normalized), self.feeds, savings, batch=self.batch,
                providers=self._machine.providers, threads=self._machine.threads, round_to=round_to, progress=show,
            )  # fmt: skip
        progress.note(model.bounds)
        if model.refusals:
            progress.note(f"{len(model.refusals)} shapes are left out, the runtime refuses them: {model.refusals[0]}")
        return model

    def _race(self, models: Mapping[str, ir.Model], seconds: float) -> np.ndarray:
        """Latencies ``[rounds, 1 + models]``, those of the original first.

        What else runs on a machine only ever slows it down, for seconds on end and not all models alike. So a race in
        which the original was slower than in another one is run again, a few times.
        """
        named = {_ORIGINAL: self._original, **{name: serialize(model) for name, model in models.items()}}
        machine = self._machine
        best: np.ndarray | None = None
        for _ in range(_MOST_RACES):
            rounds = evaluation.race(
                named, self.feeds, providers=machine.providers, threads=machine.threads, seconds=seconds
            )  # fmt: skip
            if best is None or np.median(rounds[:, 0]) < np.median(best[:, 0]):
                best = rounds
            self._fastest = min(self._fastest, float(np.median(best[:, 0])))
            if np.median(best[:, 0]) <= _SLOWER * self._fastest:
                break
        assert best is not None
        return best


def _without(network: Network, branch: Branch) -> ir.Model:
    """The model without a branch, a one in its place."""
    layer = next(layer for layer in network.layers if layer.name == branch.layer)
    assert layer.geometry is not None
    return RemovePass({branch.layer: np.ones(layer.geometry.out_channels)})(network.model.clone()).model


def meet(
    network: Network, planner: AnyPlanner, budgets: Sequence[Budget], stadium: Stadium, progress: Progress
) -> tuple[Plan, list[Lap]]:
    """The plan of least predicted loss whose model is as fast as is asked.

    A sketch of the model (the weights do not matter) is timed against the original. Where it misses the goal, or is
    faster than it need be, the plan is made anew for a latency as much lower or higher, a few times.

    Args:
        network: The model.
        planner: Plans for it, with measured latencies, or such as are taken to go with MACs.
        budgets: Budgets, of latency among others.
        stadium: Where models are timed.
        progress: Told of each that was.

    Returns:
        The plan and what was tried.

    Raises:
        BudgetError: The goal was missed in all tries; the message has the best.
    """
    original, dense = planner.costs()
    goal = min(b.limit(original.nanoseconds) for b in budgets if isinstance(b, Latency)) / original.nanoseconds
    others = [budget for budget in budgets if not isinstance(budget, Latency)]
    low = planner.least(Latency(1), *others) / original.nanoseconds
    tried: dict[Lap, Plan] = {}
    known: dict[tuple[object, ...], Lap] = {}
    start = dense.nanoseconds / original.nanoseconds
    aims = {start: start}
    aim = max(min(goal, start), low)
    for _ in range(2 * _MOST_LAPS):  # some of which may lead to the same plan
        plan = planner.plan(*others, Milliseconds(1e-6 * (aim * original.nanoseconds + 1)))
        key = (*plan.changed.items(), *plan.channels.items())
        if key not in known:
            known[key] = lap = _lap(planner, plan, stadium.time(sketch_plan(network, plan)))
            tried[lap] = plan
            progress.note(
                f"timed: {lap.measured:.1%} of the original's latency ({lap.low:.1%} to {lap.high:.1%}), predicted "
                f"{lap.predicted:.1%}; predicted loss {lap.predicted_loss:.2g}"
            )
        aims[aim] = known[key].measured
        slow = aims[aim] / goal - 1
        if -_SLACK <= slow <= _AIM or (slow < 0 and not plan.changes) or len(tried) == _MOST_LAPS:
            break
        aim = max(_next_aim(aims, goal), low)
        if min(abs(aim - other) for other in aims) < _SAME_AIM:
            break
    chosen = _chosen(list(tried), goal, f"{describe(budgets)}: {planner.bounds}")
    if _noisy(chosen):
        progress.note(f"the machine is noisy: ratios of latency from {chosen.low:.1%} to {chosen.high:.1%}")
    return replace(tried[chosen], budget=describe(budgets)), list(tried)


def _next_aim(aims: Mapping[float, float], goal: float) -> float:
    """The predicted latency at which the measured one should be the goal, linear between what was measured around it.

    Args:
        aims: Measured latency by predicted one.
        goal: The latency wanted.
    """
    faster = max((aim for aim, measured in aims.items() if measured <= goal), default=None)
    slower = min((aim for aim, measured in aims.items() if measured > goal and aim > (faster or 0)), default=None)
    if slower is None:
        return goal
    if faster is None:  # below all that was tried: in proportion to the latest
        (start, first), (aim, measured) = next(iter(aims.items())), list(aims.items())[-1]
        if len(aims) == 1 or measured > first:  # what is predicted is not what is measured
            return aim * goal / measured
        return aim - (measured - goal) * (start - aim) / max(first - measured, _LEAST_STEP)
    share = (goal - aims[faster]) / (aims[slower] - aims[faster])
    return faster + min(max(share, _LEAST_STEP), 1 - _LEAST_STEP) * (slower - faster)


def _chosen(laps: Sequence[Lap], goal: float, bounds: str) -> Lap:
    """The lap of least loss that meets the goal, all but the tolerance where none is better."""
    for allowed in (_AIM, _TOLERANCE):
        if met := [lap for lap in laps if lap.measured <= goal * (1 + allowed)]:
            return min(met, key=lambda lap: lap.predicted_loss)
    best = min(laps, key=lambda lap: lap.measured)
    noise = f"; the machine is noisy, that was {best.low:.1%} to {best.high:.1%}" if _noisy(best) else ""
    raise BudgetError(
        f"{bounds}; cannot be met: the fastest of {len(laps)} models timed took {best.measured:.1%} of the original's "
        f"latency{noise}"
    )


def _lap(planner: AnyPlanner, plan: Plan, ratios: np.ndarray) -> Lap:
    low, median, high = (float(value) for value in np.quantile(ratios, [0.25, 0.5, 0.75]))
    return Lap(planner.fraction(plan, Latency), median, low, high, plan.predicted_loss)


def _noisy(lap: Lap) -> bool:
    return lap.high - lap.low > _NOISY * lap.measured
