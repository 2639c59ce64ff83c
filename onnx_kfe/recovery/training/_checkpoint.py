"""A training run on disk, so that an interrupted one goes on where it was."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from onnx_kfe.errors import KfeError
from onnx_kfe.graph import replace_whole

__all__ = ["Checkpoint", "finishing_steps"]

_FILE = "state.safetensors"
Parts = dict[str, dict[str, Tensor]]


class Checkpoint:
    """A folder with the state of one run. The state of another run is ignored and in time replaced, as by the refit.

    Args:
        folder: The folder; None keeps nothing.
        key: What the run is: two runs of one key have the same result.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._folder = folder
        self._key = key

    @property
    def kept(self) -> bool:
        """Whether anything is kept."""
        return self._folder is not None

    @property
    def foreign(self) -> bool:
        """Whether the folder holds something that is no state of this run."""
        return self._folder is not None and (self._folder / _FILE).exists() and self.load() is None

    def check(self) -> None:
        """Check that there is a state of this run to go on from.

        Raises:
            KfeError: There is none, or that of another run.
        """
        if self.foreign:
            raise KfeError(f"--resume: the state in {self._folder} is of another model, other data or other options")
        if self.load() is None:
            raise KfeError(f"--resume: there is no state in {self._folder}: leave it out to start anew")

    def load(self) -> tuple[Parts, dict[str, Any]] | None:
        """Tensors by part and name, and plain values; None where there are none of this run."""
        if self._folder is None:
            return None
        try:
            with safetensors.safe_open(self._folder / _FILE, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self._key:
                    return None
                parts: Parts = {}
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    part, _, name = key.partition("/")
                    parts.setdefault(part, {})[name] = file.get_tensor(key)
        except (OSError, safetensors.SafetensorError):
            return None
        return parts, json.loads(metadata["state"])

    def save(self, parts: Parts, state: Mapping[str, Any]) -> None:
        """Keep the state, in place of what was kept before."""
        if self._folder is None:
            return
        self._folder.mkdir(exist_ok=True)
        flat = {f"{part}/{name}": tensor for part, values in parts.items() for name, tensor in values.items()}
        metadata = {"key": self._key, "state": json.dumps(state)}
        replace_whole(self._folder / _FILE, safetensors.torch.save(flat, metadata))

    def remove(self) -> None:
        """Remove the folder, when all is done."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.contextmanager
def finishing_steps() -> Iterator[threading.Event]:
    """Let Ctrl-C wait until the step is done; pressed again, it no longer waits.

    Yields:
        What is set by Ctrl-C.
    """
    interrupted = threading.Event()
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupted
        return

    def handle(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
