"""Samples that come only once, kept on disk so that they can be read again."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from onnx_kfe.calibration._inputs import InputSpec, Label, Sample
from onnx_kfe.calibration._source import Loader, Source
from onnx_kfe.errors import KfeError

__all__ = ["SpooledSource"]


class SpooledSource(Source):
    """Makes a source that can be read once one that can be read any number of times.

    A sample is written to a temporary folder when it is first asked for, and read from there ever after: no more is
    asked of the source than somebody wants, and memory holds one sample. The folder goes with this object, at the
    latest when the program ends.

    Args:
        source: The source.
        inputs: What the model takes.
    """

    def __init__(self, source: Source, inputs: Sequence[InputSpec]) -> None:
        self._source = source
        self._inputs = inputs
        self._pending = source.loaders()
        self._kept = 0
        self._folder = Path(tempfile.mkdtemp(prefix="onnx-kfe-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def loaders(self) -> Iterator[Loader]:
        """Yield the loaders of the samples kept, then of those still to come."""
        number = 0
        while number < self._kept or self._keep_next():
            yield partial(self._load, number)
            number += 1

    def _keep_next(self) -> bool:
        loader = next(self._pending, None)
        if loader is None:
            return False
        sample, label = loader()
        arrays = [sample[spec.name] for spec in self._inputs] + ([] if label is None else [label])
        try:
            # Objects would be pickled: text goes as text of a fixed width.
            np.savez(self._path(self._kept), *(a.astype(str) if a.dtype.hasobject else a for a in arrays))
        except OSError as error:
            raise KfeError(f"{self.describe()}: cannot be kept in {self._folder}: {error.strerror}") from error
        self._kept += 1
        return True

    def _load(self, number: int) -> tuple[Sample, Label | None]:
        with np.load(self._path(number), allow_pickle=False) as archive:
            arrays = list(archive.values())
        sample = {spec.name: _typed(array, spec.dtype) for spec, array in zip(self._inputs, arrays, strict=False)}
        return sample, arrays[-1] if len(arrays) > len(self._inputs) else None

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.npz"

    def describe(self) -> str:
        """Describe the source."""
        return self._source.describe()


def _typed(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The element type that a file cannot hold: bfloat16 comes back as bytes, text as fixed-width text."""
    return array.view(dtype) if array.dtype.kind == "V" else array.astype(dtype, copy=False)
