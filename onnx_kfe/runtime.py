"""ONNX Runtime sessions: the one place that creates them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx

from onnx_kfe.errors import KfeError, UsageError

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = [
    "Mapped",
    "Serialized",
    "create_session",
    "default_threads",
    "feeds_for",
    "import_onnxruntime",
    "reason",
    "share_threads",
]

_FATAL_ONLY = 4  # what else ONNX Runtime would log comes as an exception too
_PREFIX = re.compile(r"^(\[ONNXRuntimeError\] : \d+ : \w+ : )?")


@dataclass(frozen=True)
class Mapped:
    """A model that is too large for one message, whose large constants are external data.

    Attributes:
        message: The model.
        folder: Folder of the files with the constants; None where all of them are in memory.
        constants: All of them by name; those in files are views of the mapped file, which take no memory.
        in_memory: Names of those that are in no file.
    """

    message: bytes = field(repr=False)
    folder: Path | None
    constants: dict[str, np.ndarray] = field(repr=False)
    in_memory: frozenset[str] = frozenset()

    def __len__(self) -> int:
        """Bytes of the message and the constants."""
        return len(self.message) + sum(array.nbytes for array in self.constants.values())

    def write(self, path: Path) -> None:
        """Write the model to `path`, and its constants to a file beside it."""
        data = path.with_name(f"{path.name}.data")
        proto = onnx.ModelProto.FromString(self.message)
        with data.open("wb") as file:
            for tensor in proto.graph.initializer:
                if (array := self.constants.get(tensor.name)) is not None:
                    del tensor.external_data[:]
                    for key, value in (("location", data.name), ("offset", file.tell()), ("length", array.nbytes)):
                        tensor.external_data.add(key=key, value=str(value))
                    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        path.write_bytes(proto.SerializeToString())


Serialized: TypeAlias = bytes | Mapped


def import_onnxruntime() -> Any:
    """Import ONNX Runtime, or say which extra brings it.

    Raises:
        KfeError: Neither onnxruntime nor onnxruntime-gpu is installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise KfeError(
            "ONNX Runtime is not installed: pip install 'onnx-kfe[cpu]' (or 'onnx-kfe[gpu]' for CUDA)"
        ) from error
    return onnxruntime


def default_threads() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def share_threads(threads: int | None) -> None:
    """Make a pool of intra-operator threads for all sessions of this process, before the first one.

    The threads of a session spin for a while after each run, so that those of several sessions in turn are in each
    other's way; with a pool in common a session runs among others as it does alone.
    """
    import_onnxruntime().set_global_thread_pool_sizes(threads or default_threads(), 1)


def create_session(
    model: Serialized | str | Path,
    *,
    providers: Sequence[str] = (),
    threads: int | None = None,
    optimize: bool = True,
    profile: Path | None = None,
    shared_threads: bool = False,
    spin: bool = True,
    prepack: bool = True,
) -> ort.InferenceSession:
    """Create an inference session.

    Args:
        model: Serialised model, or the path of one. The constants of a `Mapped` one are used where they are: all
            sessions of it share them, and none packs them anew for its kernels.
        providers: Execution providers in order of preference; CPU when empty.
        threads: Intra-operator threads; all cores when None.
        optimize: Whether ONNX Runtime may fuse and relayout the graph.
        profile: Path and beginning of the name of the file to which ``end_profiling`` writes what each node took.
        shared_threads: Whether the session takes the threads of `share_threads` instead of some of its own.
        spin: Whether threads wait for the next run in a loop, in the way of whatever else computes in between.
        prepack: Whether weights are copied into the order that is fastest to compute with.

    Raises:
        UsageError: A provider is not available here.
        KfeError: ONNX Runtime is missing or refuses the model.
    """
    runtime = import_onnxruntime()
    available = runtime.get_available_providers()
    if unknown := [p for p in providers if p not in available]:
        raise UsageError(
            f"execution provider {unknown[0]} is not available; --providers can be: {', '.join(available)}"
        )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or default_threads()
    options.log_severity_level = _FATAL_ONLY
    if not optimize:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if shared_threads:
        options.use_per_session_threads = False
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    constants = _take_constants(runtime, options, model) if isinstance(model, Mapped) else {}
    source = model.message if isinstance(model, Mapped) else str(model) if isinstance(model, Path) else model
    try:
        session = runtime.InferenceSession(source, options, providers=list(providers) or ["CPUExecutionProvider"])
        session.kfe_constants = constants  # which live as long as it does
        return session
    except Exception as error:
        raise KfeError(f"ONNX Runtime cannot load the model: {reason(error)}") from error


def _take_constants(runtime: Any, options: Any, model: Mapped) -> dict[str, Any]:
    """Have a session use constants where they are; returns what has to outlive it."""
    if model.folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.folder))
    values = {name: runtime.OrtValue.ortvalue_from_numpy(model.constants[name]) for name in model.in_memory}
    options.add_external_initializers(list(values), list(values.values()))  # or it would look for a file
    for name, value in values.items():
        options.add_initializer(name, value)  # or it would keep a copy
    options.add_session_config_entry("session.disable_prepacking", "1")
    return values


def feeds_for(session: Any, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a session takes of some arrays, in single precision where it is that of a copy of the model.

    Args:
        session: The session.
        arrays: Arrays by input name, in the element types of the original.
    """
    return {
        value.name: arrays[value.name].astype(np.float32, copy=False)
        if value.type == "tensor(float)"
        else arrays[value.name]
        for value in session.get_inputs()
    }


def reason(error: Exception) -> str:
    """The first line of what ONNX Runtime says, without its error codes."""
    lines = _PREFIX.sub("", str(error).strip()).splitlines()
    return lines[0].strip() if lines else type(error).__name__
