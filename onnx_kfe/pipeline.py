"""The public functions: each takes a model as path, ``ModelProto`` or ``ir.Model`` and runs one step, `prune` all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import onnx_ir as ir

from onnx_kfe import _prune, calibration
from onnx_kfe._finetune import finetune
from onnx_kfe._floor import check_floor
from onnx_kfe._frontier import Point, sweep
from onnx_kfe._headed import head_specs, trainable
from onnx_kfe._latency_goal import Stadium
from onnx_kfe._measure import Machine, benchmark, evaluate, measure_quality, note_skipped
from onnx_kfe._prune import DEFAULT_BUDGET, Pruning, Recovery, at_seen_shapes, at_shapes_of, check_loss, divide
from onnx_kfe._recipe import CURVATURES, Recipe, make_plan
from onnx_kfe.calibration import (
    DEFAULT_MEMORY,
    Dataset,
    DataSource,
    ImageOptions,
    Loss,
    Statistics,
    data_specs,
    input_specs,
    open_dataset,
    open_loss,
)
from onnx_kfe.errors import BudgetError, KfeError, UsageError
from onnx_kfe.evaluation import Quality
from onnx_kfe.graph import ModelSource, Network, open_network
from onnx_kfe.planning import Budget, Macs, Plan, Planner
from onnx_kfe.progress import Progress, StagesOnly
from onnx_kfe.result import Result
from onnx_kfe.rewrite import apply_plan

__all__ = [
    "CURVATURES",
    "DEFAULT_BUDGET",
    "DEFAULT_SAMPLES",
    "benchmark",
    "collect",
    "evaluate",
    "finetune",
    "frontier",
    "inspect",
    "plan",
    "prune",
]

DEFAULT_SAMPLES = 1024

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
    labels: str | os.PathLike[str] | None = None,
    heads: Mapping[str, str] | None = None,
    loss: ModelSource | None = None,
    max_samples: int | None = DEFAULT_SAMPLES,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    curvature: str = "kfac",
    memory: int = DEFAULT_MEMORY,
    providers: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Collect the K-FAC or EKFAC statistics of every prunable layer.

    Args:
        model: The model.
        data: Calibration samples, see `open_dataset`; labels are not used, but by a loss that reads them.
        images: How images become inputs.
        labels: CSV of ``file,label``, for a loss.
        heads: Kind by output name where detection should be overruled.
        loss: An ONNX graph whose gradients take the place of those sampled at the heads, see `open_loss`.
        max_samples: At most this many samples.
        seed: Seed of noise and positions.
        shard: ``(i, n)`` collects the i-th of n parts, to be merged.
        curvature: ``kfac``, or ``ekfac``: a second pass over the data measures the variances of the gradient in the
            eigenbases of the factors as well.
        memory: Bytes of sums that are collected at once; what takes more is collected in several passes over the data.
        providers: Execution providers, CPU when empty.
        threads: Threads, all cores when None.
        progress: Shows what is going on.

    Raises:
        KfeError: Something about the model or the data stops the work.
        UsageError: The arguments do not fit the model or the data.
    """
    _check_curvature(curvature, shard)
    shown = progress or Progress()
    network = inspect(model)
    own = None if loss is None else open_loss(loss, network)
    dataset = _opened(data, network, own, images, labels, max_samples, shown)
    network = at_shapes_of(network, dataset)
    machine = Machine(providers, threads)
    statistics = _prune.collect(network, dataset, heads, own, seed, shard, memory, machine, shown, curvature)
    note_skipped(dataset, shown)
    return statistics


def _opened(
    source: DataSource | Dataset,
    network: Network,
    loss: Loss | None,
    images: ImageOptions | None,
    labels: str | os.PathLike[str] | None,
    max_samples: int | None,
    progress: Progress,
) -> Dataset:
    """Samples for a model, with what a loss reads besides."""
    specs = data_specs(network.model, loss)
    try:
        dataset = open_dataset(cast(DataSource, source), specs, images=images, labels=labels, max_samples=max_samples)
    except KfeError as error:
        if loss is None or not loss.targets:
            raise
        own = ", ".join(spec.name for spec in loss.targets)
        known = ", ".join(value.name or "" for value in (*network.model.graph.outputs, *network.model.graph.inputs))
        raise UsageError(
            f"{error}; --loss {loss.name} reads {own} of the data, for the model has no such output or input ({known})"
        ) from error
    progress.note(dataset.describe())
    return dataset


def _check_curvature(curvature: str, shard: tuple[int, int]) -> None:
    if curvature not in CURVATURES:
        raise UsageError(f"--curvature {curvature}: it can be {', '.join(CURVATURES)}")
    if curvature == "ekfac" and shard != (0, 1):
        raise UsageError("--curvature ekfac: the eigenbases are those of all the data; collect without --shard")


