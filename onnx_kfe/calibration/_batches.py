"""Samples gathered into batches for the runtime."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_kfe.calibration._data import Item
from onnx_kfe.calibration._inputs import InputSpec, Sample, batched_inputs, fixed_batch
from onnx_kfe.errors import UsageError

__all__ = ["Batch", "Batches", "batches"]


def _label_shape(item: Item) -> tuple[int, ...] | None:
    return None if item.label is None else item.label.shape


@dataclass(frozen=True)
class Batch:
    """Samples to be run together.

    Attributes:
        indices: The index of each sample in the whole data, shape ``[n]``, int64.
        feeds: Input name -> array; the batch axis, where there is one, has size ``n``.
        labels: The labels, shape ``[n, ...]``, or None if a sample has none.
    """

    indices: np.ndarray
    feeds: Sample
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def start(self) -> int:
        """The index of the first sample."""
        return int(self.indices[0])


class Batches(Iterator[Batch]):
    """The batches of some samples, each made when asked for.

    Attributes:
        dropped: Number of samples left out so far, because the model takes batches of one size only and they
            did not fill one.
    """

    def __init__(self, items: Iterable[Item], size: int, inputs: Sequence[InputSpec]) -> None:
        if size < 1:
            raise UsageError(f"the batch size must be at least 1, found {size}")
        self.dropped = 0
        self._inputs = tuple(inputs)
        self._batched = batched_inputs(inputs)
        self._exact = fixed_batch(inputs)
        # Without a batch axis on every input, samples cannot be told apart inside the model.
        self._size = self._exact or (size if len(self._batched) == len(self._inputs) else 1)
        self._batches = self._gather(items)

    def __next__(self) -> Batch:
        return next(self._batches)

    def _gather(self, items: Iterable[Item]) -> Iterator[Batch]:
        group: list[Item] = []
        for item in items:
            if group and not self._alike(group[0], item):
                yield from self._finish(group)
                group = []
            group.append(item)
            if len(group) == self._size:
                yield from self._finish(group)
                group = []
        yield from self._finish(group)

    def _alike(self, first: Item, item: Item) -> bool:
        """Whether two samples fit into one batch: equal shapes, and equal values where there is no batch axis."""
        if _label_shape(first) != _label_shape(item):
            return False
        return all(
            first.sample[name].shape == array.shape
            and (name in self._batched or np.array_equal(first.sample[name], array))
            for name, array in item.sample.items()
        )

    def _finish(self, group: list[Item]) -> Iterator[Batch]:
        if self._exact and len(group) < self._exact:
            self.dropped += len(group)
        elif group:
            feeds = {
                name: np.concatenate([item.sample[name] for item in group]) if name in self._batched else array
                for name, array in group[0].sample.items()
            }
            labels = (
                None if group[0].label is None else np.stack([item.label for item in group if item.label is not None])
            )
            yield Batch(np.array([item.index for item in group], np.int64), feeds, labels)


def batches(dataset: Iterable[Item], size: int, inputs: Sequence[InputSpec]) -> Batches:
    """Gather consecutive samples of equal shapes into batches, at most ``size`` together.

    A model with a fixed batch axis gets batches of exactly that size instead, and samples that do not fill one are
    dropped and counted in `Batches.dropped`. A model with an input that has no batch axis gets one sample at a time.

    Raises:
        UsageError: The size is below 1.
    """
    return Batches(dataset, size, inputs)
