"""Reader of the test data that models are published with: ``test_data_set_0/input_0.pb``, ..."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx

from onnx_kfe.calibration._inputs import Table, make_table, one_line
from onnx_kfe.calibration._source import PathReader, Request, Source, TableSource
from onnx_kfe.errors import KfeError

__all__ = ["TEST_DATA"]


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """The entries of a folder that match a pattern, in the order of the number they end with."""
    return sorted(folder.glob(pattern), key=lambda path: int(re.sub(r"\D", "", path.stem) or 0))


def _sets(path: Path) -> list[Path]:
    folders = [path, *_numbered(path, "test_data_set_*")]
    return [folder for folder in folders if folder.is_dir() and any(folder.glob("input_*.pb"))]


def _open_test_data(path: Path, request: Request) -> Source:
    """Read serialised tensors, where the number in the file name is the position of the input."""
    folders = _sets(path)
    counts = [_read_set(folder, request).count for folder in folders]

    # The rows of a set are asked for one after the other.
    @lru_cache(maxsize=1)
    def open_set(number: int) -> Table:
        return _read_set(folders[number], request)

    return TableSource(f"{path}: {sum(counts)} samples in {len(folders)} test data sets, no labels", counts, open_set)


def _read_set(folder: Path, request: Request) -> Table:
    files = _numbered(folder, "input_*.pb")
    names = [spec.name for spec in request.inputs]
    if len(files) != len(names):
        raise KfeError(f"{folder}: {len(files)} input_*.pb, the model takes {len(names)} inputs ({', '.join(names)})")
    feeds = {name: _read_tensor(file) for name, file in zip(names, files, strict=True)}
    return make_table(feeds, request.inputs, str(folder), stacked=False)


def _read_tensor(path: Path) -> np.ndarray:
    try:
        return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))
    except Exception as error:  # damaged bytes surface as DecodeError, TypeError, ValueError or KeyError
        raise KfeError(f"{path}: cannot be read as a TensorProto: {one_line(error)}") from error


TEST_DATA = PathReader(
    "a folder of test_data_set_*/input_*.pb", lambda path: path.is_dir() and bool(_sets(path)), _open_test_data
)
