from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import onnx_kfe.runtime as runtime
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.runtime import create_session, default_threads, reason
from tests.networks import classifier, samples
from tests.tiny import run


def test_sessions_of_bytes_and_paths_compute_the_model(tmp_path: Path) -> None:
    data = classifier().SerializeToString()
    (tmp_path / "net.onnx").write_bytes(data)
    x = {"x": samples(3)}
    wanted = run(classifier(), x)["logits"]
    for source in (data, tmp_path / "net.onnx", str(tmp_path / "net.onnx")):
        for optimize in (True, False):
            found = create_session(source, optimize=optimize, threads=1).run(None, x)[0]
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_options_reach_the_session() -> None:
    options = create_session(classifier().SerializeToString(), threads=1).get_session_options()
    assert options.intra_op_num_threads == 1
    options = create_session(classifier().SerializeToString()).get_session_options()
    assert options.intra_op_num_threads == default_threads() >= 1
    options = create_session(classifier().SerializeToString(), spin=False).get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_unknown_provider_lists_those_there_are() -> None:
    with pytest.raises(
        UsageError, match=r"provider Abacus is not available; --providers can be: .*CPUExecutionProvider"
    ):
        create_session(classifier().SerializeToString(), providers=["Abacus"])


def test_a_model_that_cannot_be_loaded_is_one_line_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KfeError, match="ONNX Runtime cannot load the model: ") as caught:
        create_session(b"no model")
    assert "\n" not in str(caught.value)
    assert "ONNXRuntimeError" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_runtime_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(KfeError, match=r"pip install 'onnx-kfe\[cpu\]'"):
        runtime.import_onnxruntime()


def test_reason_is_the_first_line_without_codes() -> None:
    assert reason(RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : a b\nmore")) == "a b"
    assert reason(RuntimeError("plain")) == "plain"
    assert reason(RuntimeError()) == "RuntimeError"
