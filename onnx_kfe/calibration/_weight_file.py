"""Weights in a file that ONNX Runtime maps, rather than in every model that it is given and in every session."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from onnx_kfe.errors import KfeError
from onnx_kfe.runtime import create_session

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["WeightFile"]

_SMALL = 2**16  # bytes of weights that stay in the model
_ALIGNMENT = 2**16  # of the others in the file: what any system maps at
_MOST_PREPACKED = 2**28  # bytes of weights of which sessions keep copies in an order of their own, to be faster
_NAME = "weights"


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
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= _SMALL:  # or it would be closed under views
                value.const_value = ir.Tensor(tensor.numpy(), tensor.dtype, name=tensor.name)
        try:
            ir.external_data.unload_from_model(
                model, self._folder, _NAME, size_threshold_bytes=_SMALL, alignment=_ALIGNMENT
            )
        except OSError as error:
            raise KfeError(
                f"cannot keep weights in {self._folder} ({error.strerror or error}): free space there or set TMPDIR"
            ) from error

    def session(self, model: ir.Model, *, providers: Sequence[str], threads: int | None) -> ort.InferenceSession:
        """A session of a model with these weights; large ones are used where they lie, which takes no memory.

        Args:
            model: The model.
            providers: Execution providers, CPU when empty.
            threads: Threads, all cores when None.

        Raises:
            KfeError: ONNX Runtime refuses the model.
        """
        path = self._folder / "model.onnx"
        path.write_bytes(ir.to_proto(model).SerializeToString())
        size = (self._folder / _NAME).stat().st_size
        return create_session(path, providers=providers, threads=threads, prepack=size <= _MOST_PREPACKED)
