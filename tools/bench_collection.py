"""Time collection against the forward pass over the same images, and against torch hooks computing the same statistics.

    python -m tools.bench_collection resnet20 mobilenet --json collection.json

In each round, alternated: ONNX Runtime's forward pass of the original model; ``collect``; and eager torch, forward and
backward with a hook on every layer, patches by ``unfold``, float32, no gradients of weights, on the same grid of
positions and at all positions (as K-FAC packages do). Same images, batch size, threads and noise; times are per image,
ratios are medians over rounds. Building the instrumented graph is timed apart, and counted as for 1,024 images in the
ratio "with set-up". Last, the peak memory of a process that collects N and 4 N samples. Needs the assets, an idle
machine and ``pip install 'onnx-kfe[cpu,train]'``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

import onnx_kfe as kfe
from onnx_kfe import calibration
from onnx_kfe.calibration import Head, Statistics, batch_size, find_heads, input_specs, open_dataset
from onnx_kfe.calibration._grid import grid_strides
from onnx_kfe.calibration._moments import _INPUT_COST, _OUTPUT_COST
from onnx_kfe.evaluation._child import peak_memory
from onnx_kfe.graph import Layer, Network, serialize
from onnx_kfe.runtime import create_session, default_threads
from tools.assets import MODELS
from tools.torch_oracle import Grid, Noise, TorchOracle, all_positions
from tools.verify_factors import noise_of, outputs_of

BATCHES = 6  # of a round; torch takes fewer, for it takes long
TORCH_BATCHES = 2
DEFAULT_SAMPLES = 1_024
MEMORY_BATCHES = 4
TARGETS = "targets: collect / forward at most 3.5, torch / collect at least 3"

Times = dict[str, float]


def same_grid(layer: Layer, extent: tuple[int, ...]) -> Grid:
    """The grid that collection takes positions on."""
    geometry = layer.geometry
    assert geometry is not None
    outputs = geometry.out_channels / geometry.groups
    inputs, cotangents = _INPUT_COST * outputs / geometry.patch_size, _OUTPUT_COST * geometry.patch_size / outputs
    return Grid(grid_strides(extent, min(1.0, inputs)), grid_strides(extent, min(1.0, cotangents)))


class Bench:
    """One model with everything that is timed made ready."""

    def __init__(self, name: str, threads: int) -> None:
        self.threads = threads
        self.network: Network = kfe.inspect(MODELS[name].path)
        (self.input,) = (str(value.name) for value in self.network.model.graph.inputs)
        shape = MODELS[name].images(1).shape
        self.batch = batch_size(self.network, {self.input: shape})
        self.images = MODELS[name].images(BATCHES * self.batch)
        self.session = create_session(MODELS[name].path, threads=threads)
        self.heads: list[Head] = find_heads(self.network)
        self.noise: Noise = noise_of(self.network, self.heads, {self.input: self.images}, 0)
        model = onnx.ModelProto.FromString(serialize(self.network.original))
        make = {"torch, same grid": same_grid, "torch, all positions": all_positions}
        self.torch = {
            key: TorchOracle(model, self.network.prunable, outputs_of(self.heads), torch.float32, grid)
            for key, grid in make.items()
        }

    def feeds(self, batches: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """First index and feeds of each batch."""
        for start in range(0, batches * self.batch, self.batch):
            yield start, {self.input: self.images[start : start + self.batch]}

    def forward(self) -> float:
        """Seconds an image."""
        start = time.perf_counter()
        for _, feeds in self.feeds(BATCHES):
            self.session.run(None, feeds)
        return (time.perf_counter() - start) / len(self.images)

    def collect(self) -> tuple[float, float]:
        """Seconds an image after the first batch, and seconds before that which no image explains."""
        marks = []
        data = open_dataset({self.input: self.images}, input_specs(self.network.model))
        start = time.perf_counter()
        collected: Statistics = calibration.collect(
            self.network, data, threads=self.threads, progress=lambda samples: marks.append(time.perf_counter())
        )
        assert len(marks) == BATCHES
        assert not collected.skipped
        image = (marks[-1] - marks[0]) / (len(self.images) - self.batch)
        return image, marks[0] - start - image * self.batch

    def hooks(self, key: str) -> float:
        """Seconds an image."""
        oracle = self.torch[key]
        start = time.perf_counter()
        for first, feeds in self.feeds(TORCH_BATCHES):
            oracle.add(feeds, range(first, first + self.batch), self.noise)
        return (time.perf_counter() - start) / (TORCH_BATCHES * self.batch)

    def round(self) -> Times:
        """One alternation."""
        times = {"forward": self.forward()}
        times["collect"], times["set-up"] = self.collect()
        return times | {key: self.hooks(key) for key in self.torch}


def ratios(rounds: Sequence[Times]) -> Times:
    """Medians over rounds of the ratios within a round."""

    def median(ratio: Any) -> float:
        return statistics.median(map(ratio, rounds))

    return {
        "collect / forward": median(lambda r: r["collect"] / r["forward"]),
        "with set-up": median(lambda r: (r["collect"] + r["set-up"] / DEFAULT_SAMPLES) / r["forward"]),
        "torch / collect": median(lambda r: r["torch, same grid"] / r["collect"]),
        "torch all / collect": median(lambda r: r["torch, all positions"] / r["collect"]),
    }


def memory_of(name: str, samples: int, threads: int) -> int:
    """Peak resident bytes of this process after a collection; images are made one at a time."""
    network = kfe.inspect(MODELS[name].path)
    (spec,) = input_specs(network.model)
    few = MODELS[name].images(8)

    def stream() -> Iterator[Mapping[str, np.ndarray]]:
        return ({spec.name: image[None]} for image in itertools.islice(itertools.cycle(few), samples))

    calibration.collect(network, open_dataset(stream, [spec]), threads=threads)
    return peak_memory() or 0


def memory(name: str, samples: int, threads: int) -> int:
    """The same in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(memory_of, name, samples, threads).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all when none is given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--no-memory", action="store_true", help="leave out the measurement of memory")
    parser.add_argument("--json", type=Path, help="file for the figures of every round")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    columns = ("forward", "collect", "torch, same grid", "torch, all positions")
    results = []
    print(f"{arguments.rounds} rounds, {arguments.threads} threads; {TARGETS}\n")
    for name in arguments.models or MODELS:
        bench = Bench(name, arguments.threads)
        bench.round()  # warms up
        rounds = [bench.round() for _ in range(arguments.rounds)]
        result: dict[str, Any] = {"model": name, "batch": bench.batch, "rounds": rounds, "ratios": ratios(rounds)}
        print(f"{name}, batch {bench.batch}")
        for column in columns:
            print(f"  {column + ', ms an image':<36}{1000 * statistics.median(r[column] for r in rounds):>9.2f}")
        print(f"  {'set-up, s':<36}{statistics.median(r['set-up'] for r in rounds):>9.2f}")
        for key, ratio in ratios(rounds).items():
            print(f"  {key:<36}{ratio:>9.2f}")
        if not arguments.no_memory:
            sizes = [MEMORY_BATCHES * bench.batch * factor for factor in (1, 4)]
            peaks = {size: memory(name, size, arguments.threads) for size in sizes}
            result["memory"] = peaks
            for size, peak in peaks.items():
                print(f"  {f'peak memory, {size} samples, MiB':<36}{peak / 2**20:>9.0f}")
        results.append(result)
        print(flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
