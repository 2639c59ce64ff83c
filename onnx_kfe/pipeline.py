"""The public functions: each takes a model as path, ``ModelProto`` or ``ir.Model`` and runs one step, `prune` all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import onnx_ir as ir

from onnx_kfe import calibration, planning
from onnx_kfe._compress import compress
from onnx_kfe._floor import Judge, check_floor
from onnx_kfe._measure import benchmark, evaluate, head_specs, measure_latency, measure_quality, note_skipped
from onnx_kfe.calibration import (
    Dataset,
    DataSource,
    ImageOptions,
    Statistics,
    fixed_batch,
    input_specs,
    open_dataset,
    synthetic_dataset,
)
from onnx_kfe.errors import BudgetError, KfeError
from onnx_kfe.evaluation import Quality
from onnx_kfe.graph import ModelSource, Network, open_network
from onnx_kfe.planning import DEFAULT_ROUND_TO, Budget, Macs, Plan, Planner
from onnx_kfe.progress import Progress, StagesOnly
from onnx_kfe.recovery import DEFAULT_MEMORY
from onnx_kfe.result import Result

__all__ = ["DEFAULT_BUDGET", "DEFAULT_SAMPLES", "benchmark", "collect", "evaluate", "inspect", "plan", "prune"]

DEFAULT_BUDGET = Macs(0.75)
DEFAULT_SAMPLES = 1024
_HELD_BACK = 0.2
_MOST_HELD_BACK = 256
_SYNTHETIC_SAMPLES = 16

Shapes = Mapping[str, Sequence[int]]
Source = ModelSource | Network


def inspect(
    model: Source, *, input_shapes: Shapes | None = None, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Network:
    """Open a model: its layers with geometry, MACs and parameters, and why those that cannot be pruned cannot.

    Args:
        model: The model; a `Network` is returned as it is.
        input_shapes: Shapes of inputs with free axes; a dynamic batch counts as 1.
        include: Patterns of node names to prune, all when empty.
        exclude: Patterns of node names to leave alone.

    Raises:
        KfeError: The model cannot be read.
        UsageError: A shape or pattern does not fit the model.
    """
    if isinstance(model, Network):
        return model
    return open_network(model, input_shapes=input_shapes, include=include, exclude=exclude)


def collect(
    model: Source,
    data: DataSource | Dataset,
    *,
    images: ImageOptions | None = None,
    heads: Mapping[str, str] | None = None,
    max_samples: int | None = DEFAULT_SAMPLES,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    providers: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Collect the K-FAC statistics of every prunable layer.

    Args:
        model: The model.
        data: Calibration samples, see `open_dataset`; labels are not used.
        images: How images become inputs.
        heads: Kind by output name where detection should be overruled.
        max_samples: At most this many samples.
        seed: Seed of noise and positions.
        shard: ``(i, n)`` collects the i-th of n parts, to be merged.
        providers: Execution providers, CPU when empty.
        threads: Threads, all cores when None.
        progress: Shows what is going on.

    Raises:
        KfeError: Something about the model or the data stops the work.
        UsageError: The arguments do not fit the model or the data.
    """
    shown = progress or Progress()
    network = inspect(model)
    dataset = open_dataset(cast(DataSource, data), input_specs(network.model), images=images, max_samples=max_samples)
    shown.note(dataset.describe())
    statistics = _collect(network, dataset, heads, seed, shard, providers, threads, shown)
    note_skipped(dataset, shown)
    return statistics


def plan(model: Source, statistics: Statistics, *budgets: Budget, round_to: int = DEFAULT_ROUND_TO) -> Plan:
    """Choose form and ranks of each layer: least predicted loss under the budgets.

    Args:
        model: The model that the statistics were collected on.
        statistics: Its statistics.
        budgets: `Macs`, `Params` or both.
        round_to: Ranks are multiples of this (smaller ones for small layers).

    Raises:
        BudgetError: The budgets cannot be met.
        KfeError: The statistics are of another model.
    """
    return planning.make_plan(_at_seen_shapes(inspect(model), statistics), statistics, budgets, round_to=round_to)


