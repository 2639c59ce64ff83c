"""The statistics of a collection: sums that merge by adding, with what they are sums of."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

import onnx_kfe
from onnx_kfe.calibration._heads import Head
from onnx_kfe.errors import KfeError
from onnx_kfe.graph import replace_whole
from onnx_kfe.kfe import Array, centre, symmetrize

__all__ = ["LayerStatistics", "Statistics", "merge"]

_FORMAT = "onnx-kfe statistics 1"
_OTHER = ("samples", "common")  # fields that are no tensors of their own


@dataclass
class PositionMeans:
    """Sums over rows, one for each entry of the leading axis, of what is averaged over the positions of a row.

    K-FAC takes the positions of a sample for independent. Where they are not, as before a global average pooling that
    hands all of them one gradient, changes at all positions add up coherently, and the loss is larger than ``A (x) G``
    says, up to T times. Split input and cotangent into their mean over the positions and the deviations from it, which
    are taken for independent; with the shares ``rho`` of their variance that the means carry, the trace of the Fisher
    information is that of ``A (x) G`` times ``(1 - rho_A)(1 - rho_G) + T rho_A rho_G``: the deviations as in the
    `expand` setting, the means as in the `reduce` setting of Eschenhagen et al. (2023).

    Attributes:
        rows: Number of rows.
        input_mean: Sum of the means of the input, ``[c]``.
        input_mean_square: Sum of their squared norms.
        cotangent_mean_square: Sum of the squared norms of the means of the cotangent.
    """

    rows: float = 0.0
    input_mean: Array = field(default_factory=lambda: np.zeros(1))
    input_mean_square: float = 0.0
    cotangent_mean_square: float = 0.0

    def coherence(self, positions: float, input_variance: float, cotangent_square: float) -> float:
        """``(1 - rho_A)(1 - rho_G) + T rho_A rho_G``.

        Args:
            positions: Positions summed over.
            input_variance: Variance of the input over all positions, summed over channels.
            cotangent_square: Mean squared norm of the cotangent, the trace of G.
        """
        centre_square = float(np.square(self.input_mean / self.rows).sum())
        input_share = _share(self.input_mean_square / self.rows - centre_square, input_variance)
        cotangent_share = _share(self.cotangent_mean_square / self.rows, cotangent_square)
        independent = (1 - input_share) * (1 - cotangent_share)
        return independent + positions / self.rows * input_share * cotangent_share

    def cut(self, columns: np.ndarray, cotangent_share: float) -> PositionMeans:
        """The sums over fewer channels, taking the shares of the means for the same in all of them.

        Args:
            columns: Input channels kept, ``[c]``.
            cotangent_share: Share of the squared cotangents that is left.
        """
        kept, whole = (float(np.square(part).sum()) for part in (self.input_mean[columns], self.input_mean))
        share = kept / whole if whole > 0 else float(columns.mean())
        return PositionMeans(
            self.rows, self.input_mean[columns], self.input_mean_square * share,
            self.cotangent_mean_square * cotangent_share,
        )  # fmt: skip

    def __add__(self, other: PositionMeans) -> PositionMeans:
        return PositionMeans(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))


def _share(part: float, whole: float) -> float:
    return float(np.clip(part / whole, 0.0, 1.0)) if whole > 0 else 0.0


@dataclass
class LayerStatistics:
    """Sums over samples and positions of one layer; patches are channel-major, ``i = c * taps``.

    Attributes:
        input_second_moment: Sum of ``x x^T``, ``[groups, i, i]``.
        input_sum: Sum of x, ``[groups, i]``.
        cotangent_second_moment: Sum of ``g g^T``, ``[groups, o, o]`` with o the output channels of a group.
        positions: Number of positions summed over.
        samples: Number of samples N.
        common: What the positions of a sample have in common.
    """

    input_second_moment: Array
    input_sum: Array
    cotangent_second_moment: Array
    positions: float
    samples: int
    common: PositionMeans = field(default_factory=lambda: PositionMeans())

    @property
    def mean(self) -> Array:
        """mu, ``[groups, i]``, over samples and positions."""
        return self.input_sum / self.positions

    @property
    def input_factor(self) -> Array:
        """A, ``[groups, i, i]``: summed over positions, averaged over samples (`expand` setting)."""
        return symmetrize(self.input_second_moment / self.samples)

    @property
    def centred_input_factor(self) -> Array:
        """A less what the bias absorbs, ``A - T mu mu^T``."""
        return centre(self.input_factor, self.mean, self.positions / self.samples)

    @property
    def output_factor(self) -> Array:
        """G, ``[groups, o, o]``: averaged over samples and positions."""
        return symmetrize(self.cotangent_second_moment / self.positions)

    @property
    def coherence(self) -> float:
        """Trace of the Fisher information over that of ``A (x) G``, see `PositionMeans`."""
        if not self.common.rows:
            return 1.0
        variances = np.einsum("gii->gi", self.centred_input_factor).reshape(len(self.common.input_mean), -1)
        middle = variances[:, variances.shape[1] // 2]  # the tap that sees the least of the padding
        cotangent_square = np.einsum("gii->", self.output_factor)
        return self.common.coherence(
            self.positions, float(middle.sum()) * self.samples / self.positions, float(cotangent_square)
        )

    def cut(self, rows: np.ndarray, columns: np.ndarray) -> LayerStatistics:
        """The statistics of the layer with fewer channels, as long as what is left of it stays as it is.

        Args:
            rows: Output channels kept, ``[out]`` over all groups, as many in each.
            columns: Input channels kept, ``[in]`` over all groups, as many in each.
        """
        groups, outputs, _ = self.cotangent_second_moment.shape
        taps = groups * self.input_sum.shape[1] // len(columns)
        kept_rows = [np.flatnonzero(mask) for mask in rows.reshape(groups, outputs)]
        kept_columns = [np.flatnonzero(np.repeat(mask, taps)) for mask in columns.reshape(groups, -1)]
        inputs = [moment[np.ix_(k, k)] for moment, k in zip(self.input_second_moment, kept_columns, strict=True)]
        cotangents = [moment[np.ix_(k, k)] for moment, k in zip(self.cotangent_second_moment, kept_rows, strict=True)]
        sums = [total[k] for total, k in zip(self.input_sum, kept_columns, strict=True)]
        rest = dataclasses.replace(
            self, input_second_moment=np.stack(inputs), input_sum=np.stack(sums),
            cotangent_second_moment=np.stack(cotangents),
        )  # fmt: skip
        if self.common.rows:
            shares = (float(np.einsum("gii->", each)) for each in (rest.output_factor, self.output_factor))
            after, before = shares
            rest.common = self.common.cut(columns, after / max(before, np.finfo(np.float64).tiny))
        return rest

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        return LayerStatistics(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))


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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as safetensors, sums in float64, whole or not at all."""
        tensors = {
            f"{name}/{key}": np.array(array, np.float64, order="C")
            for name, layer in self.layers.items()
            for key, array in _tensors(layer).items()
        }
        header = {
            "model_hash": self.model_hash, "seed": self.seed, "samples": self.samples,
            "heads": [dataclasses.asdict(head) for head in self.heads], "input_shapes": self.input_shapes,
            "layers": {name: layer.samples for name, layer in self.layers.items()}, "skipped": self.skipped,
            "shards": self.shards, "versions": self.versions,
        }  # fmt: skip
        metadata = {"format": _FORMAT, "statistics": json.dumps(header)}
        replace_whole(path, safetensors.numpy.save(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Read what `save` wrote.

        Raises:
            KfeError: The file is missing or no statistics file.
        """
        if not Path(path).is_file():
            raise KfeError(f"{path}: no such file")
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except Exception as error:
            raise KfeError(f"{path}: not a statistics file, or a truncated one") from error
        if metadata.get("format") != _FORMAT:
            raise KfeError(f"{path}: not a statistics file of this version; collect them again")
        try:
            return cls._from_parts(json.loads(metadata["statistics"]), tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise KfeError(f"{path}: a damaged statistics file; collect them again") from error

    @classmethod
    def _from_parts(cls, header: dict[str, Any], tensors: Mapping[str, Array]) -> Statistics:
        layers = {}
        for name, samples in header["layers"].items():
            sums, common = (
                {f.name: _number(tensors[f"{name}/{f.name}"]) for f in dataclasses.fields(kind) if f.name not in _OTHER}
                for kind in (LayerStatistics, PositionMeans)
            )
            layers[name] = LayerStatistics(**sums, samples=samples, common=PositionMeans(**common))
        return cls(
            header["model_hash"], header["seed"], header["samples"], [Head(**head) for head in header["heads"]],
            {name: tuple(shape) for name, shape in header["input_shapes"].items()}, layers, header["skipped"],
            [(index, count) for index, count in header["shards"]], header["versions"],
        )  # fmt: skip

    def check_model(self, model_hash: str, name: str = "the model") -> None:
        """Raise unless the statistics were collected on this very model.

        Raises:
            KfeError: They belong to another model.
        """
        if self.model_hash != model_hash:
            raise KfeError(f"the statistics belong to another model than {name}: collect them again")


def _tensors(layer: LayerStatistics) -> dict[str, Any]:
    fields = {**vars(layer), **vars(layer.common)}
    return {key: value for key, value in fields.items() if key not in _OTHER}


def _number(array: Array) -> Any:
    return array if array.ndim else array.item()


def merge(parts: Sequence[Statistics]) -> Statistics:
    """Add the shards of one collection; the result equals the single run up to rounding.

    Raises:
        KfeError: The parts differ in model, seed or heads, or a shard is there twice.
    """
    if not parts:
        raise KfeError("nothing to merge")
    first = parts[0]
    for part in parts[1:]:
        for attribute in ("model_hash", "seed", "heads"):
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
