"""The public functions: each takes a model as path, ``ModelProto`` or ``ir.Model`` and runs one step, `prune` all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import cast

from onnx_kfe import calibration, evaluation, planning
from onnx_kfe.calibration import (
    Dataset,
    DataSource,
    ImageOptions,
    Statistics,
    batch_size,
    batches,
    input_specs,
    open_dataset,
    synthetic_dataset,
)
from onnx_kfe.errors import UsageError
from onnx_kfe.evaluation import HeadSpec, Quality, Timing
from onnx_kfe.graph import ModelSource, Network, open_network, serialize
from onnx_kfe.planning import DEFAULT_ROUND_TO, Budget, Macs, Plan
from onnx_kfe.progress import Progress
from onnx_kfe.result import Result
from onnx_kfe.rewrite import apply_plan

__all__ = ["benchmark", "collect", "evaluate", "inspect", "plan", "prune"]

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
        seed: Seed of sampled targets and positions.
        shard: ``(i, n)`` collects the i-th of n parts, to be merged.
        providers: Execution providers, CPU when empty.
        threads: Threads, all cores when None.
        progress: Shows what is going on.
    """
    network = inspect(model)
    dataset = open_dataset(cast(DataSource, data), input_specs(network.model), images=images, max_samples=max_samples)
    shown = progress or Progress()
    with shown.stage("collecting", dataset.count()) as advance:
        statistics = calibration.collect(
            network,
            dataset,
            heads=heads,
            seed=seed,
            shard=shard,
            providers=providers,
            threads=threads,
            progress=advance,
        )
    for reason in dataset.skipped:
        shown.note(f"skipped {reason}")
    return statistics


def plan(model: Source, statistics: Statistics, *budgets: Budget, round_to: int = DEFAULT_ROUND_TO) -> Plan:
    """Choose form and ranks of each layer: least predicted loss under the budgets.

    Args:
        model: The model that the statistics were collected on.
        statistics: Its statistics.
        budgets: `Macs`, `Params` or both.
        round_to: Ranks are multiples of this (smaller ones for small layers).
    """
    return planning.make_plan(_at_seen_shapes(inspect(model), statistics), statistics, budgets, round_to=round_to)


