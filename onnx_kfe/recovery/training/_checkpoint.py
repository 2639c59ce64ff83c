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
from torch import Tensor, optim

from onnx_kfe.graph import replace_whole

__all__ = ["Checkpoint", "finishing_steps", "load_moments", "moments"]

_FILE = "state.safetensors"


class Checkpoint:
    """A folder with the state of one run. That of another run is ignored, and overwritten.

    Args:
        folder: The folder; None keeps nothing.
        key: What the run is: two runs of one key have the same result.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._folder = folder
        self._key = key

    @property
    def kept(self) -> bool:
        """Whether there is a folder."""
        return self._folder is not None

    @property
    def foreign(self) -> bool:
        """Whether the folder holds the state of another run."""
        return self._folder is not None and (self._folder / _FILE).exists() and self.load() is None

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and plain values of the state; None where there is none of this run."""
        if self._folder is None:
            return None
        try:
            with safetensors.safe_open(self._folder / _FILE, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self._key:
                    return None
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, safetensors.SafetensorError):
            return None
        return found, json.loads(metadata["state"])

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Keep the state, in place of what was kept before."""
        if self._folder is None:
            return
        self._folder.mkdir(exist_ok=True)
        metadata = {"key": self._key, "state": json.dumps(state)}
        replace_whole(self._folder / _FILE, safetensors.torch.save(dict(tensors), metadata))

    def remove(self) -> None:
        """Remove the folder, when all is done."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def moments(optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer remembers, by number of the parameter and name."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}/{name}": value.detach().to("cpu", copy=True).contiguous()
        for number, values in state.items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def load_moments(optimizer: optim.Optimizer, values: Mapping[str, Tensor]) -> None:
    """Give an optimizer what `moments` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in values.items():
        number, _, name = key.partition("/")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


@contextlib.contextmanager
def finishing_steps() -> Iterator[threading.Event]:
    """Let Ctrl-C wait until the step is done; pressed again, it no longer waits.

    Yields:
        What is set by Ctrl-C.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def handle(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, earlier)

    earlier = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, earlier)
