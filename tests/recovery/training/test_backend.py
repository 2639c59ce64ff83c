"""Precision and layout: what is computed is the same, but for rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onnx_kfe.calibration import Batch
from onnx_kfe.recovery.training import to_torch
from onnx_kfe.recovery.training._backend import Backend
from tests.networks import classifier, samples
from tests.tiny import run

CPU = torch.device("cpu")
FEEDS = {"x": samples(8)}
BATCH = Batch(np.arange(8), FEEDS, None)


def outputs(rounded: bool, exact: bool) -> np.ndarray:
    backend = Backend(CPU, rounded)
    module = to_torch(classifier())
    backend.place(module)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in module.parameters() if p.ndim == 4)
    return backend.run(module, BATCH, exact=exact)["logits"].detach().float().numpy()


def test_rounding_is_where_it_is_asked_for() -> None:
    expected = run(classifier(), FEEDS)["logits"]
    for rounded, exact in ((False, False), (False, True), (True, True)):
        np.testing.assert_allclose(outputs(rounded, exact), expected, rtol=1e-4, atol=1e-4)
    error = np.abs(outputs(True, False) - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize(
    ("has", "rounded"), [({"avx512_bf16": True}, True), ({"avx512_bf16": False}, False), ({}, False)]
)
def test_the_default_follows_the_hardware(has: dict[str, bool], rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **has}, raising=False)
    assert Backend.of(CPU, None) == Backend(CPU, rounded)
    assert Backend.of(CPU, "float32") == Backend(CPU, False)
    assert Backend.of(CPU, "bfloat16") == Backend(CPU, True)


def test_versions_that_cannot_tell_compute_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not Backend.of(CPU, None).rounded