def evaluate(
    model: ModelSource,
    data: DataSource | Dataset,
    *,
    reference: ModelSource | None = None,
    images: ImageOptions | None = None,
    labels: str | os.PathLike[str] | None = None,
    heads: Mapping[str, str] | None = None,
    max_samples: int | None = None,
    providers: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> Quality:
    """Measure accuracy where the data have labels, and fidelity to a reference model where one is given.

    Args:
        model: The model.
        data: Samples, see `open_dataset`.
        reference: The original.
        images: How images become inputs.
        labels: CSV of ``file,label``.
        heads: Kind by output name where detection should be overruled.
        max_samples: At most this many samples.
        providers: Execution providers.
        threads: Threads.
        progress: Shows what is going on.
    """
    network = inspect(reference if reference is not None else model)
    dataset = open_dataset(
        cast(DataSource, data), input_specs(network.model), images=images, labels=labels, max_samples=max_samples
    )
    specs = _head_specs(calibration.find_heads(network, heads))
    with (progress or Progress()).stage("evaluating", dataset.count()) as advance:
        return evaluation.evaluate(
            _runnable(model), _counted(network, dataset, advance), heads=specs, providers=providers, threads=threads,
            reference=_runnable(reference) if reference is not None else None,
        )  # fmt: skip


def prune(
    model: Source,
    data: DataSource | Dataset | Statistics | None = None,
    plan: Plan | Budget | Sequence[Budget] | None = None,
    *,
    evaluation_data: DataSource | Dataset | None = None,
    images: ImageOptions | None = None,
    labels: str | os.PathLike[str] | None = None,
    heads: Mapping[str, str] | None = None,
    max_samples: int | None = DEFAULT_SAMPLES,
    round_to: int = DEFAULT_ROUND_TO,
    seed: int = 0,
    providers: Sequence[str] = (),
    threads: int | None = None,
    measure: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Make a model smaller, end to end: collect, plan, rewrite, measure.

    Args:
        model: The model.
        data: Calibration samples, of which a fifth is held back to measure quality on; or statistics collected before;
            or None, when only what the weights alone justify is pruned and quality is unproven.
        plan: Budgets (three quarters of the MACs when None), or a plan made before.
        evaluation_data: Samples to measure quality on, instead of those held back.
        images: How images become inputs.
        labels: CSV of ``file,label``.
        heads: Kind by output name where detection should be overruled.
        max_samples: At most this many samples.
        round_to: Ranks are multiples of this (smaller ones for small layers).
        seed: Seed of sampled targets and positions.
        providers: Execution providers.
        threads: Threads.
        measure: Whether to measure quality and latency of the result.
        progress: Shows what is going on.

    Raises:
        BudgetError: The budgets cannot be met.
        KfeError: Something about the model or the data stops the work.
        UsageError: The arguments do not fit together.
    """
    shown = progress or Progress()
    network = inspect(model)
    options = {"images": images, "labels": labels, "max_samples": max_samples}
    statistics, held_back = _statistics(network, data, options, heads, seed, providers, threads, shown)
    if evaluation_data is not None:
        held_back = open_dataset(cast(DataSource, evaluation_data), input_specs(network.model), **options)  # type: ignore[arg-type]
    if statistics is not None:
        network = _at_seen_shapes(network, statistics)
    chosen = _plan(network, statistics, plan, round_to, shown)
    with shown.stage("rewriting", len(chosen.changed)) as advance:
        smaller, losses = apply_plan(network, chosen, statistics, progress=lambda layer: advance(1))
    result = Result(network, smaller, chosen, losses, statistics, source=model)
    if measure:
        sample = held_back or _synthetic(network)
        specs = _head_specs(
            statistics.heads if statistics is not None
            else calibration.find_heads(network, heads)
        )  # fmt: skip
        result.quality, result.proven = (
            _quality(network, result, sample, specs, providers, threads, shown),
            bool(held_back),
        )
        result.timings = _timings(network, result, sample, providers, threads, shown)
    return result


def _statistics(
    network: Network,
    data: DataSource | Dataset | Statistics | None,
    options: Mapping[str, object],
    heads: Mapping[str, str] | None,
    seed: int,
    providers: Sequence[str],
    threads: int | None,
    progress: Progress,
) -> tuple[Statistics | None, Dataset | None]:
    """Statistics, and the samples held back from them."""
    if data is None or isinstance(data, Statistics):
        return data, None
    dataset = open_dataset(data, input_specs(network.model), **options)  # type: ignore[arg-type]
    progress.note(dataset.describe())
    count = dataset.count()
    share = _HELD_BACK if count is None else min(_HELD_BACK, _MOST_HELD_BACK / count)
    used, held_back = dataset.split(share)
    statistics = collect(
        network, used, heads=heads, max_samples=None, seed=seed, providers=providers, threads=threads, progress=progress
    )
    return statistics, held_back


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


def _quality(
    network: Network,
    result: Result,
    dataset: Dataset,
    heads: Sequence[HeadSpec],
    providers: Sequence[str],
    threads: int | None,
    progress: Progress,
) -> Quality:
    with progress.stage("measuring quality", dataset.count()) as advance:
        return evaluation.evaluate(
            serialize(result.ir_model), _counted(network, dataset, advance), reference=serialize(network.original),
            heads=heads, providers=providers, threads=threads,
        )  # fmt: skip


def _timings(
    network: Network,
    result: Result,
    dataset: Dataset,
    providers: Sequence[str],
    threads: int | None,
    progress: Progress,
) -> list[Timing]:
    feeds = next(iter(batches(dataset, 1, input_specs(network.model)))).feeds
    with progress.stage("measuring latency"):
        return evaluation.benchmark(
            {"original": serialize(network.original), "pruned": serialize(result.ir_model)}, feeds,
            providers=providers, threads=threads,
        )  # fmt: skip


def _counted(network: Network, dataset: Dataset, advance):  # type: ignore[no-untyped-def]
    specs = input_specs(network.model)
    first = next(iter(dataset.take(1)), None)
    if first is None:
        raise UsageError("no samples to measure quality on")
    size = batch_size(network, {name: array.shape for name, array in first.sample.items()})
    for batch in batches(dataset, size, specs):
        yield batch
        advance(len(batch))


def _synthetic(network: Network) -> Dataset:
    return synthetic_dataset(input_specs(network.model), _SYNTHETIC_SAMPLES, 0, network.input_shapes)


def _head_specs(heads: Sequence[calibration.Head]) -> list[HeadSpec]:
    return [HeadSpec(head.output, head.kind, head.probabilities, head.axis) for head in heads]


def _runnable(model: ModelSource) -> bytes | str:
    """What ONNX Runtime loads; a path stays a path, so that external data are found."""
    if isinstance(model, str | os.PathLike):
        inspect(model)  # for the clear errors
        return os.fspath(model)
    return serialize(open_network(model).original)


def benchmark(
    models: Sequence[str | os.PathLike[str]],
    *,
    batch: int = 1,
    input_shapes: Shapes | None = None,
    providers: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Timing]:
    """Time models against each other on the same random inputs, alternated in one run.

    Args:
        models: Paths; speed is relative to the first.
        batch: Samples in a run.
        input_shapes: Shapes of inputs with free axes.
        providers: Execution providers.
        threads: Threads.
        progress: Shows what is going on.
    """
    networks = [open_network(path, input_shapes=input_shapes) for path in models]
    specs = input_specs(networks[0].model)
    samples = synthetic_dataset(specs, batch, 0, networks[0].input_shapes)
    feeds = next(iter(batches(samples, batch, specs))).feeds
    with (progress or Progress()).stage("measuring latency"):
        paths = {os.fspath(path): os.fspath(path) for path in models}
        return evaluation.benchmark(paths, feeds, providers=providers, threads=threads)
