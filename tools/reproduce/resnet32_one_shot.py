"""Prune CIFAR-10 ResNet-32 in one shot, without labels, training or refit, and score it on 5,000 test images.

    python -m tools.reproduce.resnet32_one_shot --json one_shot.json

The factors come from 1,000 unlabelled training images; budgets are fractions of the MACs of the whole model. Ranks on
the default grid of 16 and unrounded, beside the figures of the prototype (unrounded ranks, the core solved by least
squares). Needs the assets.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import onnx_kfe as kfe
from onnx_kfe.graph import Network, serialize
from onnx_kfe.runtime import create_session
from tools.assets import MODELS, cifar10

CALIBRATION = 1_000
TEST = 5_000
BATCH = 100
PROTOTYPE = {0.6: 86.5, 0.5: 83.8, 0.4: 73.5}  # top-1 by share of the MACs kept
GRIDS = (16, 1)


def top1(model: bytes, images: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy in per cent."""
    session = create_session(model)
    name = session.get_inputs()[0].name
    logits = [session.run(None, {name: images[i : i + BATCH]})[0] for i in range(0, len(images), BATCH)]
    return 100 * float((np.concatenate(logits).argmax(1) == labels).mean())


def one_shot(
    network: Network, statistics: kfe.Statistics, kept: float, grid: int, images: np.ndarray, labels: np.ndarray
) -> dict[str, Any]:
    """Plan and rewrite under one budget and score the result."""
    plan = kfe.plan(network, statistics, kfe.Macs(kept), round_to=grid)
    result = kfe.prune(network, statistics, plan, measure=False)
    macs = result.report["macs"]
    return {
        "budget": kept,
        "round to": grid,
        "macs": macs["after"] / macs["before"],
        "predicted loss": result.predicted_loss,
        "top1": top1(serialize(result.ir_model), images, labels),
        "prototype": PROTOTYPE[kept],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--statistics", type=Path, help="statistics of the images, collected when not given")
    parser.add_argument("--seed", type=int, default=0, help="seed of noise and positions")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()

    network = kfe.inspect(MODELS["resnet32"].path)
    if arguments.statistics:
        statistics = kfe.Statistics.load(arguments.statistics)
    else:
        statistics = kfe.collect(network, cifar10("train", 0, CALIBRATION)[0], seed=arguments.seed)
    images, labels = cifar10("test", 0, TEST)
    original = top1(serialize(network.original), images, labels)
    print(f"original: top-1 {original:.2f} % on the first {TEST} test images\n")
    print(f"{'budget':>8}{'round to':>10}{'MACs kept':>11}{'predicted loss':>16}{'top-1':>8}{'prototype':>11}")
    rows = []
    for grid in GRIDS:
        for kept in PROTOTYPE:
            row = one_shot(network, statistics, kept, grid, images, labels)
            rows.append(row)
            print(
                f"{kept:>8.0%}{grid:>10}{row['macs']:>11.1%}{row['predicted loss']:>16.3f}"
                f"{row['top1']:>8.2f}{row['prototype']:>11.1f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"original": original, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
