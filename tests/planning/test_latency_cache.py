"""Latencies on disk: kept, shared, and never believed when they are of something else."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from onnx_kfe.planning import _latency_cache
from onnx_kfe.planning._latency_cache import LatencyCache
from onnx_kfe.planning._stopwatch import Refusal
from onnx_kfe.planning._workload import Workload

GEMM = Workload("Gemm", 5, 4, 1, (2,), (), (), (), "", "FLOAT")
CONV = Workload("Conv", 6, 4, 2, (1,), (7, 6), (3, 2), (("pads", (1, 0, 1, 2)), ("auto_pad", "VALID")), "Relu", "FLOAT")


def filled() -> LatencyCache:
    cache = LatencyCache((), 2)
    cache.add([(GEMM, 1.25e-5), (CONV, Refusal("too small"))])
    return cache


def test_what_is_kept_comes_back(cache: Path):
    assert LatencyCache((), 2).get(GEMM) is None
    written = filled()
    assert written.path.is_relative_to(cache)
    for own in (written, LatencyCache((), 2)):
        assert own.path == written.path
        assert own.get(GEMM) == 1.25e-5
        refusal = own.get(CONV)
        assert isinstance(refusal, Refusal)
        assert refusal == "too small"


def test_nothing_is_written_for_nothing(cache: Path):
    LatencyCache((), 2).add([])
    assert not cache.exists()


def test_each_machine_has_its_own(monkeypatch: pytest.MonkeyPatch):
    """Another number of threads, provider, processor or runtime is another machine."""
    written = filled()
    assert LatencyCache(["CPUExecutionProvider"], 2).get(GEMM) == 1.25e-5, "the default by its name"
    others = [LatencyCache((), 1), LatencyCache(["CUDAExecutionProvider"], 2)]
    with monkeypatch.context() as patch:
        patch.setattr(_latency_cache, "_processor", lambda: "another")
        others.append(LatencyCache((), 2))
    with monkeypatch.context() as patch:
        runtime = type("Runtime", (), {"__version__": "0.1"})
        patch.setattr(_latency_cache, "import_onnxruntime", lambda: runtime)
        others.append(LatencyCache((), 2))
    assert len({written.path, *(other.path for other in others)}) == 5
    assert all(other.get(GEMM) is None for other in others)


def test_the_default_number_of_threads_has_the_cache_of_that_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_latency_cache, "default_threads", lambda: 2)
    filled()
    assert LatencyCache((), None).get(GEMM) == 1.25e-5


BROKEN = {
    "empty": lambda good: b"",
    "cut off": lambda good: json.dumps(good).encode()[:-20],
    "bytes": lambda good: b"\xff\xfe\x00",
    "list": lambda good: json.dumps([good]).encode(),
    "number": lambda good: b"3",
    "no machine": lambda good: json.dumps({"seconds": good["seconds"]}).encode(),
    "no seconds": lambda good: json.dumps({"machine": good["machine"]}).encode(),
    "seconds in a list": lambda good: json.dumps({**good, "seconds": [1.0]}).encode(),
    "seconds of nothing": lambda good: json.dumps({**good, "seconds": {GEMM.key: None}}).encode(),
    "another format": lambda good: json.dumps({**good, "machine": {**good["machine"], "format": "0"}}).encode(),
    "another runtime": lambda good: json.dumps({**good, "machine": {**good["machine"], "runtime": "0.1"}}).encode(),
    "another processor": lambda good: json.dumps({**good, "machine": {**good["machine"], "processor": ""}}).encode(),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_broken_or_of_another_machine_is_written_anew(how):
    path = filled().path
    good = json.loads(path.read_text())
    assert set(good["seconds"]) == {GEMM.key, CONV.key}
    path.write_bytes(BROKEN[how](good))
    again = LatencyCache((), 2)
    assert again.get(GEMM) is None
    assert again.get(CONV) is None
    again.add([(CONV, 3e-6)])
    assert json.loads(path.read_text()) == {**good, "seconds": {CONV.key: 3e-6}}
    assert LatencyCache((), 2).get(CONV) == 3e-6


def test_two_processes_add_to_each_other():
    first, second = LatencyCache((), 2), LatencyCache((), 2)
    first.add([(GEMM, 1e-5)])
    second.add([(CONV, 2e-5)])
    assert second.get(GEMM) == 1e-5
    assert [LatencyCache((), 2).get(workload) for workload in (GEMM, CONV)] == [1e-5, 2e-5]


def test_without_a_place_for_it_what_was_measured_is_still_known(cache: Path):
    cache.write_text("a file where the folder should be")
    own = filled()
    assert own.get(GEMM) == 1.25e-5
    assert LatencyCache((), 2).get(GEMM) is None


def test_a_full_disk_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch, cache: Path):
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert filled().get(GEMM) == 1.25e-5
    assert not [path for path in cache.rglob("*") if path.is_file()]
