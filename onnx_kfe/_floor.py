"""The quality floor: the smallest model that is measured to be hardly worse than the original."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from onnx_kfe.calibration import Statistics
from onnx_kfe.errors import BudgetError, UsageError
from onnx_kfe.evaluation import Quality, default_metric, find_metric, measured_drop
from onnx_kfe.graph import Network
from onnx_kfe.planning import AnyPlanner, Attempt, Budget, Plan, meets, search
from onnx_kfe.progress import Progress

__all__ = ["Floor", "Judge", "Trial", "check_floor", "format_drop"]

Rewritten = tuple[ir.Model, dict[str, float]]


@dataclass(frozen=True)
class Trial(Attempt):
    """One of the models that the search made and measured.

    Attributes:
        low: Lower end of the 95 % interval of the drop.
        high: Upper end of it.
    """

    low: float
    high: float

    def as_dict(self) -> dict[str, float | None]:
        """Plain values for JSON; infinity, which JSON lacks, becomes None."""
        return {name: value if math.isfinite(value) else None for name, value in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class Floor:
    """A quality floor and what was tried to find the smallest model above it.

    Attributes:
        max_drop: The largest drop allowed.
        metric: What it is a drop of, see `evaluation.METRICS`.
        size: What was made small, in words.
        samples: How many samples, and which, it was measured on, in words.
        chosen: The model that was taken.
        curve: All models that were measured, the smallest first.
    """

    max_drop: float
    metric: str
    size: str
    samples: str
    chosen: Trial
    curve: tuple[Trial, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; infinity, which JSON lacks, becomes None."""
        curve = [{**trial.as_dict(), "met": meets(trial, self.max_drop)} for trial in self.curve]
        return {
            "max_drop": self.max_drop, "metric": self.metric, "size": self.size, "samples": self.samples,
            "chosen": self.chosen.as_dict(), "curve": curve,
        }  # fmt: skip


def check_floor(
    max_drop: float | None, metric: str | None, plan: object, data: object, evaluation_data: object
) -> None:
    """Refuse a floor that makes no sense beside the other arguments of `prune`.

    Raises:
        UsageError: The argument at fault and what to do.
    """
    if metric is not None:
        find_metric(metric)
    if max_drop is None:
        if metric is not None:
            raise UsageError("--metric says how the drop is measured: give --max-drop too")
        return
    if not 0 < max_drop < math.inf:
        raise UsageError(f"--max-drop {max_drop:g}: give a number above 0")
    if plan:
        raise UsageError("--max-drop finds the budget by itself: drop --macs, --params and --plan, or drop --max-drop")
    if data is None:
        raise UsageError("--max-drop needs samples to prune and to measure with: give --data")
    if isinstance(data, Statistics) and evaluation_data is None:
        raise UsageError("--max-drop needs samples to measure on: give --data beside the statistics")


class Judge:
    """Measures models against a floor.

    Args:
        measure: Measures a model against the original on samples that neither statistics nor refit saw.
        original: The original, measured first: what does not fit is known before any long work.
        max_drop: The largest drop allowed.
        metric: Key of `evaluation.METRICS` or ``package.module:function``, which `measure` measures; None for the one
            that suits the model.
        held_back: The fraction of the user's samples that `measure` has, 1 where these are samples of their own.

    Raises:
        UsageError: The metric does not fit the model or the data, or the floor is finer than the samples can show.
    """

    def __init__(
        self,
        measure: Callable[[ir.Model], Quality],
        original: ir.Model,
        max_drop: float,
        metric: str | None,
        held_back: float,
    ) -> None:
        quality = measure(original)
        self._measure, self._max_drop, self._metric = measure, max_drop, metric or default_metric(quality)
        measured_drop(quality, self._metric)
        self._samples = f"{quality.samples} {'held-back' if held_back < 1 else 'given'} samples"
        known = find_metric(self._metric)
        if known.unit == "%" and max_drop >= 1:
            raise UsageError(f"--max-drop {max_drop:g}: a drop in {self._metric} is a share, give less than 1")
        if known.counted:
            self._check_resolution(quality, held_back)

    def smallest(
        self,
        network: Network,
        planner: AnyPlanner,
        kind: type[Budget],
        rewrite: Callable[[Plan], Rewritten],
        progress: Progress,
    ) -> tuple[Plan, Rewritten, Floor]:
        """Find the smallest, or fastest, model that meets the floor.

        Args:
            network: The original.
            planner: Plans for it.
            kind: The budget that says what small is.
            rewrite: Makes the model of a plan.
            progress: Told of every model that was measured.

        Returns:
            The plan, what `rewrite` made of it, and what was tried on the way.

        Raises:
            BudgetError: No smaller model meets the floor; the message has the best that was found.
        """
        trials: dict[tuple[object, ...], Trial] = {}
        made: dict[Trial, tuple[Plan, Rewritten]] = {}

        def attempt(budget: float) -> Trial:
            plan = planner.plan(kind(budget))
            plan = dataclasses.replace(plan, budget=f"--max-drop {self._max_drop:g} --metric {self._metric}")
            key = (*plan.changed.items(), *plan.channels.items())
            if not key:
                return Trial(1.0, 0.0, 0.0, 0.0, 0.0)
            if key not in trials:
                model, losses = rewrite(plan)
                fraction = planner.fraction(plan, kind)
                trials[key] = trial = self._trial(fraction, plan.predicted_loss, model)
                progress.note(f"attempt {len(trials)}: {self._described(trial, kind)}")
                if meets(trial, self._max_drop):
                    made.clear()  # each that meets the floor is smaller than those before it
                    made[trial] = plan, (model, losses)
            return trials[key]

        _, best = search(attempt, planner.frontier(kind), self._max_drop)
        curve = tuple(sorted(trials.values(), key=lambda trial: trial.fraction))
        if best is None:
            least = min(curve, key=lambda trial: trial.drop, default=None)
            found = f"the best found is {self._described(least, kind)}" if least else "there is no smaller model"
            raise BudgetError(f"--max-drop {self._max_drop:g} cannot be met on {self._samples}: {found}")
        plan, rewritten = made[best]
        return plan, rewritten, Floor(self._max_drop, self._metric, kind.title, self._samples, best, curve)

    def _trial(self, fraction: float, predicted_loss: float, model: ir.Model) -> Trial:
        drop = measured_drop(self._measure(model), self._metric)
        return Trial(fraction, predicted_loss, drop.value, drop.low, drop.high)

    def _described(self, trial: Trial, kind: type[Budget]) -> str:
        drop = f"{self._metric} drop {format_drop(self._metric, trial.drop)}"
        return f"{trial.fraction:.1%} of the {kind.title}, predicted loss {trial.predicted_loss:.2g}, {drop}"

    def _check_resolution(self, quality: Quality, held_back: float) -> None:
        """One decision is the smallest drop that samples can show."""
        decisions = min(head.decisions for head in quality.heads if head.decisions)
        if self._max_drop * decisions < 1 - 1e-9:
            needed = math.ceil(quality.samples / decisions / self._max_drop / held_back)
            raise UsageError(
                f"--max-drop {self._max_drop:g} is finer than {self._samples} can show, which is "
                f"{format_drop(self._metric, 1 / decisions)}: give about {needed} samples (--data, --max-samples), "
                "or a larger drop"
            )


def format_drop(metric: str, drop: float) -> str:
    """A drop as people write it."""
    unit = find_metric(metric).unit
    return f"{drop:.2%}" if unit == "%" else f"{drop:.3g} dB" if unit == "dB" else f"{drop:.3g}"
