"""Collection: the instrumented graph over the data, sums accumulated in float64 on the host."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from onnx_kfe.calibration._data import Dataset
from onnx_kfe.calibration._forward import Forward
from onnx_kfe.calibration._heads import detect_heads
from onnx_kfe.calibration._instrument import Probe, differentiable_copy, instrument
from onnx_kfe.calibration._layer_statistics import LayerStatistics, PositionMeans
from onnx_kfe.calibration._loss import Loss
from onnx_kfe.calibration._passes import Progress, batch_size, blocks, data_specs, input_specs, run_pass
from onnx_kfe.calibration._patches import channel_major
from onnx_kfe.calibration._statistics import Statistics
from onnx_kfe.calibration._weight_file import WeightFile
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.graph import Network

__all__ = ["DEFAULT_MEMORY", "collect"]

DEFAULT_MEMORY = 4 * 2**30
_SCALE_SAMPLES = 64  # samples whose outputs give a quantity its unit
_SUM, _ADDED = 8, 4  # bytes of an element of a sum, and of what a node adds to it by batch


def collect(
    network: Network,
    data: Dataset,
    *,
    heads: Mapping[str, str] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    memory: int = DEFAULT_MEMORY,
    providers: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress = lambda samples: None,
) -> Statistics:
    """Collect the K-FAC statistics of every prunable layer over the data.

    Memory on the host does not depend on the number of samples: a batch of activations and one sum a layer. Where the
    sums of all layers take too much, there are several passes over the data, each for as many layers as fit; what a
    pass found goes to a temporary file.

    Args:
        network: The model.
        data: Calibration samples; labels are not used, but by a loss that reads them.
        heads: Kind by output name where detection should be overruled.
        loss: What is differentiated in the place of the heads: the empirical Fisher information, see `open_loss`.
        seed: Seed of noise and positions.
        shard: ``(i, n)``: collect the i-th of n parts, to be merged.
        memory: Bytes that the sums of a pass may take, if those of a single layer do.
        providers: Execution providers, CPU when empty.
        threads: Threads, all cores when None.
        progress: Called with the number of samples done since the last call.

    Raises:
        KfeError: Nothing can be collected, or an activation or gradient is not finite (the layer is named).
        UsageError: The loss is neither one value a sample nor their sum.
    """
    index, count = shard
    if not 0 <= index < count:
        raise UsageError(f"--shard {index}/{count}: shards are numbered 0 to {count - 1}")
    first = next(iter(data))
    shapes = {spec.name: first.sample[spec.name].shape for spec in input_specs(network.model)}
    if not network.input_shapes and any(layer.geometry is None for layer in network.layers):
        network = network.with_input_shapes(shapes)  # typical ones may be none that the model can take
    specs = data_specs(network.model, loss)
    size = batch_size(network, shapes)
    copy = differentiable_copy(network.model)
    weights = WeightFile(copy)
    forward = Forward(copy, detect_heads(copy, heads), weights, providers=providers, threads=threads)
    scaled = forward.scaled_heads(itertools.islice(blocks(data, size, specs), -(-_SCALE_SAMPLES // size)))
    if loss is not None:
        loss.check(copy, data, specs, providers=providers, threads=threads)
    instrumented = instrument(copy, network.prunable, scaled, loss)
    weights = WeightFile(instrumented.model)  # those of the backward pass as well
    found = {probe.layer.name: probe for probe in instrumented.probes}
    nodes = [[found[use.name] for use in layer.uses] for layer in network.prunable if layer.name in found]
    passes = _passes(nodes, memory)
    advance = _shared(progress, len(passes))

    def collected(layers: Sequence[Sequence[Probe]]) -> Statistics:
        probes = [probe for nodes in layers for probe in nodes]
        session = weights.session(instrumented.part(probes), providers=providers, threads=threads)
        names = [name for probe in probes for name in probe.outputs]
        batches = run_pass(
            session, names, blocks(data, size, specs, shard), forward, scaled, seed, loss=loss, progress=advance
        )
        summed, samples = _summed(layers, batches)
        if samples == 0:
            raise KfeError(f"{data.describe()}: no samples in shard {index}/{count}")
        return Statistics(
            network.fingerprint, seed, samples, scaled, shapes, summed, instrumented.skipped, [(index, count)],
            loss=loss.fingerprint if loss is not None else None,
        )  # fmt: skip

    parts = [collected(layers) if len(passes) == 1 else collected(layers).on_disk() for layers in passes]
    return dataclasses.replace(parts[0], layers={name: seen for part in parts for name, seen in part.layers.items()})


def _summed(
    layers: Sequence[Sequence[Probe]], batches: Iterable[tuple[int, dict[str, np.ndarray]]]
) -> tuple[dict[str, LayerStatistics], int]:
    """The statistics of some layers, given as their nodes, and the number of samples, from what a pass yields."""
    sums = {first.layer.name: _Sums(first, *others) for first, *others in layers}
    samples = 0
    for done, results in batches:
        for layer in sums.values():
            layer.add(results, done)
        samples += done
        results.clear()  # before those of the next batch take as much again
    return {name: sums.pop(name).statistics() for name in list(sums)}, samples


def _passes(layers: Sequence[Sequence[Probe]], memory: int) -> list[list[Sequence[Probe]]]:
    """The layers of each pass, given as their nodes, in order, as many as fit."""
    passes: list[list[Sequence[Probe]]] = []
    free = 0
    for nodes in layers:
        geometry = nodes[0].layer.geometry
        assert geometry is not None
        needed = (_SUM + _ADDED * len(nodes)) * geometry.groups * (geometry.patch_size**2 + geometry.cotangent_size**2)
        if not passes or needed > free:
            passes.append([])
            free = memory
        passes[-1].append(nodes)
        free -= needed
    return passes


def _shared(progress: Progress, passes: int) -> Progress:
    """Progress for all passes together, each of which sees every sample."""
    seen = 0

    def advance(samples: int) -> None:
        nonlocal seen
        progress((seen + samples) // passes - seen // passes)
        seen += samples

    return advance


class _Sums:
    """Sums of one layer over batches and nodes, each scaled from the positions on its grid to all positions.

    To the factors, positions of other nodes with the same weight are further positions. Patches stay in the
    order of the graph, tap-major, until the end: the permutation costs more than the addition.
    """

    def __init__(self, *probes: Probe) -> None:
        geometry = probes[0].layer.geometry
        assert geometry is not None
        self._probes, self._geometry = probes, geometry
        self._patch, self._out = geometry.patch_size, geometry.cotangent_size
        self._inputs = np.zeros((geometry.groups, self._patch, self._patch))
        self._total = np.zeros((geometry.groups, self._patch))
        self._cotangents = np.zeros((geometry.groups, self._out, self._out))
        self._positions = 0.0
        self._common = PositionMeans()
        self._saliency = np.zeros((geometry.groups, geometry.out_channels // geometry.groups))
        self._samples = 0

    def add(self, results: Mapping[str, np.ndarray], samples: int) -> None:
        """Add a batch of outputs of the instrumented graph."""
        channels = self._geometry.in_channels if self._geometry.transposed else self._geometry.out_channels
        self._samples += samples
        positions = {p: results[p.output_size].item() / channels for p in self._probes}
        seen = {probe: count for probe, count in positions.items() if count}  # the rest is padding throughout
        rows = sum(len(results[probe.input_means]) for probe in seen)
        for probe, count in seen.items():
            self._add(probe, results, count, sum(seen.values()) / rows)
        self._saliency += np.square(self._gate_gradients(results)).sum(0)
        # Squares on the diagonal cannot cancel, so it shows whatever is not finite.
        for sums, what in ((self._inputs, "input"), (self._cotangents, "gradient")):
            if not np.isfinite(np.einsum("gii->gi", sums)).all():
                raise KfeError(
                    f"layer '{self._probes[0].layer.name}': NaN or infinity in its {what}; "
                    "check the calibration data, or --exclude the layer"
                )

    def _add(self, probe: Probe, results: Mapping[str, np.ndarray], positions: float, usual: float) -> None:
        """Add what a node saw of a batch, at its positions; `usual` is how many of all nodes there are a row."""
        geometry = self._geometry
        taken = results[probe.input_size].item() / (self._patch * geometry.groups)
        taken_cotangents = results[probe.cotangent_size].item() / (self._out * geometry.groups)
        _add_scaled(self._inputs, results[probe.input_second_moment], positions / taken)
        _add_scaled(self._total, results[probe.input_sum], positions / taken)
        _add_scaled(self._cotangents, results[probe.cotangent_second_moment], positions / taken_cotangents)
        self._positions += positions
        self._common += _position_means(probe, results, positions, usual)

    def _gate_gradients(self, results: Mapping[str, np.ndarray]) -> np.ndarray:
        """``[samples, groups, o]``, summed over nodes; one behind the other where these divide samples differently."""
        shape = (-1, *self._saliency.shape)
        parts = [results[probe.gate_gradients].reshape(shape).astype(np.float64) for probe in self._probes]
        return np.sum(parts, axis=0) if len(set(map(len, parts))) == 1 else np.concatenate(parts)

    def statistics(self) -> LayerStatistics:
        """The sums with patches in channel-major order."""
        inputs, total, cotangents = self._inputs, self._total, self._cotangents
        order = channel_major(self._geometry)
        if self._geometry.transposed:
            cotangents = cotangents[:, order[:, None], order]
        else:
            inputs, total = inputs[:, order[:, None], order], total[:, order]
        return LayerStatistics(
            inputs, total, cotangents,
            self._positions, self._samples, self._common, self._saliency,
        )  # fmt: skip


def _position_means(probe: Probe, results: Mapping[str, np.ndarray], positions: float, usual: float) -> PositionMeans:
    """The cotangent at nodes with more positions than usual adds up to more."""
    inputs, cotangents = (
        results[name].reshape(-1, results[name].shape[-1]).astype(np.float64)
        for name in (probe.input_means, probe.cotangent_means)
    )
    share = positions / len(inputs) / usual
    squares = np.square(inputs).sum(), np.square(share * cotangents).sum()
    return PositionMeans(len(inputs), inputs.sum(0), *squares)


def _add_scaled(sums: np.ndarray, added: np.ndarray, scale: float) -> None:
    sums += np.multiply(added.reshape(sums.shape), scale, dtype=np.float64)
