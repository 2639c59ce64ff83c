"""Readers of samples made by code: iterables of dicts, ONNX Runtime calibration readers, functions."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

from onnx_kfe.calibration._inputs import InputSpec, Table, make_table, one_line
from onnx_kfe.calibration._source import Loader, Source, TableSource
from onnx_kfe.calibration._spool import SpooledSource
from onnx_kfe.errors import KfeError, UsageError

__all__ = [
    "StreamSource",
    "calls",
    "import_function",
    "is_function_name",
    "iterable_source",
    "list_source",
    "reader_source",
]

_FUNCTION_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class StreamSource(Source):
    """Samples that come one after the other from code, as dicts of input name to array.

    A dict may hold several samples along the batch axis, as calibration readers and data loaders give them: they are
    taken apart. Only one dict is held at a time.

    Args:
        name: What to call the stream in messages.
        begin: Starts the stream anew.
        inputs: What the model takes.
    """

    def __init__(self, name: str, begin: Callable[[], Iterator[object]], inputs: Sequence[InputSpec]) -> None:
        self._name = name
        self._begin = begin
        self._inputs = inputs

    def loaders(self) -> Iterator[Loader]:
        """Start the stream and yield the loaders of the samples of each dict."""
        for number, feeds in enumerate(self._begin()):
            table = _as_table(feeds, self._inputs, f"{self._name}, item {number}")
            for row in range(table.count):
                yield partial(table.load, row)

    def describe(self) -> str:
        """Describe the stream."""
        return f"samples from {self._name}"


def _as_table(feeds: object, inputs: Sequence[InputSpec], name: str) -> Table:
    if not isinstance(feeds, Mapping):
        raise KfeError(f"{name}: expected a dict of input name to array, found {type(feeds).__name__}")
    return make_table(feeds, inputs, name, stacked=False)


def list_source(items: Sequence[object], inputs: Sequence[InputSpec]) -> Source:
    """Dicts that are all in memory: their number is known and they are checked at once."""
    tables = [_as_table(feeds, inputs, f"the list, item {number}") for number, feeds in enumerate(items)]
    counts = [table.count for table in tables]
    return TableSource(f"list of {sum(counts)} samples", counts, tables.__getitem__)


def iterable_source(iterable: Iterable[object], inputs: Sequence[InputSpec]) -> Source:
    """Begin by ``iter``; a generator and its like, for which that works only once, is spooled."""
    source = StreamSource(type(iterable).__name__, lambda: iter(iterable), inputs)
    return SpooledSource(source, inputs) if iter(iterable) is iterable else source


def reader_source(reader: object, inputs: Sequence[InputSpec]) -> Source:
    """Begin a ``CalibrationDataReader``: it is rewound from the second time on, or spooled if it cannot be."""
    rewind = getattr(reader, "rewind", None)
    started = False

    def begin() -> Iterator[object]:
        nonlocal started
        if started and callable(rewind):
            rewind()
        started = True
        return iter(reader.get_next, None)  # type: ignore[attr-defined]

    source = StreamSource(type(reader).__name__, begin, inputs)
    return source if callable(rewind) else SpooledSource(source, inputs)


def calls(function: Callable[[], object], name: str) -> Callable[[], Iterator[object]]:
    """Begin by calling a function that returns an iterable or a calibration reader.

    What it raises becomes one line that names it.
    """

    def begin() -> Iterator[object]:
        try:
            items = function()
            if callable(next_feeds := getattr(items, "get_next", None)):
                items = iter(next_feeds, None)
            if not isinstance(items, Iterable) or isinstance(items, Mapping):
                raise KfeError(f"{name}: must yield dicts of input name to array, returned {type(items).__name__}")
            yield from items
        except KfeError:
            raise
        except Exception as error:
            raise KfeError(f"{name} raised {type(error).__name__}: {one_line(error)}") from error

    return begin


def is_function_name(text: str) -> bool:
    """Whether a text looks like ``package.module:function``."""
    return _FUNCTION_NAME.fullmatch(text) is not None


def import_function(name: str) -> Callable[..., object]:
    """Import ``package.module:function``, where the module may lie in the current directory.

    Raises:
        UsageError: The module cannot be imported or has no such function.
    """
    module_name, _, attribute = name.partition(":")
    if (here := os.getcwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        found: object = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module may raise anything while it is imported
        raise UsageError(f"{name}: cannot be imported: {type(error).__name__}: {one_line(error)}") from error
    if not callable(found):
        raise UsageError(f"{name}: is {type(found).__name__}, expected a function")
    return found
