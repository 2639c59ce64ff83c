from __future__ import annotations

import gc
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from onnx_kfe.calibration._data import open_dataset
from onnx_kfe.calibration._inputs import InputSpec
from onnx_kfe.errors import KfeError

X = InputSpec("x", np.dtype(np.float32), ("N", 2))
TEXT = InputSpec("file", np.dtype(object), ("N",))
HALF = InputSpec("a/b", np.dtype(ml_dtypes.bfloat16), ("N", 2))


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


class Reader:
    """A calibration reader that cannot be rewound."""

    def __init__(self, count: int) -> None:
        self.items = iter([{"x": np.full((1, 2), number, np.float32)} for number in range(count)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.items, None)


def numbers(dataset: object) -> list[float]:
    return [item.sample["x"][0, 0] for item in dataset]  # type: ignore[attr-defined]


def test_once_is_any_number_of_times() -> None:
    dataset = open_dataset(Reader(5), [X])
    assert numbers(dataset) == numbers(dataset) == [0, 1, 2, 3, 4]
    assert [item.index for item in dataset] == [0, 1, 2, 3, 4]


def test_an_iteration_given_up_half_way_loses_nothing() -> None:
    dataset = open_dataset(iter([{"x": np.full((2, 2), number, np.float32)} for number in range(3)]), [X])
    assert numbers(itertools.islice(dataset, 3)) == [0, 0, 1]
    first, second = iter(dataset), iter(dataset)
    assert numbers([next(first), next(first), next(second), next(first)]) == [0, 0, 0, 1]
    assert numbers(dataset) == [0, 0, 1, 1, 2, 2]


def test_parts_of_a_stream_are_disjoint_and_together_everything() -> None:
    dataset = open_dataset(Reader(20), [X], max_samples=15)
    used, held_back = dataset.split(0.2)
    assert sorted(numbers(used) + numbers(held_back)) == list(range(15))
    assert sorted(numbers(dataset.shard(0, 2)) + numbers(dataset.shard(1, 2))) == list(range(15))


def test_types_and_labels_survive() -> None:
    half = np.array([[1.5, -2]], ml_dtypes.bfloat16)
    feeds = {"x": np.ones((1, 2), np.float32), "file": np.array(["größer"], object), "a/b": half, "label": 3}
    dataset = open_dataset(iter([feeds]), [X, TEXT, HALF])
    for _ in range(2):
        (item,) = dataset
        assert item.label == 3
        assert item.sample["file"].dtype == object
        assert item.sample["file"].tolist() == ["größer"]
        assert item.sample["a/b"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(item.sample["a/b"], half)


def test_no_more_is_asked_for_than_is_wanted_and_nothing_stays_behind(temporary: Path) -> None:
    asked = []

    def endless() -> Iterator[dict[str, np.ndarray]]:
        for number in itertools.count():
            asked.append(number)
            yield {"x": np.full((1, 2), number, np.float32)}

    dataset = open_dataset(endless(), [X], max_samples=4)
    assert asked == []
    assert numbers(dataset) == numbers(dataset) == [0, 1, 2, 3]
    assert asked == [0, 1, 2, 3]
    (spool,) = temporary.iterdir()
    assert len(list(spool.iterdir())) == 4
    del dataset
    gc.collect()
    assert not list(temporary.iterdir())


def test_a_bad_item_is_named() -> None:
    dataset = open_dataset(iter([{"x": np.ones((1, 2), np.float32)}, 5]), [X])
    with pytest.raises(KfeError, match="item 1: expected a dict of input name to array, found int"):
        list(dataset)
