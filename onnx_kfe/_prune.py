"""The steps of `prune`, in order: samples divided, statistics, plan, chains, refit, what came out measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir

from onnx_kfe import calibration, recovery
from onnx_kfe._bandit_search import refine_plan
from onnx_kfe._floor import Judge
from onnx_kfe._latency_goal import Lap, Stadium, meet
from onnx_kfe._measure import Machine, head_specs, measure_latency, measure_quality, note_skipped
from onnx_kfe.calibration import Dataset, Statistics, fixed_batch, input_specs, synthetic_dataset
from onnx_kfe.errors import KfeError
from onnx_kfe.evaluation import Quality
from onnx_kfe.graph import ModelSource, Network
from onnx_kfe.planning import DEFAULT_ROUND_TO, Budget, Latency, Macs, Plan, Planner
from onnx_kfe.progress import Progress, StagesOnly
from onnx_kfe.result import Result
from onnx_kfe.rewrite import solve_plan, write_chains

__all__ = ["DEFAULT_BUDGET", "Pruning", "Recovery", "Samples", "at_seen_shapes", "collect", "divide", "make_plan"]

DEFAULT_BUDGET = Macs(0.75)
_HELD_BACK = 0.2
_MOST_HELD_BACK = 256
_SYNTHETIC_SAMPLES = 16


class Recovery(NamedTuple):
    """Whether to refit, in how much memory (bytes of activations), going on from which folder."""

    refit: bool
    memory: int
    checkpoint: Path | None


class Samples(NamedTuple):
    """Who sees which samples.

    Attributes:
        used: For the statistics and the refit.
        held_back: Of the same data, seen by neither.
        test: For the quality of the result; the held-back ones where there are no others.
    """

    used: Dataset | None = None
    held_back: Dataset | None = None
    test: Dataset | None = None

    @property
    def judging(self) -> Dataset | None:
        """What models are measured on while the smallest is searched for."""
        return self.test if self.held_back is None else self.held_back


def divide(data: Dataset | None, test: Dataset | None, *, floor: bool) -> Samples:
    """Hold a fifth of the data back, where there are no samples to test on or a quality floor needs some of its own."""
    if data is None or (test is not None and not floor):
        return Samples(data, None, test)
    count = data.count()
    share = _HELD_BACK if count is None or floor else min(_HELD_BACK, _MOST_HELD_BACK / count)
    used, held_back = data.split(share)
    return Samples(used, held_back, test or held_back)


@dataclass
class Pruning:
    """One call of `prune`."""

    network: Network
    source: ModelSource | Network
    samples: Samples
    statistics: Statistics | None
    heads: Mapping[str, str] | None
    machine: Machine
    recovery: Recovery
    progress: Progress

    def judge(self, max_drop: float, metric: str | None) -> Judge:
        """Who decides whether a model is above the floor; made before any long work, for it refuses what cannot be."""
        dataset = self.samples.judging
        assert dataset is not None
        if self.statistics is not None:
            self.progress.note(
                "the floor is sound only if the statistics were not collected on the samples it is measured on"
            )
        quiet = StagesOnly(self.progress)
        share = 1.0 if self.samples.used is None else _HELD_BACK
        return Judge(lambda model: self._quality(model, dataset, quiet), self.network.original, max_drop, metric, share)

    def collect(self, seed: int) -> None:
        """Collect statistics where none were given and there are samples."""
        if self.statistics is None and self.samples.used is not None:
            self.statistics = collect(
                self.network, self.samples.used, self.heads, seed, (0, 1), self.machine, self.progress
            )
        if self.statistics is None:
            self.progress.note("no data: only what the weights alone justify is pruned, and quality will be unproven")
        else:
            self.network = at_seen_shapes(self.network, self.statistics)
            if shortage := _shortage(self.network, self.statistics):
                self.progress.note(shortage)

    def smaller(
        self, plan: Plan | Budget | Sequence[Budget] | None, round_to: int | None, evaluations: int | None
    ) -> Result:
        """The model of a plan, or of the plan for a budget, refined by so many evaluations."""
        laps: list[Lap] = []
        if not isinstance(plan, Plan):
            default = () if self.statistics is None else (DEFAULT_BUDGET,)
            budgets = [plan] if isinstance(plan, Budget) else list(plan or default)
            plan, laps, planner = make_plan(
                self.network, self.statistics, budgets, self.machine, self.progress, round_to=round_to
            )  # fmt: skip
            if evaluations is not None:
                assert self.statistics is not None
                assert self.samples.used is not None
                plan = refine_plan(
                    self.network, planner, plan, budgets, self.statistics, self.samples.used, self.machine,
                    evaluations, self.progress,
                )  # fmt: skip
        model, losses = self._rewritten(plan, self.progress, self.recovery.checkpoint)
        return Result(self.network, model, plan, losses, self.statistics, source=self.source, laps=laps)

    def smallest(self, judge: Judge, kind: type[Budget], round_to: int | None) -> Result:
        """The smallest model above a quality floor, small in what the budget is of."""
        assert self.statistics is not None
        latency = None
        if issubclass(kind, Latency):
            latency = Stadium(self.network, self.machine).measure(round_to, self.progress)
        with self.progress.stage("planning"):
            grid = round_to or DEFAULT_ROUND_TO
            planner = Planner(self.network, self.statistics, round_to=grid, latency=latency)
        quiet = StagesOnly(self.progress)
        chosen, (model, losses), floor = judge.smallest(
            self.network, planner, kind, lambda plan: self._rewritten(plan, quiet, None), self.progress
        )
        return Result(self.network, model, chosen, losses, self.statistics, source=self.source, floor=floor)

    def measure(self, result: Result) -> None:
        """Measure quality and latency of the result; on synthetic inputs where there is nothing else."""
        specs = input_specs(self.network.model)
        count = fixed_batch(specs) or _SYNTHETIC_SAMPLES
        sample = self.samples.test or synthetic_dataset(specs, count, 0, self.network.input_shapes)
        result.proven = self.samples.test is not None
        result.quality = self._quality(result.ir_model, sample, self.progress)
        held_back = self.samples.test is self.samples.held_back
        measured_on = ("held-back samples" if held_back else "given samples") if result.proven else "synthetic inputs"
        result.measured_on = f"{result.quality.samples} {measured_on}"
        result.timings = measure_latency(self.network, result.ir_model, sample, self.machine, self.progress)
        result.skipped_samples = sample.skipped
        note_skipped(sample, self.progress)

    def _rewritten(self, plan: Plan, progress: Progress, checkpoint: Path | None) -> tuple[ir.Model, dict[str, float]]:
        """The model of a plan, and by changed layer the loss that was predicted, before any refit."""
        network, statistics, samples = self.network, self.statistics, self.samples.used
        with progress.stage("rewriting", len(plan.changed)) as advance:
            chains, losses = solve_plan(network, plan, statistics, progress=lambda layer: advance(1))
        if not self.recovery.refit or samples is None or statistics is None or not plan.changed:
            return write_chains(network, plan, statistics, chains), losses
        if reason := recovery.refusal(network, samples):
            progress.note(f"not refitted: {reason}")
            return write_chains(network, plan, statistics, chains), losses
        layers = [name for name in plan.choices if name in statistics.layers]
        with progress.stage("refitting", len(layers)) as advance:
            chains = recovery.refit(
                network, plan, statistics, samples, memory=self.recovery.memory, checkpoint=checkpoint,
                providers=self.machine.providers, threads=self.machine.threads, progress=lambda layer: advance(1),
            )  # fmt: skip
        return write_chains(network, plan, statistics, chains), losses

    def _quality(self, model: ir.Model, dataset: Dataset, progress: Progress) -> Quality:
        if self.statistics is not None:
            specs = head_specs(self.statistics.heads, scaled=True)
        else:
            specs = head_specs(calibration.find_heads(self.network, self.heads))
        return measure_quality(self.network, model, dataset, specs, self.machine, progress)


def collect(
    network: Network,
    dataset: Dataset,
    heads: Mapping[str, str] | None,
    seed: int,
    shard: tuple[int, int],
    machine: Machine,
    progress: Progress,
) -> Statistics:
    """Collect statistics, saying what the outputs are taken for.

    Raises:
        KfeError: There are no samples, or collection fails.
    """
    found = calibration.find_heads(network, heads)
    named = ", ".join(f"{head.output} {head.kind}" for head in found)
    progress.note(f"heads: {named} ({'as given' if heads else 'assumed; change with --head'})")
    if next(iter(dataset), None) is None:
        raise KfeError(f"{dataset.describe()}: no samples to collect statistics on")
    with progress.stage("collecting", dataset.count()) as advance:
        return calibration.collect(
            network, dataset, heads=heads, seed=seed, shard=shard, providers=machine.providers,
            threads=machine.threads, progress=advance,
        )  # fmt: skip


def make_plan(
    network: Network,
    statistics: Statistics | None,
    budgets: Sequence[Budget],
    machine: Machine,
    progress: Progress,
    *,
    round_to: int | None,
) -> tuple[Plan, list[Lap], Planner]:
    """The plan for budgets, the models that were timed for it where one is of latency, and what made it.

    Raises:
        BudgetError: The budgets cannot be met.
    """
    stadium = latency = None
    if any(isinstance(budget, Latency) for budget in budgets):
        stadium = Stadium(network, machine)
        latency = stadium.measure(round_to, progress)
    with progress.stage("planning"):
        planner = Planner(network, statistics, round_to=round_to or DEFAULT_ROUND_TO, latency=latency)
        if stadium is None:
            return (planner.plan(*budgets) if budgets or statistics else planner.smallest()), [], planner
    return *meet(network, planner, budgets, stadium, progress), planner


def _shortage(network: Network, statistics: Statistics) -> str | None:
    """Which layer has the fewest positions for its input covariance, where they do not determine it."""
    needed = {
        layer.name: math.ceil(layer.geometry.patch_size * seen.samples / seen.positions)
        for layer in network.prunable
        if layer.geometry is not None and (seen := statistics.layers.get(layer.name)) is not None
    }
    name = max(needed, key=needed.__getitem__, default=None)
    if name is None or needed[name] <= statistics.samples:
        return None
    return (
        f"few samples: the input covariance of layer '{name}' takes {needed[name]:,} at least, of which there are "
        f"{statistics.samples:,}; unseen directions keep their weights (more with --max-samples)"
    )


def at_seen_shapes(network: Network, statistics: Statistics) -> Network:
    """Count costs at the shapes that the data had, where the user gave none."""
    statistics.check_model(network.fingerprint, network.name)
    free = any(layer.geometry is None for layer in network.layers) or any(
        not isinstance(size, int) for spec in input_specs(network.model) for size in spec.shape[1:]
    )
    if network.input_shapes or not free:
        return network
    return network.with_input_shapes(statistics.input_shapes)