def plan(
    model: Source,
    statistics: Statistics,
    *budgets: Budget,
    method: str | None = None,
    basis: str | None = None,
    channels: float | None = None,
    round_to: int | None = None,
    providers: Sequence[str] = (),
    threads: int | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Plan:
    """Choose form and ranks of each layer: least predicted loss under the budgets.

    Args:
        model: The model that the statistics were collected on.
        statistics: Its statistics.
        budgets: `Macs`, `Params`, `Latency`, `Milliseconds`. For a latency the layers and the forms that can take their
            place are measured here, and the plan's whole model as well.
        method: ``forms`` when None, else one of `planning.METHODS`: what is least important goes, by one threshold.
        basis: What an importance is of: ``channel`` (when None) or ``kfe``.
        channels: Remove channels first, until this share of the MACs is left, and choose forms for the rest.
        round_to: Ranks are multiples of this (smaller ones for small layers); 16 when None, and with a latency what was
            measured to run fast.
        providers: Execution providers that a latency is of, CPU when empty.
        threads: Threads that a latency is of, all cores when None.
        batch: Samples of a run that a latency is of.
        progress: Shows what is going on.

    Raises:
        BudgetError: The budgets cannot be met.
        KfeError: The statistics are of another model.
    """
    network = at_seen_shapes(inspect(model), statistics)
    machine, shown = Machine(providers, threads, batch), progress or Progress()
    recipe = Recipe.of(method, basis, channels)
    return make_plan(network, statistics, budgets, machine, shown, round_to=round_to, recipe=recipe).plan


def frontier(
    model: Source,
    statistics: Statistics,
    data: DataSource | Dataset | None = None,
    *,
    images: ImageOptions | None = None,
    max_samples: int | None = DEFAULT_SAMPLES,
    round_to: int | None = None,
    providers: Sequence[str] = (),
    threads: int | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> list[Point]:
    """Sweep the latency budget: models from nearly the original's latency down to the fastest that there is.

    Args:
        model: The model that the statistics were collected on.
        statistics: Its statistics.
        data: Samples to measure fidelity to the original on, best such as the statistics were not collected on.
        images: How images become inputs.
        max_samples: At most this many samples.
        round_to: Ranks are multiples of this; what was measured to run fast when None.
        providers: Execution providers that a latency is of, CPU when empty.
        threads: Threads that a latency is of, all cores when None.
        batch: Samples of a run that a latency is of.
        progress: Shows what is going on.

    Returns:
        The models, the slowest first, each with predicted loss and measured latency, without refit.

    Raises:
        KfeError: The statistics are of another model, or nothing in it can be made faster.
    """
    network = at_seen_shapes(inspect(model), statistics)
    machine, shown = Machine(providers, threads, batch), progress or Progress()
    measure = None
    if data is not None:
        specs = input_specs(network.model)
        dataset = open_dataset(cast(DataSource, data), specs, images=images, max_samples=max_samples)
        shown.note(dataset.describe())
        heads = head_specs(statistics.heads, scaled=True)

        def measure(smaller: ir.Model) -> Quality:
            return measure_quality(network, smaller, dataset, heads, machine, StagesOnly(shown))

    stadium = Stadium(network, machine)
    planner = Planner(network, statistics, latency=stadium.measure(round_to, shown))
    return sweep(
        network, planner, stadium, lambda plan: apply_plan(network, plan, statistics)[0], measure, StagesOnly(shown)
    )


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
    loss: ModelSource | None = None,
    max_samples: int | None = DEFAULT_SAMPLES,
    method: str | None = None,
    basis: str | None = None,
    channels: float | None = None,
    iterations: int = 1,
    schedule: str | None = None,
    epochs: int = 0,
    curvature: str = "kfac",
    round_to: int | None = None,
    seed: int = 0,
    providers: Sequence[str] = (),
    threads: int | None = None,
    batch: int = 1,
    refit: bool = True,
    memory: int = DEFAULT_MEMORY,
    checkpoint: str | os.PathLike[str] | None = None,
    max_drop: float | None = None,
    metric: str | None = None,
    minimize: type[Budget] = Macs,
    evaluations: int | None = None,
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
        loss: An ONNX graph whose gradients take the place of those sampled at the heads, see `open_loss`.
        max_samples: At most this many samples.
        method: ``forms`` when None, else one of `planning.METHODS`: what is least important goes, by one threshold.
            EigenDamage is as published, and not refitted.
        basis: What an importance is of: ``channel`` (when None) or ``kfe``.
        channels: Remove channels first, until this share of the MACs is left, and choose forms for the rest.
        iterations: Rounds of a method by importance, each with statistics collected anew on what is left.
        schedule: Key of `SCHEDULES`: prune while training, in the first half of the epochs. How many channels (or, with
            the basis ``kfe``, directions) go where is as the method plans it; the schedule decides which.
        epochs: Epochs in which the smaller model learns from the original on the data, after pruning (divided over the
            iterations) or while pruning on a schedule. 0 for no training. Statistics and refit then take at most 4,096
            of the samples.
        curvature: ``kfac``, or ``ekfac`` for importances by variances measured in the eigenbases; statistics that have
            such variances are used with them.
        round_to: Ranks are multiples of this (smaller ones for small layers); 16 when None, and with a latency what was
            measured to run fast. Of eigendirections any number is kept when None.
        seed: Seed of noise and positions.
        providers: Execution providers, CPU when empty.
        threads: Threads, all cores when None.
        batch: Samples of a run whose latency counts.
        refit: Whether to solve the layers anew, front to back, on the samples (see `recovery.refit`).
        memory: Bytes of sums that are collected at once, and of activations that the refit keeps in memory.
        checkpoint: Folder from which an interrupted refit goes on, removed when it is done.
        max_drop: Instead of a plan: find the smallest model that is no more than this worse than the original, on
            samples that neither the statistics nor the refit saw.
        metric: What `max_drop` is measured in: a key of `evaluation.METRICS` or ``package.module:function``; None for
            the one that suits the model.
        minimize: What is made as small as `max_drop` allows: `Macs`, `Params` or `Latency`.
        evaluations: Refine the plan by a factored bandit that measures at most so many models on minibatches of the
            data (see `planning.refine`); None for the plan as predicted.
        measure: Whether to measure quality and latency of the result.
        progress: Shows what is going on.

    Raises:
        BudgetError: The budgets or the floor cannot be met, or nothing can be pruned at all.
        KfeError: Something about the model or the data stops the work.
        UsageError: The arguments do not fit together.
    """
    check_floor(max_drop, metric, plan, data, evaluation_data)
    recipe = Recipe.of(method, basis, channels, iterations, curvature, schedule, epochs)
    _check_together(recipe, method, data, plan, max_drop, evaluations)
    shown = progress or Progress()
    network = inspect(model)

    if epochs > 0:
        trainable(calibration.find_heads(network, heads))
    own = None if loss is None else open_loss(loss, network)

    def opened(source: DataSource | Dataset | None, loss: Loss | None = None) -> Dataset | None:
        return None if source is None else _opened(source, network, loss, images, labels, max_samples, shown)

    if isinstance(data, Statistics):
        data, statistics = None, data
    check_loss(own, statistics, iterations, collects=data is not None)
    test = opened(evaluation_data)
    inputs = [spec.name for spec in input_specs(network.model)]
    dataset = opened(data, own)
    network = at_shapes_of(network, dataset) if statistics is None else at_seen_shapes(network, statistics)
    if not network.prunable:
        raise BudgetError(f"{network.name}: no layer can be pruned; onnx-kfe inspect says why")
    samples = divide(dataset, test, inputs, floor=max_drop is not None, training=epochs > 0)
    machine = Machine(providers, threads, batch)
    recovery = Recovery(refit, memory, None if checkpoint is None else Path(checkpoint))
    run = Pruning(network, model, samples, statistics, heads, own, machine, recovery, recipe, seed, shown)
    judge = None if max_drop is None else run.judge(max_drop, metric)
    run.collect()
    result = run.smaller(plan, round_to, evaluations) if judge is None else run.smallest(judge, minimize, round_to)
    if measure:
        run.measure(result)
    return result


def _check_together(
    recipe: Recipe, method: str | None, data: object, plan: object, max_drop: float | None, evaluations: int | None
) -> None:
    """Refuse arguments of `prune` that do not go together.

    Raises:
        UsageError: Which, and what to do.
    """
    made = isinstance(plan, Plan)
    if made and (method is not None or recipe.channels is not None or recipe.rounds > 1 or recipe.schedule is not None):
        raise UsageError(
            "--plan already says what to do: drop --method, --channels, --iterations and --schedule, or drop --plan"
        )
    if evaluations is not None and (made or max_drop is not None or data is None or recipe != Recipe()):
        raise UsageError(
            "--search refines the forms of a plan for a budget on samples: give --data, and no --plan, --max-drop or "
            "other --method"
        )
    if evaluations is not None and isinstance(data, Statistics):
        raise UsageError("--search measures models on samples: give --data beside the statistics")
    if max_drop is not None and (recipe.channels is not None or recipe.rounds > 1 or recipe.epochs):
        raise UsageError("--max-drop looks for the size by itself: drop --channels, --iterations and --finetune")
    if recipe.epochs and (data is None or isinstance(data, Statistics)):
        raise UsageError("--finetune trains on samples: give --data")
    if recipe.rounds > 1 and (data is None or isinstance(data, Statistics)):
        raise UsageError("--iterations collects statistics anew in each round: give --data")
