"""The layers that a refit has solved, on disk, so that an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from onnx_kfe.calibration import Statistics
from onnx_kfe.graph import Layer, replace_whole
from onnx_kfe.planning import Plan, Stage
from onnx_kfe.rewrite import Chain

__all__ = ["Checkpoint"]


class Checkpoint:
    """A folder with one file for each solved layer. Files of another plan or other statistics are ignored.

    Args:
        folder: The folder; None keeps nothing.
        plan: What is refitted.
        statistics: What it was planned from.
    """

    def __init__(self, folder: Path | None, plan: Plan, statistics: Statistics) -> None:
        self._folder = folder
        identity = json.dumps([plan.as_dict(), statistics.seed, statistics.samples], sort_keys=True)
        self._key = hashlib.sha256(identity.encode()).hexdigest()

    def load(self, layer: Layer) -> Chain | None:
        """What a layer was solved to; None when it was not."""
        path = self._path(layer)
        if path is None or not path.is_file():
            return None
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except safetensors.SafetensorError:
            return None
        if metadata.get("key") != self._key:
            return None
        stages = [Stage(tensors[str(n)], tuple(axes)) for n, axes in enumerate(json.loads(metadata["axes"]))]
        return Chain(layer, metadata["form"], stages, tensors["bias"])

    def save(self, chain: Chain) -> None:
        """Keep a solved layer."""
        path = self._path(chain.layer)
        if path is None:
            return
        path.parent.mkdir(exist_ok=True)
        tensors = {str(place): np.ascontiguousarray(stage.weight) for place, stage in enumerate(chain.stages)}
        axes = json.dumps([stage.axes for stage in chain.stages])
        metadata = {"key": self._key, "form": chain.form, "axes": axes}
        replace_whole(path, safetensors.numpy.save({**tensors, "bias": chain.bias}, metadata))

    def remove(self) -> None:
        """Remove the folder, when all is done."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, layer: Layer) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / f"{hashlib.sha256(layer.name.encode()).hexdigest()[:16]}.safetensors"
