"""Activations in memory and on disk."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from onnx_kfe.errors import KfeError
from onnx_kfe.recovery._activations import Activations


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_is_beyond_the_memory_goes_to_disk_and_comes_back(folder: Path):
    arrays = [np.random.default_rng(n).standard_normal((10, 10)) for n in range(4)]
    with Activations(memory=2 * arrays[0].nbytes) as kept:
        for place, array in enumerate(arrays):
            kept.put(place, "x", array)
        assert len(list(folder.rglob("*.npy"))) == 2
        assert all(np.array_equal(kept.get(place, "x"), array) for place, array in enumerate(arrays))
        kept.drop(0, "x")
        kept.drop(3, "x")
        assert len(list(folder.rglob("*.npy"))) == 1
        kept.put(4, "x", arrays[0])  # there is memory again
        assert len(list(folder.rglob("*.npy"))) == 1
    assert not list(folder.iterdir())


def test_a_full_disk_is_said_and_cleaned_up(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with Activations(memory=0) as kept:
        kept.put(0, "x", np.zeros(3))
        monkeypatch.setattr(np, "save", full)
        with pytest.raises(KfeError, match=r"No space left on device.*--memory"):
            kept.put(1, "x", np.zeros(3))
    assert not list(folder.iterdir())
