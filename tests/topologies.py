"""Hand-made graphs in which channels come together in the ways that networks have, beside those of the model zoo.

Inputs are called ``x``, with a free batch and sometimes a free sequence. All channels but those of the outputs can be
removed, and most of a layer's go one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import TensorProto

from tests.tiny import node, tiny, weights

__all__ = ["TOPOLOGIES", "Builder"]

TOPOLOGIES: dict[str, Callable[[], onnx.ModelProto]] = {}


class Builder:
    """Nodes and constants of a graph, one value after the other."""

    def __init__(self, dtype: type = np.float32) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.dtype = dtype

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: object) -> str:
        """A node named after its place; its output, or the first of its outputs, ``<name>.0``, ``<name>.1``, ..."""
        name = f"{op_type}{len(self.nodes)}"
        names = [name] if outputs == 1 else [f"{name}.{place}" for place in range(outputs)]
        self.nodes.append(node(op_type, list(inputs), names, name, **attributes))
        return name

    def const(self, array: np.ndarray | Sequence[int] | int) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = np.array(array)
        return name

    def weight(self, *shape: int, scale: float = 1.0) -> str:
        return self.const(weights(*shape, seed=len(self.constants), dtype=self.dtype) * self.dtype(scale))

    def conv(
        self, x: str, c_in: int, c_out: int, size: int = 3, *, group: int = 1, bias: str = "", **more: object
    ) -> str:
        """A convolution that keeps the size of the image, with a bias."""
        scale = (c_in // group * size * size) ** -0.5
        weight = self.weight(c_out, c_in // group, size, size, scale=scale)
        return self.op("Conv", x, weight, bias or self.weight(c_out), group=group, pads=[size // 2] * 4, **more)

    def relu_conv(self, x: str, c_in: int, c_out: int, size: int = 3, **more: object) -> str:
        return self.op("Relu", self.conv(x, c_in, c_out, size, **more))

    def gemm(self, x: str, n_in: int, n_out: int) -> str:
        return self.op("Gemm", x, self.weight(n_out, n_in, scale=n_in**-0.5), self.weight(n_out), transB=1)

    def matmul(self, x: str, n_in: int, n_out: int) -> str:
        product = self.op("MatMul", x, self.weight(n_in, n_out, scale=n_in**-0.5))
        return self.op("Add", product, self.weight(n_out))

    def model(self, shape: Sequence[int | str], *outputs: str, **options: object) -> onnx.ModelProto:
        dtype = TensorProto.FLOAT16 if self.dtype is np.float16 else TensorProto.FLOAT
        model = tiny(self.nodes, {"x": shape}, dict.fromkeys(outputs, ()), self.constants, dtype=dtype, **options)
        for output in model.graph.output:
            output.type.tensor_type.ClearField("shape")
        return onnx.shape_inference.infer_shapes(model)


IMAGE = ["n", 3, 8, 8]
TOKENS = ["n", 6, 12]


def topology(function: Callable[[], onnx.ModelProto]) -> Callable[[], onnx.ModelProto]:
    TOPOLOGIES[function.__name__] = function
    return function


@topology
def zero_padding_shortcut() -> onnx.ModelProto:
    """As in ResNets for CIFAR: every other pixel, and zeros for the new channels."""
    b = Builder()
    x = b.relu_conv("x", 3, 8)
    y = b.conv(b.relu_conv(x, 8, 12, strides=[2, 2]), 12, 16)
    half = b.op("Slice", x, b.const([0, 0]), b.const([8, 8]), b.const([2, 3]), b.const([2, 2]))
    padded = b.op("Pad", half, b.const([0, 4, 0, 0, 0, 4, 0, 0]))
    return b.model(IMAGE, b.conv(b.op("Relu", b.op("Add", y, padded)), 16, 4))


@topology
def gated_mlp() -> onnx.ModelProto:
    """SwiGLU: one product gives gate and value."""
    b = Builder()
    b.op("Split", b.matmul("x", 12, 40), b.const([20, 20]), outputs=2, axis=-1)
    gate = b.op("Mul", "Split2.0", b.op("Sigmoid", "Split2.0"))
    return b.model(TOKENS, b.matmul(b.op("Mul", gate, "Split2.1"), 20, 12))


@topology
def depthwise_multiplier() -> onnx.ModelProto:
    b = Builder()
    return b.model(IMAGE, b.conv(b.relu_conv(b.relu_conv("x", 3, 6), 6, 18, group=6), 18, 4, 1))


@topology
def grouped_transposed() -> onnx.ModelProto:
    """ConvTranspose in groups, and depthwise."""
    b = Builder()
    x = b.relu_conv("x", 3, 8)
    x = b.op("ConvTranspose", x, b.weight(8, 6, 2, 2), b.weight(12), group=2, strides=[2, 2])
    x = b.op("ConvTranspose", b.op("Relu", x), b.weight(12, 2, 2, 2), b.weight(24), group=12)
    return b.model(IMAGE, b.conv(b.op("Relu", x), 24, 4))


@topology
def pixel_shuffle() -> onnx.ModelProto:
    """Channels become positions in both orders, and positions channels."""
    b = Builder()
    x = b.op("DepthToSpace", b.relu_conv("x", 3, 24), blocksize=2)
    x = b.op("DepthToSpace", b.relu_conv(x, 6, 20), blocksize=2, mode="CRD")
    x = b.op("SpaceToDepth", b.relu_conv(x, 5, 5), blocksize=2)
    return b.model(IMAGE, b.conv(x, 20, 4))


@topology
def channel_shuffle() -> onnx.ModelProto:
    """Groups exchange channels, half of which pass by a branch."""
    b = Builder()
    x = b.op("Reshape", b.relu_conv("x", 3, 8), b.const([0, 2, 4, 8, 8]))
    x = b.op("Reshape", b.op("Transpose", x, perm=[0, 2, 1, 3, 4]), b.const([0, 8, 8, 8]))
    b.op("Split", x, b.const([4, 4]), outputs=2, axis=1)
    branch = b.relu_conv(b.relu_conv(f"{b.nodes[-1].name}.0", 4, 6), 6, 4)
    return b.model(IMAGE, b.conv(b.op("Concat", branch, f"{b.nodes[5].name}.1", axis=1), 8, 4))


@topology
def flattened() -> onnx.ModelProto:
    """A feature is read at all positions of a channel: channels in front, and last as after a Transpose."""
    b = Builder()
    x = b.relu_conv("x", 3, 6, strides=[2, 2])
    last = b.op("Reshape", b.op("Transpose", x, perm=[0, 2, 3, 1]), b.const([-1, 96]))
    return b.model(IMAGE, b.gemm(b.op("Relu", b.gemm(b.op("Flatten", x), 96, 10)), 10, 4), b.gemm(last, 96, 4))


@topology
def decoder() -> onnx.ModelProto:
    """Features become channels with positions."""
    b = Builder()
    x = b.op("Reshape", b.op("Relu", b.gemm("x", 12, 80)), b.const([0, 5, 4, 4]))
    return b.model(["n", 12], b.conv(b.relu_conv(x, 5, 6), 6, 4))


@topology
def shared_biases() -> onnx.ModelProto:
    """Constants that look alike are one, and tie nothing."""
    b = Builder()
    bias, scale = b.weight(8), b.weight(8, 1, 1)
    x = b.conv("x", 3, 8, bias=bias)
    y = b.conv(b.op("PRelu", x, scale), 8, 8, bias=bias)
    return b.model(IMAGE, b.conv(b.op("Mul", b.op("Relu", y), scale), 8, 4))


@topology
def shared_weights() -> onnx.ModelProto:
    """A layer is applied three times in a row, so that its input and output channels are the same."""
    b = Builder()
    x = b.relu_conv("x", 3, 8)
    weight, bias = b.weight(8, 8, 3, 3, scale=0.1), b.weight(8)
    for _ in range(3):
        x = b.op("Relu", b.op("Conv", x, weight, bias, pads=[1] * 4))
    return b.model(IMAGE, b.conv(x, 8, 4))


@topology
def gathered() -> onnx.ModelProto:
    """Channels in another order, some twice, some not at all, counted from the end too."""
    b = Builder()
    x = b.op("Gather", b.relu_conv("x", 3, 8), b.const([7, 2, -3, 2, 0, 1]), axis=1)
    return b.model(IMAGE, b.conv(x, 6, 4))


@topology
def sliced() -> onnx.ModelProto:
    """Two parts of a layer's channels, one bounded from the end, and one channel more than there is."""
    b = Builder()
    x = b.relu_conv("x", 3, 12)
    first = b.op("Slice", x, b.const([0]), b.const([-4]), b.const([1]))
    second = b.op("Slice", x, b.const([-6]), b.const([2**62]), b.const([1]))
    return b.model(IMAGE, b.conv(b.op("Concat", b.relu_conv(first, 8, 5), second, axis=1), 11, 4))


