"""The command line: parse, call the API, print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, cast

import typer

import onnx_kfe as kfe
from onnx_kfe import _options as options
from onnx_kfe import _tables, console
from onnx_kfe._frontier import check_plot, save_frontier
from onnx_kfe.calibration import Statistics
from onnx_kfe.errors import BudgetError, KfeError, UsageError
from onnx_kfe.graph import check_output, find_groups
from onnx_kfe.pipeline import DEFAULT_SAMPLES
from onnx_kfe.planning import Macs, Plan
from onnx_kfe.result import Result

__all__ = ["app", "main"]

_INTERRUPTED = 130
_DEMO_BUDGET = 0.5
_FRONTIER_HELP = "Sweep the latency instead; -o is a plot (.png, .html) or .json; --data measures fidelity."
_ClickError = cast(
    "type[Exception]", typer.BadParameter.__mro__[2]
)  # click's ClickException, of whichever click this typer uses

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a trained ONNX model smaller and measurably faster, from the .onnx file and some inputs alone.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Args:
        arguments: The command line without the program's name; the process's own when None.

    Returns:
        The exit code: 0 done, 1 failed, 2 usage, 3 a budget that cannot be met, 130 interrupted.
    """
    try:
        return app(None if arguments is None else list(arguments), standalone_mode=False) or 0
    except KfeError as error:
        console.print_error(str(error))
        return error.exit_code
    except _ClickError as error:
        console.print_error(f"{error.format_message().rstrip('.')} (see --help)")  # type: ignore[attr-defined]
        return UsageError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose options come in groups."""
    return app.command()(options.flattened(function))


@app.callback(invoke_without_command=True)
def program(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Print the version or the help where no command is given."""
    if version:
        console.print_line(f"onnx-kfe {kfe.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@command
def inspect(
    *,
    model: options.Model,
    selection: options.Selection,
    groups: Annotated[bool, typer.Option("--groups", help="List the channels that can only go together.")] = False,
    json: options.Json = False,
) -> None:
    """List the layers: geometry, MACs, parameters, and why those that cannot be pruned cannot."""
    network = selection.open(model)
    if groups:
        found = find_groups(network).groups
        if json:
            console.print_json(_tables.group_rows(found))
        else:
            _tables.show_groups(found)
    elif json:
        console.print_json(_tables.layer_rows(network))
    else:
        _tables.show_layers(network)


@command
def collect(
    *,
    model: options.Model,
    data: options.Data = None,
    output: options.Output,
    shard: Annotated[str, typer.Option("--shard", help="i/n: collect the i-th of n parts, to be merged.")] = "0/1",
    curvature: options.Curvature = "kfac",
    sampling: options.Sampling,
    heads: options.Heads,
    selection: options.Selection,
    images: options.Images,
    machine: options.Machine,
    json: options.Json = False,
) -> None:
    """Collect K-FAC statistics over data into a file."""
    check_output(output, model)
    sources = _required(data)
    part = options.parse_shard(shard)
    statistics = kfe.collect(
        selection.open(model),
        sources,
        images=images.given,
        heads=heads.given,
        shard=part,
        curvature=curvature,
        progress=console.ShownProgress(),
        **sampling.given,
        **machine.given,
    )
    _save_statistics(statistics, output, json)


@command
def merge(
    *,
    parts: Annotated[list[Path], typer.Argument(help="Statistics of the shards.")],
    output: options.Output,
    json: options.Json = False,
) -> None:
    """Add the shards of one collection."""
    check_output(output, *parts)
    _save_statistics(kfe.merge([Statistics.load(part) for part in parts]), output, json)


@command
def plan(
    *,
    model: options.Model,
    stats: Annotated[Path, typer.Option("--stats", help="Statistics of this model.")],
    output: options.Output,
    budget: options.Budgets,
    method: options.Method,
    frontier: Annotated[bool, typer.Option("--frontier", help=_FRONTIER_HELP)] = False,
    data: options.Data = None,
    images: options.Images,
    selection: options.Selection,
    machine: options.Machine,
    json: options.Json = False,
) -> None:
    """Choose form and ranks of each layer under a budget, into a file that can be edited."""
    check_output(output, model, stats)
    shared = {
        "round_to": budget.round_to, "batch": budget.batch, "progress": console.ShownProgress(), **machine.given
    }  # fmt: skip
    if frontier:
        if budget.given:
            raise UsageError("--frontier sweeps the latency by itself: drop the budgets")
        if method != options.Method():
            raise UsageError("--frontier sweeps plans of forms: drop --method, --basis and --channels")
        check_plot(output)
        points = kfe.frontier(
            selection.open(model), Statistics.load(stats), data or None, images=images.given, **shared
        )  # fmt: skip
        save_frontier(points, model.name, output)
        if json:
            console.print_json([point.as_dict() for point in points])
        else:
            _tables.show_frontier(points)
            console.print_line(f"written: {output}")
        return
    if data:
        raise UsageError("--data is what --frontier measures on: a plan is made from the statistics")
    chosen = kfe.plan(selection.open(model), Statistics.load(stats), *budget.given, **method.given, **shared)
    chosen.save(output)
    if json:
        console.print_json({**chosen.as_dict(), "output": str(output)})
    else:
        _tables.show_plan(chosen)
        console.print_line(f"written: {output}")


@command
def prune(
    *,
    model: options.Model,
    data: options.Data = None,
    output: options.Output,
    stats: Annotated[Path | None, typer.Option(help="Statistics of this model, collected before.")] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="A plan made before, instead of a budget.")] = None,
    budget: options.Budgets,
    floor: options.Floor,
    method: options.Method,
    rounds: options.Rounds,
    taught: options.Taught,
    search: options.Search,
    sampling: options.Sampling,
    labels: options.Labels = None,
    heads: options.Heads,
    selection: options.Selection,
    images: options.Images,
    recovery: options.Recovery,
    machine: options.Machine,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and measure, but write nothing.")] = False,
    json: options.Json = False,
) -> None:
    """Make a model smaller: collect, plan, rewrite, refit, measure. Keeps 75 % of the MACs by default.

    With --stats, the data refit and measure the result. Without either, only what the weights alone justify is pruned.
    """
    check_output(output, model, *(path for path in (stats, plan) if path is not None))
    budgets = budget.given
    if plan is not None and budgets:
        raise UsageError("--plan already says what to do: drop the budgets, or drop --plan")
    network = selection.open(model)
    result = kfe.prune(
        network,
        data,
        budgets if plan is None else Plan.load(plan, network),
        statistics=Statistics.load(stats) if stats is not None else None,
        images=images.given,
        labels=labels,
        heads=heads.given,
        round_to=budget.round_to,
        batch=budget.batch,
        progress=console.ShownProgress(),
        **sampling.given,
        **floor.given,
        **method.given,
        **rounds.given,
        **taught.given,
        **search.given,
        checkpoint=output.with_name(f"{output.name}.refit"),
        **recovery.given,
        **machine.given,
    )
    _save_result(result, None if dry_run else output, json)


