"""Time ``prune`` end to end on MobileNetV2, from a folder of image files to the measured result.

    python -m tools.bench_prune --json prune.json

Prints the wall time of every stage. Needs the assets.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_kfe as kfe
from onnx_kfe.calibration import image_preset
from onnx_kfe.progress import Progress
from tools.assets import MODELS, extract_images

TARGETS = {"planning": 10.0, "rewriting": 10.0, "in all": 240.0}  # seconds on two cores


class Stopwatch(Progress):
    """Remembers how long each stage took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Time a stage."""
        start = time.perf_counter()
        yield lambda steps: None
        self.seconds[title] = time.perf_counter() - start


def bench(name: str, images: int, kept: float) -> dict[str, float]:
    """Seconds by stage."""
    asset = MODELS[name]
    if asset.preset is None:
        raise SystemExit(f"{name}: its images are not files; take one of the ImageNet models")
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        extract_images(Path(folder), images)
        start = time.perf_counter()
        result = kfe.prune(
            asset.path, folder, kfe.Macs(kept), images=image_preset(asset.preset), max_samples=images, progress=watch
        )
        result.save(Path(folder) / "small.onnx")
        total = time.perf_counter() - start
    report = result.report
    print(f"{name}: {report['macs']['after'] / report['macs']['before']:.1%} of the MACs, {images} images")
    print(f"{report['calibration_samples']} for the statistics, {report['quality']['samples']} held back")
    return {**watch.seconds, "the rest": total - sum(watch.seconds.values()), "in all": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenet", choices=sorted(k for k, a in MODELS.items() if a.preset))
    parser.add_argument("--images", type=int, default=512, help="number of image files")
    parser.add_argument("--macs", type=float, default=0.75, help="share of the MACs to keep")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()

    seconds = bench(arguments.model, arguments.images, arguments.macs)
    print(f"\n{'stage':<24}{'seconds':>10}{'target':>10}")
    for stage, value in seconds.items():
        print(f"{stage:<24}{value:>10.1f}{'< ' + format(TARGETS[stage], '.0f') if stage in TARGETS else '':>10}")
    if arguments.json:
        arguments.json.write_text(json.dumps(seconds, indent=1) + "\n")


if __name__ == "__main__":
    main()
