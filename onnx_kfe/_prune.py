"""The steps of `prune`, in order: samples divided, statistics, plan, chains, refit, what came out measured."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir

from onnx_kfe import calibration, recovery
from onnx_kfe._bandit_search import refine_plan
from onnx_kfe._course import Course
from onnx_kfe._floor import Judge
from onnx_kfe._headed import head_specs
from onnx_kfe._latency_goal import Lap, Stadium
from onnx_kfe._measure import Machine, measure_latency, measure_quality, note_skipped
from onnx_kfe._recipe import Recipe, make_plan, make_planner
from onnx_kfe._rounds import prune_in_rounds
from onnx_kfe.calibration import Dataset, Loss, Statistics, fixed_batch, input_specs, synthetic_dataset
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.evaluation import Quality
from onnx_kfe.graph import ModelSource, Network
from onnx_kfe.planning import Budget, Latency, Macs, Plan, Planner
from onnx_kfe.progress import Progress, StagesOnly
from onnx_kfe.result import Result
from onnx_kfe.rewrite import Chain, Narrowed, add_losses, narrow, rotate, solve_plan, write_chains

__all__ = [
    "DEFAULT_BUDGET",
    "Pruning",
    "Recovery",
    "Samples",
    "at_seen_shapes",
    "at_shapes_of",
    "check_loss",
    "collect",
    "divide",
]

DEFAULT_BUDGET = Macs(0.75)
_HELD_BACK = 0.2
_MOST_HELD_BACK = 256
_MOST_FITTED = 4096  # samples for statistics and refit where there are more, to train on: these are enough
_SYNTHETIC_SAMPLES = 16


class Recovery(NamedTuple):
    """Whether to refit, in how much memory (bytes of activations; of sums as well), going on from which folder."""

    refit: bool
    memory: int
    checkpoint: Path | None


class Samples(NamedTuple):
    """Who sees which samples.

    Attributes:
        used: For the statistics and the refit.
        held_back: Of the same data, seen by neither.
        test: For the quality of the result; the held-back ones where there are no others.
        taught: To train on: those used, and all others that are not held back.
        measured: Those used, with what a loss reads of them besides: for the statistics.
    """

    used: Dataset | None = None
    held_back: Dataset | None = None
    test: Dataset | None = None
    taught: Dataset | None = None
    measured: Dataset | None = None

    @property
    def judging(self) -> Dataset | None:
        """What models are measured on while the smallest is searched for."""
        return self.test if self.held_back is None else self.held_back


def divide(
    data: Dataset | None, test: Dataset | None, inputs: Collection[str], *, floor: bool, training: bool
) -> Samples:
    """Hold a fifth of the data back, where there are no samples to test on or a quality floor needs some of its own.

    Args:
        data: The samples; they may hold more than the model takes, which is for the statistics alone.
        test: Samples to test on.
        inputs: Names of what the model takes.
        floor: Whether there is a quality floor.
        training: Whether there is training.
    """
    if data is None:
        return Samples(test=test)
    whole, data = data, data.only(inputs)
    if test is not None and not floor:
        return Samples(_fitted(data, training), None, test, data, _fitted(whole, training))
    count = data.count()
    share = _HELD_BACK if count is None or floor else min(_HELD_BACK, _MOST_HELD_BACK / count)
    used, held_back = data.split(share)
    measured, _ = whole.split(share)
    return Samples(_fitted(used, training), held_back, test or held_back, used, _fitted(measured, training))


def _fitted(data: Dataset | None, training: bool) -> Dataset | None:
    if data is None or not training or (data.count() or 0) <= _MOST_FITTED:
        return data
    return data.take(_MOST_FITTED)


@dataclass
class Pruning:
    """One call of `prune`."""

    network: Network
    source: ModelSource | Network
    samples: Samples
    statistics: Statistics | None
    heads: Mapping[str, str] | None
    loss: Loss | None
    machine: Machine
    recovery: Recovery
    recipe: Recipe
    seed: int
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
        return Judge(
            lambda model: self._quality(model, dataset, quiet, metric), self.network.original, max_drop, metric, share
        )

    def collect(self) -> None:
        """Collect statistics where none were given and there are samples."""
        if self.statistics is None and self.samples.measured is not None:
            self.statistics = collect(
                self.network, self.samples.measured, self.heads, self.loss, self.seed, (0, 1), self.recovery.memory,
                self.machine,
                self.progress, self.recipe.curvature,
            )  # fmt: skip
        if self.statistics is None:
            self.progress.note("no data: only what the weights alone justify is pruned, and quality will be unproven")
        else:
            if self.recipe.curvature == "ekfac" and not any(s.eigen for s in self.statistics.layers.values()):
                raise KfeError("the statistics have no variances in the eigenbases: collect with --curvature ekfac")
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
            if self.recipe.rounds > 1:
                return self._in_rounds(budgets, round_to)
            found = make_plan(
                self.network, self.statistics, budgets, self.machine, self.progress,
                round_to=round_to, recipe=self.recipe,
            )  # fmt: skip
            plan, laps = found.plan, found.laps
            if self.recipe.schedule is not None:
                return self._on_schedule(plan, laps)
            if evaluations is not None:
                assert self.statistics is not None
                assert self.samples.used is not None
                assert isinstance(found.planner, Planner)
                plan = refine_plan(
                    self.network, found.planner, plan, budgets, self.statistics, self.samples.used, self.machine,
                    evaluations, self.progress,
                )  # fmt: skip
        model, losses = self._rewritten(plan, self.progress, self.recovery.checkpoint)
        if self.recipe.epochs:
            course = self._course()
            model = course.train(model, self.recipe.epochs)
            course.done()
        return Result(self.network, model, plan, losses, self.statistics, source=self.source, laps=laps)

    def smallest(self, judge: Judge, kind: type[Budget], round_to: int | None) -> Result:
        """The smallest model above a quality floor, small in what the budget is of."""
        assert self.statistics is not None
        stadium = Stadium(self.network, self.machine) if issubclass(kind, Latency) else None
        planner = make_planner(
            self.network, self.statistics, self.recipe.method, kind, round_to, stadium, self.progress
        )  # fmt: skip
        quiet = StagesOnly(self.progress)
        chosen, (model, losses), floor = judge.smallest(
            self.network, planner, kind, lambda plan: self._rewritten(plan, quiet, None), self.progress
        )
        return Result(self.network, model, chosen, losses, self.statistics, source=self.source, floor=floor)

    def _in_rounds(self, budgets: Sequence[Budget], round_to: int | None) -> Result:
        """The model that several rounds lead to."""
        samples = self.samples.measured
        assert self.statistics is not None
        assert samples is not None

        def collected(network: Network) -> Statistics:
            quiet = StagesOnly(self.progress)
            return collect(
                network, samples, self.heads, self.loss, self.seed, (0, 1), self.recovery.memory, self.machine, quiet,
                self.recipe.curvature,
            )  # fmt: skip

        course, epochs, count = self._course(), self.recipe.epochs, self.recipe.rounds

        def trained(model: ir.Model) -> ir.Model:
            place = course.parts
            return course.train(model, epochs * (place + 1) // count - epochs * place // count)

        rounds = prune_in_rounds(
            self.network, self.statistics, budgets, self.recipe, round_to, self.machine, collected, self.progress,
            trained if epochs else None,
        )  # fmt: skip
        narrowed = Narrowed(rounds.network, rounds.statistics, rounds.losses)
        model = self._written(narrowed, rounds.plan, rounds.chains, self.progress, self.recovery.checkpoint)
        if epochs:
            model = trained(model)
            course.done()
        return Result(
            self.network, model, rounds.plan, rounds.losses, self.statistics, source=self.source, laps=rounds.laps
        )  # fmt: skip

    def _on_schedule(self, plan: Plan, laps: list[Lap]) -> Result:
        """The model of which a schedule decides what goes, a plan how much."""
        assert self.statistics is not None
        assert self.recipe.schedule is not None
        network, statistics = self.network, self.statistics
        if plan.rotates:
            network, statistics = rotate(network, statistics)
        course = self._course()
        model, plan = course.pruned(
            network, statistics, plan, self.recipe.method.form, self.recipe.schedule, self.recipe.epochs
        )  # fmt: skip
        course.done()
        return Result(self.network, model, plan, {}, self.statistics, source=self.source, laps=laps)

    def _course(self) -> Course:
        """What trains."""
        assert self.statistics is not None
        assert self.samples.taught is not None
        return Course(
            self.network.original, head_specs(self.statistics.heads), self.samples.taught, self.seed,
            self.recovery.memory, self.machine.threads, self.recovery.checkpoint, self.progress,
        )  # fmt: skip

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
        narrowed = narrow(self.network, plan, self.statistics)
        with progress.stage("rewriting", len(plan.changed)) as advance:
            chains, losses = solve_plan(
                narrowed.network, plan, narrowed.statistics, progress=lambda layer: advance(1)
            )  # fmt: skip
        model = self._written(narrowed, plan, chains, progress, checkpoint)
        return model, add_losses(narrowed.losses, losses)

    def _written(
        self, narrowed: Narrowed, plan: Plan, chains: Mapping[str, Chain], progress: Progress, checkpoint: Path | None
    ) -> ir.Model:
        """The model of a narrowed network and chains in it, refitted where it can be."""
        network, statistics, _ = narrowed
        samples = self.samples.used
        wanted = self.recovery.refit and self.recipe.refits
        if not wanted or samples is None or statistics is None or not plan.changes:
            return write_chains(network, plan, statistics, chains)
        if reason := recovery.refusal(network, samples):
            progress.note(f"not refitted: {reason}")
            return write_chains(network, plan, statistics, chains)
        if settled := recovery.settled_layers(network, plan, statistics):
            progress.note(f"not solved anew, as they feed themselves through a shared weight: {', '.join(settled)}")
        layers = [name for name in plan.choices if name in statistics.layers]
        with progress.stage("refitting", len(layers)) as advance:
            chains = recovery.refit(
                network, plan, statistics, samples, memory=self.recovery.memory, checkpoint=checkpoint,
                providers=self.machine.providers, threads=self.machine.threads, progress=lambda layer: advance(1),
            )  # fmt: skip
        return write_chains(network, plan, statistics, chains)

    def _quality(self, model: ir.Model, dataset: Dataset, progress: Progress, metric: str | None = None) -> Quality:
        if self.statistics is not None:
            specs = head_specs(self.statistics.heads, scaled=True)
        else:
            specs = head_specs(calibration.find_heads(self.network, self.heads))
        return measure_quality(self.network, model, dataset, specs, self.machine, progress, metric)


def collect(
    network: Network,
    dataset: Dataset,
    heads: Mapping[str, str] | None,
    loss: Loss | None,
    seed: int,
    shard: tuple[int, int],
    memory: int,
    machine: Machine,
    progress: Progress,
    curvature: str = "kfac",
) -> Statistics:
    """Collect statistics, saying what the outputs are taken for; in a second pass over the data those of EKFAC.

    Raises:
        KfeError: There are no samples, or collection fails.
    """
    found = calibration.find_heads(network, heads)
    named = ", ".join(
        f"{head.output} {head.kind}{f' (read by {head.read_by})' if head.read_by else ''}" for head in found
    )
    progress.note(f"heads: {named} ({'as given' if heads else 'assumed; change with --head'})")
    if loss is not None:
        progress.note(f"loss: {loss.name} of {', '.join(loss.reads)}, in the place of the heads")
    if next(iter(dataset), None) is None:
        raise KfeError(f"{dataset.describe()}: no samples to collect statistics on")
    with progress.stage("collecting", dataset.count()) as advance:
        statistics = calibration.collect(
            network, dataset, heads=heads, loss=loss, seed=seed, shard=shard, memory=memory,
            providers=machine.providers,
            threads=machine.threads, progress=advance,
        )  # fmt: skip
    if curvature == "kfac":
        return statistics
    with progress.stage("collecting in the eigenbases", dataset.count()) as advance:
        return calibration.collect_eigen_moments(
            network, statistics, dataset, loss=loss, providers=machine.providers, threads=machine.threads,
            progress=advance,
        )  # fmt: skip


def check_loss(loss: Loss | None, statistics: Statistics | None, rounds: int, *, collects: bool) -> None:
    """Refuse a loss that nothing is collected with, or that is not that of the statistics.

    Args:
        loss: The loss, if any.
        statistics: Statistics that were collected before.
        rounds: How often statistics are collected, these included.
        collects: Whether there are samples to collect statistics on.

    Raises:
        UsageError: Which of the two.
    """
    if statistics is not None and (loss is not None or rounds > 1):
        statistics.check_loss(loss.fingerprint if loss is not None else None)
    elif loss is not None and not collects:
        raise UsageError("--loss is what statistics are collected with: give --data")


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


def at_shapes_of(network: Network, data: Dataset | None) -> Network:
    """Count costs at the shapes of the data where there are layers whose shapes cannot be told without."""
    if data is None or network.input_shapes or all(layer.geometry is not None for layer in network.layers):
        return network
    first = next(iter(data), None)
    shapes = {} if first is None else {name: array.shape for name, array in first.sample.items()}
    return network.with_input_shapes(shapes)


def at_seen_shapes(network: Network, statistics: Statistics) -> Network:
    """Count costs at the shapes that the data had, where the user gave none."""
    statistics.check_model(network.fingerprint, network.name)
    free = any(layer.geometry is None for layer in network.layers) or any(
        not isinstance(size, int) for spec in input_specs(network.model) for size in spec.shape[1:]
    )
    if network.input_shapes or not free:
        return network
    return network.with_input_shapes(statistics.input_shapes)
