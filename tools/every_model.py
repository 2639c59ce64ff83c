"""`prune --max-drop 0.01` of every model of the assets, nothing set by hand.

    python -m tools.every_model --json every_model.json
    python -m tools.every_model cct ocr --samples 256

The task's metric before and after is top-1 in percent of 200 samples behind those for calibration, PSNR in dB, the
percentage of characters read rightly, or 100 times Spearman's rho; detectors have none here. What the floor is measured
in, and the drop of the model that it took, are the product's own, on the samples that it held back. Speed is that of
batch 1 on one thread against the original in one run. What was left alone follows each row, with the reason. Needs the
assets; the sentence encoders that ``prepare.py`` there fetches are left out where they are missing.
"""

from __future__ import annotations

import argparse
import collections
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_kfe as kfe
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import serialize
from onnx_kfe.runtime import create_session
from tools.assets import MODELS, assets_folder, photos, sentence_encoder, sentences, sts_spearman
from tools.headline import scorer

MAX_DROP = 0.01
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Subject:
    """A model with samples of what it takes.

    Attributes:
        path: The model.
        samples: Gives so many samples.
        score: Gives the score of a serialised model, for so many calibration samples; None where there is none.
    """

    path: Path
    samples: Callable[[int], Any]
    score: Callable[[int], Callable[[bytes], float]] | None = None


def subjects() -> dict[str, Subject]:
    """All models by short name."""
    found = {
        name: Subject(asset.path, asset.images, lambda count, name=name: scorer(name, count))  # type: ignore[misc]
        for name, asset in MODELS.items()
    }
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    plain, signed = {"mean": [0] * 3, "std": [1] * 3}, {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}
    detectors = {
        "ocr-det": ("ch_PP-OCRv4_det_infer.onnx", lambda count: photos(count, 320, **imagenet)),
        "fastestdet": ("fastestdet_coco.onnx", lambda count: photos(count, 352, **plain)),
        "ultraface": ("ultraface_rfb320.onnx", lambda count: photos(count, 320, **signed)[:, :, 40:280]),
    }
    for name, (file, samples) in detectors.items():
        found[name] = Subject(assets_folder() / "models" / file, samples)
    for name in ("minilm-l6", "minilm-l3"):
        try:
            path = sentence_encoder(name)
        except SystemExit as missing:
            print(missing)
            continue
        score: Callable[[bytes], float] = lambda model: 100 * sts_spearman(create_session(model))  # noqa: E731
        found[name] = Subject(path, sentences, lambda count, score=score: score)  # type: ignore[misc]
    return found


def measured(subject: Subject, count: int) -> dict[str, Any]:
    """One model: pruned, scored and timed."""
    network = kfe.inspect(subject.path)
    samples = subject.samples(count)
    if isinstance(samples, list):
        samples = [{name: row[name] for name in (v.name for v in network.model.graph.inputs)} for row in samples]
    score = None if subject.score is None else subject.score(count)
    before = None if score is None else score(serialize(network.original))
    result = kfe.prune(network, samples, max_drop=MAX_DROP, max_samples=None, threads=1)
    report, layers = result.report, result.network.layers  # at the shapes of the samples
    changed = [name for name, layer in report["layers"].items() if layer["form"] != "dense"]
    return {
        "before": before, "after": None if score is None else score(serialize(result.ir_model)),
        "metric": report["floor"]["metric"], "drop": report["floor"]["chosen"]["drop"],
        **{cost: report[cost]["after"] / report[cost]["before"] for cost in ("macs", "parameters")},
        "speed": result.timings[1].speedup, "changed": len(changed), "layers": len(layers),
        "left": {layer.name: layer.reason for layer in layers if layer.reason} | report["skipped"],
    }  # fmt: skip


def print_row(name: str, row: dict[str, Any]) -> None:
    """A row, and below it by reason what was left alone."""
    scores = ("" if row[key] is None else f"{row[key]:.2f}" for key in ("before", "after"))
    print(
        "{:<12}{:>9}{:>9}".format(name, *scores)
        + f"  {row['drop']:.4f} {row['metric']:<15}{row['macs']:>7.1%}{row['parameters']:>8.1%}{row['speed']:>7.2f}x"
        f"{row['changed']:>5} of {row['layers']}"
    )
    reasons = collections.defaultdict(list)
    for layer, reason in row["left"].items():
        reasons[reason].append(layer)
    for reason, layers in reasons.items():
        more = ", ..." if len(layers) > _NAMES_SHOWN else ""
        print(f"{'':<12}{len(layers)} left: {reason} ({', '.join(layers[:_NAMES_SHOWN])}{more})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="short names; all when none is given")
    parser.add_argument("--samples", type=int, default=500, help="calibration samples, of which a fifth is held back")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    found = subjects()
    if unknown := [name for name in arguments.models if name not in found]:
        parser.error(f"no such model: {', '.join(unknown)}; there are {', '.join(found)}")
    print(f"{'':<12}{'before':>9}{'after':>9}  {'drop':<22}{'MACs':>7}{'params':>8}{'speed':>8}  layers changed")
    rows = {}
    for name in arguments.models or found:
        try:
            rows[name] = measured(found[name], arguments.samples)
        except KfeError as error:
            rows[name] = {"error": str(error)}
            print(f"{name:<12}{error}", flush=True)
        else:
            print_row(name, rows[name])
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
