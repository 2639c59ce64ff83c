"""Commands that look at a model and decide: inspect, collect, merge, plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import onnx_kfe as kfe
from onnx_kfe import _options as options
from onnx_kfe import _tables, console
from onnx_kfe._frontier import check_plot, save_frontier
from onnx_kfe.calibration import Statistics
from onnx_kfe.cli._app import command
from onnx_kfe.errors import UsageError
from onnx_kfe.graph import check_output, find_groups

__all__: list[str] = []

_FRONTIER_HELP = "Sweep the latency instead; -o is a plot (.png, .html) or .json; --data measures fidelity."


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
    memory: options.Memory = options.DEFAULT_MEMORY,
    labels: options.Labels = None,
    heads: options.Heads,
    loss: options.Loss = None,
    selection: options.Selection,
    images: options.Images,
    machine: options.Machine,
    json: options.Json = False,
) -> None:
    """Collect K-FAC statistics over data into a file."""
    check_output(output, model)
    sources = options.required(data)
    part = options.parse_shard(shard)
    statistics = kfe.collect(
        selection.open(model),
        sources,
        images=images.given,
        labels=labels,
        heads=heads.given,
        loss=loss,
        shard=part,
        curvature=curvature,
        memory=options.parse_bytes(memory),
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


def _save_statistics(statistics: Statistics, output: Path, json: bool) -> None:
    statistics.save(output)
    if json:
        console.print_json(_tables.statistics_summary(statistics, output))
    else:
        _tables.show_statistics(statistics)
        console.print_line(f"written: {output}")
