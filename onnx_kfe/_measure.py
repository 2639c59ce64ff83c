"""What a model is worth: whole models over data, for `evaluate`, `benchmark` and the end of `prune`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import onnx_ir as ir

from onnx_kfe import calibration, evaluation
from onnx_kfe._executable import executable
from onnx_kfe._headed import giving, head_specs
from onnx_kfe.calibration import (
    Batch,
    Dataset,
    DataSource,
    ImageOptions,
    batch_size,
    batches,
    fixed_batch,
    input_specs,
    open_dataset,
    synthetic_dataset,
)
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.evaluation import HeadSpec, Quality, Timing
from onnx_kfe.graph import ModelSource, Network, load, open_network, serialize
from onnx_kfe.progress import Progress
from onnx_kfe.runtime import Serialized

__all__ = [
    "Machine",
    "benchmark",
    "evaluate",
    "measure_latency",
    "measure_quality",
    "note_skipped",
]


class Machine(NamedTuple):
    """What ONNX Runtime runs on.

    Attributes:
        providers: Execution providers, CPU when empty.
        threads: Intra-operator threads, all cores when None.
        batch: Samples of a run whose latency counts.
    """

    providers: Sequence[str] = ()
    threads: int | None = None
    batch: int = 1


def evaluate(
    model: ModelSource,
    data: DataSource | Dataset,
    *,
    reference: ModelSource | None = None,
    images: ImageOptions | None = None,
    labels: str | os.PathLike[str] | None = None,
    heads: Mapping[str, str] | None = None,
    metric: str | None = None,
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
        metric: Key of `evaluation.METRICS` or ``package.module:function``: how much worse the model is than the
            original, with an interval.
        max_samples: At most this many samples.
        providers: Execution providers, CPU when empty.
        threads: Threads, all cores when None.
        progress: Shows what is going on.

    Raises:
        UsageError: There is nothing to measure against, or an option does not fit the model or the data.
        KfeError: Something about the models or the data stops the work.
    """
    shown = progress or Progress()
    network = open_network(model if reference is None else reference)
    dataset = open_dataset(
        cast(DataSource, data), input_specs(network.model), images=images, labels=labels, max_samples=max_samples
    )
    shown.note(dataset.describe())
    specs = head_specs(calibration.find_heads(network, heads))
    quality = _evaluate(
        _runnable(model, specs, providers),
        None if reference is None else _runnable(reference, specs, providers),
        network,
        dataset,
        specs,
        metric,
        providers,
        threads,
        shown,
    )
    note_skipped(dataset, shown)
    return quality


