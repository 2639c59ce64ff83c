"""A small classifier, and samples for it, that the tests of whole commands share."""

from __future__ import annotations

import numpy as np
import onnx

from tests.tiny import node, tiny, weights

CHANNELS, CLASSES, SIDE = (8, 16, 16), 5, 8


def classifier(seed: int = 0, *, low_rank: int | None = None, **options: object) -> onnx.ModelProto:
    """Three convolutions and a Gemm: ``x`` [N, 3, 8, 8] to ``logits`` [N, 5].

    Args:
        seed: Of the weights.
        low_rank: Exact rank of the last convolution's weight [16, 16 * 9]; full when None.
        options: As of `tiny`.
    """
    constants: dict[str, np.ndarray] = {}
    nodes, value, width = [], "x", 3
    for place, channels in enumerate(CHANNELS):
        weight = weights(channels, width * 9, seed=seed + place) / np.float32(np.sqrt(width * 4.5))
        if low_rank is not None and place == len(CHANNELS) - 1:
            left, _, right = np.linalg.svd(weight, full_matrices=False)
            weight = (left[:, :low_rank] @ right[:low_rank]).astype(np.float32)
        constants |= {f"w{place}": weight.reshape(channels, width, 3, 3), f"b{place}": weights(channels, seed=7) / 5}
        nodes += [
            node("Conv", [value, f"w{place}", f"b{place}"], [f"c{place}"], name=f"conv{place}", pads=[1, 1, 1, 1]),
            node("Relu", [f"c{place}"], [f"r{place}"], name=f"relu{place}"),
        ]
        value, width = f"r{place}", channels
    constants |= {"w": weights(CLASSES, width, seed=seed + 9), "b": weights(CLASSES, seed=8)}
    nodes += [
        node("GlobalAveragePool", [value], ["pooled"], name="pool"),
        node("Flatten", ["pooled"], ["flat"], name="flatten"),
        node("Gemm", ["flat", "w", "b"], ["logits"], name="fc", transB=1),
    ]
    return tiny(nodes, {"x": ["N", 3, SIDE, SIDE]}, {"logits": ["N", CLASSES]}, constants, **options)


def samples(count: int, seed: int = 0) -> np.ndarray:
    """Inputs [count, 3, 8, 8]: noise around a level of each channel, so that samples differ after pooling too."""
    random = np.random.default_rng(seed)
    level, noise = random.standard_normal((count, 3, 1, 1)), random.standard_normal((count, 3, SIDE, SIDE))
    return (level + noise).astype(np.float32)


def mixer(*, left: bool = True) -> onnx.ModelProto:
    """Tokens mixed and then channels: ``x`` [N, 6, 7] to ``logits`` [N, 5].

    Args:
        left: Whether tokens are mixed by ``W @ x``, or by ``x^T @ W^T`` between transpositions, which gives the same.
    """
    constants = {"w0": weights(10, 6), "b0": weights(10, 1, seed=1), "w1": weights(6, 10, seed=2) / np.float32(3)}
    constants |= {"w": weights(7, 5, seed=3), "b": weights(5, seed=4)}
    mixed = {"mix0": ("x", "w0", "m0"), "mix1": ("r0", "w1", "m1")}
    nodes = {name: [node("MatMul", [w, x], [y], name=name)] for name, (x, w, y) in mixed.items()}
    if not left:
        constants |= {w: np.ascontiguousarray(constants[w].T) for w in ("w0", "w1")}
        for name, (x, w, y) in mixed.items():
            nodes[name] = [
                node("Transpose", [x], [f"{x}/t"], perm=[0, 2, 1]),
                node("MatMul", [f"{x}/t", w], [f"{y}/t"], name=name),
                node("Transpose", [f"{y}/t"], [y], perm=[0, 2, 1]),
            ]
    graph = [
        *nodes["mix0"],
        node("Add", ["m0", "b0"], ["a0"], name="add0"),
        node("Relu", ["a0"], ["r0"], name="relu"),
        *nodes["mix1"],
        node("Add", ["m1", "x"], ["sum"], name="sum"),
        node("ReduceMean", ["sum"], ["mean"], name="mean", axes=[1], keepdims=0),
        node("Gemm", ["mean", "w", "b"], ["logits"], name="head"),
    ]
    return tiny(graph, {"x": ["N", 6, 7]}, {"logits": ["N", 5]}, constants)