@topology
def old_attributes() -> onnx.ModelProto:
    """Opset 9: amounts are attributes."""
    b = Builder()
    x = b.relu_conv("x", 3, 12)
    b.op("Split", x, outputs=3, axis=1)
    part = b.op("Slice", "Split2.1", axes=[1], starts=[1], ends=[4])
    padded = b.op("Pad", part, pads=[0, 1, 0, 0, 0, 0, 0, 0], mode="constant")
    pooled = b.op("ReduceMean", "Split2.2", axes=[2, 3], keepdims=0)
    gate = b.op("Unsqueeze", b.op("Clip", pooled, min=0.0, max=6.0), axes=[2, 3])
    joined = b.op("Add", b.op("Mul", b.op("Add", "Split2.0", padded), gate), "Split2.2")
    return b.model(IMAGE, b.conv(b.op("Upsample", joined, b.const(np.float32([1, 1, 2, 2]))), 4, 4), opset=9)


@topology
def new_split() -> onnx.ModelProto:
    """Opset 18: the number of parts, the last of which is smaller; 13: none, with equal parts."""
    b = Builder()
    b.op("Split", b.relu_conv("x", 3, 11), outputs=3, axis=1, num_outputs=3)
    return b.model(IMAGE, *(b.conv(f"Split2.{part}", c, 2) for part, c in enumerate((4, 4, 3))), opset=18)


