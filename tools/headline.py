"""The largest measured speed-up at a quality drop of at most 1 %, label-free and untrained.

    python -m tools.headline vgg16 dncnn ocr --samples 96 --goals 0.6 0.5 0.4 --stats statistics/

For each goal of latency, the fastest last: plan, refit on unlabelled samples, quality of the task on other samples
(top-1 in percent, PSNR in dB, percentage of characters read rightly), latency at batch 1 and 8 against the original in
one run. Stops behind the first that loses more than 1 % of the original's quality. Needs the assets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import onnx_kfe as kfe
from onnx_kfe import evaluation
from onnx_kfe._latency_goal import Stadium, meet
from onnx_kfe._measure import Machine
from onnx_kfe._prune import at_seen_shapes
from onnx_kfe.calibration import input_specs, open_dataset
from onnx_kfe.errors import BudgetError
from onnx_kfe.graph import serialize
from onnx_kfe.planning import Planner
from onnx_kfe.recovery import refit
from onnx_kfe.rewrite import write_chains
from onnx_kfe.runtime import create_session
from tools.assets import MODELS
from tools.latency_table import Printed, statistics_of

ALLOWED = 0.01
SCORED = 400
BATCHES = (1, 8)


def scorer(name: str, samples: int) -> Callable[[bytes], float]:
    """The quality of a model: the task's own score, or top-1 on labelled samples behind the calibration's."""
    score = MODELS[name].score
    if score is not None:
        return lambda model: score(create_session(model))
    images, labels = (array[samples:] for array in MODELS[name].labelled(samples + SCORED))

    def top1(model: bytes) -> float:
        session = create_session(model)
        (given,) = session.get_inputs()
        decisions = [int(session.run(None, {given.name: image[None]})[0].argmax()) for image in images]
        return 100 * float(np.mean(np.array(decisions) == labels))

    return top1


def measure(name: str, samples: int, goals: Sequence[float], folder: Path | None) -> list[dict[str, Any]]:
    """Models of one after the other goal."""
    images = MODELS[name].images(samples)
    network = kfe.inspect(MODELS[name].path)
    statistics = statistics_of(name, network, images, folder)
    network = at_seen_shapes(network, statistics)
    stadium = Stadium(network, Machine())
    planner = Planner(network, statistics, latency=stadium.measure(None, Printed()))
    quality = scorer(name, samples)
    original = serialize(network.original)
    before = quality(original)
    calibration = open_dataset(images, input_specs(network.model))
    rows = []
    for goal in sorted(goals, reverse=True):
        try:
            plan, _ = meet(network, planner, [kfe.Latency(goal)], stadium, Printed())
        except BudgetError as error:
            print(f"  {goal:.0%}: {error}", flush=True)
            break
        model = serialize(write_chains(network, plan, statistics, refit(network, plan, statistics, calibration)))
        row: dict[str, Any] = {
            "model": name, "goal": goal, "macs": planner.fraction(plan, kfe.Macs), "before": before,
            "after": quality(model),
        }  # fmt: skip
        for batch in BATCHES:
            feeds = Stadium(network, Machine(batch=batch)).feeds
            _, timing = evaluation.benchmark({"original": original, "fast": model}, feeds, batch=batch)
            row[f"speed at batch {batch}"] = [timing.speedup, *timing.speedup_iqr]
        rows.append(row)
        spans = ("batch {}: {:.2f}x ({:.2f} to {:.2f})".format(b, *row[f"speed at batch {b}"]) for b in BATCHES)
        print(
            f"{name} {goal:.0%}: quality {before:.2f} -> {row['after']:.2f}, MACs {row['macs']:.1%}, {', '.join(spans)}"
        )
        if row["after"] < (1 - ALLOWED) * before:
            break
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--goals", type=float, nargs="+", default=[0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    parser.add_argument("--stats", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        rows += measure(name, options.samples, options.goals, options.stats)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
