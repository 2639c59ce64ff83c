"""What the user has, as samples for a model: any number of times, in a fixed order, one at a time."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from onnx_kfe.calibration._images import ImageOptions
from onnx_kfe.calibration._inputs import InputSpec, Label, Sample
from onnx_kfe.calibration._readers_arrays import NPY, NPZ, array_source, only_input
from onnx_kfe.calibration._readers_images import IMAGES, ImageSource
from onnx_kfe.calibration._readers_streams import (
    StreamSource,
    calls,
    import_function,
    is_function_name,
    iterable_source,
    list_source,
    reader_source,
)
from onnx_kfe.calibration._readers_tensors import TEST_DATA
from onnx_kfe.calibration._source import Concatenation, CorruptSample, Narrowed, PathReader, Request, Source
from onnx_kfe.errors import KfeError, UsageError

__all__ = ["DataSource", "Dataset", "Item", "open_dataset"]

DataSource: TypeAlias = (
    str | os.PathLike[str] | np.ndarray | Mapping[str, Any] | Iterable[Any] | Callable[[], Iterable[Any]]
)
"""What `open_dataset` takes. A ``CalibrationDataReader`` need not be iterable: ``get_next`` is enough."""

_PATH_READERS: tuple[PathReader, ...] = (NPZ, NPY, TEST_DATA, IMAGES)
"""The first that accepts a path reads it; a new kind of file is one line here."""

_GOLDEN_RATIO = (5**0.5 - 1) / 2
_TOLERATED_CORRUPT = 0.01
_LISTED_CORRUPT = 5

T = TypeVar("T")
Stage = Callable[[Iterator[tuple[int, Any]]], Iterator[tuple[int, Any]]]
"""Leaves out some of the (index, loader) pairs of a dataset."""


@dataclass(frozen=True, slots=True)
class Item:
    """One sample: its index in the whole data (shards and splits keep it), its inputs and its label."""

    index: int
    sample: Sample
    label: Label | None


class _Corrupt:
    """The unreadable samples met so far by a dataset and its subsets, out of a population known or counted."""

    def __init__(self, population: int | None) -> None:
        self.population = population
        self.reasons: dict[str, None] = {}  # in the order they were met, each once however often it is read
        self._seen = 0

    def add(self, reason: str) -> None:
        self.reasons[reason] = None
        if self.population is not None:
            self._check(self.population)

    def end(self, seen: int) -> None:
        """At the end of an iteration that looked at so many samples: decide where only that tells their number."""
        self._seen = max(self._seen, seen)
        if self.population is None:
            self._check(self._seen)

    def _check(self, population: int) -> None:
        if len(self.reasons) > _TOLERATED_CORRUPT * population:
            count, listed = len(self.reasons), "; ".join(list(self.reasons)[:_LISTED_CORRUPT])
            raise KfeError(
                f"{count} of {population} samples are corrupt, more than 1 %; repair or remove them: {listed}"
            )


class Dataset:
    """Samples for a model, read lazily: memory does not grow with their number.

    Iterating yields an `Item` for each sample and starts afresh each time; what comes only once, such as a generator,
    is spooled to disk. Subsets share the source and never read what they leave out.

    Corrupt images are left out and listed in `skipped`; more than 1 % of them raise `KfeError` as soon as that is
    certain.
    """

    def __init__(self, source: Source, stages: tuple[Stage, ...] = (), corrupt: _Corrupt | None = None) -> None:
        self._source = source
        self._stages = stages
        self._corrupt = corrupt or _Corrupt(self.count())

    def __iter__(self) -> Iterator[Item]:
        seen = 0
        for index, load in self._selected(self._numbered_loaders()):
            seen = index + 1
            try:
                sample, label = load()
            except CorruptSample as error:
                self._corrupt.add(str(error))
            else:
                yield Item(index, sample, label)
        self._corrupt.end(seen)

    def _numbered_loaders(self) -> Iterator[tuple[int, Any]]:
        index = -1
        for index, loader in enumerate(self._source.loaders()):
            yield index, loader
        if index < 0:
            raise KfeError(f"{self._source.describe()}: no samples")

    def _selected(self, pairs: Iterator[tuple[int, T]]) -> Iterator[tuple[int, T]]:
        for stage in self._stages:
            pairs = stage(pairs)
        return pairs

    def _subset(self, stage: Stage) -> Dataset:
        return Dataset(self._source, (*self._stages, stage), self._corrupt)

    def count(self) -> int | None:
        """Return the number of samples, corrupt ones included, or None if only reading them all would tell."""
        total = self._source.count()
        if total is None:
            return None
        return sum(1 for _ in self._selected((index, None) for index in range(total)))

    @property
    def labels(self) -> dict[int, Label] | None:
        """Label by sample index, or None if there are none or only reading the samples would tell."""
        labels = self._source.labels()
        return None if labels is None else dict(self._selected(enumerate(labels)))

    @property
    def skipped(self) -> list[str]:
        """The corrupt samples met so far, each named and with what is wrong with it."""
        return list(self._corrupt.reasons)

    def describe(self) -> str:
        """Say in one line what the samples are, how they are prepared and how many are used."""
        total, count = self._source.count(), self.count()
        used = "" if count == total else f" ({count} of {total} samples used)"
        return self._source.describe() + used

    def where(self, predicate: Callable[[int], bool]) -> Dataset:
        """Keep the samples whose index satisfies a predicate."""
        return self._subset(lambda pairs: (pair for pair in pairs if predicate(pair[0])))

    def only(self, names: Collection[str]) -> Dataset:
        """The same samples with no other arrays than these."""
        return Dataset(Narrowed(self._source, names), self._stages, self._corrupt)

    def take(self, max_samples: int) -> Dataset:
        """Keep at most so many samples, and number them anew from 0.

        They are spread evenly if the number of samples is known, because folders are sorted by class; of a stream
        they are the first, and no more than those are asked of it.

        Raises:
            UsageError: That would be none.
        """
        if max_samples < 1:
            raise UsageError(f"the number of samples to take must be at least 1, found {max_samples}")
        total = self.count()

        def taken(pairs: Iterator[tuple[int, T]]) -> Iterator[tuple[int, T]]:
            loaders = (loader for _, loader in pairs)
            if total is None:
                return enumerate(itertools.islice(loaders, max_samples))
            return enumerate(
                loader for place, loader in enumerate(loaders) if place * max_samples % total < max_samples
            )

        return self._subset(taken)

    def shard(self, number: int, shards: int) -> Dataset:
        """Keep every ``shards``-th sample from the ``number``-th on: the shards are disjoint and together everything.

        Raises:
            UsageError: There is no shard of that number.
        """
        if not 0 <= number < shards:
            raise UsageError(f"shard {number} of {shards}: shards are numbered from 0 to {shards - 1}")
        return self._subset(lambda pairs: itertools.islice(pairs, number, None, shards))

    def split(self, held_back: float) -> tuple[Dataset, Dataset]:
        """Divide into a part for the statistics and a part held back from them.

        Which samples are held back depends on nothing but their place. The places are those of a golden ratio
        sequence: any fraction, evenly spread, and not in step with data that goes through its classes in turn.

        Args:
            held_back: The fraction to hold back, at most a half.

        Raises:
            UsageError: The fraction is out of range, or there is only one sample.
        """
        if not 0 < held_back <= 0.5:
            raise UsageError(f"the fraction to hold back must be above 0 and at most 0.5, found {held_back}")
        if self.count() == 1:
            raise UsageError("one sample cannot be split into statistics and held-back samples; give at least two")

        def part(held: bool) -> Dataset:
            return self._subset(
                lambda pairs: (
                    pair for place, pair in enumerate(pairs) if (place * _GOLDEN_RATIO % 1 < held_back) == held
                )
            )

        return part(False), part(True)


def open_dataset(
    source: DataSource | Dataset,
    inputs: Sequence[InputSpec],
    *,
    images: ImageOptions | None = None,
    labels: str | os.PathLike[str] | None = None,
    max_samples: int | None = None,
) -> Dataset:
    """Open the user's data as samples for a model.

    Args:
        source: A path, or a list of paths to be read one after the other: a folder of images, an ``.npz`` keyed by
            input name, a ``.npy`` for the only input, a folder of ``test_data_set_*/input_*.pb``, or the text
            ``package.module:function``. Or a dict of arrays whose first axis is the samples, one such array for the
            only input, dicts of input name to array in any iterable, a function that returns one, a
            ``CalibrationDataReader``, or a `Dataset` as it is.
        inputs: What the model takes.
        images: How images become inputs; `default_image_options` when None.
        labels: CSV of ``file,label`` for a folder of images.
        max_samples: Use at most so many samples, see `Dataset.take`.

    Raises:
        UsageError: A path does not exist, a function cannot be imported, or an option does not apply to this data.
        KfeError: The data does not fit the model, or there is none.
    """
    request = Request(tuple(inputs), images, None if labels is None else Path(labels))
    dataset = source if isinstance(source, Dataset) else Dataset(_open(source, request))
    if dataset.count() == 0:
        raise KfeError(f"{dataset.describe()}: no samples")
    if (images or labels) and not _has_images(dataset._source):
        raise UsageError("image options and a file of labels apply to folders of images, and the data holds none")
    if max_samples is None:
        return dataset
    taken = dataset.take(max_samples)
    taken._corrupt = _Corrupt(taken.count())  # from here on these are all the data
    return taken


def _open(source: Any, request: Request) -> Source:
    if isinstance(source, (str, os.PathLike)):
        return _open_name(source, request)
    if isinstance(source, np.ndarray):
        spec = only_input(request.inputs, "the array", "one array")
        return array_source({spec.name: source}, request.inputs, "the array")
    if isinstance(source, Mapping):
        return array_source(source, request.inputs, "the arrays")
    if callable(getattr(source, "get_next", None)):
        return reader_source(source, request.inputs)
    if isinstance(source, (list, tuple)):
        if source and all(isinstance(part, (str, os.PathLike)) for part in source):
            parts = [_open_name(part, request) for part in source]
            return parts[0] if len(parts) == 1 else Concatenation(parts)
        return list_source(source, request.inputs)
    if isinstance(source, Iterable):
        return iterable_source(source, request.inputs)
    if callable(source):
        name = getattr(source, "__qualname__", type(source).__name__)
        return StreamSource(name, calls(source, name), request.inputs)
    raise UsageError(f"data of type {type(source).__name__} is not understood: give a path, arrays or dicts of arrays")


def _open_name(name: str | os.PathLike[str], request: Request) -> Source:
    path = Path(name)
    if isinstance(name, str) and is_function_name(name) and not path.exists():
        function = import_function(name)
        return StreamSource(name, calls(function, name), request.inputs)
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    for reader in _PATH_READERS:
        if reader.accepts(path):
            return reader.open(path, request)
    kinds = ", ".join(reader.kind for reader in _PATH_READERS)
    raise UsageError(f"{path}: not a kind of data this program reads; it reads {kinds}, or package.module:function")


def _has_images(source: Source) -> bool:
    parts = source.parts if isinstance(source, Concatenation) else [source]
    return any(isinstance(part, ImageSource) for part in parts)
