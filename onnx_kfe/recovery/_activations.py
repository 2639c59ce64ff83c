"""Activations kept between segments: in memory up to a budget, in a temporary folder beyond it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from onnx_kfe.errors import KfeError

__all__ = ["Activations"]


class Activations:
    """Arrays by batch and name. Use as a context manager: what was spilled is removed at the end.

    Args:
        memory: Bytes to keep in memory; arrays beyond it are written to a temporary folder.
    """

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._held = 0
        self._kept: dict[tuple[int, str], np.ndarray | Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._written = 0

    def put(self, batch: int, name: str, array: np.ndarray) -> None:
        """Keep an array.

        Raises:
            KfeError: The disk is full.
        """
        if self._held + array.nbytes <= self._memory:
            self._held += array.nbytes
            self._kept[batch, name] = array
        else:
            self._kept[batch, name] = self._spill(array)

    def get(self, batch: int, name: str) -> np.ndarray:
        """The array; what was spilled is mapped, not read."""
        kept = self._kept[batch, name]
        return np.load(kept, mmap_mode="r", allow_pickle=False) if isinstance(kept, Path) else kept

    def drop(self, batch: int, name: str) -> None:
        """Forget an array."""
        kept = self._kept.pop((batch, name), None)
        if isinstance(kept, Path):
            kept.unlink()
        elif kept is not None:
            self._held -= kept.nbytes

    def _spill(self, array: np.ndarray) -> Path:
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="onnx-kfe-")
            path = Path(self._folder.name) / f"{self._written}.npy"
            self._written += 1
            np.save(path, array, allow_pickle=False)
        except OSError as error:
            where = f"{tempfile.gettempdir()} ({error.strerror or error})"
            raise KfeError(
                f"cannot keep activations in {where}: free space there, set TMPDIR or raise --memory"
            ) from error
        return path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept.clear()
        if self._folder is not None:
            self._folder.cleanup()
