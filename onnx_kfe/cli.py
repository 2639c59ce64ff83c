"""The command line: parse, call the API, print."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import onnx_kfe as kfe
from onnx_kfe import console
from onnx_kfe.calibration import ImageOptions, Statistics, image_preset
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.graph import check_output
from onnx_kfe.pipeline import DEFAULT_SAMPLES
from onnx_kfe.planning import DEFAULT_ROUND_TO, Budget, Macs, Params, Plan
from onnx_kfe.progress import Progress

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Make a trained ONNX model smaller and measurably faster, from the .onnx file and some inputs alone.",
)  # fmt: skip

Model = Annotated[Path, typer.Argument(help="The .onnx file; it is never modified.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Calibration inputs: image folder, .npz, .npy, test_data_set folder, or package.module:function; repeatable.",
    ),
]
Stats = Annotated[Path | None, typer.Option("--stats", help="Statistics collected before, instead of --data.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="File to write, whole or not at all.")]
MacsOption = Annotated[
    float | None, typer.Option("--macs", help="MACs to keep: a fraction of the original, or a number.")
]
ParamsOption = Annotated[float | None, typer.Option("--params", help="Parameters to keep: a fraction, or a number.")]
RoundTo = Annotated[
    int, typer.Option("--round-to", min=1, help="Ranks are multiples of this, smaller for small layers.")
]
HeadsOption = Annotated[
    list[str] | None, typer.Option("--head", help="NAME=categorical|bernoulli|gaussian|none for an output; repeatable.")
]
Include = Annotated[list[str] | None, typer.Option("--include", help="Only layers with such names (glob); repeatable.")]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", help="No layers with such names (glob); repeatable.")]
Shapes = Annotated[list[str] | None, typer.Option("--input-shape", help="name:1,3,224,224 for free axes; repeatable.")]
Samples = Annotated[int, typer.Option("--max-samples", min=2, help="Use at most this many samples.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of sampled targets and positions.")]
Providers = Annotated[
    list[str] | None, typer.Option("--providers", help="Execution provider; repeatable, CPU by default.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads; all cores by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Preset = Annotated[str | None, typer.Option("--preset", help="Image preprocessing by name, e.g. imagenet, unit, raw.")]
Mean = Annotated[
    str | None, typer.Option("--mean", help="Image mean per channel after scaling, e.g. 0.485,0.456,0.406.")
]
Std = Annotated[str | None, typer.Option("--std", help="Image standard deviation per channel.")]
Size = Annotated[str | None, typer.Option("--size", help="Image height,width when the model leaves it free.")]
Layout = Annotated[str | None, typer.Option("--layout", help="NCHW or NHWC; detected by default.")]
Labels = Annotated[Path | None, typer.Option("--labels", help="CSV of file,label for an image folder.")]


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a command whose errors are one line and an exit code."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except KfeError as error:
            console.print_error(str(error))
            raise typer.Exit(error.exit_code) from None

    return app.command(name=function.__name__.rstrip("_"))(run)


def main() -> None:
    """Entry point of the console script."""
    app()


@command
def inspect(
    model: Model, input_shape: Shapes = None, include: Include = None, exclude: Exclude = None, json: Json = False
) -> None:
    """List the layers: geometry, MACs, parameters, and why those that cannot be pruned cannot."""
    network = kfe.inspect(model, input_shapes=_shapes(input_shape), include=include or (), exclude=exclude or ())
    if json:
        console.print_json([_layer_row(layer) for layer in network.layers])
    else:
        console.show_layers(network)


@command
def collect(
    model: Model, data: Data, output: Output, head: HeadsOption = None, shard: str = "0/1",
    max_samples: Samples = DEFAULT_SAMPLES, seed: Seed = 0, input_shape: Shapes = None, include: Include = None,
    exclude: Exclude = None, preset: Preset = None, mean: Mean = None, std: Std = None, size: Size = None,
    layout: Layout = None, providers: Providers = None, threads: Threads = None, json: Json = False,
) -> None:  # fmt: skip
    """Collect K-FAC statistics over data into a file; --shard i/n collects a part of it."""
    check_output(output, model)
    network = kfe.inspect(model, input_shapes=_shapes(input_shape), include=include or (), exclude=exclude or ())
    statistics = kfe.collect(
        network, _data(data), images=_images(preset, mean, std, size, layout), heads=_heads(head),
        max_samples=max_samples, seed=seed, shard=_shard(shard), providers=providers or (), threads=threads,
        progress=_progress(json),
    )  # fmt: skip
    statistics.save(output)
    _show_statistics(statistics, output, json)


@command
def merge(
    parts: Annotated[list[Path], typer.Argument(help="Statistics of the shards.")], output: Output, json: Json = False
) -> None:
    """Add the shards of one collection."""
    check_output(output, *parts)
    statistics = kfe.merge([Statistics.load(part) for part in parts])
    statistics.save(output)
    _show_statistics(statistics, output, json)


@command
def plan(
    model: Model, stats: Annotated[Path, typer.Option("--stats", help="Statistics of this model.")], output: Output,
    macs: MacsOption = None, params: ParamsOption = None, round_to: RoundTo = DEFAULT_ROUND_TO,
    input_shape: Shapes = None, include: Include = None, exclude: Exclude = None, json: Json = False,
) -> None:  # fmt: skip
    """Choose form and ranks of each layer under a budget, into a file that can be edited."""
    check_output(output, model, stats)
    network = kfe.inspect(model, input_shapes=_shapes(input_shape), include=include or (), exclude=exclude or ())
    chosen = kfe.plan(network, Statistics.load(stats), *_budgets(macs, params), round_to=round_to)
    chosen.save(output)
    if json:
        console.print_json(chosen.as_dict())
    else:
        console.show_plan(chosen)


@command
def prune(
    model: Model, output: Output, data: Data = None, stats: Stats = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="A plan made before, instead of a budget.")] = None,
    macs: MacsOption = None, params: ParamsOption = None, round_to: RoundTo = DEFAULT_ROUND_TO, head: HeadsOption = None,
    max_samples: Samples = DEFAULT_SAMPLES, seed: Seed = 0, input_shape: Shapes = None, include: Include = None,
    exclude: Exclude = None, preset: Preset = None, mean: Mean = None, std: Std = None, size: Size = None,
    layout: Layout = None, labels: Labels = None, providers: Providers = None, threads: Threads = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and measure, but write nothing.")] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Make a model smaller: collect statistics, choose forms and ranks, rewrite, measure. Keeps 75 % of the MACs by default."""
    check_output(output, model)
    if plan is not None and (macs or params):
        raise UsageError("--plan already says what to do: drop --macs and --params, or drop --plan")
    network = kfe.inspect(model, input_shapes=_shapes(input_shape), include=include or (), exclude=exclude or ())
    images = _images(preset, mean, std, size, layout)
    progress = _progress(json)
    if not data and stats is None:
        progress.note("no --data: quality will be unproven, and only what the weights alone justify is pruned")
    result = kfe.prune(
        network, Statistics.load(stats) if stats else (_data(data) if data else None),
        Plan.load(plan, network) if plan else _budgets(macs, params),
        evaluation_data=_data(data) if data and stats else None, images=images, labels=labels, heads=_heads(head),
        max_samples=max_samples, round_to=round_to, seed=seed, providers=providers or (), threads=threads,
        progress=progress,
    )  # fmt: skip
    if not dry_run:
        result.save(output)
    if json:
        console.print_json({**result.report, "output": None if dry_run else str(output)})
    else:
        console.show_result(result, None if dry_run else str(output))


