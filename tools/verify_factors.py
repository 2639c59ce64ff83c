"""Compare every factor of real models with an independent torch computation, same samples and same noise.

    python -m tools.verify_factors resnet20 mobilenet lite0 --json factors.json

For each model, the largest relative (Frobenius) difference of A, mean and G over its layers. First between collection
at all positions and torch in float64, where only rounding may differ; a unit that rounding puts on the other side of a
ReLU or Clip is put on the same side, for the gradient jumps there ("as is" says what happens without). Then between
collection on the grid of positions that is the default and at all positions: its sampling error. Needs the assets and
``pip install 'onnx-kfe[cpu,train]'``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx

import onnx_kfe as kfe
from onnx_kfe.calibration import Head, Statistics, _collect, _moments, find_heads, sample_noise
from onnx_kfe.graph import Network, serialize
from onnx_kfe.runtime import create_session
from tools.assets import MODELS
from tools.torch_oracle import Gate, Noise, Output, TorchOracle, relative_error

TOLERANCE = 1e-4
SAMPLES = {"resnet20": (64, 1_000), "resnet32": (64, 1_000)}  # to compare with torch, and to see the grid's error
FEWER_SAMPLES = (16, 64)  # at 224 x 224
SEED = 0
SAME, FREE, GRID = "all positions", "as is", "grid"


@contextmanager
def all_positions() -> Iterator[None]:
    """Statistics are collected at every position, whatever they cost."""
    with mock.patch.multiple(_moments, _INPUT_COST=math.inf, _OUTPUT_COST=math.inf):
        yield


def outputs_of(heads: Sequence[Head]) -> dict[str, Output]:
    """The heads as the oracle reads them."""
    return {head.output: Output(head.kind, head.axis, head.probabilities, head.scale) for head in heads}


def noise_of(network: Network, heads: Sequence[Head], feeds: dict[str, np.ndarray], seed: int) -> Noise:
    """The noise that a collection samples its targets with; outputs have the shapes that they have for one sample."""
    session = create_session(serialize(network.original))
    names = [head.output for head in heads]
    values = session.run(names, {name: array[:1] for name, array in feeds.items()})
    shapes = {name: value.shape for name, value in zip(names, values, strict=True)}
    return lambda index: sample_noise(list(heads), shapes, seed, index)


@contextmanager
def watched(names: Sequence[str], see: Callable[[dict[str, np.ndarray], list[Gate]], None]) -> Iterator[None]:
    """While it lasts, collections show the feeds of each batch, and the values that the named nodes have there."""

    def create(model: bytes, **options: Any) -> Any:
        proto = onnx.ModelProto.FromString(model)
        known = {name for node in proto.graph.node for name in node.output}
        present = [name for name in names if name in known]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in present)
        session = create_session(proto.SerializeToString(), **options)
        run = session.run

        def watched_run(outputs: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            values = run([*outputs, *present], feeds)
            found = dict(zip(present, values[len(outputs) :], strict=True))
            see(feeds, [found.get(name) for name in names])
            return values[: len(outputs)]

        session.run = watched_run
        return session

    with mock.patch.object(_collect, "create_session", create):
        yield


def compared(network: Network, feeds: dict[str, np.ndarray]) -> tuple[Statistics, TorchOracle, TorchOracle]:
    """A collection at all positions, and the same by torch: on the same side of all thresholds, and as is."""
    model = onnx.ModelProto.FromString(serialize(network.original))
    heads = find_heads(network)
    noise = noise_of(network, heads, feeds, SEED)
    same, free = (TorchOracle(model, network.prunable, outputs_of(heads)) for _ in range(2))

    def see(given: dict[str, np.ndarray], gates: list[Gate]) -> None:
        batch = {name: given[name] for name in feeds}
        indices = range(same.samples, same.samples + len(next(iter(batch.values()))))
        same.add(batch, indices, noise, gates)
        free.add(batch, indices, noise)

    thresholds = [node.output[0] for node in model.graph.node if node.op_type in ("Relu", "Clip")]
    with all_positions(), watched(thresholds, see):
        statistics = kfe.collect(network, feeds, seed=SEED)
    return statistics, same, free


def differences(statistics: Statistics, expected: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """Relative error of each factor by layer."""
    return {
        name: {
            "A": relative_error(statistics.layers[name].input_factor, factors["A"]),
            "mean": relative_error(statistics.layers[name].mean, factors["mean"]),
            "G": relative_error(statistics.layers[name].output_factor, factors["G"]),
        }
        for name, factors in expected.items()
    }


def verify(name: str, samples: int | None = None) -> dict[str, Any]:
    """Compare one model."""
    network = kfe.inspect(MODELS[name].path)
    (spec,) = (str(value.name) for value in network.model.graph.inputs)
    checked, sampled = SAMPLES.get(name, FEWER_SAMPLES)
    images = MODELS[name].images(max(samples or checked, sampled))
    full, same, free = compared(network, {spec: images[: samples or checked]})
    with all_positions():
        whole = kfe.collect(network, images[:sampled], seed=SEED)
    grid = kfe.collect(network, images[:sampled], seed=SEED)
    exact = {
        key: {"A": layer.input_factor, "mean": layer.mean, "G": layer.output_factor}
        for key, layer in whole.layers.items()
    }
    return {
        "model": name,
        "skipped": full.skipped,
        "samples": {SAME: full.samples, FREE: full.samples, GRID: grid.samples},
        SAME: differences(full, same.factors()),
        FREE: differences(full, free.factors()),
        GRID: differences(grid, exact),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--samples", type=int, help="samples of each model to compare with torch")
    parser.add_argument("--json", type=Path, help="file for every figure")
    arguments = parser.parse_args()

    results = []
    heading = "".join(f"{'max ' + key:>10}" for key in ("A", "mean", "G"))
    print(f"{'model':<12}{'samples':>8}{'layers':>8}{'positions':>15}{heading}   worst layer")
    for name in arguments.models or ["resnet20", "mobilenet", "lite0"]:
        result = verify(name, arguments.samples)
        results.append(result)
        for positions in (SAME, FREE, GRID):
            layers = result[positions]
            worst = {key: max(layer[key] for layer in layers.values()) for key in ("A", "mean", "G")}
            where = max(layers, key=lambda layer: max(layers[layer].values()))
            figures = "".join(f"{value:>10.1e}" for value in worst.values())
            print(
                f"{name:<12}{result['samples'][positions]:>8}{len(layers):>8}{positions:>15}{figures}   {where}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    errors = [e for r in results for layer in r[SAME].values() for e in layer.values()]
    sys.exit(0 if max(errors) <= TOLERANCE else f"a factor differs by {max(errors):.1e}, more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
