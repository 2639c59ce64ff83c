"""Commands that make a model smaller, or better again: prune, refit, finetune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import onnx_kfe as kfe
from onnx_kfe import _options as options
from onnx_kfe import _tables, console
from onnx_kfe.calibration import Statistics
from onnx_kfe.cli._app import command
from onnx_kfe.errors import UsageError
from onnx_kfe.graph import check_output
from onnx_kfe.pipeline import DEFAULT_SAMPLES
from onnx_kfe.planning import Plan
from onnx_kfe.result import Result

__all__ = ["save_result"]


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
    loss: options.Loss = None,
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
        loss=loss,
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
    save_result(result, None if dry_run else output, json)


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
        options.required(data),
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
    save_result(result, output, json)


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
    resume: Annotated[bool, typer.Option("--resume", help="Fail where there is no checkpoint to go on from.")] = False,
    json: options.Json = False,
) -> None:
    """Train all weights to give what --teacher gives, or what labels say (extra: train).

    Interrupted, it goes on where it was. Under torchrun several processes train one model.
    """
    check_output(output, model, *(path for path in (teacher,) if path is not None))
    tuned = kfe.finetune(
        model,
        options.required(data),
        teacher=teacher,
        evaluation_data=evaluation or None,
        images=images.given,
        labels=labels,
        heads=heads.given,
        max_samples=max_samples,
        memory=options.parse_bytes(memory),
        checkpoint=output.with_name(f"{output.name}.finetune"),
        resume=resume,
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


def save_result(result: Result, output: Path | None, json: bool) -> None:
    """Write the model, unless this is a dry run, and say what it cost."""
    if output is not None:
        result.save(output)
    if json:
        console.print_json({**result.report, "output": None if output is None else str(output)})
    else:
        _tables.show_result(result)
        console.print_line("nothing was written: --dry-run" if output is None else f"written: {output}")
