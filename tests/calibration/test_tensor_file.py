"""Files of tensors against the safetensors library, and what reading and writing them takes."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from onnx_kfe.calibration import LayerStatistics, Statistics
from onnx_kfe.calibration._tensor_file import map_tensors, write_tensors
from onnx_kfe.errors import KfeError

LAYERS, SIZE = 8, 256
LAYER_BYTES = 2 * 8 * SIZE * SIZE


def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "matrix": random.standard_normal((3, 5)),
        "transposed": random.standard_normal((4, 2, 3)).T,
        "strided": random.standard_normal((6, 6))[::2, 1::3],
        "single": random.standard_normal(7).astype(np.float32),
        "empty": np.zeros((0, 3)),
        "number": np.array(2.5),
        "named like ünïcode": np.arange(4.0),
    }


def test_the_library_reads_what_is_written(tmp_path: Path):
    path = tmp_path / "file"
    write_tensors(path, {**tensors(), "plain": 3.0}, {"format": "some"})
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "some"}
    found = safetensors.numpy.load_file(path)
    assert set(found) == {*tensors(), "plain"}
    assert found["plain"] == 3.0
    for name, expected in tensors().items():
        assert found[name].dtype == np.float64
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


def test_what_the_library_writes_is_mapped(tmp_path: Path):
    path = tmp_path / "file"
    given = {name: np.array(array, np.float64, order="C") for name, array in tensors().items()}
    safetensors.numpy.save_file(given, path, {"format": "some"})
    found, metadata = map_tensors(path)
    assert metadata == {"format": "some"}
    assert set(found) == set(given)
    for name, expected in given.items():
        assert type(found[name]) is np.ndarray
        assert not found[name].flags.owndata
        assert not found[name].flags.writeable
        np.testing.assert_array_equal(found[name], expected, err_msg=name, strict=True)


def test_a_mapped_file_can_be_replaced(tmp_path: Path):
    path = tmp_path / "file"
    write_tensors(path, {"x": np.arange(3.0)}, {})
    (first,) = map_tensors(path)[0].values()
    write_tensors(path, {"x": first + 1}, {})
    (second,) = map_tensors(path)[0].values()
    assert (first.tolist(), second.tolist()) == ([0, 1, 2], [1, 2, 3])


@pytest.mark.parametrize("kept", [0, 7, 8, 40, -1])
def test_truncated_files_are_refused(kept: int, tmp_path: Path):
    path = tmp_path / "file"
    write_tensors(path, {"x": np.arange(3.0), "y": np.arange(3.0)}, {})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError):
        map_tensors(path)


def test_other_types_are_refused(tmp_path: Path):
    safetensors.numpy.save_file({"x": np.zeros(4, np.float32)}, tmp_path / "file")
    with pytest.raises(ValueError, match="F32"):
        map_tensors(tmp_path / "file")


def test_a_failed_write_leaves_nothing(tmp_path: Path):
    path = tmp_path / "file"
    write_tensors(path, {"x": np.arange(3.0)}, {})
    before = path.read_bytes()

    class Broken(dict[str, np.ndarray]):
        def values(self):
            yield np.arange(3.0)
            raise OSError(28, "No space left on device")

    with pytest.raises(KfeError, match="No space left"):
        write_tensors(path, Broken(x=np.arange(3.0), y=np.arange(3.0)), {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def statistics() -> Statistics:
    random = np.random.default_rng(0)

    def layer() -> LayerStatistics:
        moments = [random.standard_normal((1, SIZE, SIZE)) for _ in range(2)]
        return LayerStatistics(moments[0], random.standard_normal((1, SIZE)), moments[1], 40.0, 8)

    return Statistics("hash", 0, 8, [], {"x": (1, 3)}, {f"layer{place}": layer() for place in range(LAYERS)})


def peak(action: Callable[[], object]) -> int:
    """Bytes that an action takes at most, mapped files not counted."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_statistics_are_saved_and_used_a_layer_at_a_time(tmp_path: Path):
    given, path = statistics(), tmp_path / "statistics.safetensors"
    given.save(path)  # what is imported and cached once
    assert path.stat().st_size > LAYERS * LAYER_BYTES
    assert peak(lambda: given.save(path)) < LAYER_BYTES / 4
    assert peak(lambda: Statistics.load(path)) < LAYER_BYTES / 4

    loaded = Statistics.load(path)
    traces = []

    def use() -> None:
        for seen in loaded.layers.values():
            traces.append((np.trace(seen.input_factor[0]), np.trace(seen.output_factor[0])))

    assert peak(use) < 2 * LAYER_BYTES
    for seen, trace in zip(given.layers.values(), traces, strict=True):
        assert trace == (np.trace(seen.input_factor[0]), np.trace(seen.output_factor[0]))


def test_statistics_on_disk_are_the_same_and_leave_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    given = statistics()
    moved = given.on_disk()
    assert not list(tmp_path.iterdir())
    assert (moved.samples, moved.input_shapes, list(moved.layers)) == (8, {"x": (1, 3)}, list(given.layers))
    for name, layer in given.layers.items():
        np.testing.assert_array_equal(moved.layers[name].input_second_moment, layer.input_second_moment)
        assert moved.layers[name].input_second_moment.base is not None
