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
