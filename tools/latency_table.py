"""Latency and loss of plans by MACs and of plans by latency, of the models of the assets.

    python -m tools.latency_table resnet20 vgg16 --batch 1 --samples 128 --json latency.json

Each row is one plan: what was asked for, the latency of its model measured against the original's in one run, the MACs
it keeps, and the loss measured on samples that statistics and refit have not seen (nats a sample).
The last line compares both kinds of plans at equal measured loss. ``--stats`` names a folder where statistics are kept
from run to run. Needs the assets.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import onnx_kfe as kfe
from onnx_kfe._latency_goal import Stadium, meet
from onnx_kfe._measure import Machine, head_specs, measure_quality
from onnx_kfe._prune import at_seen_shapes
from onnx_kfe.calibration import input_specs, open_dataset
from onnx_kfe.errors import BudgetError
from onnx_kfe.graph import Network
from onnx_kfe.planning import Planner
from onnx_kfe.progress import Progress
from onnx_kfe.recovery import refit
from onnx_kfe.rewrite import write_chains
from tools.assets import MODELS

KEPT = (0.8, 0.6)
UNSEEN = 96


class Printed(Progress):
    """Notes on the standard output."""

    def note(self, text: str) -> None:
        """Print it."""
        print(f"    {text}", flush=True)


def statistics_of(name: str, network: Network, images: np.ndarray, folder: Path | None) -> kfe.Statistics:
    """Of these images, or as kept."""
    kept = None if folder is None else folder / f"{name}.safetensors"
    if kept is not None and kept.exists():
        return kfe.Statistics.load(kept)
    statistics = kfe.collect(network, images)
    if kept is not None:
        statistics.save(kept)
    return statistics


def measure(name: str, samples: int, batch: int, kept: Sequence[float], folder: Path | None) -> list[dict[str, Any]]:
    """All plans of one model."""
    images = MODELS[name].images(samples + UNSEEN)
    network = kfe.inspect(MODELS[name].path)
    statistics = statistics_of(name, network, images[:samples], folder)
    network = at_seen_shapes(network, statistics)
    machine = Machine(batch=batch)
    stadium = Stadium(network, machine)
    start = time.perf_counter()
    latency = stadium.measure(None, Progress())
    print(
        f"{name}, batch {batch}: {1e-6 * latency.original:.3g} ms, {latency.prunable_share:.0%} in layers that can be "
        f"pruned; measured in {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    start = time.perf_counter()
    planner = Planner(network, statistics, latency=latency)
    print(f"  candidates in {time.perf_counter() - start:.0f} s", flush=True)
    unseen = open_dataset(images[samples:], input_specs(network.model))
    heads = head_specs(statistics.heads, scaled=True)

    calibration = open_dataset(images[:samples], input_specs(network.model))

    def row(kind: str, asked: float, plan: kfe.Plan) -> dict[str, Any]:
        model = write_chains(network, plan, statistics, refit(network, plan, statistics, calibration))
        low, median, high = np.quantile(stadium.time(model), [0.25, 0.5, 0.75])
        loss = measure_quality(network, model, unseen, heads, machine, Progress()).divergence
        found = {
            "model": name, "batch": batch, "kind": kind, "asked": asked, "latency": float(median), "low": float(low),
            "high": float(high), "macs": planner.fraction(plan, kfe.Macs), "predicted_loss": plan.predicted_loss,
            "measured_loss": loss,
        }  # fmt: skip
        print(
            f"  {kind:8s} {asked:.0%}: latency {median:.1%} ({low:.1%} to {high:.1%}), MACs {found['macs']:.1%}, "
            f"speed over promise {found['macs'] / median:.2f}, loss {loss:.3g} (predicted {plan.predicted_loss:.3g})",
            flush=True,
        )
        return found

    rows = []
    for kind, asked in itertools.product(("macs", "latency"), kept):
        try:
            if kind == "macs":
                plan = planner.plan(kfe.Macs(asked))
            else:
                plan, _ = meet(network, planner, [kfe.Latency(asked)], stadium, Printed())
        except BudgetError as error:
            print(f"  {kind:8s} {asked:.0%}: {error}", flush=True)
            continue
        rows.append(row(kind, asked, plan))
    return rows


def compare(rows: list[dict[str, Any]]) -> None:
    """Latencies of both kinds at equal measured loss, interpolated on a logarithmic scale."""
    curves = {}
    for kind in ("macs", "latency"):
        points = [(max(r["measured_loss"], 1e-12), r["latency"]) for r in rows if r["kind"] == kind]
        curves[kind] = np.log(sorted(points))
    if any(len(curve) < 2 for curve in curves.values()):
        return
    low, high = max(c[0, 0] for c in curves.values()), min(c[-1, 0] for c in curves.values())
    losses = np.linspace(low, high, 9) if low < high else np.array([(low + high) / 2])
    ratio = np.exp(np.interp(losses, *curves["macs"].T) - np.interp(losses, *curves["latency"].T))
    span = f"{ratio.min():.2f} to {ratio.max():.2f}"
    print(f"  at equal loss plans by latency are {np.median(ratio):.2f} times as fast ({span})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--kept", type=float, nargs="+", default=KEPT, help="fractions of the MACs, and of the latency")
    parser.add_argument("--stats", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        found = measure(name, options.samples, options.batch, options.kept, options.stats)
        compare(found)
        rows += found
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
