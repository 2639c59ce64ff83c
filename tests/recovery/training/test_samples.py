"""Samples by place: the same from memory and from disk, and labels checked before they are used."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_kfe.calibration import Dataset, InputSpec, open_dataset
from onnx_kfe.errors import KfeError
from onnx_kfe.evaluation import HeadSpec
from onnx_kfe.recovery.training._samples import Samples, check_labels

SPEC = InputSpec("x", np.dtype(np.float32), ("N", 3))
VALUES = np.arange(30, dtype=np.float32).reshape(10, 3)
HEAD = HeadSpec("y", "categorical")


def dataset(**arrays: np.ndarray) -> Dataset:
    return open_dataset({"x": VALUES, **arrays}, [SPEC])


@pytest.mark.parametrize("memory", [0, 5 * 12, 1 << 20])
def test_any_order_from_memory_or_disk(memory: int) -> None:
    with Samples(dataset(labels=np.arange(10)), memory) as samples:
        assert len(samples) == 10
        for place in (7, 0, 9, 7, 3):
            item = samples[place]
            np.testing.assert_array_equal(item.sample["x"], VALUES[place : place + 1])
            assert item.index == place
            assert item.label == place
        assert [item.index for item in samples] == list(range(10))


def test_the_digest_tells_data_apart() -> None:
    with Samples(dataset(), 0) as first, Samples(dataset(), 1 << 20) as second:
        assert first.digest == second.digest
    with Samples(open_dataset({"x": VALUES + 1}, [SPEC]), 0) as third:
        assert third.digest != first.digest


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(10) - 1, "sample 0: label -1 is no class of output 'y', which has 9"),
        (np.arange(10), "sample 9: label 9 is no class"),
        (np.zeros(10, np.float32), "takes 1 integer label"),
        (np.zeros((10, 2), np.int64), "takes 1 integer label"),
    ],
)
def test_labels_that_are_no_classes(labels: np.ndarray, message: str) -> None:
    with Samples(dataset(labels=labels), 0) as samples, pytest.raises(KfeError, match=message):
        check_labels(samples, HEAD, np.zeros((1, 9)))


def test_labels_of_positions_and_no_labels() -> None:
    with Samples(dataset(labels=np.zeros((10, 4), np.int64)), 0) as samples:
        check_labels(samples, HEAD, np.zeros((1, 4, 9)))
    with Samples(dataset(), 0) as samples, pytest.raises(KfeError, match="these samples have none"):
        check_labels(samples, HEAD, np.zeros((1, 9)))
