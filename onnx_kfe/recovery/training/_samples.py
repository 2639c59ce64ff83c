"""The samples of a training run: read once, then in any order."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Self

import numpy as np

from onnx_kfe.calibration import Dataset, Item
from onnx_kfe.errors import KfeError
from onnx_kfe.recovery._activations import Activations

__all__ = ["Samples"]


class Samples:
    """The samples of a dataset by place. Use as a context manager: what went to disk is removed at the end.

    Args:
        data: The samples.
        memory: Bytes to keep in memory; samples beyond that go to a temporary folder.

    Raises:
        KfeError: There are none, or some have labels and some have none.
    """

    def __init__(self, data: Dataset, memory: int) -> None:
        self._kept = Activations(memory)
        self._indices: list[int] = []
        self.labels: list[np.ndarray] = []
        for place, item in enumerate(data):
            for name, array in item.sample.items():
                self._kept.put(place, name, array)
            self._names = list(item.sample)
            self._indices.append(item.index)
            if item.label is not None:
                self.labels.append(np.asarray(item.label))
        if not self._indices:
            raise KfeError(f"{data.describe()}: no samples")
        if self.labels and len(self.labels) < len(self):
            raise KfeError(f"{data.describe()}: some samples have labels and some have none: give all or none")

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> Item:
        if not 0 <= place < len(self):
            raise IndexError(place)
        sample = {name: self._kept.get(place, name) for name in self._names}
        return Item(self._indices[place], sample, self.labels[place] if self.labels else None)

    def __iter__(self) -> Iterator[Item]:
        return (self[place] for place in range(len(self)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept.__exit__(kind, error, trace)
