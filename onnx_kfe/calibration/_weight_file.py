"""Weights in a file that ONNX Runtime maps, rather than in every model that it is given and in every session."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import weakref
from pathlib import Path

import onnx_ir as ir

from onnx_kfe.errors import KfeError

__all__ = ["WeightFile"]

_SMALL = 2**16  # bytes of weights that stay in the model
_ALIGNMENT = 2**16  # of the others in the file: what any system maps at


class WeightFile:
    """The weights of a model in a temporary file, for all models that are made of it.

    The file goes with this object; sessions that were created before keep what they have mapped.

    Args:
        model: The model, whose large weights become references to the file.

    Raises:
        KfeError: There is no space for it.
    """

    def __init__(self, model: ir.Model) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="onnx-kfe-"))
        self._numbers = itertools.count()
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        try:
            ir.external_data.unload_from_model(
                model, self._folder, "weights", size_threshold_bytes=_SMALL, alignment=_ALIGNMENT
            )
        except OSError as error:
            raise KfeError(
                f"cannot keep weights in {self._folder} ({error.strerror or error}): free space there or set TMPDIR"
            ) from error

    def write(self, model: ir.Model) -> Path:
        """Write a model with these weights, without them, to a file that ONNX Runtime can load."""
        path = self._folder / f"{next(self._numbers)}.onnx"
        path.write_bytes(ir.to_proto(model).SerializeToString())
        return path
