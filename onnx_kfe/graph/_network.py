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
    def twins(self) -> dict[str, str]:
        """The layer that another node with the same weight is pruned with, by name of that node."""
        return {twin.name: layer.name for layer in self.prunable for twin in layer.twins}

    @property
    def owners(self) -> list[Layer]:
        """The layers without the twins of others."""
        twins = self.twins
        return [layer for layer in self.layers if layer.name not in twins]

    @property
    def left_alone(self) -> dict[str, str]:
        """Reason by name of the layers that cannot be replaced."""
        return {layer.name: layer.reason for layer in self.owners if layer.reason is not None}

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
        layers = _left_out(find_layers(model, self.input_shapes), self.unselected)
        before = {name: shift[cuts[name].rows] for name, shift in self.shifts.items()}
        shifts = {name: np.add(before.get(name, 0.0), shifts.get(name, 0.0)) for name in (*before, *shifts)}
        if self.whole is not None:
            cuts = {name: cut.within(self.cuts[name]) for name, cut in cuts.items()}
        return dataclasses.replace(
            self, model=model, layers=layers, whole=self.whole or self, cuts=cuts, shifts=shifts
        )  # fmt: skip

    def reweighed(self, model: ir.Model) -> Network:
        """The network of a model with the same nodes and other weights."""
        layers = _left_out(find_layers(model, self.input_shapes), self.unselected)
        return dataclasses.replace(self, model=model, layers=layers)

    def with_input_shapes(self, input_shapes: Mapping[str, Sequence[int]]) -> Network:
        """The same network with costs counted at other input shapes."""
        given = {name: tuple(shape) for name, shape in input_shapes.items()}
        layers = _left_out(find_layers(self.model, given), self.unselected)
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
    reasons = {layer.name: reason for layer in layers if (reason := _unselected(layer, include, exclude)) is not None}
    layers = _left_out(layers, reasons)
    shapes = {name: tuple(shape) for name, shape in (input_shapes or {}).items()}
    return Network(source_name(source), model, fingerprint(original), layers, shapes, original)


def _unselected(layer: Layer, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Why the user left a layer out: by any of the nodes that are pruned as one."""

    def named(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(use.name, pattern) for use in layer.uses for pattern in patterns)

    if include and not named(include):
        return _NOT_INCLUDED
    return _EXCLUDED if named(exclude) else None


def _left_out(layers: Sequence[Layer], reasons: Mapping[str, str]) -> list[Layer]:
    """The layers, those marked that the user left out, with all nodes that are pruned as one."""
    parted = {use.name: reasons[layer.name] for layer in layers if layer.name in reasons for use in layer.twins}
    return [
        dataclasses.replace(
            layer,
            reason=parted.get(layer.name) or layer.reason or reasons.get(layer.name),
            twins=() if layer.name in reasons else layer.twins,
        )
        for layer in layers
    ]