@topology
def equal_split() -> onnx.ModelProto:
    b = Builder()
    b.op("Split", b.relu_conv("x", 3, 12), outputs=2, axis=1)
    return b.model(IMAGE, b.conv(b.op("Concat", b.relu_conv("Split2.0", 6, 4), "Split2.1", axis=1), 10, 4), opset=13)


@topology
def computed_target() -> onnx.ModelProto:
    """Attention whose shapes are computed: heads lose the same features, batch and sequence stay free."""
    b = Builder()
    free = b.op("Gather", b.op("Shape", "x"), b.const([0, 1]), axis=0)
    split_up = b.op("Concat", free, b.const([3, 5]), axis=0)
    q, k, v = (b.op("Transpose", b.op("Reshape", b.matmul("x", 12, 15), split_up), perm=[0, 2, 1, 3]) for _ in range(3))
    scores = b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    mixed = b.op("Transpose", b.op("MatMul", scores, v), perm=[0, 2, 1, 3])
    merged = b.op("Reshape", mixed, b.op("Concat", free, b.const([15]), axis=0))
    return b.model(["n", "t", 12], b.matmul(merged, 15, 12))


@topology
def tokens() -> onnx.ModelProto:
    """Image to tokens by a computed shape, with a class token and positions, both constants."""
    b = Builder()
    x = b.conv("x", 3, 10, 2, strides=[4, 4])
    size = b.op("Slice", b.op("Shape", x), b.const([0]), b.const([2]))
    flat = b.op("Reshape", x, b.op("Concat", size, b.const([-1]), axis=0))
    token = b.op(
        "Expand", b.weight(1, 1, 10), b.op("Concat", b.op("Gather", size, b.const([0])), b.const([1, 1]), axis=0)
    )
    sequence = b.op("Add", b.op("Concat", token, b.op("Transpose", flat, perm=[0, 2, 1]), axis=1), b.weight(1, 10, 10))
    return b.model(IMAGE, b.matmul(sequence, 10, 4))


@topology
def resized_alike() -> onnx.ModelProto:
    """An image is brought to the computed size of another."""
    b = Builder()
    x = b.relu_conv("x", 3, 8)
    low = b.relu_conv(x, 8, 8, strides=[2, 2])
    up = b.op("Resize", low, "", "", b.op("Shape", x), mode="nearest")
    return b.model(IMAGE, b.conv(b.op("Add", up, x), 8, 4))


@topology
def normalized() -> onnx.ModelProto:
    """Constants by channel that nothing folds, and a mask."""
    b = Builder()
    x = b.op("InstanceNormalization", b.conv("x", 3, 8), b.weight(8), b.weight(8))
    x = b.op(
        "BatchNormalization", b.op("Relu", x), *(b.weight(8) for _ in range(3)), b.const(np.full(8, 2, np.float32))
    )
    x = b.op("Where", b.op("Greater", x, b.weight(8, 1, 1)), x, b.weight(1, 8, 1, 1))
    return b.model(IMAGE, b.conv(b.op("Tile", x, b.const([1, 2, 1, 1])), 16, 4))


@topology
def half_precision() -> onnx.ModelProto:
    b = Builder(np.float16)
    return b.model(IMAGE, b.conv(b.relu_conv(b.relu_conv("x", 3, 8), 8, 8), 8, 4))
