"""A model opened for work: normalised, fingerprinted, its layers found."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_kfe.errors import UsageError
from onnx_kfe.graph._io import ModelSource, fingerprint, load, source_name
from onnx_kfe.graph._layers import Layer, find_layers
from onnx_kfe.graph._normalize import normalize

if TYPE_CHECKING:
    from onnx_kfe.graph.groups import LayerCut

__all__ = ["Network", "open_network"]


@dataclass(frozen=True)
class Network:
    """A model and what every step needs to know of it.

    Attributes:
        name: What to call it in messages.
        model: The normalised model. Steps that change it work on a clone.
        fingerprint: Hash of the model as it was given.
        layers: Its linear nodes in graph order, those that were not selected marked with the reason.
        input_shapes: Shapes given for inputs with free axes.
        original: The model as it was given.
        whole: The network that this one was made from by removing channels; None where all are there.
        cuts: Which channels of the layers of `whole` are left, by layer name.
        shifts: What is added behind products ``[out]`` for the channels that went, by layer name.
    """

    name: str
    model: ir.Model
    fingerprint: str
    layers: list[Layer]
    input_shapes: dict[str, tuple[int, ...]]
    original: ir.Model = field(repr=False)
    whole: Network | None = field(default=None, repr=False)
    cuts: Mapping[str, LayerCut] = field(default_factory=dict, repr=False)
    shifts: Mapping[str, npt.NDArray[np.float64]] = field(default_factory=dict, repr=False)

    @property
    def prunable(self) -> list[Layer]:
        """The layers that can be replaced."""
        return [layer for layer in self.layers if layer.prunable]

    @property
    def unselected(self) -> dict[str, str]:
        """Reason by name of the layers that are left alone because the user said so."""
        return {layer.name: layer.reason for layer in self.layers if layer.reason in (_EXCLUDED, _NOT_INCLUDED)}

    def narrowed(
        self, model: ir.Model, cuts: Mapping[str, LayerCut], shifts: Mapping[str, npt.NDArray[np.float64]]
    ) -> Network:
        """The network of a model with fewer channels, whose nodes have the names that they had.

        Args:
            model: The model.
            cuts: Which channels of the layers are left.
            shifts: What is now added behind products, by layer name.
        """
        unselected = self.unselected
        layers = [
            dataclasses.replace(layer, reason=layer.reason or unselected.get(layer.name))
            for layer in find_layers(model, self.input_shapes)
        ]
        before = {name: shift[cuts[name].rows] for name, shift in self.shifts.items()}
        shifts = {name: np.add(before.get(name, 0.0), shifts.get(name, 0.0)) for name in (*before, *shifts)}
        if self.whole is not None:
            cuts = {name: cut.within(self.cuts[name]) for name, cut in cuts.items()}
        return dataclasses.replace(
            self, model=model, layers=layers, whole=self.whole or self, cuts=cuts, shifts=shifts
        )  # fmt: skip

    def reweighed(self, model: ir.Model) -> Network:
        """The network of a model with the same nodes and other weights."""
        reasons = {layer.name: layer.reason for layer in self.layers}
        layers = [
            dataclasses.replace(layer, reason=reasons.get(layer.name, layer.reason))
            for layer in find_layers(model, self.input_shapes)
        ]
        return dataclasses.replace(self, model=model, layers=layers)

    def with_input_shapes(self, input_shapes: Mapping[str, Sequence[int]]) -> Network:
        """The same network with costs counted at other input shapes."""
        given = {name: tuple(shape) for name, shape in input_shapes.items()}
        unselected = self.unselected
        layers = [
            dataclasses.replace(layer, reason=layer.reason or unselected.get(layer.name))
            for layer in find_layers(self.model, given)
        ]
        return dataclasses.replace(self, layers=layers, input_shapes=given)


_EXCLUDED = "excluded by --exclude"
_NOT_INCLUDED = "not selected by --include"


def open_network(
    source: ModelSource,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Network:
    """Load and normalise a model and find its layers.

    Args:
        source: A path, ``ModelProto`` or ``ir.Model``.
        input_shapes: Shapes of inputs with free axes.
        include: Patterns of node names; when given, only these layers are pruned.
        exclude: Patterns of node names to leave alone.

    Raises:
        KfeError: The model cannot be read.
        UsageError: A pattern that matches no layer.
    """
    original = load(source)
    model = normalize(original)
    layers = find_layers(model, input_shapes)
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(layer.name, pattern) for layer in layers):
                raise UsageError(f"{option} {pattern}: no layer has such a name; see onnx-kfe inspect")
    layers = [
        dataclasses.replace(layer, reason=layer.reason or _unselected(layer, include, exclude)) for layer in layers
    ]
    shapes = {name: tuple(shape) for name, shape in (input_shapes or {}).items()}
    return Network(source_name(source), model, fingerprint(original), layers, shapes, original)


def _unselected(layer: Layer, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    if include and not any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in include):
        return _NOT_INCLUDED
    return _EXCLUDED if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in exclude) else None