@command
def refit(
    *,
    model: options.Model,
    plan: Annotated[Path, typer.Option("--plan", help="The plan, of the model.")],
    stats: Annotated[Path, typer.Option(help="Statistics of the model.")],
    data: options.Data = None,
    output: options.Output,
    max_samples: Annotated[int, typer.Option(min=2, help="Use at most this many samples.")] = DEFAULT_SAMPLES,
    memory: options.Memory = options.DEFAULT_MEMORY,
    labels: options.Labels = None,
    selection: options.Selection,
    images: options.Images,
    machine: options.Machine,
    json: options.Json = False,
) -> None:
    """Carry out a plan, every layer solved anew on the data, front to back. Interrupted, it goes on where it was."""
    check_output(output, model, plan, stats)
    network = selection.open(model)
    result = kfe.prune(
        network,
        _required(data),
        Plan.load(plan, network),
        statistics=Statistics.load(stats),
        images=images.given,
        labels=labels,
        max_samples=max_samples,
        memory=options.parse_bytes(memory),
        checkpoint=output.with_name(f"{output.name}.refit"),
        progress=console.ShownProgress(),
        **machine.given,
    )
    _save_result(result, output, json)


@command
def finetune(
    *,
    model: options.Model,
    teacher: Annotated[Path | None, typer.Option("--teacher", help="The original, to learn from.")] = None,
    data: options.Data = None,
    output: options.Output,
    evaluation: Annotated[
        list[str] | None, typer.Option("--evaluation", help="Data to choose the best weights on; a tenth by default.")
    ] = None,
    max_samples: Annotated[
        int | None, typer.Option("--max-samples", min=2, help="At most this many; all by default.")
    ] = None,
    training: options.Training,
    memory: options.Memory = options.DEFAULT_MEMORY,
    labels: options.Labels = None,
    heads: options.Heads,
    images: options.Images,
    json: options.Json = False,
) -> None:
    """Train all weights to give what --teacher gives, or what labels say (extra: train).

    Interrupted, it goes on where it was. Under torchrun several processes train one model.
    """
    check_output(output, model, *(path for path in (teacher,) if path is not None))
    tuned = kfe.finetune(
        model,
        _required(data),
        teacher=teacher,
        evaluation_data=evaluation or None,
        images=images.given,
        labels=labels,
        heads=heads.given,
        max_samples=max_samples,
        memory=options.parse_bytes(memory),
        checkpoint=output.with_name(f"{output.name}.finetune"),
        progress=console.ShownProgress(),
        **training.given,
    )
    tuned.save(output)
    if not tuned.writes:
        return
    if json:
        console.print_json({**tuned.report, "output": str(output)})
    else:
        _tables.show_tuned(tuned)
        console.print_line(f"written: {output}")


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
    images: options.Images,
    machine: options.Machine,
    json: options.Json = False,
) -> None:
    """Measure accuracy where the data have labels, and fidelity to --reference."""
    quality = kfe.evaluate(
        model,
        _required(data),
        reference=reference,
        images=images.given,
        labels=labels,
        heads=heads.given,
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


@command
def export(
    *,
    factory: Annotated[str, typer.Argument(help="package.module:function that returns a torch module.")],
    output: options.Output,
    input_shape: Annotated[list[str], typer.Option(help="x:1,3,224,224 or ids:int64:1,128; repeatable.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights: .safetensors, or a torch state dict.")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set; torch's own choice by default.")] = None,
    dynamic: Annotated[list[str] | None, typer.Option(help="x:0=batch for each open axis, or none.")] = None,
    json: options.Json = False,
) -> None:
    """Export a torch module to ONNX and compare it with torch (needs the extra: train)."""
    from onnx_kfe.exporting import export_factory, parse_dynamic, parse_input_shape

    check_output(output)
    inputs = [parse_input_shape(text) for text in input_shape]
    with console.ShownProgress().stage("exporting"):
        export_factory(factory, output, inputs, checkpoint, opset, parse_dynamic(dynamic or []))
        network = kfe.inspect(output)
    if json:
        console.print_json({"output": str(output), "layers": len(network.layers), "prunable": len(network.prunable)})
    else:
        console.print_line(f"{len(network.prunable)} of {len(network.layers)} layers can be pruned")
        console.print_line(f"written, and equal to torch: {output}")


@command
def demo(
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("digits-small.onnx"),
    macs: Annotated[float, typer.Option("--macs", help="MACs to keep.")] = _DEMO_BUDGET,
    machine: options.Machine,
    json: options.Json = False,
) -> None:
    """Prune a bundled classifier of handwritten digits and measure what it cost."""
    from onnx_kfe import demo as bundle

    check_output(output, bundle.model_path())
    images, _ = bundle.load_digits_split("calibration")
    test, labels = bundle.load_digits_split("test")
    result = kfe.prune(
        bundle.model_path(),
        {"image": images},
        Macs(macs),
        evaluation_data={"image": test, "labels": labels},
        progress=console.ShownProgress(),
        **machine.given,
    )
    _save_result(result, output, json)


def _required(data: list[str] | None) -> list[str]:
    if not data:
        raise UsageError("give --data: an image folder, .npz, .npy, test_data_set folder, or package.module:function")
    return data


def _save_statistics(statistics: Statistics, output: Path, json: bool) -> None:
    statistics.save(output)
    if json:
        console.print_json(_tables.statistics_summary(statistics, output))
    else:
        _tables.show_statistics(statistics)
        console.print_line(f"written: {output}")


def _save_result(result: Result, output: Path | None, json: bool) -> None:
    """Write the model, unless this is a dry run, and say what it cost."""
    if output is not None:
        result.save(output)
    if json:
        console.print_json({**result.report, "output": None if output is None else str(output)})
    else:
        _tables.show_result(result)
        console.print_line("nothing was written: --dry-run" if output is None else f"written: {output}")