@command
def evaluate(
    model: Model, data: Data, reference: Annotated[Path | None, typer.Option("--reference", help="The original.")] = None,
    head: HeadsOption = None, max_samples: Annotated[int | None, typer.Option("--max-samples", min=1)] = None,
    preset: Preset = None, mean: Mean = None, std: Std = None, size: Size = None, layout: Layout = None,
    labels: Labels = None, providers: Providers = None, threads: Threads = None, json: Json = False,
) -> None:  # fmt: skip
    """Measure accuracy where the data have labels, and fidelity to --reference."""
    quality = kfe.evaluate(
        model, _data(data), reference=reference, images=_images(preset, mean, std, size, layout), labels=labels,
        heads=_heads(head), max_samples=max_samples, providers=providers or (), threads=threads, progress=_progress(json),
    )  # fmt: skip
    if json:
        console.print_json(quality.as_dict())
    else:
        console.show_quality(quality)


@command
def benchmark(
    models: Annotated[list[Path], typer.Argument(help="Models; speed is relative to the first.")],
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples in a run.")] = 1,
    input_shape: Shapes = None, providers: Providers = None, threads: Threads = None, json: Json = False,
) -> None:  # fmt: skip
    """Time models against each other, alternated in one run, on random inputs."""
    timings = kfe.benchmark(
        models, batch=batch, input_shapes=_shapes(input_shape), providers=providers or (), threads=threads,
        progress=_progress(json),
    )  # fmt: skip
    if json:
        console.print_json([timing.as_dict() for timing in timings])
    else:
        console.show_timings(timings)


