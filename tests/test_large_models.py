"""Models over protobuf's limit, here a low one, go the whole way, and give what they give below it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_kfe as kfe
from onnx_kfe.graph import _serialize
from tests.networks import classifier, samples
from tests.tiny import add_external_data, run


@pytest.mark.usefixtures("quick_benchmark")
@pytest.mark.parametrize("opset", [11, 17, 21])
def test_prune_and_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opset: int) -> None:
    path = add_external_data(classifier(opset=opset), str(tmp_path / "net.onnx"))
    below = kfe.prune(path, samples(64), kfe.Macs(0.6), threads=1)
    monkeypatch.setattr(_serialize, "_PROTOBUF_LIMIT", 1_000)
    result = kfe.prune(path, samples(64), kfe.Macs(0.6), threads=1)
    assert result.plan.choices.keys() == below.plan.choices.keys()
    assert result.report["macs"] == below.report["macs"]
    assert result.quality.divergence == pytest.approx(below.quality.divergence, rel=1e-2)
    assert [timing.name for timing in result.timings] == ["original", "pruned"]

    result.save(tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx.data").stat().st_size > 1_000
    onnx.checker.check_model(str(tmp_path / "small.onnx"))
    x = {"x": samples(5, seed=1)}
    np.testing.assert_allclose(
        run(str(tmp_path / "small.onnx"), x)["logits"], run(below.model, x)["logits"], rtol=1e-2, atol=1e-2
    )
    quality = kfe.evaluate(tmp_path / "small.onnx", samples(8), reference=path, threads=1)
    assert quality.samples == 8


def test_onnxsim_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the model in one message."""
    import onnxsim

    path = add_external_data(classifier(), str(tmp_path / "net.onnx"))
    monkeypatch.setattr(_serialize, "_PROTOBUF_LIMIT", 1_000)
    monkeypatch.setattr(onnxsim, "simplify", lambda *arguments, **options: pytest.fail("it was"))
    assert len(kfe.inspect(path).prunable) == 4
