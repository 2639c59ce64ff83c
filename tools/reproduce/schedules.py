"""Prune CIFAR-10 ResNets and train them: forms, and every schedule, at equal MACs, parameters and epochs.

    python -m tools.reproduce.schedules resnet32 --kept 0.4 --epochs 10 --json schedules.json
    python -m tools.reproduce.schedules resnet32 --kept 0.4 0.25 0.125 --epochs 30 --only forms

Models learn from the original on unlabelled training images and are scored on the test set. The iterative rows prune in
seven rounds (or in as many as there are epochs), one of them EigenDamage as published. On a schedule, numbers of
channels are planned by the method ``channels``, those of directions by ``c-obd``. Latency is that of batch 1 on one
thread, as a ratio to the original in the same run. Needs torch and the assets, with all training images
(``prepare.py cifar10`` there) for more than 10,000 samples.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import onnx_kfe as kfe
from onnx_kfe.console import ShownProgress
from onnx_kfe.graph import Network, serialize
from onnx_kfe.recovery.schedules import SCHEDULES
from tools.assets import MODELS, cifar10
from tools.reproduce.resnet32_one_shot import top1

ROUNDS = 7


def rows(epochs: int) -> dict[str, dict[str, Any]]:
    """What is compared: options of `prune` by name."""
    rounds = min(ROUNDS, epochs)
    found: dict[str, dict[str, Any]] = {
        "forms": {"round_to": None},
        "channels": {"method": "channels"},
        "channels, iterative": {"method": "channels", "iterations": rounds},
        "EigenDamage, iterative": {"method": "eigendamage", "iterations": rounds},
        "KFE C-OBD, iterative": {"method": "c-obd", "basis": "kfe", "iterations": rounds},
    }
    for basis in ("channel", "kfe"):
        found |= {f"{basis} {name}": {"schedule": name, "basis": basis} for name in SCHEDULES}
    return found


def measured(
    network: Network,
    images: np.ndarray,
    kept: float,
    epochs: int,
    options: dict[str, Any],
    test: tuple[np.ndarray, np.ndarray],
) -> dict[str, Any]:
    """One model: pruned, trained, scored and timed."""
    started = time.monotonic()
    result = kfe.prune(
        network, images, [kfe.Macs(kept), kfe.Params(kept)], max_samples=None, epochs=epochs, threads=1, measure=False,
        progress=ShownProgress(), **{"round_to": 1, **options},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        result.save(small := Path(folder) / "small.onnx")
        timings = kfe.benchmark([network.name, small], threads=1)
    return {
        "top1": top1(serialize(result.ir_model), *test),
        "macs": result.report["macs"]["after"] / result.report["macs"]["before"],
        "parameters": result.report["parameters"]["after"] / result.report["parameters"]["before"],
        "speed": timings[1].speedup,
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="resnet20, resnet32, or a file")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.4], help="shares of MACs and parameters")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each row, at least 2")
    parser.add_argument("--samples", type=int, default=50_000, help="training images")
    parser.add_argument("--only", nargs="*", help="rows, by parts of their names")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()

    asset = MODELS.get(arguments.model)
    network = kfe.inspect(arguments.model if asset is None else asset.path)
    images, test = cifar10("train", 0, arguments.samples)[0], cifar10("test", 0, 10_000)
    original = top1(serialize(network.original), *test)
    print(f"{arguments.model}: top-1 {original:.2f} % of 10,000 test images")
    print(f"{'':<24}{'top-1':>8}{'MACs':>8}{'params':>8}{'speed':>8}{'seconds':>9}")
    results = []
    for kept in arguments.kept:
        for name, options in rows(arguments.epochs).items():
            if arguments.only and not any(part in name for part in arguments.only):
                continue
            row = measured(network, images, kept, arguments.epochs, options, test)
            results.append({"name": name, "kept": kept, **row})
            print(
                f"{name:<24}{row['top1']:>8.2f}{row['macs']:>8.1%}{row['parameters']:>8.1%}{row['speed']:>7.2f}x"
                f"{row['seconds']:>9.0f}",
                flush=True,
            )
            if arguments.json:
                arguments.json.write_text(json.dumps({"original": original, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
