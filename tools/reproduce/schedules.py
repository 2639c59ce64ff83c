"""Train CIFAR-10 ResNets while they are pruned: every schedule at equal MACs and epochs.

    python -m tools.reproduce.schedules resnet20 --macs 0.4 --epochs 20 --json schedules.json

Models learn from the original on unlabelled training images and are scored on the test set. One shot, then fine-tuning,
is the baseline; the iterative rows prune in seven rounds (or in as many as there are epochs). In the channel basis
plans are by the method ``channels``, in the KFE by ``c-obd``. Latency is that of batch 1 on one thread, as a ratio to
the original in the same run. Needs the assets, and torch.
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
BASES = {"channel": "channels", "kfe": "c-obd"}  # and the method that plans


def rows(epochs: int) -> list[tuple[str, dict[str, Any]]]:
    """What is compared: a name, and options of `prune`."""
    found: list[tuple[str, dict[str, Any]]] = []
    for basis, method in BASES.items():
        how = {"method": method, "basis": None if method == "channels" else basis, "epochs": epochs}
        found.append((f"{basis} one shot", how))
        found.append((f"{basis} iterative", {**how, "iterations": min(ROUNDS, epochs)}))
        found += [(f"{basis} {name}", {"schedule": name, "basis": basis, "epochs": epochs}) for name in SCHEDULES]
    return found


def measured(
    network: Network, images: np.ndarray, macs: float, options: dict[str, Any], test: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """One model: pruned, trained, scored and timed."""
    started = time.monotonic()
    result = kfe.prune(
        network, images, kfe.Macs(macs), max_samples=None, round_to=1, threads=1, measure=False,
        progress=ShownProgress(), **options,
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
    parser.add_argument("model", choices=["resnet20", "resnet32"], help="what is pruned")
    parser.add_argument("--macs", type=float, default=0.4, help="share of the MACs that is kept")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of each row, at least 2")
    parser.add_argument("--samples", type=int, default=50_000, help="training images")
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--only", nargs="*", help="rows, by parts of their names")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()

    network = kfe.inspect(MODELS[arguments.model].path)
    images, test = cifar10("train", 0, arguments.samples)[0], cifar10("test", 0, arguments.test)
    original = top1(serialize(network.original), *test)
    print(f"{arguments.model}: top-1 {original:.2f} % on the first {arguments.test} test images")
    print(f"{'':<24}{'top-1':>8}{'MACs':>8}{'params':>8}{'speed':>8}{'seconds':>9}")
    results = {}
    for name, options in rows(arguments.epochs):
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        results[name] = row = measured(network, images, arguments.macs, options, test)
        print(
            f"{name:<24}{row['top1']:>8.2f}{row['macs']:>8.1%}{row['parameters']:>8.1%}{row['speed']:>7.2f}x"
            f"{row['seconds']:>9.0f}",
            flush=True,
        )
        if arguments.json:
            arguments.json.write_text(json.dumps({"original": original, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
