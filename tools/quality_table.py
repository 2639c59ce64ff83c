"""Quality against MACs kept, before and after refit, of the models of the assets that have a quality figure.

    python -m tools.quality_table resnet32 resnet20 --samples 1000 --json quality.json

Quality is top-1 in percent; of `dncnn` the PSNR in dB, of `ocr` the percentage of characters read rightly. Statistics
and refit see the same unlabelled samples; quality is measured on others. Needs the assets.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

import onnx_kfe as kfe
from onnx_kfe.calibration import input_specs
from onnx_kfe.graph import serialize
from onnx_kfe.runtime import create_session
from tools.assets import MODELS, cifar10

KEPT = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3)
BATCH = 50
CIFAR_TEST = 5_000


def logits_of(model: bytes, images: np.ndarray) -> np.ndarray:
    """Outputs of a model over all images."""
    session = create_session(model)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: images[i : i + BATCH]})[0] for i in range(0, len(images), BATCH)])


def samples_of(name: str, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Calibration images, test images and test labels, of which the first two have nothing in common."""
    if name.startswith("resnet"):
        return MODELS[name].images(count), *cifar10("test", 0, CIFAR_TEST)
    images, labels = MODELS[name].labelled(4 * count // 3)
    chosen = np.arange(len(images)) % 4 != 0
    return images[chosen][:count], images[~chosen], labels[~chosen]


def measure(name: str, samples: int, kept: tuple[float, ...]) -> list[dict[str, Any]]:
    """All budgets of one model."""
    network = kfe.inspect(MODELS[name].path)
    (spec,) = input_specs(network.model)
    score = MODELS[name].score
    if score is None:
        calibration, test, labels = samples_of(name, samples)
    else:
        calibration, test, labels = MODELS[name].images(samples), np.empty(0), np.empty(0)

    def quality(model: bytes) -> float:
        if score is not None:
            return score(create_session(model))
        return 100 * float((logits_of(model, test).argmax(-1).reshape(-1) == labels).mean())

    start = time.perf_counter()
    statistics = kfe.collect(network, {spec.name: calibration}, max_samples=None)
    collecting = time.perf_counter() - start
    rows = [{"model": name, "kept": 1.0, "one shot": quality(serialize(network.original)), "samples": len(calibration)}]
    for share in kept:
        try:
            plan = kfe.plan(network, statistics, kfe.Macs(share))
        except kfe.BudgetError as error:
            rows.append({"model": name, "kept": share, "reason": str(error)})
            continue
        one_shot = kfe.prune(network, statistics, plan, measure=False)
        start = time.perf_counter()
        refitted = kfe.prune(
            network, {spec.name: calibration}, plan, statistics=statistics, max_samples=None, measure=False,
            evaluation_data={spec.name: calibration[:1]},
        )  # fmt: skip
        seconds = time.perf_counter() - start
        macs = refitted.report["macs"]
        rows.append(
            {
                "model": name, "kept": macs["after"] / macs["before"], "predicted loss": plan.predicted_loss,
                "one shot": quality(serialize(one_shot.ir_model)), "refitted": quality(serialize(refitted.ir_model)),
                "refit / collect": seconds / collecting,
            }
        )  # fmt: skip
        print_row(rows[-1])
    return rows


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    print(
        f"{row['model']:<12}{row['kept']:>10.1%}{row['one shot']:>10.2f}{row['refitted']:>10.2f}"
        f"{row['predicted loss']:>16.4f}{row['refit / collect']:>17.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all when none is given")
    parser.add_argument("--samples", type=int, default=1_000, help="calibration samples, at most")
    parser.add_argument("--kept", type=float, nargs="+", default=KEPT, help="shares of the MACs")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    print(
        f"{'model':<12}{'MACs kept':>10}{'one shot':>10}{'refitted':>10}{'predicted loss':>16}{'refit / collect':>17}"
    )
    results = []
    for name in arguments.models or MODELS:
        rows = measure(name, arguments.samples, tuple(arguments.kept))
        print(f"{name:<12}{'original':>10}{rows[0]['one shot']:>10.2f}   ({rows[0]['samples']} samples)\n", flush=True)
        results += rows
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
