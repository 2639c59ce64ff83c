"""Second moments of the gradient in the eigenbases of the layers, by a second pass over the data (EKFAC).

K-FAC's eigenvalues are products; the variances of the gradient in the same basis are the best diagonal there is for
these directions (George, Laurent, Bouthillier, Ballas, Vincent 2018).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnx_kfe.calibration._data import Dataset
from onnx_kfe.calibration._forward import Forward
from onnx_kfe.calibration._gradients import emit_gradients, emit_squares
from onnx_kfe.calibration._instrument import differentiable_copy, differentiate
from onnx_kfe.calibration._layer_statistics import LayerStatistics
from onnx_kfe.calibration._loss import Loss
from onnx_kfe.calibration._passes import ACTIVATION_BUDGET, Progress, batch_size, blocks, data_specs, run_pass
from onnx_kfe.calibration._patches import channel_major
from onnx_kfe.calibration._statistics import Statistics
from onnx_kfe.calibration._weight_file import WeightFile
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import Geometry, Layer, Network
from onnx_kfe.kfe import EigenMoments, eigen_bases

__all__ = ["collect_eigen_moments"]


def collect_eigen_moments(
    network: Network,
    statistics: Statistics,
    data: Dataset,
    *,
    loss: Loss | None = None,
    providers: Sequence[str] = (),
    threads: int | None = None,
    progress: Progress = lambda samples: None,
) -> Statistics:
    """The statistics with the second moments of the gradient in the eigenbases of their factors, at all positions.

    Those of ConvTranspose stay as they are: no form is made of their eigenbases.

    Noise is that of the first pass, sample by sample.

    Args:
        network: The model.
        statistics: Its whole statistics.
        data: The samples that they were collected on.
        loss: What was differentiated in the place of the heads.
        providers: Execution providers, CPU when empty.
        threads: Threads, all cores when None.
        progress: Called with the number of samples done since the last call.

    Raises:
        KfeError: The statistics are of another model, of other data or of a part of it, or a batch fails.
    """
    statistics.check_model(network.fingerprint)
    if statistics.shards != [(0, 1)]:
        raise KfeError("second moments in the eigenbases need the whole statistics: merge the shards first")
    statistics.check_loss(loss.fingerprint if loss is not None else None)
    copy = differentiable_copy(network.model)
    weights = WeightFile(copy)
    forward = Forward(copy, statistics.heads, weights, providers=providers, threads=threads)
    known = [layer for layer in network.prunable if layer.name in statistics.layers]
    if not (layers := [layer for layer in known if not layer.transposed]):
        return statistics
    specs, size = data_specs(network.model, loss), _batch_size(network, statistics, layers)
    bases = {layer.name: _bases(layer, statistics.layers[layer.name]) for layer in layers}
    model, outputs = _instrument(copy, layers, statistics, bases, loss)
    weights = WeightFile(model)  # those of the backward pass and the bases as well
    session = weights.session(model, providers=providers, threads=threads)
    names, numbered = [name for parts in outputs.values() for name in parts], blocks(data, size, specs)
    samples = 0
    for done, results in run_pass(
        session, names, numbered, forward, statistics.heads, statistics.seed, loss=loss, progress=progress
    ):
        for layer in layers:
            order = channel_major(_geometry(layer))
            sums = bases[layer.name].second_moment
            for name in outputs[layer.name]:
                sums += results[name][:, :, order].reshape(sums.shape)
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
    return 8 * (patches + len(layer.uses) * geometry.weight_parameters)


def _bases(layer: Layer, sums: LayerStatistics) -> EigenMoments:
    """The eigenbases of every group, with no moments yet."""
    geometry = _geometry(layer)
    factors = zip(sums.centred_input_factor, sums.output_factor, strict=True)
    pairs = [eigen_bases(a, g, geometry.taps) for a, g in factors]
    inputs, outputs = (np.stack(bases) for bases in zip(*pairs, strict=True))
    return EigenMoments(inputs, outputs, np.zeros((*outputs.shape[:2], inputs.shape[1], geometry.taps)))


def _instrument(
    model: ir.Model,
    layers: Sequence[Layer],
    statistics: Statistics,
    bases: Mapping[str, EigenMoments],
    loss: Loss | None,
) -> tuple[ir.Model, dict[str, list[str]]]:
    """The model that computes a batch's sums, and the names of the outputs that make up those of a layer, by its name.

    A sample's gradients by a weight at several nodes are added before the square, where these have the same samples.
    """
    whole = differentiate(model, layers, statistics.heads, loss)
    owners = {use.name: layer.name for layer in layers for use in layer.uses}
    gradients: defaultdict[tuple[str, object], list[ir.Value]] = defaultdict(list)
    for layer, x, y, cotangent in whole.layers:
        name = owners[layer.name]
        own, mean = bases[name], statistics.layers[name].mean
        gradient = emit_gradients(whole.emit, layer, x, y, cotangent, own.input_basis, own.output_basis, mean)
        gradients[name, _samples(y)].append(gradient)
    outputs: defaultdict[str, list[ir.Value]] = defaultdict(list)
    for (name, _), parts in gradients.items():
        outputs[name].append(emit_squares(whole.emit, parts))
    found = {name: [value.name or "" for value in values] for name, values in outputs.items()}
    return whole.with_outputs([value for values in outputs.values() for value in values]), found


def _samples(value: ir.Value) -> object:
    """The size of the leading axis, known or as a name; where it is neither the value itself, which equals no other."""
    size = value.shape[0] if value.shape else None
    name = size.value if isinstance(size, ir.SymbolicDim) else size
    return value if name is None else name


def _geometry(layer: Layer) -> Geometry:
    assert layer.geometry is not None
    return layer.geometry
