"""Second moments of the gradient in the eigenbases of the layers, by a second pass over the data (EKFAC).

K-FAC's eigenvalues are products; the variances of the gradient in the same basis are the best diagonal there is for
these directions (George, Laurent, Bouthillier, Ballas, Vincent 2018).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.calibration._data import Dataset
from onnx_kfe.calibration._forward import Forward
from onnx_kfe.calibration._gradients import emit_squared_gradients
from onnx_kfe.calibration._instrument import differentiable_copy, differentiate
from onnx_kfe.calibration._layer_statistics import LayerStatistics
from onnx_kfe.calibration._passes import ACTIVATION_BUDGET, Progress, batch_size, blocks, input_specs, run_pass
from onnx_kfe.calibration._patches import channel_major
from onnx_kfe.calibration._statistics import Statistics
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import Geometry, Layer, Network
from onnx_kfe.kfe import EigenMoments, eigen_bases
from onnx_kfe.runtime import Serialized

__all__ = ["collect_eigen_moments"]


def collect_eigen_moments(
    network: Network,
    statistics: Statistics,
    data: Dataset,
    *,
    providers: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress = lambda samples: None,
) -> Statistics:
    """The statistics with the second moments of the gradient in the eigenbases of their factors, at all positions.

    Noise is that of the first pass, sample by sample.

    Args:
        network: The model.
        statistics: Its whole statistics.
        data: The samples that they were collected on.
        providers: Execution providers, CPU when empty.
        threads: Threads, all cores when None.
        progress: Called with the number of samples done since the last call.

    Raises:
        KfeError: The statistics are of another model, of other data or of a part of it, or a batch fails.
    """
    statistics.check_model(network.fingerprint)
    if statistics.shards != [(0, 1)]:
        raise KfeError("second moments in the eigenbases need the whole statistics: merge the shards first")
    copy = differentiable_copy(network.model)
    forward = Forward(copy, statistics.heads, providers=providers, threads=threads)
    layers = [layer for layer in network.prunable if layer.name in statistics.layers]
    specs, size = input_specs(network.model), _batch_size(network, statistics, layers)
    bases = {layer.name: _bases(layer, statistics.layers[layer.name]) for layer in layers}
    model, outputs = _instrument(copy, layers, statistics, bases)
    samples = 0
    for done, results in run_pass(
        model, list(outputs.values()), blocks(data, size, specs), forward, statistics.heads, statistics.seed,
        providers=providers, threads=threads, progress=progress,
    ):  # fmt: skip
        for layer in layers:
            order = channel_major(_geometry(layer))
            sums = bases[layer.name].second_moment
            sums += results[outputs[layer.name]][:, :, order].reshape(sums.shape)
        samples += done
    if samples != statistics.samples:
        raise KfeError(f"{data.describe()}: {samples} samples, but the statistics are of {statistics.samples}")
    found = {name: dataclasses.replace(s, eigen=bases.get(name)) for name, s in statistics.layers.items()}
    return dataclasses.replace(statistics, layers=found)


def _batch_size(network: Network, statistics: Statistics, layers: Sequence[Layer]) -> int:
    """Samples run together, fewer where the patches and gradients of single samples are large."""
    most = max(_sample_bytes(layer, statistics.layers[layer.name]) for layer in layers)
    return max(1, min(batch_size(network, statistics.input_shapes), ACTIVATION_BUDGET // most))


def _sample_bytes(layer: Layer, sums: LayerStatistics) -> int:
    """Bytes of the patches, their deviations, and the gradient of a sample with its square."""
    geometry = _geometry(layer)
    patches = geometry.groups * geometry.patch_size * int(sums.positions / sums.samples)
    return 8 * (patches + geometry.weight_parameters)


def _bases(layer: Layer, sums: LayerStatistics) -> EigenMoments:
    """The eigenbases of every group, with no moments yet."""
    geometry = _geometry(layer)
    factors = zip(sums.centred_input_factor, sums.output_factor, strict=True)
    pairs = [eigen_bases(a, g, geometry.taps) for a, g in factors]
    inputs, outputs = (np.stack(bases) for bases in zip(*pairs, strict=True))
    return EigenMoments(inputs, outputs, np.zeros((*outputs.shape[:2], inputs.shape[1], geometry.taps)))


def _instrument(
    model: ir.Model, layers: Sequence[Layer], statistics: Statistics, bases: Mapping[str, EigenMoments]
) -> tuple[Serialized, dict[str, str]]:
    """The model that computes a batch's sums, and the names of its outputs by layer name."""
    whole = differentiate(model, layers, statistics.heads)
    outputs: dict[str, ir.Value] = {}
    for layer, x, y, cotangent in whole.layers:
        own, mean = bases[layer.name], statistics.layers[layer.name].mean
        outputs[layer.name] = emit_squared_gradients(
            whole.emit, layer, x, y, cotangent, own.input_basis, own.output_basis, mean
        )
    return whole.serialized(list(outputs.values())), {name: value.name or "" for name, value in outputs.items()}


def _geometry(layer: Layer) -> Geometry:
    assert layer.geometry is not None
    return layer.geometry
