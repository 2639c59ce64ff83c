"""Where samples come from: the interface of every reader."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from onnx_kfe.calibration._images import ImageOptions
from onnx_kfe.calibration._inputs import InputSpec, Label, Sample, Table

__all__ = ["Concatenation", "CorruptSample", "Loader", "Narrowed", "PathReader", "Request", "Source", "TableSource"]

Loader = Callable[[], tuple[Sample, Label | None]]
"""Reads one sample and its label when called: what is not wanted is never decoded."""


class CorruptSample(Exception):
    """This sample cannot be read, the others can. The message names it and says why."""


class Source(ABC):
    """Samples in a fixed order."""

    @abstractmethod
    def loaders(self) -> Iterator[Loader]:
        """Yield one loader a sample, from the first sample on, each to be called before the next is asked for."""

    @abstractmethod
    def describe(self) -> str:
        """Say in one line what the samples are and how they are prepared."""

    def count(self) -> int | None:
        """Return the number of samples, or None if only reading them all would tell."""
        return None

    def labels(self) -> Sequence[Label] | None:
        """Return the label of each sample, or None if there are none or only reading the samples would tell."""
        return None


class Concatenation(Source):
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = parts

    def loaders(self) -> Iterator[Loader]:
        """Yield the loaders of all parts."""
        return itertools.chain.from_iterable(part.loaders() for part in self.parts)

    def describe(self) -> str:
        """Describe the parts."""
        return "; ".join(part.describe() for part in self.parts)

    def count(self) -> int | None:
        """Return the number of samples of all parts together."""
        counts = [part.count() for part in self.parts]
        return None if None in counts else sum(count for count in counts if count is not None)

    def labels(self) -> Sequence[Label] | None:
        """Return the labels if every part has them."""
        labels = [part.labels() for part in self.parts]
        return None if None in labels else [label for part in labels if part is not None for label in part]


class Narrowed(Source):
    """The samples of another source with some of their arrays left out.

    Args:
        source: The other source.
        names: The arrays that stay.
    """

    def __init__(self, source: Source, names: Collection[str]) -> None:
        self._source = source
        self._names = names

    def loaders(self) -> Iterator[Loader]:
        """Yield the loaders of the samples."""
        return (partial(self._load, loader) for loader in self._source.loaders())

    def _load(self, loader: Loader) -> tuple[Sample, Label | None]:
        sample, label = loader()
        return {name: sample[name] for name in sample if name in self._names}, label

    def describe(self) -> str:
        """Describe the other source."""
        return self._source.describe()

    def count(self) -> int | None:
        """Return the number of samples of the other source."""
        return self._source.count()

    def labels(self) -> Sequence[Label] | None:
        """Return the labels of the other source."""
        return self._source.labels()


class TableSource(Source):
    """Samples that lie in tables, each opened when first needed.

    Args:
        description: What the samples are.
        counts: Number of samples of each table.
        open_table: Opens the table of a number.
    """

    def __init__(self, description: str, counts: Sequence[int], open_table: Callable[[int], Table]) -> None:
        self._description = description
        self._counts = counts
        self._open = open_table

    def loaders(self) -> Iterator[Loader]:
        """Yield the loaders of the rows of all tables."""
        for number, count in enumerate(self._counts):
            for row in range(count):
                yield partial(self._load, number, row)

    def _load(self, number: int, row: int) -> tuple[Sample, Label | None]:
        return self._open(number).load(row)

    def describe(self) -> str:
        """Describe the tables."""
        return self._description

    def count(self) -> int:
        """Return the number of rows."""
        return sum(self._counts)

    def labels(self) -> Sequence[Label] | None:
        """Return the labels if every table has them."""
        labels: list[Label] = []
        for number in range(len(self._counts)):
            table = self._open(number)
            if table.labels is None:
                return None
            labels.extend(table.labels)
        return labels


@dataclass(frozen=True)
class Request:
    """What a reader needs to know besides the path."""

    inputs: tuple[InputSpec, ...]
    images: ImageOptions | None = None
    labels: Path | None = None


@dataclass(frozen=True)
class PathReader:
    """A kind of file or folder that samples are read from.

    Attributes:
        kind: What to call it in messages.
        accepts: Whether an existing path is of this kind.
        open: Reads it; raises `KfeError` if it does not hold there what the model takes.
    """

    kind: str
    accepts: Callable[[Path], bool]
    open: Callable[[Path, Request], Source]
