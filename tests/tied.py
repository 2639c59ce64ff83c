"""Small models in which several nodes share a weight."""

from __future__ import annotations

import numpy as np
import onnx

from tests.tiny import node, tiny, weights
from tests.topologies import Builder

__all__ = ["pyramid", "samples", "siamese", "stacked", "upsampled"]


def pyramid(channels: int = 8) -> onnx.ModelProto:
    """A head of three convolutions over three levels of features: ``x`` [n, 3, 12, 12] to [n, 5].

    The first is strided on one level, the second has a bias of its own on each, the third none.
    """
    b = Builder()
    levels = [b.relu_conv("x", 3, channels)]
    for _ in range(2):
        levels.append(b.relu_conv(levels[-1], channels, channels, strides=[2, 2]))
    first, second = (b.weight(channels, channels, 3, 3, scale=(9 * channels) ** -0.5) for _ in range(2))
    bias, third = b.weight(channels), b.weight(5, channels, 1, 1, scale=channels**-0.5)
    outputs = []
    for place, level in enumerate(levels):
        h = b.op("Relu", b.op("Conv", level, first, bias, pads=[1] * 4, strides=[2, 2] if place == 1 else [1, 1]))
        h = b.op("Relu", b.op("Conv", h, second, b.weight(channels), pads=[1] * 4))
        outputs.append(b.op("ReduceMean", b.op("Conv", h, third), axes=[2, 3], keepdims=0))
    return b.model(["n", 3, 12, 12], b.op("Sum", *outputs))


def stacked(width: int = 10) -> onnx.ModelProto:
    """A residual block of two products that runs three times, as in ALBERT: ``x`` [n, 6, width] to [n, 5]."""
    b = Builder()
    wide, narrow = (b.weight(*shape, scale=shape[0] ** -0.5) for shape in ((width, 2 * width), (2 * width, width)))
    biases = b.weight(2 * width), b.weight(width)
    x = "x"
    for _ in range(3):
        h = b.op("Relu", b.op("Add", b.op("MatMul", x, wide), biases[0]))
        x = b.op("Add", x, b.op("Add", b.op("MatMul", h, narrow), biases[1]))
    return b.model(["n", 6, width], b.matmul(b.op("ReduceMean", x, axes=[1], keepdims=0), width, 5))


def siamese() -> onnx.ModelProto:
    """Two inputs ``p``, ``q`` [n, 12] in the same two layers, and what the difference says: [n, 4]."""
    nodes = []
    for x in "pq":
        nodes += [
            node("Gemm", [x, "w0", "b0"], [f"{x}0"], f"{x}/first", transB=1),
            node("Relu", [f"{x}0"], [f"{x}1"]),
            node("Gemm", [f"{x}1", "w1"], [f"{x}2"], f"{x}/second"),
        ]
    nodes += [node("Sub", ["p2", "q2"], ["d"]), node("Tanh", ["d"], ["t"]), node("Gemm", ["t", "w2"], ["y"], "last")]
    arrays = {"w0": weights(10, 12), "b0": weights(10, seed=1), "w1": weights(10, 8, seed=2)}
    return tiny(nodes, {"p": ["n", 12], "q": ["n", 12]}, {"y": ["n", 4]}, arrays | {"w2": weights(8, 4, seed=3)})


def upsampled(channels: int = 8) -> onnx.ModelProto:
    """Two levels of features that one transposed convolution makes larger: ``x`` [n, 3, 8, 8] to [n, 5]."""
    b = Builder()
    levels = [b.relu_conv("x", 3, channels)]
    levels.append(b.relu_conv(levels[0], channels, channels, strides=[2, 2]))
    weight = b.weight(channels, 6, 3, 3, scale=(9 * channels) ** -0.5)
    up = [b.op("Relu", b.op("ConvTranspose", level, weight, b.weight(6), strides=[2, 2])) for level in levels]
    pooled = [b.op("ReduceMean", b.relu_conv(x, 6, 5), axes=[2, 3], keepdims=0) for x in up]
    return b.model(["n", 3, 8, 8], b.op("Add", *pooled))


def samples(model: onnx.ModelProto, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of a model: noise around a level of each channel."""
    feeds = {}
    for place, value in enumerate(model.graph.input):
        shape = [axis.dim_value for axis in value.type.tensor_type.shape.dim][1:]
        level = weights(count, shape[0], *[1] * (len(shape) - 1), seed=100 * seed + place)
        feeds[value.name] = level + weights(count, *shape, seed=100 * seed + place + 50)
    return feeds
