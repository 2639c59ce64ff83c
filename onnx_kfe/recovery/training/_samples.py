"""The samples of a training run: read once, then in any order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import numpy as np

from onnx_kfe.calibration import Dataset, Item
from onnx_kfe.errors import KfeError
from onnx_kfe.evaluation import HeadSpec
from onnx_kfe.recovery._activations import Activations

__all__ = ["Samples", "check_labels"]


class Samples:
    """The samples of a dataset by place. Use as a context manager: what went to disk is removed at the end.

    Attributes:
        labels: The labels, empty where there are none.
        digest: A hash of the inputs.

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
        digest = hashlib.sha256()
        for place, item in enumerate(data):
            for name, array in item.sample.items():
                self._kept.put(place, name, array)
                digest.update(np.ascontiguousarray(array).data)
            self._names = list(item.sample)
            self._indices.append(item.index)
            if item.label is not None:
                self.labels.append(np.asarray(item.label))
        self.digest = digest.hexdigest()
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


def check_labels(samples: Samples, head: HeadSpec, output: np.ndarray) -> None:
    """Check that there are labels and that they are classes of a categorical output.

    Args:
        samples: The samples.
        head: How the output is read.
        output: The output for the first of them.

    Raises:
        KfeError: There are none, they are no integers, not one for each position, or no classes.
    """
    if not samples.labels:
        raise KfeError("--label-share needs labels: these samples have none")
    _, positions, classes = head.rows(output).shape
    for place, label in enumerate(samples.labels):
        if label.dtype.kind not in "iu" or label.size != positions:
            raise KfeError(
                f"sample {place}: output '{head.name}' takes {positions} integer label(s), "
                f"not {label.dtype} {list(label.shape)}"
            )
        if label.min() < 0 or label.max() >= classes:
            wrong = label.min() if label.min() < 0 else label.max()
            raise KfeError(f"sample {place}: label {wrong} is no class of output '{head.name}', which has {classes}")
