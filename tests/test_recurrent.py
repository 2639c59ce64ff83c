"""Layers in front of recurrent operators are skipped with the reason, those behind are pruned."""

from __future__ import annotations

import numpy as np
import pytest

import onnx_kfe as kfe
from tests.tiny import node, run, tiny, weights

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("method", [None, "channels"])
def test_a_model_with_a_recurrent_operator(kind: str, method: str | None) -> None:
    arrays = {
        "u": weights(8, 8) / 3, "w": weights(1, 8 * GATES[kind], 8) / 3, "r": weights(1, 8 * GATES[kind], 8) / 3,
        "v": weights(8, 16) / 3, "z": weights(16, 4) / 4,
    }  # fmt: skip
    nodes = [
        node("MatMul", ["x", "u"], ["h"], "before"),
        node("Transpose", ["h"], ["t"], perm=[1, 0, 2]),
        node(kind, ["t", "w", "r"], ["", "state"], "cell", hidden_size=8),
        node("Squeeze", ["state", "axis"], ["s"]),
        node("MatMul", ["s", "v"], ["a"], "hidden"),
        node("Relu", ["a"], ["b"]),
        node("MatMul", ["b", "z"], ["y"], "behind"),
    ]
    model = tiny(nodes, {"x": ["n", 7, 8]}, {"y": ["n", 4]}, arrays | {"axis": np.array([0])})
    reasons = {layer.name: layer.reason for layer in kfe.inspect(model).layers}
    assert reasons == {"before": None, "cell/W": "recurrent", "cell/R": "recurrent", "hidden": None, "behind": None}
    x = weights(40, 7, 8, seed=5)
    result = kfe.prune(model, x, kfe.Macs(0.99), method=method, round_to=1, measure=False)
    assert result.plan.changes
    assert result.report["macs"]["after"] < result.report["macs"]["before"]
    assert result.statistics.skipped["before"] == f"no gradient rule for {kind} (node 'cell')"
    assert set(result.statistics.layers) == {"hidden", "behind"}
    found, wanted = run(result.model, {"x": x})["y"], run(model, {"x": x})["y"]
    assert np.square(found - wanted).mean() < 0.2 * wanted.var()
