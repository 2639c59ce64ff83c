"""Commands that measure models: evaluate, benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import onnx_kfe as kfe
from onnx_kfe import _options as options
from onnx_kfe import _tables, console
from onnx_kfe.cli._app import command
from onnx_kfe.errors import BudgetError, UsageError

__all__: list[str] = []


@command
def evaluate(
    *,
    model: options.Model,
    data: options.Data = None,
    reference: Annotated[Path | None, typer.Option("--reference", help="The original, to compare with.")] = None,
    max_samples: Annotated[
        int | None, typer.Option("--max-samples", min=1, help="At most this many; all by default.")
    ] = None,
    labels: options.Labels = None,
    heads: options.Heads,
    metric: options.Metric = None,
    images: options.Images,
    machine: options.Machine,
    json: options.Json = False,
) -> None:
    """Measure accuracy where the data have labels, and fidelity to --reference; with --metric one number of both."""
    quality = kfe.evaluate(
        model,
        options.required(data),
        reference=reference,
        images=images.given,
        labels=labels,
        heads=heads.given,
        metric=metric,
        max_samples=max_samples,
        progress=console.ShownProgress(),
        **machine.given,
    )
    if json:
        console.print_json(quality.as_dict())
    else:
        _tables.show_quality(quality)


@command
def benchmark(
    *,
    models: Annotated[list[Path], typer.Argument(help="Models; speed is relative to the first.")],
    batch: Annotated[list[int] | None, typer.Option("--batch", min=1, help="Samples in a run; repeatable.")] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="Threads, all cores by default; repeatable.")] = None,
    providers: options.Providers = None,
    input_shape: Annotated[
        list[str] | None, typer.Option("--input-shape", help="name:1,3,224,224; repeatable.")
    ] = None,
    min_speedup: Annotated[
        float | None, typer.Option("--min-speedup", min=0, help="Exit with 3 where a model is less fast than that.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Time models against each other, alternated in one run, on random inputs."""
    if min_speedup is not None and len(models) < 2:
        raise UsageError("--min-speedup compares with the first model: give two or more")
    timings = kfe.benchmark(
        models, batch=batch or 1, input_shapes=options.parse_shapes(input_shape), progress=console.ShownProgress(),
        threads=threads, providers=providers or (),
    )  # fmt: skip
    if json:
        console.print_json([timing.as_dict() for timing in timings])
    else:
        _tables.show_timings(timings)
    slow = [t for t in timings if min_speedup is not None and t.speedup < min_speedup and t.name != str(models[0])]
    if slow:
        worst = min(slow, key=lambda timing: timing.speedup)
        raise BudgetError(
            f"{worst.name} runs at {worst.speedup:.2f}x the speed of {models[0]} at batch {worst.batch} with "
            f"{worst.threads} thread(s), less than --min-speedup {min_speedup:g}"
        )