@command
def export(
    factory: Annotated[str, typer.Argument(help="package.module:function that returns a torch module.")],
    output: Output,
    input_shape: Annotated[list[str], typer.Option("--input-shape", help="x:1,3,224,224 or ids:int64:1,128; repeatable.")],
    checkpoint: Annotated[Path | None, typer.Option("--checkpoint", help="Weights, .safetensors or a state dict.")] = None,
    opset: Annotated[int | None, typer.Option("--opset", help="ONNX operator set.")] = None,
    dynamic: Annotated[list[str] | None, typer.Option("--dynamic", help="x:0=batch for an open axis, or none.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Export a torch module to ONNX and compare it with torch (needs the extra: train)."""
    from onnx_kfe.export import export_factory, parse_dynamic, parse_input_shape

    check_output(output)
    inputs = [parse_input_shape(text) for text in input_shape]
    export_factory(factory, output, inputs, checkpoint, opset, parse_dynamic(dynamic) if dynamic else None)
    network = kfe.inspect(output)
    if json:
        console.print_json({"output": str(output), "layers": len(network.layers), "prunable": len(network.prunable)})
    else:
        console.print_line(
            f"written: {output}, equal to torch; {len(network.prunable)} of {len(network.layers)} layers can be pruned"
        )


@command
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the pruned model.")] = Path("digits-small.onnx"),
    macs: MacsOption = None, threads: Threads = None, json: Json = False,
) -> None:  # fmt: skip
    """Prune a bundled classifier of handwritten digits and measure what it cost."""
    from onnx_kfe import demo as bundle

    check_output(output, bundle.model_path())
    images, _ = bundle.load_digits_split("calibration")
    test, labels = bundle.load_digits_split("test")
    result = kfe.prune(
        bundle.model_path(), {"image": images}, Macs(macs or 0.5), evaluation_data={"image": test, "labels": labels},
        threads=threads, progress=_progress(json),
    )  # fmt: skip
    result.save(output)
    if json:
        console.print_json({**result.report, "output": str(output)})
    else:
        console.show_result(result, str(output))


def _progress(json: bool) -> Progress:
    return Progress() if json else console.ShownProgress()


def _data(data: list[str] | None) -> list[str]:
    if not data:
        raise UsageError("give --data: an image folder, .npz, .npy, test_data_set folder, or package.module:function")
    return data


def _budgets(macs: float | None, params: float | None) -> list[Budget]:
    found: list[Budget] = [Macs(macs)] if macs is not None else []
    return [*found, Params(params)] if params is not None else found


def _heads(texts: list[str] | None) -> dict[str, str]:
    pairs = [text.rpartition("=") for text in texts or ()]
    if bad := next((kind for name, _, kind in pairs if not name), None):
        raise UsageError(f"--head {bad}: write NAME=KIND")
    return {name: kind for name, _, kind in pairs}


def _shapes(texts: list[str] | None) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for text in texts or ():
        name, _, sizes = text.rpartition(":")
        try:
            shapes[name] = tuple(int(size) for size in sizes.split(","))
        except ValueError:
            raise UsageError(f"--input-shape {text}: write name:1,3,224,224") from None
        if not name or min(shapes[name]) < 1:
            raise UsageError(f"--input-shape {text}: write name:1,3,224,224")
    return shapes


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UsageError(f"--shard {text}: write i/n with i from 0 to n - 1")
    return int(index), int(count)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: write numbers with commas between") from None


def _images(
    preset: str | None, mean: str | None, std: str | None, size: str | None, layout: str | None
) -> ImageOptions | None:
    """Image options where any was given: those of the preset, each replaced by what was given beside it."""
    import dataclasses

    given: dict[str, Any] = {}
    if mean is not None:
        given["mean"] = _numbers("--mean", mean)
    if std is not None:
        given["std"] = _numbers("--std", std)
    if size is not None:
        given["size"] = tuple(int(number) for number in _numbers("--size", size))
    if layout is not None:
        given["layout"] = layout.upper()
    if preset is None and not given:
        return None
    return dataclasses.replace(image_preset(preset or "imagenet"), **given)


def _layer_row(layer: Any) -> dict[str, Any]:
    geometry = layer.geometry
    return {
        "name": layer.name, "operator": layer.op_type, "macs": layer.macs, "parameters": layer.parameters,
        "in_channels": geometry.in_channels if geometry else None,
        "out_channels": geometry.out_channels if geometry else None,
        "kernel": list(geometry.kernel) if geometry else None, "groups": geometry.groups if geometry else None,
        "prunable": layer.prunable, "reason": layer.reason,
    }  # fmt: skip


def _show_statistics(statistics: Statistics, output: Path, json: bool) -> None:
    heads = {head.output: head.kind for head in statistics.heads}
    if json:
        console.print_json(
            {"output": str(output), "samples": statistics.samples, "layers": len(statistics.layers), "heads": heads,
             "skipped": statistics.skipped, "shards": statistics.shards}
        )  # fmt: skip
        return
    named = ", ".join(f"{name} {kind}" for name, kind in heads.items())
    console.print_line(
        f"{statistics.samples} samples, {len(statistics.layers)} layers; heads: {named} (change with --head)"
    )
    for name, reason in statistics.skipped.items():
        console.print_line(f"left out {name}: {reason}")
    console.print_line(f"written: {output}")