def prune(
    model: Source,
    data: DataSource | Dataset | Statistics | None = None,
    plan: Plan | Budget | Sequence[Budget] | None = None,
    *,
    statistics: Statistics | None = None,
    evaluation_data: DataSource | Dataset | None = None,
    images: ImageOptions | None = None,
    labels: str | os.PathLike[str] | None = None,
    heads: Mapping[str, str] | None = None,
    max_samples: int | None = DEFAULT_SAMPLES,
    round_to: int = DEFAULT_ROUND_TO,
    seed: int = 0,
    providers: Sequence[str] = (),
    threads: int | None = None,
    refit: bool = True,
    memory: int = DEFAULT_MEMORY,
    checkpoint: str | os.PathLike[str] | None = None,
    max_drop: float | None = None,
    metric: str | None = None,
    measure: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Make a model smaller, end to end: collect, plan, rewrite, refit, measure.

    Args:
        model: The model.
        data: Calibration samples, of which a fifth is held back to measure quality on where there are no
            `evaluation_data`; or statistics collected before, when nothing is refitted; or None, when only what the
            weights alone justify is pruned and quality is unproven.
        plan: Budgets (three quarters of the MACs when None), or a plan made before.
        statistics: Statistics collected before, when the data only refit and measure.
        evaluation_data: Samples to measure quality on.
        images: How images become inputs.
        labels: CSV of ``file,label``.
        heads: Kind by output name where detection should be overruled.
        max_samples: At most this many samples.
        round_to: Ranks are multiples of this (smaller ones for small layers).
        seed: Seed of noise and positions.
        providers: Execution providers, CPU when empty.
        threads: Threads, all cores when None.
        refit: Whether to solve the layers anew, front to back, on the samples (see `recovery.refit`).
        memory: Bytes of activations that the refit keeps in memory.
        checkpoint: Folder from which an interrupted refit goes on, removed when it is done.
        max_drop: Instead of a plan: find the smallest model that is no more than this worse than the original, on
            samples that neither the statistics nor the refit saw.
        metric: What `max_drop` is measured in: a key of `evaluation.METRICS`; None for the one that suits the model.
        measure: Whether to measure quality and latency of the result.
        progress: Shows what is going on.

    Raises:
        BudgetError: The budgets or the floor cannot be met, or nothing can be pruned at all.
        KfeError: Something about the model or the data stops the work.
        UsageError: The arguments do not fit together.
    """
    check_floor(max_drop, metric, plan, data, evaluation_data)
    shown = progress or Progress()
    quiet = StagesOnly(shown)
    network = inspect(model)
    if not network.prunable:
        raise BudgetError(f"{network.name}: no layer can be pruned; onnx-kfe inspect says why")

    def opened(source: DataSource | Dataset) -> Dataset:
        specs = input_specs(network.model)
        dataset = open_dataset(cast(DataSource, source), specs, images=images, labels=labels, max_samples=max_samples)
        shown.note(dataset.describe())
        return dataset

    def measured(smaller: ir.Model, dataset: Dataset, progress: Progress) -> Quality:
        found = statistics.heads if statistics is not None else calibration.find_heads(network, heads)
        return measure_quality(network, smaller, dataset, head_specs(found), providers, threads, progress)

    def rewritten(plan: Plan, progress: Progress) -> tuple[ir.Model, dict[str, float]]:
        samples = used if refit else None
        kept = None if checkpoint is None or max_drop is not None else Path(checkpoint)
        return compress(network, plan, statistics, samples, memory, providers, threads, progress, kept)

    test, measured_on = None if evaluation_data is None else opened(evaluation_data), "given samples"
    judge, held = None, test
    used: Dataset | None = None
    if isinstance(data, Statistics):
        statistics = data
    elif data is not None:
        used = opened(data)
        if test is None or max_drop is not None:
            used, held = _divided(used, _MOST_HELD_BACK if max_drop is None else None)
        if test is None:
            test, measured_on = held, "held-back samples"
    if max_drop is not None and held is not None:
        share, tried_on = 1.0 if used is None else _HELD_BACK, held
        judge = Judge(lambda model: measured(model, tried_on, quiet), network.original, max_drop, metric, share)
        if statistics is not None:
            shown.note("the floor is sound only if the statistics were not collected on the samples it is measured on")
    if statistics is None and used is not None:
        statistics = _collect(network, used, heads, seed, (0, 1), providers, threads, shown)
    if statistics is None:
        shown.note("no data: only what the weights alone justify is pruned, and quality will be unproven")
    else:
        network = _at_seen_shapes(network, statistics)
    floor = None
    if judge is None or statistics is None:
        chosen = _plan(network, statistics, plan, round_to, shown)
        smaller, losses = rewritten(chosen, shown)
    else:
        planner = Planner(network, statistics, round_to=round_to)
        chosen, (smaller, losses), floor = judge.smallest(network, planner, lambda p: rewritten(p, quiet), shown)
    result = Result(network, smaller, chosen, losses, statistics, source=model, floor=floor)
    if measure:
        result.proven = test is not None
        sample = test or _synthetic(network)
        result.quality = measured(smaller, sample, shown)
        result.measured_on = f"{result.quality.samples} {measured_on if test is not None else 'synthetic inputs'}"
        result.timings = measure_latency(network, smaller, sample, providers, threads, shown)
        result.skipped_samples = sample.skipped
        note_skipped(sample, shown)
    return result


def _collect(
    network: Network,
    dataset: Dataset,
    heads: Mapping[str, str] | None,
    seed: int,
    shard: tuple[int, int],
    providers: Sequence[str],
    threads: int | None,
    progress: Progress,
) -> Statistics:
    found = calibration.find_heads(network, heads)
    named = ", ".join(f"{head.output} {head.kind}" for head in found)
    progress.note(f"heads: {named} ({'as given' if heads else 'assumed; change with --head'})")
    if next(iter(dataset), None) is None:
        raise KfeError(f"{dataset.describe()}: no samples to collect statistics on")
    with progress.stage("collecting", dataset.count()) as advance:
        return calibration.collect(
            network,
            dataset,
            heads=heads,
            seed=seed,
            shard=shard,
            providers=providers,
            threads=threads,
            progress=advance,
        )


def _divided(dataset: Dataset, most: int | None) -> tuple[Dataset, Dataset]:
    """The samples for the statistics, and those held back from them, at most so many where the count is known."""
    count = dataset.count()
    return dataset.split(_HELD_BACK if count is None or most is None else min(_HELD_BACK, most / count))


def _plan(
    network: Network,
    statistics: Statistics | None,
    plan: Plan | Budget | Sequence[Budget] | None,
    round_to: int,
    progress: Progress,
) -> Plan:
    if isinstance(plan, Plan):
        return plan
    budgets = [plan] if isinstance(plan, Budget) else list(plan or ())
    with progress.stage("planning"):
        if statistics is None:
            return planning.plan_from_weights(network, budgets, round_to=round_to)
        return planning.make_plan(network, statistics, budgets or [DEFAULT_BUDGET], round_to=round_to)


def _at_seen_shapes(network: Network, statistics: Statistics) -> Network:
    """Count costs at the shapes that the data had, where the user gave none."""
    statistics.check_model(network.fingerprint, network.name)
    free = any(layer.geometry is None for layer in network.layers) or any(
        not isinstance(size, int) for spec in input_specs(network.model) for size in spec.shape[1:]
    )
    if network.input_shapes or not free:
        return network
    return network.with_input_shapes(statistics.input_shapes)


def _synthetic(network: Network) -> Dataset:
    specs = input_specs(network.model)
    return synthetic_dataset(specs, fixed_batch(specs) or _SYNTHETIC_SAMPLES, 0, network.input_shapes)
