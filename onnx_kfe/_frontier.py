"""The frontier of quality against latency: models of one budget after the other, predicted and measured."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_kfe._latency_goal import Stadium
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.evaluation import Quality
from onnx_kfe.graph import Network, replace_whole
from onnx_kfe.planning import Latency, Macs, Params, Plan, Planner
from onnx_kfe.progress import Progress
from onnx_kfe.rewrite import sketch_plan

__all__ = ["PLOTS", "Point", "check_plot", "save_frontier", "sweep"]

_POINTS = 8
_SMALLEST = 0.2  # fraction of the latency below which no model is worth much
_LARGEST = 0.95
_ROOM = 1e-6  # above the least, so that rounding does not take it away
_FLOOR = 1e-9  # nats that a logarithmic axis shows as nothing


@dataclass(frozen=True)
class Point:
    """One model on the frontier.

    Attributes:
        budget: Latency that was asked for, as a fraction of the original's.
        latency: As measured.
        macs: MACs kept.
        parameters: Parameters kept.
        predicted_loss: In nats a sample.
        measured_loss: The same as measured on held-back samples; None without samples.
        agreement: Share of decisions that stay; None without samples, or where there are no decisions.
    """

    budget: float
    latency: float
    macs: float
    parameters: float
    predicted_loss: float
    measured_loss: float | None
    agreement: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Plain values for JSON."""
        return asdict(self)


def sweep(
    network: Network,
    planner: Planner,
    stadium: Stadium,
    rewrite: Callable[[Plan], ir.Model],
    measure: Callable[[ir.Model], Quality] | None,
    progress: Progress,
) -> list[Point]:
    """Plan, write and measure models of falling latency.

    Args:
        network: The original.
        planner: Plans for it, with measured latencies.
        stadium: Where models are timed.
        rewrite: Makes the model of a plan; only called where there is something to measure on.
        measure: Measures its quality; None without samples.
        progress: Shown each model.

    Returns:
        The different models, the slowest first.
    """
    original, dense = planner.costs()
    slowest = min(_LARGEST, dense.nanoseconds / original.nanoseconds)
    least = max(planner.least(Latency(1)) / original.nanoseconds, _SMALLEST)
    if least > slowest:
        raise KfeError(f"{network.name}: no form is faster than the layers as they are, there is no frontier")
    points: list[Point] = []
    seen: list[dict[str, Any]] = []
    with progress.stage("sweeping", _POINTS) as advance:
        for step in np.linspace(0, 1, _POINTS) ** 2:  # closer where models are still worth something
            budget = slowest - step * max(slowest - least - _ROOM, 0.0)
            plan = planner.plan(Latency(float(budget)))
            if plan.changed and plan.changed not in seen:
                seen.append(plan.changed)
                ratios = stadium.time(sketch_plan(network, plan))
                quality = None if measure is None else measure(rewrite(plan))
                points.append(_point(planner, plan, float(budget), float(np.median(ratios)), quality))
            advance(1)
    return points


def _point(planner: Planner, plan: Plan, budget: float, latency: float, quality: Quality | None) -> Point:
    agreements = [h.agreement.value for h in quality.heads if h.agreement is not None] if quality is not None else []
    return Point(
        budget, latency, planner.fraction(plan, Macs), planner.fraction(plan, Params), plan.predicted_loss,
        None if quality is None else quality.divergence, min(agreements, default=None),
    )  # fmt: skip


def check_plot(path: Path) -> None:
    """Refuse early what `save_frontier` could not write.

    Raises:
        UsageError: The ending is unknown, or the library that plots is not installed.
    """
    if path.suffix not in PLOTS:
        raise UsageError(f"{path}: a frontier is written as {', '.join(PLOTS)}")
    try:
        PLOTS[path.suffix]([], "")
    except ImportError as error:
        raise UsageError(f"{path}: {error.name} is not installed: pip install 'onnx-kfe[report]'") from error


def save_frontier(points: Sequence[Point], name: str, path: str | os.PathLike[str]) -> None:
    """Write the points as a picture (PNG), a page (HTML) or JSON, by the ending of the path."""
    replace_whole(path, PLOTS[Path(path).suffix](points, name))


def _curves(points: Sequence[Point]) -> dict[str, tuple[list[float], list[float]]]:
    """Latencies and losses by title, losses that were not measured left out."""
    measured = [(p.latency, p.measured_loss) for p in points if p.measured_loss is not None]
    curves = {"predicted loss": ([p.latency for p in points], [max(p.predicted_loss, _FLOOR) for p in points])}
    if measured:
        curves["measured loss"] = ([at for at, _ in measured], [max(loss, _FLOOR) for _, loss in measured])
    return curves


def _json(points: Sequence[Point], name: str) -> bytes:
    return json.dumps({"model": name, "points": [point.as_dict() for point in points]}, indent=1).encode()


def _png(points: Sequence[Point], name: str) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(title=name, xlabel="latency / original", ylabel="nats a sample", yscale="log")
    for title, (latencies, losses) in _curves(points).items():
        axes.plot(latencies, losses, "o-", label=title)
    agreements = [(p.latency, p.agreement) for p in points if p.agreement is not None]
    if agreements:
        right = axes.twinx()
        right.set_ylabel("same decision")
        right.plot(*zip(*agreements, strict=True), "s--", color="tab:green", label="same decision")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=150)
        return file.getvalue()


def _html(points: Sequence[Point], name: str) -> bytes:
    import plotly.graph_objects as go

    figure = go.Figure()
    for title, (latencies, losses) in _curves(points).items():
        figure.add_scatter(x=latencies, y=losses, name=title, mode="lines+markers")
    agreements = [(p.latency, p.agreement) for p in points if p.agreement is not None]
    if agreements:
        at, shares = zip(*agreements, strict=True)
        figure.add_scatter(x=at, y=shares, name="same decision", mode="lines+markers", yaxis="y2")
        figure.update_layout(yaxis2={"title": "same decision", "overlaying": "y", "side": "right"})
    figure.update_layout(
        title=name, xaxis_title="latency / original", yaxis={"title": "nats a sample", "type": "log"},
        template="plotly_white",
    )  # fmt: skip
    return figure.to_html(include_plotlyjs=True).encode()


PLOTS: dict[str, Callable[[Sequence[Point], str], bytes]] = {".png": _png, ".html": _html, ".json": _json}
"""Writers by the ending of a path."""
