"""Layers with random statistics, to plan and rewrite with."""

from __future__ import annotations

import numpy as np
import onnx

from onnx_kfe.calibration import LayerStatistics, Statistics
from onnx_kfe.graph import Layer, Network, find_layers, load
from onnx_kfe.planning import LayerProblem
from tests.tiny import node, tiny, weights

__all__ = ["SHAPES", "layer_of", "model_of", "problem_of", "random_statistics", "statistics_of"]

SHAPES = {  # weight, groups, input; "up" are ConvTranspose
    "1x1": ((10, 6, 1, 1), 1, ["n", 6, 5, 5]),
    "3x3": ((8, 6, 3, 3), 1, ["n", 6, 5, 5]),
    "1x3": ((8, 6, 1, 3), 1, ["n", 6, 5, 5]),
    "conv1d": ((8, 6, 3), 1, ["n", 6, 9]),
    "conv3d": ((8, 6, 3, 2, 2), 1, ["n", 6, 5, 4, 5]),
    "1x1x1": ((10, 6, 1, 1, 1), 1, ["n", 6, 3, 4, 5]),
    "grouped 1x1": ((8, 6, 1, 1), 2, ["n", 12, 5, 5]),
    "grouped 3x3": ((12, 5, 3, 3), 2, ["n", 10, 5, 5]),
    "grouped conv1d": ((12, 5, 5), 2, ["n", 10, 9]),
    "few inputs": ((16, 2, 1, 3), 1, ["n", 2, 5, 5]),
    "matmul": ((6, 8), 1, ["n", 4, 6]),
    "up 3x3": ((8, 6, 3, 3), 1, ["n", 8, 5, 5]),
    "up 1x1": ((10, 6, 1, 1), 1, ["n", 10, 5, 5]),
    "up conv1d": ((8, 6, 4), 1, ["n", 8, 9]),
    "up conv3d": ((6, 5, 3, 2, 2), 1, ["n", 6, 3, 4, 3]),
    "up grouped 3x2": ((12, 5, 3, 2), 2, ["n", 12, 5, 5]),
    "up few outputs": ((16, 2, 1, 3), 1, ["n", 16, 5, 5]),
}


def model_of(name: str) -> onnx.ModelProto:
    """A model of one layer of `SHAPES`, strides of 2 where it has a kernel."""
    weight, groups, shape = SHAPES[name]
    arrays = {"w": weights(*weight)}
    if name == "matmul":
        return tiny([node("MatMul", ["x", "w"], ["y"], "layer")], {"x": shape}, {"y": ["n", 4, 8]}, arrays)
    kernel = weight[2:]
    pads = [k // 2 for k in kernel] * 2
    operator, channels = ("ConvTranspose", weight[1] * groups) if name.startswith("up") else ("Conv", weight[0])
    conv = node(operator, ["x", "w", "b"], ["y"], "layer", group=groups, strides=[2] * len(kernel), pads=pads)
    outputs = ["n", channels, *("abc"[: len(kernel)])]
    return tiny([conv], {"x": shape}, {"y": outputs}, arrays | {"b": weights(channels, seed=1)})


def layer_of(name: str) -> Layer:
    """That layer."""
    (layer,) = find_layers(load(model_of(name)))
    return layer


def random_statistics(layer: Layer, seed: int = 0, samples: int = 50) -> LayerStatistics:
    """Sums over random patches and cotangents that are far from white and have a mean."""
    rng = np.random.default_rng(seed)
    geometry = layer.geometry
    assert geometry is not None
    inside, out = geometry.patch_size, geometry.cotangent_size
    count = samples * 8
    decay = np.geomspace(2, 0.2, inside)
    x = rng.normal(size=(geometry.groups, count, inside)) * decay @ rng.normal(size=(inside, inside)) / inside**0.5
    x += rng.normal(size=(geometry.groups, 1, inside))
    g = 1e-2 * rng.normal(size=(geometry.groups, count, out)) * np.geomspace(3, 0.3, out)
    moments = (np.swapaxes(a, 1, 2) @ a for a in (x, g))
    return LayerStatistics(next(moments), x.sum(1), next(moments), count, samples)


def problem_of(name: str, seed: int = 0) -> LayerProblem:
    layer = layer_of(name)
    return LayerProblem(layer, random_statistics(layer, seed))


def statistics_of(network: Network) -> Statistics:
    """Random statistics of every prunable layer."""
    layers = {layer.name: random_statistics(layer, seed) for seed, layer in enumerate(network.prunable)}
    return Statistics(network.fingerprint, 0, 50, [], {}, layers)