def benchmark(
    models: Sequence[str | os.PathLike[str]],
    *,
    batch: int | Sequence[int] = 1,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    providers: Sequence[str] = (),
    threads: int | Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[Timing]:
    """Time models against each other on the same random inputs, alternated in one run.

    Args:
        models: Paths; speed is relative to the first.
        batch: Samples in a run, or several such numbers.
        input_shapes: Shapes of inputs with free axes.
        providers: Execution providers, CPU when empty.
        threads: Threads, all cores when None, or several such numbers.
        progress: Shows what is going on.

    Returns:
        The timings of all models at each combination of batch and threads.

    Raises:
        UsageError: There is no model, or a shape or provider cannot be.
        KfeError: A model cannot be loaded or run, or takes other inputs than the first.
    """
    if not models:
        raise UsageError("there is no model to benchmark")
    specs, *_ = [input_specs(load(path)) for path in models]
    shapes = {name: tuple(shape) for name, shape in (input_shapes or {}).items()}
    paths = {os.fspath(path): os.fspath(path) for path in models}
    fixed = fixed_batch(specs)
    counts = [fixed] if fixed else [batch] if isinstance(batch, int) else list(batch)
    pools = list(threads) if isinstance(threads, Sequence) else [threads]
    timings = []
    with (progress or Progress()).stage("measuring latency", len(counts) * len(pools)) as advance:
        for count, pool in itertools.product(counts, pools):
            feeds = _first_batch(synthetic_dataset(specs, count, 0, shapes), specs, count).feeds
            timings += evaluation.benchmark(paths, feeds, batch=count, providers=providers, threads=pool)
            advance(1)
    return timings


def measure_quality(
    network: Network,
    smaller: ir.Model,
    dataset: Dataset,
    heads: Sequence[HeadSpec],
    machine: Machine,
    progress: Progress,
    metric: str | None = None,
) -> Quality:
    """Quality of a smaller model against the original."""
    models = [serialize(executable(giving(model, heads), machine.providers)) for model in (smaller, network.original)]
    return _evaluate(
        models[0], models[1], network, dataset, heads, metric, machine.providers, machine.threads, progress
    )


def measure_latency(
    network: Network,
    smaller: ir.Model,
    dataset: Dataset,
    machine: Machine,
    progress: Progress,
) -> list[Timing]:
    """Timings of the original and of a smaller model on samples of the data; none where they cannot be run here."""
    if executable(network.original, machine.providers) is not network.original:
        progress.note(
            "ONNX Runtime lacks kernels for the model's element type: no latency, quality in single precision"
        )
        return []
    models = {"original": serialize(network.original), "pruned": serialize(smaller)}
    batch = _first_batch(dataset, input_specs(network.model), machine.batch)
    with progress.stage("measuring latency"):
        return evaluation.benchmark(
            models, batch.feeds, batch=len(batch), providers=machine.providers, threads=machine.threads
        )


def note_skipped(dataset: Dataset, progress: Progress) -> None:
    """Say which samples could not be read."""
    if dataset.skipped:
        progress.note(f"skipped {len(dataset.skipped)} corrupt sample(s): {'; '.join(dataset.skipped)}")


def _evaluate(
    model: Serialized | str,
    reference: Serialized | str | None,
    network: Network,
    dataset: Dataset,
    heads: Sequence[HeadSpec],
    metric: str | None,
    providers: Sequence[str],
    threads: int | None,
    progress: Progress,
) -> Quality:
    specs = input_specs(network.model)
    first = _first_batch(dataset, specs)
    size = batch_size(network, {name: array.shape for name, array in first.feeds.items()})
    known = None if metric is None else evaluation.find_metric(metric)
    if known is not None and known.function is not None:
        size = 1  # what outputs of any length are of which sample is then known
    use_labels = (known is not None and known.own_labels) or _labels_fit(network, heads, first)
    if not use_labels:
        progress.note("the labels are left out: they are not one for each decision of the model")

    def counted() -> Iterator[Batch]:
        for batch in batches(dataset, size, specs):
            yield batch if use_labels else dataclasses.replace(batch, labels=None)
            advance(len(batch))

    with progress.stage("measuring quality", dataset.count()) as advance:
        return evaluation.evaluate(
            model, counted(), reference=reference, heads=heads, metric=metric, providers=providers, threads=threads
        )


def _labels_fit(network: Network, heads: Sequence[HeadSpec], batch: Batch) -> bool:
    """Whether labels, which may lie beside the images by chance, can be those of the first categorical head."""
    head = next((head for head in heads if head.kind == "categorical"), None)
    output = next((v for v in network.model.graph.outputs if head is not None and v.name == head.name), None)
    if head is None or batch.labels is None:
        return True
    if output is None or output.shape is None:
        return output is not None
    rest = list(output.shape)[1:]
    if len(rest) > 0:
        del rest[head.axis - 1 if head.axis is not None and head.axis > 0 else -1]
    if not all(isinstance(dim, int) for dim in rest):
        return True
    return math.prod(dim for dim in rest if isinstance(dim, int)) == batch.labels[0].size


def _first_batch(dataset: Dataset, specs: Sequence[calibration.InputSpec], size: int = 1) -> Batch:
    first = next(batches(dataset, size, specs), None)
    if first is None:
        raise KfeError(f"{dataset.describe()}: too few samples for one batch of the size that the model takes")
    return first


def _runnable(model: ModelSource, heads: Sequence[HeadSpec], providers: Sequence[str]) -> Serialized | str:
    """What ONNX Runtime loads; a path stays a path where it can, so that models over 2 GiB can be run too."""
    loaded = load(model)  # for the clear errors
    found = executable(giving(loaded, heads), providers)
    return os.fspath(model) if found is loaded and isinstance(model, str | os.PathLike) else serialize(found)
