"""What the command line shows: progress bars, tables, one-line errors. Results go to stdout, the rest to stderr."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from onnx_kfe.evaluation import HeadQuality, Quality, Timing
from onnx_kfe.evaluation import Rate as Rated
from onnx_kfe.graph import Network
from onnx_kfe.planning import Plan, network_cost
from onnx_kfe.progress import Progress
from onnx_kfe.result import Result

__all__ = [
    "Bars",
    "ShownProgress",
    "print_json",
    "show_layers",
    "show_plan",
    "show_quality",
    "show_result",
    "show_timings",
]

_out = Console(soft_wrap=False)
_err = Console(stderr=True)
_PATIENCE = 1.0  # seconds before a bar appears


class ShownProgress(Progress):
    """Bars for stages that take longer than a second, notes as lines, all on stderr."""

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show a bar once the stage has taken longer than a second."""
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        )  # fmt: skip
        started = time.monotonic()
        with Bars(*columns, console=_err, transient=not _err.is_terminal, disable=not _err.is_terminal) as bars:
            task = bars.add_task(title, total=total, visible=False)

            def advance(steps: int) -> None:
                bars.update(task, advance=steps, visible=time.monotonic() - started > _PATIENCE)

            yield advance

    def note(self, text: str) -> None:
        """Print a line."""
        _err.print(text, style="dim", highlight=False)


def print_json(data: Any) -> None:
    """Print plain values for machines."""
    print(json.dumps(data, indent=1))


def print_line(text: str, style: str = "") -> None:
    """Print a line of the result."""
    _out.print(text, style=style, highlight=False)


def print_error(text: str) -> None:
    """Print an error on one line."""
    _err.print(f"[bold red]error:[/] {_escaped(text)}", highlight=False, soft_wrap=True)


def show_layers(network: Network) -> None:
    """The table of `inspect`."""
    table = Table("layer", "operator", "channels", "kernel", "groups", "MACs", "parameters", "left alone because")
    for layer in network.layers:
        g = layer.geometry
        table.add_row(
            layer.name, layer.op_type, f"{g.in_channels} > {g.out_channels}" if g else "?",
            "x".join(map(str, g.kernel)) if g else "", str(g.groups) if g and g.groups > 1 else "",
            _si(layer.macs), _si(layer.parameters), layer.reason or "", style="" if layer.prunable else "dim",
        )  # fmt: skip
    _out.print(table)
    cost = network_cost(network)
    share = sum(layer.macs for layer in network.prunable) / max(cost.macs, 1)
    print_line(
        f"{len(network.prunable)} of {len(network.layers)} layers can be pruned, {100 * share:.0f} % of "
        f"{_si(cost.macs)}MACs; {_si(cost.parameters)}parameters in all"
    )


def show_plan(plan: Plan) -> None:
    """The layers that get another form."""
    table = Table("layer", "form", "ranks", "MACs", "parameters", "predicted loss (nats/sample)")
    for name, choice in plan.changed.items():
        ranks = ", ".join(map(str, choice.ranks))
        table.add_row(
            name, choice.form, ranks, _si(choice.cost.macs), _si(choice.cost.parameters), f"{choice.loss:.2e}"
        )
    _out.print(table)
    print_line(
        f"{len(plan.changed)} of {len(plan.choices)} layers change; "
        f"predicted loss {plan.predicted_loss:.3g} nats a sample"
    )


