"""What the commands print: tables that fit a terminal of 80 columns."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from onnx_kfe._finetune import Tuned
from onnx_kfe._floor import Floor, format_drop
from onnx_kfe._frontier import Point
from onnx_kfe.calibration import Statistics
from onnx_kfe.console import print_line, print_renderable
from onnx_kfe.evaluation import HeadQuality, Quality, Rate, Score, Timing
from onnx_kfe.graph import ChannelGroup, Geometry, Layer, Network, Products, find_embeddings
from onnx_kfe.planning import Plan, meets, network_cost
from onnx_kfe.result import Result

__all__ = [
    "group_rows",
    "layer_rows",
    "show_frontier",
    "show_groups",
    "show_layers",
    "show_plan",
    "show_quality",
    "show_result",
    "show_statistics",
    "show_timings",
    "show_tuned",
    "statistics_summary",
]

_FAR = 5.0  # measured over predicted loss, or the inverse, that is worth a word
_NAMED = 3  # layers named in a row, where more are only counted


def show_layers(network: Network) -> None:
    """The table of `inspect`: the layers, and behind them tables of embeddings."""
    table = _table("layer", "shape", ">MACs", ">params", "pruned")
    twins, embeddings = network.twins, find_embeddings(network.model)
    reasons = network.left_alone | {table.name: table.reason for table in embeddings if table.reason is not None}
    for layer in [*network.layers, *embeddings]:
        pruned = f"with {twins[layer.name]}" if layer.name in twins else "no" if layer.name in reasons else ""
        table.add_row(layer.name, _shape(layer), _si(layer.macs), _si(layer.parameters), pruned)
    print_renderable(table)
    _print_skipped(reasons, "cannot be pruned")
    cost = network_cost(network)
    share = sum(use.macs for layer in network.prunable for use in layer.uses) / max(cost.macs, 1)
    print_line(
        f"{len(network.prunable)} of {len(network.owners)} layers can be pruned: {share:.0%} of {_si(cost.macs)} MACs; "
        f"{_si(cost.parameters)} parameters in all"
    )


def layer_rows(network: Network) -> list[dict[str, Any]]:
    """What `inspect` knows of the layers and of tables of embeddings, as plain values."""
    return [
        {
            "name": layer.name,
            "operator": layer.op_type,
            "macs": layer.macs,
            "parameters": layer.parameters,
            "in_channels": layer.geometry.in_channels if layer.geometry else None,
            "out_channels": layer.geometry.out_channels if layer.geometry else None,
            "kernel": list(layer.geometry.kernel) if layer.geometry else None,
            "groups": layer.geometry.groups if layer.geometry else None,
            "prunable": layer.prunable,
            "reason": layer.reason,
        }
        for layer in (*network.layers, *find_embeddings(network.model))
    ]


def show_groups(groups: Sequence[ChannelGroup], products: Products) -> None:
    """The table of `inspect --groups`, and which of them are heads that rotate."""
    table = _table("group", ">channels", "computed by", "read by")
    for group in groups:
        if group.prunable:
            table.add_row(group.name, str(group.size), *(_named(_layers(group, side)) for side in ("rows", "columns")))
    print_renderable(table)
    _print_skipped({group.name: group.reason for group in groups if group.reason is not None}, "cannot be pruned")
    _print_skipped(products.declined, "heads that cannot be rotated")
    if rotated := {product.group for product in products.found}:
        print_line(f"{len(rotated)} of {len(groups)} groups are rotated head by head before channels go")
    prunable = [group.size for group in groups if group.prunable]
    total = sum(group.size for group in groups)
    print_line(f"{len(prunable)} of {len(groups)} groups can be pruned: {sum(prunable)} of {total} channels")


def group_rows(groups: Sequence[ChannelGroup], products: Products) -> list[dict[str, Any]]:
    """What `inspect --groups` knows of the channel groups, as plain values."""
    rotated = {product.group for product in products.found}
    return [
        {
            "name": group.name,
            "channels": group.size,
            "computed_by": _layers(group, "rows"),
            "read_by": _layers(group, "columns"),
            "prunable": group.prunable,
            "reason": group.reason,
            "rotated": group.name in rotated,
            "not_rotated": products.declined.get(group.name),
        }
        for group in groups
    ]


def show_statistics(statistics: Statistics) -> None:
    """What `collect` and `merge` made."""
    _print_skipped(statistics.skipped, "without statistics")
    shards = "" if statistics.shards == [(0, 1)] else f", shards {', '.join(f'{i}/{n}' for i, n in statistics.shards)}"
    print_line(f"statistics of {len(statistics.layers)} layers over {statistics.samples} samples{shards}")


def statistics_summary(statistics: Statistics, output: Path) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "output": str(output),
        "samples": statistics.samples,
        "layers": len(statistics.layers),
        "heads": {head.output: head.kind for head in statistics.heads},
        "skipped": statistics.skipped,
        "shards": statistics.shards,
    }


def show_plan(plan: Plan) -> None:
    """The layers that get another form."""
    table = _table("layer", "form", "ranks", ">MACs", ">params", ">loss")
    for name, choice in plan.changed.items():
        ranks = ", ".join(map(str, choice.ranks))
        cost = choice.cost
        table.add_row(name, choice.form, ranks, _si(cost.macs), _si(cost.parameters), f"{choice.loss:.1e}")
    print_renderable(table)
    _print_changes(plan)


def show_frontier(points: Sequence[Point]) -> None:
    """The models of `plan --frontier`."""
    table = _table("latency asked", ">measured", ">speed", ">MACs", ">params", ">predicted", ">loss", ">same decision")
    for point in points:
        table.add_row(
            f"{point.budget:.0%}", f"{point.latency:.0%}", f"{1 / point.latency:.2f}x", f"{point.macs:.0%}",
            f"{point.parameters:.0%}", f"{point.predicted_loss:.2g}",
            "" if point.measured_loss is None else f"{point.measured_loss:.2g}",
            "" if point.agreement is None else f"{point.agreement:.1%}",
        )  # fmt: skip
    print_renderable(table)


def show_result(result: Result) -> None:
    """The before/after tables of `prune`: what the model costs, then what it is worth."""
    report = result.report
    table = _table("cost", ">original", ">pruned", "pruned / original")
    for title in ("MACs", "parameters"):
        before, after = report[title.lower()]["before"], report[title.lower()]["after"]
        table.add_row(title, _si(before), _si(after), f"{after / max(before, 1):.1%}")
    for title, values, last in _timing_rows(result.timings):
        table.add_row(title, *values, last)
    print_renderable(table)
    if result.quality is not None:
        predicted = None if result.statistics is None else result.predicted_loss
        _print_quality(result.quality, f"quality, {result.measured_on}", ("original", "pruned"), predicted)
        _print_ratio(result.loss_ratio)
    if result.network.input_shapes:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in result.network.input_shapes.items())
        print_line(f"MACs are counted at {shapes}")
    _print_changes(result.plan)
    if not result.plan.changes and result.statistics is None:
        print_line("nothing was changed: the weights alone justify no smaller form, give --data", "yellow")
    if not result.proven:
        print_line("quality is unproven: it was measured on synthetic inputs only", "yellow")
    if result.floor is not None:
        _print_floor(result.floor)


def show_quality(quality: Quality) -> None:
    """The table of `evaluate`."""
    _print_quality(quality, f"quality, {quality.samples} samples", ("reference", "model"))
    if quality.score is not None:
        _print_score(quality.score)


def show_tuned(tuned: Tuned) -> None:
    """The table of `finetune`: quality before and after on the same samples."""
    if tuned.before is None or tuned.after is None:
        return
    teacher = bool(tuned.after.heads)
    titles = (*(["teacher"] if teacher else []), "before", "after")
    table = _table(f"quality, {tuned.measured_on}", *(f">{title}" for title in titles), "95 % interval")
    for (name, original, before, _), (_, _, after, interval) in zip(
        _quality_rows(tuned.before), _quality_rows(tuned.after), strict=True
    ):
        table.add_row(name, *((original,) if teacher else ()), before, after, interval)
    print_renderable(table)
    print_line(f"weights of epoch {tuned.best} of {len(tuned.history) - 1}")


def show_timings(timings: Sequence[Timing]) -> None:
    """The tables of `benchmark`, one for each batch size and number of threads; speed relative to the first model."""
    for (batch, threads), group in itertools.groupby(timings, lambda timing: (timing.batch, timing.threads)):
        print_line(f"batch {batch}, {threads} thread{'s' * (threads > 1)}")
        _show_timings(list(group))


def _show_timings(timings: Sequence[Timing]) -> None:
    names = [Path(timing.name).name for timing in timings]
    unique = len(set(names)) == len(names)
    table = _table("", *(f">{name if unique else timing.name}" for name, timing in zip(names, timings, strict=True)))
    for title, values, _ in _timing_rows(timings):
        table.add_row(title, *values)
    table.add_row("samples a second", *(f"{timing.throughput:,.1f}" for timing in timings))
    table.add_row("load time", *(_ms(timing.load_time) for timing in timings))
    table.add_row("speed", *(f"{timing.speedup:.2f}x" for timing in timings))
    table.add_row("speed, quartiles", *("{:.2f} to {:.2f}".format(*timing.speedup_iqr) for timing in timings))
    print_renderable(table)


def _timing_rows(timings: Sequence[Timing]) -> Iterator[tuple[str, list[str], str]]:
    """Title, one value for each model, and the last over the first."""
    if not timings:
        return
    first, last = timings[0], timings[-1]
    yield "file size", [_bytes(t.file_size) for t in timings], f"{last.file_size / first.file_size:.1%}"
    low, high = last.speedup_iqr
    yield "latency, median", [_ms(t.median) for t in timings], f"{last.speedup:.2f}x speed ({low:.2f} to {high:.2f})"
    yield "latency, p90", [_ms(t.p90) for t in timings], ""
    yield "latency, p99", [_ms(t.p99) for t in timings], ""
    if all(t.peak_memory for t in timings):
        ratio = (last.peak_memory or 0) / (first.peak_memory or 1)
        yield "peak memory", [_bytes(t.peak_memory or 0) for t in timings], f"{ratio:.1%}"


def _print_quality(quality: Quality, title: str, columns: Sequence[str], predicted: float | None = None) -> None:
    """One row a measure; the columns are the reference, left out where it would be empty, and the model."""
    columns = columns if quality.reference_accuracy is not None else columns[1:]
    table = _table(title, *(f">{column}" for column in columns), "95 % interval")
    rows = _quality_rows(quality)
    if predicted is not None:
        rows.append(("predicted loss, nats", "", f"{predicted:.3g}", ""))
    for name, before, after, interval in rows:
        table.add_row(name, *(before, after)[-len(columns) :], interval)
    print_renderable(table)


def _quality_rows(quality: Quality) -> list[tuple[str, str, str, str]]:
    """Title, reference, model and the interval of the model."""
    return [*_accuracy_rows(quality), *(row for head in quality.heads for row in _head_rows(head, len(quality.heads)))]


def _accuracy_rows(quality: Quality) -> Iterator[tuple[str, str, str, str]]:
    for title, key in (("top-1 accuracy", "top1"), ("top-5 accuracy", "top5")):
        before, after = (getattr(accuracy, key, None) for accuracy in (quality.reference_accuracy, quality.accuracy))
        if after is not None:
            yield title, f"{before.value:.2%}" if before is not None else "", f"{after.value:.2%}", _percents(after)


def _head_rows(head: HeadQuality, heads: int) -> Iterator[tuple[str, str, str, str]]:
    prefix = f"{head.name}: " if heads > 1 else ""
    interval = "{:.3g} to {:.3g}".format(*head.interval) if head.interval is not None else ""
    if head.agreement is not None:
        yield f"{prefix}same decision", "", f"{head.agreement.value:.2%}", _percents(head.agreement)
    if head.kl is not None:
        yield f"{prefix}KL, nats a sample", "", f"{head.kl:.3g}", interval
    if head.relative_error is not None:
        yield f"{prefix}relative error", "", f"{head.relative_error:.3g}", interval
        if head.nats is not None:
            yield f"{prefix}loss, nats a sample", "", f"{head.nats:.3g}", ""


def _percents(rate: Rate) -> str:
    return f"{rate.low:.2%} to {rate.high:.2%}"


def _print_ratio(ratio: float | None) -> None:
    """Say so where measured and predicted loss part."""
    if ratio is not None and ratio > _FAR:
        print_line(f"measured loss is {ratio:.2g} times the predicted: many layers were cut deeply at once")
    elif ratio is not None and ratio < 1 / _FAR:
        print_line(f"measured loss is only {ratio:.2g} times the predicted")


def _print_score(score: Score) -> None:
    """What the metric that was asked for says."""
    known = score.original is not None and score.model is not None
    pair = f"{score.metric} {score.original:.4g}, of the model {score.model:.4g}: " if known else f"{score.metric}: "
    drop, low, high = (format_drop(score.metric, v) for v in (score.drop.value, score.drop.low, score.drop.high))
    print_line(f"{pair}drop {drop} (95 % interval {low} to {high})")


def _print_floor(floor: Floor) -> None:
    """The curve of what was tried, and how sure the result is."""
    table = _table(f"{floor.size} kept", ">predicted loss", f">{floor.metric} drop", "95 % interval", "")
    for trial in floor.curve:
        drop, low, high = (format_drop(floor.metric, value) for value in (trial.drop, trial.low, trial.high))
        verdict = "taken" if trial == floor.chosen else "" if meets(trial, floor.max_drop) else "too much"
        table.add_row(f"{trial.fraction:.1%}", f"{trial.predicted_loss:.3g}", drop, f"{low} to {high}", verdict)
    print_renderable(table)
    allowed, drop, low, high = (
        format_drop(floor.metric, value)
        for value in (floor.max_drop, floor.chosen.drop, floor.chosen.low, floor.chosen.high)
    )
    unsure = ", so it may be above on other samples" if floor.chosen.high > floor.max_drop else ""
    print_line(f"{floor.metric} drop {drop} on {floor.samples} (at most {allowed} allowed)")
    print_line(f"95 % interval {low} to {high}{unsure}")


def _print_changes(plan: Plan) -> None:
    _print_skipped(plan.skipped, "left alone")
    for name, kept in plan.channels.items():
        print_line(f"channels of {name}: {len(kept)} kept")
    if plan.channels:
        print_line(f"{len(plan.channels)} channel groups narrowed, {len(plan.changed)} layers changed in form")
    else:
        print_line(f"{len(plan.changed)} layers changed, {len(plan.choices) - len(plan.changed)} best as they are")


def _print_skipped(reasons: Mapping[str, str], title: str) -> None:
    """One line for each reason, with the number of layers and the first of them."""
    layers = defaultdict(list)
    for name, reason in reasons.items():
        layers[reason].append(name)
    for reason, names in sorted(layers.items(), key=lambda item: -len(item[1])):
        print_line(f"{title}: {len(names)} x {reason} ({_named(names)})")


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _layers(group: ChannelGroup, side: str) -> list[str]:
    return [member.layer for member in group.members if member.side == side]


def _table(first: str, *others: str) -> Table:
    """A table whose first column folds where the terminal is narrow; numbers, in columns marked ``>``, to the right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold", min_width=15)
    for title in others:
        table.add_column(title.removeprefix(">"), justify="right" if title.startswith(">") else "left", overflow="fold")
    return table


def _shape(layer: Layer) -> str:
    geometry: Geometry | None = layer.geometry
    if layer.op_type == "Gather":
        (table, *_) = layer.node.inputs
        return f"Gather {'x'.join(map(str, table.shape.numpy()))}" if table is not None and table.shape else "Gather"
    if geometry is None:
        return f"{layer.op_type}, unknown"
    kernel = f" {'x'.join(map(str, geometry.kernel))}" if geometry.kernel else ""
    groups = f", {geometry.groups} groups" if geometry.groups > 1 else ""
    return f"{layer.op_type}{kernel} {geometry.in_channels} > {geometry.out_channels}{groups}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _bytes(count: float) -> str:
    return f"{_si(count)}B" if count >= 1000 else f"{count:g} B"


def _si(count: float) -> str:
    power = min(int(f"{count:.2e}".partition("e")[2]) // 3, 4) if count >= 1 else 0
    return f"{count / 1000**power:.3g} {' kMGT'[power]}".rstrip()
