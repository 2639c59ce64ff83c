"""Readers of arrays: ``.npz``, ``.npy``, a dict of arrays, one array."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from onnx_kfe.calibration._inputs import InputSpec, make_table, one_line
from onnx_kfe.calibration._source import PathReader, Request, Source, TableSource
from onnx_kfe.errors import KfeError, UsageError

__all__ = ["NPY", "NPZ", "array_source", "only_input"]

_Layout = tuple[tuple[int, ...], bool, np.dtype]  # shape, whether column-major, type of element
_LOCAL_HEADER_SIZE = 30  # of a zip member; the lengths of the name and of the extra field are its last four bytes


def array_source(arrays: Mapping[str, object], inputs: Sequence[InputSpec], name: str) -> Source:
    """Arrays whose first axis is the samples, by input name, perhaps with labels.

    Raises:
        KfeError: They do not fit the inputs, or hold no samples.
    """
    table = make_table(arrays, inputs, name, stacked=True)
    if table.count == 0:
        raise KfeError(f"{name}: no samples, the arrays are empty")
    shapes = ", ".join(f"{key} {list(array.shape[1:])}" for key, array in table.arrays.items())
    labels = "with labels" if table.labels is not None else "no labels"
    return TableSource(f"{name}: {table.count} samples of {shapes}, {labels}", [table.count], lambda _: table)


def only_input(inputs: Sequence[InputSpec], name: str, what: str) -> InputSpec:
    """Return the input of a model that has one.

    Raises:
        UsageError: The model has several, so it is not known which of them is meant.
    """
    if len(inputs) != 1:
        names = ", ".join(spec.name for spec in inputs)
        raise UsageError(
            f"{name}: {what} feeds one input and the model has {len(inputs)} ({names}); "
            "give an .npz whose keys are the input names, or a package.module:function"
        )
    return inputs[0]


def _open_npz(path: Path, request: Request) -> Source:
    """Read the members of an ``.npz`` by input name.

    Members stored as they are (``np.savez``) are memory-mapped, so memory does not grow with the file. Compressed
    ones (``np.savez_compressed``) can only be had by decompressing them once, as a whole, into memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            arrays = {key: _read_member(path, archive, info) for key, info in members.items()}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise KfeError(f"{path}: cannot be read as an .npz: {one_line(error)}") from error
    return array_source(arrays, request.inputs, str(path))


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as stream:
        if info.compress_type != zipfile.ZIP_STORED:
            return npy.read_array(stream, allow_pickle=False)
        layout = _read_header(stream)
        header_size = stream.tell()
    with path.open("rb") as raw:
        raw.seek(info.header_offset)
        name_size, extra_size = struct.unpack("<HH", raw.read(_LOCAL_HEADER_SIZE)[-4:])
    return _map(path, info.header_offset + _LOCAL_HEADER_SIZE + name_size + extra_size + header_size, layout)


def _read_header(stream: IO[bytes]) -> _Layout:
    version = npy.read_magic(stream)
    return npy.read_array_header_1_0(stream) if version == (1, 0) else npy.read_array_header_2_0(stream)


def _map(path: Path, offset: int, layout: _Layout) -> np.ndarray:
    shape, column_major, dtype = layout
    if dtype.hasobject:
        raise ValueError("it holds pickled Python objects, which are never loaded")
    if 0 in shape:  # nothing to map
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape, "F" if column_major else "C")


def _open_npy(path: Path, request: Request) -> Source:
    """Read a ``.npy``, memory-mapped, for a model with one input."""
    spec = only_input(request.inputs, str(path), "a .npy file")
    try:
        with path.open("rb") as stream:
            layout = _read_header(stream)
            array = _map(path, stream.tell(), layout)
    except (EOFError, OSError, ValueError) as error:
        raise KfeError(f"{path}: cannot be read as a .npy: {one_line(error)}") from error
    return array_source({spec.name: array}, request.inputs, str(path))


NPZ = PathReader(".npz", lambda path: path.suffix.lower() == ".npz" and path.is_file(), _open_npz)
NPY = PathReader(".npy", lambda path: path.suffix.lower() == ".npy" and path.is_file(), _open_npy)