def show_result(result: Result, output: str | None) -> None:
    """The before/after table of `prune`."""
    report = result.report
    table = Table("", "before", "after", "after / before")
    for title, key in (("MACs", "macs"), ("parameters", "parameters")):
        before, after = report[key]["before"], report[key]["after"]
        table.add_row(title, _si(before), _si(after), f"{after / max(before, 1):.1%}")
    if len(result.timings) == 2:
        first, second = result.timings
        sizes = first.file_size, second.file_size
        table.add_row("file size", _bytes(sizes[0]), _bytes(sizes[1]), f"{sizes[1] / sizes[0]:.1%}")
        low, high = second.speedup_iqr
        table.add_row(
            "latency, batch 1 (median)", _ms(first.median), _ms(second.median),
            f"{second.speedup:.2f}x faster ({low:.2f} to {high:.2f})" if second.speedup >= 1
            else f"{second.speedup:.2f}x, slower ({low:.2f} to {high:.2f})",
        )  # fmt: skip
        table.add_row("latency, p90", _ms(first.p90), _ms(second.p90), "")
        if first.peak_memory and second.peak_memory:
            memory = first.peak_memory, second.peak_memory
            table.add_row("peak memory", _bytes(memory[0]), _bytes(memory[1]), f"{memory[1] / memory[0]:.1%}")
    if result.quality:
        _quality_rows(table, result.quality)
        kl = next((head.kl for head in result.quality.heads if head.kl is not None), None)
        measured = f"{kl:.3g} measured (KL)" if kl is not None else ""
        table.add_row("loss, nats a sample", "", f"{result.predicted_loss:.3g} predicted", measured)
    _out.print(table)
    _verdict(result, output)


def _verdict(result: Result, output: str | None) -> None:
    if result.quality is not None and result.proven:
        print_line(f"quality measured on {result.quality.samples} samples that the statistics did not see")
    elif not result.proven:
        print_line("quality is unproven: no data were given to measure it on", "yellow")
    if not result.plan.changed:
        print_line("nothing was changed: the weights alone justify no smaller form; give --data", "yellow")
    if output:
        print_line(f"written: {output}")


def show_quality(quality: Quality) -> None:
    """The table of `evaluate`."""
    table = Table("", "reference", "model", "")
    _quality_rows(table, quality)
    _out.print(table)
    print_line(f"{quality.samples} samples; intervals are 95 %")


def _quality_rows(table: Table, quality: Quality) -> None:
    if quality.accuracy is not None:
        before = quality.reference_accuracy
        for title, key in (("top-1 accuracy", "top1"), ("top-5 accuracy", "top5")):
            after = getattr(quality.accuracy, key)
            if after is not None:
                was = f"{getattr(before, key).value:.2%}" if before is not None else ""
                table.add_row(title, was, f"{after.value:.2%}", _interval(after))
    for head in quality.heads:
        for title, value, interval in _head_rows(head):
            table.add_row(f"{title} ({head.name})", "", value, interval)


def _head_rows(head: HeadQuality) -> Iterator[tuple[str, str, str]]:
    if head.agreement is not None:
        yield "agreement with the original", f"{head.agreement.value:.2%}", _interval(head.agreement)
    if head.kl is not None:
        yield "KL from the original, nats", f"{head.kl:.3g}", ""
    if head.relative_error is not None:
        yield "relative error", f"{head.relative_error:.3g}", ""


def show_timings(timings: Sequence[Timing]) -> None:
    """The table of `benchmark`; speed relative to the first model."""
    table = Table("model", "median", "p90", "speed", "quartiles", "load", "peak memory", "file size")
    for timing in timings:
        low, high = timing.speedup_iqr
        table.add_row(
            timing.name, _ms(timing.median), _ms(timing.p90), f"{timing.speedup:.2f}x", f"{low:.2f} to {high:.2f}",
            _ms(timing.load_time), _bytes(timing.peak_memory) if timing.peak_memory else "?", _bytes(timing.file_size),
        )  # fmt: skip
    _out.print(table)


def show_table(title: str, rows: Mapping[str, str]) -> None:
    """Names and values."""
    table = Table(title, "")
    for name, value in rows.items():
        table.add_row(name, value)
    _out.print(table)


def _interval(rate: Rated) -> str:
    return f"{rate.low:.2%} to {rate.high:.2%}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _bytes(count: float) -> str:
    return f"{_si(count)}B"


def _si(count: float) -> str:
    for unit in ("", "k", "M", "G"):
        if abs(count) < 1000:
            return f"{count:.4g} {unit}" if unit else f"{count:g} "
        count /= 1000
    return f"{count:.4g} T"


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")
