"""What learning from the original adds behind a refit, without labels: CIFAR-10 ResNet-32 at half its MACs and less.

    python -m tools.reproduce.distillation --json few.json
    python -m tools.reproduce.distillation --samples 50000 --epochs 4 --json many.json

Statistics and refit take 2,000 training images but for those held back, fine-tuning takes ``--samples``. Top-1 is of
the first 5,000 test images and of all. Needs torch and the assets, with all training images (``prepare.py cifar10``
there) for more than 10,000 samples.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

import onnx_kfe as kfe
from onnx_kfe.console import ShownProgress
from onnx_kfe.graph import serialize
from tools.assets import MODELS, cifar10
from tools.reproduce.resnet32_one_shot import top1

FITTED = 2_000
FIRST = 5_000


def scores(model: bytes, images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Top-1 of the first test images and of all."""
    return top1(model, images[:FIRST], labels[:FIRST]), top1(model, images, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.4, 0.3], help="shares of the MACs")
    parser.add_argument("--samples", type=int, default=FITTED, help="images to learn on")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, help="its peak")
    parser.add_argument("--intermediate", nargs="*", default=[], help="values within the models to be met as well")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()

    path = MODELS["resnet32"].path
    images, test = cifar10("train", 0, max(arguments.samples, FITTED))[0], cifar10("test", 0, 10_000)
    network = kfe.inspect(path)
    print(f"original: top-1 {scores(serialize(network.original), *test)}")
    results: list[dict[str, Any]] = []
    for kept in arguments.kept:
        small = kfe.prune(network, images[:FITTED], kfe.Macs(kept), max_samples=None, measure=False).ir_model
        started = time.monotonic()
        tuned = kfe.finetune(
            small, images[: arguments.samples], teacher=path, epochs=arguments.epochs, measure=False,
            learning_rate=arguments.learning_rate, intermediate=arguments.intermediate, threads=arguments.threads,
            progress=ShownProgress(),
        )  # fmt: skip
        row = {"kept": kept, "seconds": time.monotonic() - started, "best epoch": tuned.best}
        row |= {"refitted": scores(serialize(small), *test)}
        row |= {"tuned": scores(serialize(tuned.ir_model), *test)}
        results.append(row)
        print(" ".join(f"{name}: {value}" for name, value in row.items()), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
