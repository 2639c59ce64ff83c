"""Budgets of latency: plans from measured latencies, corrected by whole models until these are as fast as is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import onnx_ir as ir

from onnx_kfe import evaluation
from onnx_kfe._measure import Machine
from onnx_kfe.calibration import batches, fixed_batch, input_specs, synthetic_dataset
from onnx_kfe.errors import BudgetError, KfeError
from onnx_kfe.graph import Network, nominal_input_shapes, serialize
from onnx_kfe.planning import Budget, Latency, LatencyModel, Plan, Planner, describe, measure_latency_model
from onnx_kfe.progress import Progress
from onnx_kfe.rewrite import sketch_plan

__all__ = ["Lap", "Stadium", "meet"]

_TOLERANCE = 0.05
"""A goal is met where the measured latency is no more than this above it."""

_AIM = 0.01
"""Share of the goal that a plan may be off without another try."""

_MOST_LAPS = 5
_SECONDS = 2.0  # for each model of a race
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
        self._network, self._machine, self._feeds = network, machine, first.feeds
        self._original = serialize(network.original)

    def time(self, model: ir.Model) -> tuple[np.ndarray, float]:
        """Latency of a model over that of the original, by round, and the original's median in seconds."""
        rounds = evaluation.race(
            {"original": self._original, "smaller": serialize(model)}, self._feeds,
            providers=self._machine.providers, threads=self._machine.threads, seconds=_SECONDS,
        )  # fmt: skip
        return rounds[:, 1] / rounds[:, 0], float(np.median(rounds[:, 0]))

    def measure(self, round_to: int | None, progress: Progress) -> LatencyModel:
        """Measure the layers of the model and their forms."""
        ratios, original = self.time(self._network.model)
        with progress.stage("measuring layers", 100) as advance:
            shown = 0

            def show(done: int, total: int) -> None:
                nonlocal shown
                advance(100 * done // total - shown)
                shown = 100 * done // total

            return measure_latency_model(
                self._network, original, original * float(np.median(ratios)), batch=self.batch,
                providers=self._machine.providers, threads=self._machine.threads, round_to=round_to, progress=show,
            )  # fmt: skip


def meet(
    network: Network, planner: Planner, budgets: Sequence[Budget], stadium: Stadium, progress: Progress
) -> tuple[Plan, list[Lap]]:
    """The plan of least predicted loss whose model is as fast as is asked.

    A sketch of the model (the weights do not matter) is timed against the original. Where it misses the goal, or is
    faster than it need be, what replacing layers changes is scaled to what was measured, and the plan is made anew.

    Args:
        network: The model.
        planner: Plans for it, with measured latencies.
        budgets: Budgets, of latency among others.
        stadium: Where models are timed.
        progress: Told of each that was.

    Returns:
        The plan and what was tried.

    Raises:
        BudgetError: The budgets cannot be met, or the goal was missed in all of a few tries; the message has the best.
    """
    original, _ = planner.costs()
    goal = min(b.limit(original.nanoseconds) for b in budgets if isinstance(b, Latency)) / original.nanoseconds
    laps: list[Lap] = []
    tried: dict[Lap, Plan] = {}
    while len(laps) < _MOST_LAPS:
        try:
            plan = planner.plan(*budgets)
        except BudgetError:
            if not laps:
                raise
            break  # after the correction nothing is fast enough
        lap = _lap(planner, plan, stadium.time(sketch_plan(network, plan))[0])
        progress.note(
            f"timed: {lap.measured:.1%} of the original's latency ({lap.low:.1%} to {lap.high:.1%}), predicted "
            f"{lap.predicted:.1%}; predicted loss {lap.predicted_loss:.2g}"
        )
        known = plan.changed in [other.changed for other in tried.values()]
        laps.append(lap)
        tried[lap] = plan
        if known or abs(lap.measured / goal - 1) <= _AIM or not planner.correct_latency(plan, lap.measured):
            break
    met = [lap for lap in laps if lap.measured <= goal * (1 + _TOLERANCE)]
    near = [lap for lap in met if lap.measured <= goal * (1 + _AIM)]
    if not met:
        best = min(laps, key=lambda lap: lap.measured)
        noise = f"; the machine is noisy: {best.low:.1%} to {best.high:.1%}" if _noisy(best) else ""
        raise BudgetError(
            f"{describe(budgets)} was not reached in {len(laps)} tries: the fastest took {best.measured:.1%} of the "
            f"original's latency{noise}"
        )
    chosen = min(near or met, key=lambda lap: lap.predicted_loss)
    if _noisy(chosen):
        progress.note(f"the machine is noisy: ratios of latency from {chosen.low:.1%} to {chosen.high:.1%}")
    return tried[chosen], laps


def _lap(planner: Planner, plan: Plan, ratios: np.ndarray) -> Lap:
    low, median, high = (float(value) for value in np.quantile(ratios, [0.25, 0.5, 0.75]))
    return Lap(planner.predicted_latency(plan), median, low, high, plan.predicted_loss)


def _noisy(lap: Lap) -> bool:
    return lap.high - lap.low > _NOISY * lap.measured
