import json
import shutil
from itertools import pairwise

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.evaluation import benchmark, file_size
from tests.evaluation.small import linear, save_external, serialise

MEGABYTE = 1 << 20


def chain(length: int, width: int = 128) -> bytes:
    """`length` multiplications of [256, width] by [width, width], one after the other."""
    weight = (np.eye(width) + 0.01).astype(np.float32)
    names = ["x", *(f"y{i}" for i in range(1, length)), "y"]
    nodes = [
        helper.make_node(op, [a, *extra], [b])
        for a, b in pairwise(names)
        for op, extra, a, b in (("MatMul", ["w"], a, b + "_"), ("Tanh", [], b + "_", b))
    ]
    value = (TensorProto.FLOAT, ["N", width])
    return serialise(nodes, {"x": value}, {"y": value}, {"w": weight})


def lookup(size: int) -> bytes:
    """One element of a table of so many floats: weights and next to no work."""
    return serialise(
        [helper.make_node("Gather", ["table", "i"], ["y"])],
        {"i": (TensorProto.INT64, ["N"])},
        {"y": (TensorProto.FLOAT, ["N"])},
        {"table": np.ones(size, np.float32)},
    )


def test_fifty_times_the_work_is_slower():
    models = {"long": chain(50), "short": chain(1)}
    feeds = {"x": np.ones((256, 128), np.float32)}
    long, short = benchmark(models, feeds, threads=1, seconds=0.5, min_runs=20)
    assert (long.name, short.name) == ("long", "short")
    assert long.rounds == short.rounds >= 20
    assert long.median > 8 * short.median
    assert long.speedup == 1
    assert long.speedup_iqr == (1, 1)
    assert short.speedup > 8
    assert short.speedup_iqr[0] <= short.speedup <= short.speedup_iqr[1]
    for timing, name in ((long, "long"), (short, "short")):
        assert 0 < timing.median <= timing.p90
        assert timing.spread >= 0
        assert timing.load_time > 0
        assert timing.file_size == len(models[name])
    assert json.loads(json.dumps(short.as_dict(), allow_nan=False))["median"] == short.median


def test_a_model_is_as_fast_as_itself():
    """With a pool of threads for each session the quartiles of this ratio were 0.6 and 1.6."""
    model = chain(8)
    _, again = benchmark({"one": model, "same": model}, {"x": np.ones((256, 128), np.float32)}, seconds=0.5)
    assert again.speedup == pytest.approx(1, abs=0.3)


def test_number_of_rounds():
    feeds = {"x": np.ones((1, 2), np.float32)}
    models = dict.fromkeys("abc", linear(np.eye(2)))
    assert [timing.rounds for timing in benchmark(models, feeds, threads=1, seconds=0, min_runs=4)] == [4, 4, 4]
    (alone,) = benchmark({"a": models["a"]}, feeds, threads=1, seconds=0.2, min_runs=1)
    assert alone.rounds > 50


def test_peak_memory_of_a_large_initializer(tmp_path):
    ballast = bytearray(b"x") * (300 * MEGABYTE)  # a large parent must not hide what the child takes
    large = tmp_path / "large.onnx"
    large.write_bytes(lookup(200 * MEGABYTE // 4))
    feeds = {"i": np.array([1])}
    small, big = benchmark({"small": lookup(4), "big": large}, feeds, threads=1, seconds=0, min_runs=1)
    assert ballast
    assert 0 <= small.peak_memory < 100 * MEGABYTE
    assert 150 * MEGABYTE < big.peak_memory - small.peak_memory < 1000 * MEGABYTE
    assert big.file_size == large.stat().st_size > 200 * MEGABYTE


def test_external_data(tmp_path):
    model, path = linear(np.eye(64)), tmp_path / "m.onnx"
    save_external(model, path)
    weights = (tmp_path / "weights.bin").stat().st_size
    assert weights == 64 * 64 * 4
    assert file_size(path) == path.stat().st_size + weights
    assert file_size(model) == len(model)
    feeds = {"x": np.ones((1, 64), np.float32)}
    outside, inside = benchmark({"outside": str(path), "inside": model}, feeds, threads=1, seconds=0, min_runs=1)
    assert outside.file_size == file_size(path)
    assert inside.file_size == len(model)
    path.write_bytes(b"nothing")
    with pytest.raises(KfeError, match="cannot read the model"):
        file_size(path)


def test_inputs_of_awkward_names_and_types():
    nodes = [helper.make_node("Concat", ["in/file:0", "file"], ["text"], axis=0)]
    text = (TensorProto.STRING, ["N"])
    model = serialise(nodes, {"in/file:0": text, "file": text}, {"text": (TensorProto.STRING, None)})
    feeds = {"in/file:0": np.array(["a", "bc"], object), "file": np.array(["d"])}
    (timing,) = benchmark({"text": model}, feeds, threads=1, seconds=0, min_runs=1)
    assert timing.rounds == 1


@pytest.mark.parametrize(
    ("models", "feeds", "options", "error", "message"),
    [
        ({}, ["x"], {}, UsageError, "no model"),
        ({"a": linear(np.eye(2))}, ["x"], {"providers": ["None"]}, UsageError, "^execution provider None is not avail"),
        ({"a": b"junk"}, ["x"], {}, KfeError, "model 'a': ONNX Runtime cannot load"),
        ({"a": linear(np.eye(2)), "b": linear(np.eye(3))}, ["x"], {}, KfeError, "model 'b' fails in ONNX Runtime"),
        ({"a": linear(np.eye(2))}, ["z"], {}, KfeError, "model 'a' has an input 'x' that"),
    ],
)
def test_errors(models, feeds, options, error, message):
    with pytest.raises(KfeError, match=message) as caught:
        benchmark(models, dict.fromkeys(feeds, np.ones((1, 2), np.float32)), seconds=0, **options)
    assert type(caught.value) is error


def test_different_inputs():
    value = (TensorProto.FLOAT, ["N", 2])
    other = serialise([helper.make_node("Add", ["x", "z"], ["y"])], {"z": value, "x": value}, {"y": value})
    with pytest.raises(KfeError, match="'a' takes x, 'b' takes x, z"):
        benchmark({"a": linear(np.eye(2)), "b": other}, {"x": np.ones((1, 2), np.float32)})


def test_failure_in_the_fresh_process(monkeypatch):
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    with pytest.raises(KfeError, match="model 'a' fails in a fresh process: exit status 1"):
        benchmark({"a": linear(np.eye(2))}, {"x": np.ones((1, 2), np.float32)}, seconds=0, min_runs=1)
