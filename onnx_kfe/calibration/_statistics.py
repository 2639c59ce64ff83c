"""The statistics of a collection: the sums of its layers with what they are sums of, saved, loaded and merged."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_kfe
from onnx_kfe.calibration._heads import Head
from onnx_kfe.calibration._layer_statistics import LayerStatistics, PositionMeans
from onnx_kfe.calibration._tensor_file import map_tensors, write_tensors
from onnx_kfe.errors import KfeError, UsageError
from onnx_kfe.kfe import Array, EigenMoments

__all__ = ["Statistics", "merge"]

_FORMAT = "onnx-kfe statistics 1"
_OTHER = ("samples", "common", "eigen")  # fields that are no tensors of their own


@dataclass
class Statistics:
    """K-FAC statistics of a model over calibration data.

    Attributes:
        model_hash: Fingerprint of the model they belong to.
        seed: Seed of noise and positions.
        samples: Number of samples summed over.
        heads: The heads, with their scales.
        input_shapes: Shape of one typical sample for each input.
        layers: Sums by layer name.
        skipped: Reason by layer name for the layers without statistics.
        shards: Shards that are in it, as ``(index, count)``; ``(0, 1)`` is a whole collection.
        versions: Versions of what computed them.
        loss: Fingerprint of the loss that was differentiated in the place of the heads; None for the heads.
    """

    model_hash: str
    seed: int
    samples: int
    heads: list[Head]
    input_shapes: dict[str, tuple[int, ...]]
    layers: dict[str, LayerStatistics]
    skipped: dict[str, str] = field(default_factory=dict)
    shards: list[tuple[int, int]] = field(default_factory=lambda: [(0, 1)])
    versions: dict[str, str] = field(default_factory=lambda: {"onnx-kfe": onnx_kfe.__version__})
    loss: str | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as safetensors, sums in float64, whole or not at all."""
        tensors = {
            f"{name}/{key}": array for name, layer in self.layers.items() for key, array in _tensors(layer).items()
        }
        header = {
            "model_hash": self.model_hash, "seed": self.seed, "samples": self.samples,
            "heads": [dataclasses.asdict(head) for head in self.heads], "input_shapes": self.input_shapes,
            "layers": {name: layer.samples for name, layer in self.layers.items()}, "skipped": self.skipped,
            "shards": self.shards, "versions": self.versions, "loss": self.loss,
        }  # fmt: skip
        metadata = {"format": _FORMAT, "statistics": json.dumps(header)}
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Open what `save` wrote: the sums lie in the file, which is read where they are used.

        Raises:
            KfeError: The file is missing or no statistics file.
        """
        if not Path(path).is_file():
            raise KfeError(f"{path}: no such file")
        try:
            tensors, metadata = map_tensors(path)
        except Exception as error:
            raise KfeError(f"{path}: not a statistics file, or a truncated one") from error
        if metadata.get("format") != _FORMAT:
            raise KfeError(f"{path}: not a statistics file of this version; collect them again")
        try:
            return cls._from_parts(json.loads(metadata["statistics"]), tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise KfeError(f"{path}: a damaged statistics file; collect them again") from error

    def on_disk(self) -> Statistics:
        """The same with its sums in a temporary file, which goes with the last of them.

        Raises:
            KfeError: There is no space for it.
        """
        with tempfile.TemporaryDirectory(prefix="onnx-kfe-", ignore_cleanup_errors=True) as folder:
            path = Path(folder, "statistics.safetensors")
            self.save(path)
            return self.load(path)

    @classmethod
    def _from_parts(cls, header: dict[str, Any], tensors: Mapping[str, Array]) -> Statistics:
        layers = {}
        for name, samples in header["layers"].items():
            sums, common = (_read(kind, name, tensors) for kind in (LayerStatistics, PositionMeans))
            moments = _read(EigenMoments, name, tensors) if f"{name}/second_moment" in tensors else None
            layers[name] = LayerStatistics(
                **sums,
                samples=samples,
                common=PositionMeans(**common),
                eigen=None if moments is None else EigenMoments(**moments),
            )
        return cls(
            header["model_hash"], header["seed"], header["samples"], [Head(**head) for head in header["heads"]],
            {name: tuple(shape) for name, shape in header["input_shapes"].items()}, layers, header["skipped"],
            [(index, count) for index, count in header["shards"]], header["versions"],
            header.get("loss"),
        )  # fmt: skip

    def check_model(self, model_hash: str, name: str = "the model") -> None:
        """Raise unless the statistics were collected on this very model.

        Raises:
            KfeError: They belong to another model.
        """
        if self.model_hash != model_hash:
            raise KfeError(f"the statistics belong to another model than {name}: collect them again")

    def check_loss(self, fingerprint: str | None) -> None:
        """Raise unless this loss was differentiated, or the heads for None.

        Raises:
            UsageError: It was something else.
        """
        if self.loss != fingerprint:
            own = "the heads of the model" if self.loss is None else "another loss"
            raise UsageError(f"--loss: the statistics were collected with {own}: collect them again, or give that one")


def _tensors(layer: LayerStatistics) -> dict[str, Any]:
    fields = {**vars(layer), **vars(layer.common), **(vars(layer.eigen) if layer.eigen else {})}
    return {key: value for key, value in fields.items() if key not in _OTHER and value is not None}


def _read(kind: type, name: str, tensors: Mapping[str, Array]) -> dict[str, Any]:
    """The fields of a part of a layer's statistics; those that are None by default may be missing."""
    keys = {f.name: f"{name}/{f.name}" for f in dataclasses.fields(kind) if f.name not in _OTHER}
    optional = {f.name for f in dataclasses.fields(kind) if f.default is None}
    return {field: _number(tensors[key]) for field, key in keys.items() if key in tensors or field not in optional}


def _number(array: Array) -> Any:
    return array if array.ndim else array.item()


def merge(parts: Sequence[Statistics]) -> Statistics:
    """Add the shards of one collection; the result equals the single run up to rounding.

    Raises:
        KfeError: The parts differ in model, seed, heads or loss, or a shard is there twice.
    """
    if not parts:
        raise KfeError("nothing to merge")
    first = parts[0]
    for part in parts[1:]:
        for attribute in ("model_hash", "seed", "heads", "loss"):
            if getattr(part, attribute) != getattr(first, attribute):
                raise KfeError(f"cannot merge statistics with different {attribute.replace('_', ' ')}")
    shards = [shard for part in parts for shard in part.shards]
    if len(set(shards)) != len(shards) or len({count for _, count in shards}) != 1:
        raise KfeError(f"cannot merge shards {shards}: a shard is there twice, or they are of different divisions")
    layers: dict[str, LayerStatistics] = {}
    for part in parts:
        for name, layer in part.layers.items():
            layers[name] = layers[name] + layer if name in layers else layer
    skipped = {name: reason for part in parts for name, reason in part.skipped.items() if name not in layers}
    complete = len(shards) == shards[0][1]
    return dataclasses.replace(
        first, samples=sum(part.samples for part in parts), layers=layers, skipped=skipped,
        shards=[(0, 1)] if complete else sorted(shards),
    )  # fmt: skip
