"""Collection: the instrumented graph over the data, sums accumulated in float64 on the host."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_kfe.calibration._batches import Batch, batches
from onnx_kfe.calibration._data import Dataset
from onnx_kfe.calibration._forward import Forward
from onnx_kfe.calibration._heads import Head, detect_heads, sample_noise
from onnx_kfe.calibration._inputs import InputSpec, fixed_batch
from onnx_kfe.calibration._instrument import (
    PHASE_INPUT,
    Probe,
    activation_bytes,
    differentiable_copy,
    instrument,
    noise_input,
)
from onnx_kfe.calibration._patches import channel_major
from onnx_kfe.calibration._statistics import LayerStatistics, PositionMeans, Statistics
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.graph import Network, concrete_shapes, nominal_input_shapes
from onnx_kfe.runtime import create_session

__all__ = ["batch_size", "collect", "input_specs"]

_ACTIVATION_BUDGET = 2**30  # bytes of activations of one batch, forward and backward together
_LARGEST_BATCH = 64
_SCALE_SAMPLES = 64  # samples whose outputs give a Gaussian head its unit

Progress = Callable[[int], None]


def input_specs(model: ir.Model) -> list[InputSpec]:
    """What the model takes, as the data readers want it."""
    specs = []
    for value in model.graph.inputs:
        if value.is_initializer() or value.dtype is None:
            continue
        shape = tuple(size if isinstance(size, int) else size.value for size in value.shape or ())
        specs.append(InputSpec(value.name or "", np.dtype(value.dtype.numpy()), shape))
    return specs


def batch_size(network: Network, input_shapes: Mapping[str, Sequence[int]]) -> int:
    """Samples run together: a function of the model and its input shapes, so that shards divide the data alike."""
    shapes = concrete_shapes(network.model, nominal_input_shapes(network.model, input_shapes))
    return int(np.clip(_ACTIVATION_BUDGET // (3 * max(activation_bytes(network.model, shapes), 1)), 1, _LARGEST_BATCH))


def collect(
    network: Network,
    data: Dataset,
    *,
    heads: Mapping[str, str] | None = None,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    providers: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress = lambda samples: None,
) -> Statistics:
    """Collect the K-FAC statistics of every prunable layer over the data.

    Memory on the host does not depend on the number of samples: a batch of activations and one sum a layer.

    Args:
        network: The model.
        data: Calibration samples; labels are not used.
        heads: Kind by output name where detection should be overruled.
        seed: Seed of noise and positions.
        shard: ``(i, n)``: collect the i-th of n parts, to be merged.
        providers: Execution providers, CPU when empty.
        threads: Threads, all cores when None.
        progress: Called with the number of samples done since the last call.

    Raises:
        KfeError: Nothing can be collected, or an activation or gradient is not finite (the layer is named).
    """
    index, count = shard
    if not 0 <= index < count:
        raise UsageError(f"--shard {index}/{count}: shards are numbered 0 to {count - 1}")
    first = next(iter(data))
    shapes = {name: array.shape for name, array in first.sample.items()}
    specs = input_specs(network.model)
    size = batch_size(network, shapes)
    copy = differentiable_copy(network.model)
    forward = Forward(copy, detect_heads(copy.graph, heads), providers=providers, threads=threads)
    scaled = forward.scaled_heads(itertools.islice(_blocks(data, size, specs), -(-_SCALE_SAMPLES // size)))
    instrumented = instrument(copy, network.prunable, scaled)
    session = create_session(instrumented.model, providers=providers, threads=threads)
    sums = {probe.layer.name: _Sums(probe) for probe in instrumented.probes}
    samples = 0
    names = [name for probe in instrumented.probes for name in probe.outputs]
    for block, batch in _blocks(data, size, specs, shard):
        feeds = _feeds(session, batch, forward, scaled, seed, block)
        results = dict(zip(names, _run(session, names, feeds), strict=True))
        for layer in sums.values():
            layer.add(results, len(batch))
        samples += len(batch)
        progress(len(batch))
    if samples == 0:
        raise KfeError(f"{data.describe()}: no samples in shard {index}/{count}")
    return Statistics(
        network.fingerprint, seed, samples, scaled, shapes,
        {name: layer.statistics() for name, layer in sums.items()}, instrumented.skipped, [(index, count)],
    )  # fmt: skip


def _blocks(
    data: Dataset, size: int, specs: Sequence[InputSpec], shard: tuple[int, int] = (0, 1)
) -> Iterator[tuple[int, Batch]]:
    """Batches within blocks of consecutive indices, so that any shard sees the batches of the single run."""
    fixed = fixed_batch(specs) or 1
    length = size if fixed == 1 else 16 * fixed
    index, count = shard
    chosen = data if count == 1 else data.where(lambda place: place // length % count == index)
    for block, items in itertools.groupby(chosen, key=lambda item: item.index // length):
        for batch in batches(items, size, specs):
            yield block, batch


def _feeds(
    session: Any, batch: Batch, forward: Forward, heads: list[Head], seed: int, block: int
) -> dict[str, np.ndarray]:
    shapes = forward.sample_shapes(batch)
    drawn = [sample_noise(heads, shapes, seed, int(index)) for index in batch.indices]
    noise = {noise_input(head): np.concatenate([row[place] for row in drawn]) for place, head in enumerate(heads)}
    first = np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64))).integers(0, 2**20, 2)
    phase = first + block  # successive batches take successive rows, so that all are taken equally often
    feeds = {**batch.feeds, **noise, PHASE_INPUT: phase}
    return {value.name: feeds[value.name] for value in session.get_inputs()}


def _run(session: Any, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    try:
        return session.run(names, feeds)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise KfeError(f"the instrumented model failed in ONNX Runtime: {reason}") from error


class _Sums:
    """Sums of one layer over batches, each scaled from the positions on its grid to all positions.

    Patches stay in the order of the graph, tap-major, until the end: the permutation costs more than the addition.
    """

    def __init__(self, probe: Probe) -> None:
        geometry = probe.layer.geometry
        assert geometry is not None
        self._probe, self._geometry = probe, geometry
        self._patch, self._out = geometry.patch_size, geometry.out_channels // geometry.groups
        self._inputs = np.zeros((geometry.groups, self._patch, self._patch))
        self._total = np.zeros((geometry.groups, self._patch))
        self._cotangents = np.zeros((geometry.groups, self._out, self._out))
        self._positions = 0.0
        self._common = PositionMeans()
        self._samples = 0

    def add(self, results: Mapping[str, np.ndarray], samples: int) -> None:
        """Add a batch of outputs of the instrumented graph."""
        probe, geometry = self._probe, self._geometry
        positions = results[probe.output_size].item() / geometry.out_channels
        taken = results[probe.input_size].item() / (self._patch * geometry.groups)
        taken_cotangents = results[probe.cotangent_size].item() / geometry.out_channels
        _add_scaled(self._inputs, results[probe.input_second_moment], positions / taken)
        _add_scaled(self._total, results[probe.input_sum], positions / taken)
        _add_scaled(self._cotangents, results[probe.cotangent_second_moment], positions / taken_cotangents)
        self._positions += positions
        self._samples += samples
        self._common += self._position_means(results)
        # Squares on the diagonal cannot cancel, so it shows whatever is not finite.
        for sums, what in ((self._inputs, "input"), (self._cotangents, "gradient")):
            if not np.isfinite(np.einsum("gii->gi", sums)).all():
                raise KfeError(
                    f"layer '{probe.layer.name}': NaN or infinity in its {what}; "
                    "check the calibration data, or --exclude the layer"
                )

    def statistics(self) -> LayerStatistics:
        """The sums with patches in channel-major order."""
        order = channel_major(self._geometry)
        return LayerStatistics(
            self._inputs[:, order[:, None], order], self._total[:, order], self._cotangents,
            self._positions, self._samples, self._common,
        )  # fmt: skip

    def _position_means(self, results: Mapping[str, np.ndarray]) -> PositionMeans:
        probe = self._probe
        inputs, cotangents = (
            results[name].reshape(-1, results[name].shape[-1]).astype(np.float64)
            for name in (probe.input_means, probe.cotangent_means)
        )
        return PositionMeans(len(inputs), inputs.sum(0), np.square(inputs).sum(), np.square(cotangents).sum())


def _add_scaled(sums: np.ndarray, added: np.ndarray, scale: float) -> None:
    sums += np.multiply(added.reshape(sums.shape), scale, dtype=np.float64)
