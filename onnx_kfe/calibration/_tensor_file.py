"""Tensors in a file of the safetensors format, written one at a time and mapped, so that neither takes memory.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of a JSON header, little-endian; the
header, with type, shape and place of each tensor; their elements one after another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_kfe.graph import replace_whole
from onnx_kfe.kfe import Array

__all__ = ["map_tensors", "write_tensors"]

_ALIGNMENT = 8  # of the elements in the file, so that they can be used where they are
_METADATA = "__metadata__"
_DOUBLE = np.dtype("<f8")


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, npt.ArrayLike], metadata: Mapping[str, str]
) -> None:
    """Write tensors in float64, whole or not at all.

    Args:
        path: The file.
        tensors: By name; numbers are tensors without axes.
        metadata: Text that goes with them.

    Raises:
        UsageError: The folder does not exist or cannot be written.
        KfeError: Writing failed, for example for want of space.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + _DOUBLE.itemsize * np.size(tensor)
        header[name] = {"dtype": "F64", "shape": np.shape(tensor), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)

    def parts() -> Iterator[memoryview]:
        yield memoryview(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            yield np.ascontiguousarray(tensor, _DOUBLE).data

    replace_whole(path, parts())


def map_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors of a file as arrays that lie in it and are read when they are used, and its metadata.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is not of this format, truncated, or has tensors that are not float64.
    """
    whole = np.memmap(path, np.uint8, "r").view(np.ndarray)
    start = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    header = json.loads(whole[8:start].tobytes())
    if not isinstance(header, dict):
        raise ValueError("no header")
    metadata = header.pop(_METADATA, {})
    tensors = {name: _mapped(whole[start:], **entry) for name, entry in header.items()}
    if start + sum(tensor.nbytes for tensor in tensors.values()) != len(whole):
        raise ValueError("truncated")
    return tensors, metadata


def _mapped(elements: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> Array:
    if dtype != "F64":
        raise ValueError(f"a tensor of {dtype}")
    start, end = data_offsets
    return elements[start:end].view(_DOUBLE).reshape(shape)
